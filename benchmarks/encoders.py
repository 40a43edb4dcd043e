"""Speed and memory of the frozen encoders, against timm's bare forward pass of the same network.

    python -m benchmarks.encoders --encoders dinov2-vit-b,mocov3-vit-b --batch-size 4

Weights are random: speed does not depend on them. The passes alternate and the fastest of --repeats rounds counts, as
other load only ever slows them down; on a CPU they are compared by processor time for the same reason. Peak memory is
that of a process of its own; on a CPU it includes torch itself.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable

import timm
import torch

from models.encoder_table import ENCODERS, EncoderSpec
from models.encoders import Encoder, build, public_encoder


def random_encoder(spec: EncoderSpec, resolution: int, depth: int | None) -> Encoder:
    network = build(spec, resolution, depth).to_empty(device="cpu")
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return public_encoder(spec, network, resolution)


def seconds(call: Callable, device: torch.device) -> tuple[float, float]:
    """Wall-clock seconds of a call, and the seconds to compare by: on a CPU those of the processor, else the same."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return wall, wall if device.type == "cuda" else processor


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Images per second of the encoder and of the bare network, and the share of preprocessing."""
    torch.set_num_threads(args.threads)
    device, spec = torch.device(args.device), ENCODERS[name]
    encoder = random_encoder(spec, args.resolution, args.depth).to(device)

    # The same network without anything of ours around it, on pixels that are ready.
    size = dict(img_size=encoder.input_size, depth=args.depth or spec.depth, num_heads=spec.heads)
    bare = timm.create_model(spec.timm_name, num_classes=0, **size).eval().to(device)
    bare.load_state_dict(encoder.network.state_dict())
    images = torch.randint(256, (args.batch_size, 3, args.resolution, args.resolution), dtype=torch.uint8).to(device)
    pixels = encoder.preprocess(images)
    if device.type == "cuda" and args.compile:
        encoder.compile_blocks()
        bare.forward_features = torch.compile(bare.forward_features)

    # Alternating, in an order that turns around, so that no call always comes after the same one.
    calls = {
        "encoder": lambda: encoder(images),
        "bare": lambda: bare.forward_features(pixels),
        "preprocessing": lambda: encoder.preprocess(images),
    }
    times = {key: [] for key in calls}
    half = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    with torch.no_grad(), half:
        for round_ in range(args.repeats + 1):
            for key in sorted(calls, reverse=round_ % 2 == 1):
                spent = seconds(calls[key], device)
                if round_:  # the first round warms up
                    times[key].append(spent)

    wall = {key: min(wall for wall, _ in rows) for key, rows in times.items()}
    work = {key: min(work for _, work in rows) for key, rows in times.items()}
    return {
        "images/s": args.batch_size / wall["encoder"],
        "bare images/s": args.batch_size / wall["bare"],
        "slower by %": 100 * (work["encoder"] / work["bare"] - 1),
        "preprocessing %": 100 * work["preprocessing"] / work["encoder"],
    }


def peak_memory(name: str, args: argparse.Namespace) -> float:
    """GB that the encoder alone takes for a batch: peak of the CUDA allocator, else of the process's resident size."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    encoder = random_encoder(ENCODERS[name], args.resolution, args.depth).to(device)
    images = torch.randint(256, (args.batch_size, 3, args.resolution, args.resolution), dtype=torch.uint8).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
        encoder(images)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", default=",".join(ENCODERS), help="comma list")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--depth", type=int, help="other number of blocks than the public network's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="under autocast")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="eager on CUDA")
    args = parser.parse_args(argv)

    columns = ("images/s", "bare images/s", "slower by %", "preprocessing %", "peak GB")
    print(f"{'encoder':<18}" + "".join(f"{column:>17}" for column in columns))
    context = multiprocessing.get_context("spawn")
    for name in args.encoders.split(","):
        with context.Pool(1, maxtasksperchild=1) as pool:
            row = pool.apply(measure, (name, args)) | {"peak GB": pool.apply(peak_memory, (name, args))}
        print(f"{name:<18}" + "".join(f"{row[column]:>17.2f}" for column in columns), flush=True)


if __name__ == "__main__":
    main()
