"""Draw samples from a trained SiT and write the ADM suite's `.npz`.

    torchrun --nproc_per_node=8 generate.py --exp-path exps/my-run --train-steps 400000 --num-fid-samples 50000
    python generate.py --exp-path exps/my-run --num-fid-samples 64 --pproc-batch-size 64 --cfg-scale 2.5
    torchrun --nproc_per_node=8 generate.py --preset e2e-vavae-800ep-cfg

Sample number i depends on (--global-seed, i) alone: not on the batch size, the number of processes, or restarts. A
killed job, started again with the same flags, draws only what is missing.
"""

from configs.arguments import generate_arguments, generate_parser
from utils.checkpoint_files import require_trained

if __name__ == "__main__":  # --help, a mistyped flag and a missing run are answered before the heavy imports
    generate_parser().answer_before_imports(generate_arguments, check=require_trained)

import argparse
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from dataset.image_sources import require_size
from evaluation.evaluator import NEIGHBOUR, Evaluator
from evaluation.features import load_features
from evaluation.reference import read_reference, reference_images
from sampling.job import (
    SamplingJob,
    check_sampling_flags,
    output_name,
    precision_name,
    sampling_job,
    set_sampling_numerics,
)
from sampling.plan import plan_text
from sampling.presets import blaming_preset, preset_line, published_result, require_preset_run
from sampling.store import SampleStore
from sampling.trained import load_trained
from utils.background import ahead
from utils.distributed import from_main, launched_rank, launcher_notes, main_first, start_processes, together
from utils.errors import InputError, about, command, when_interrupted
from utils.files import write_json
from utils.images import image_grid, save_png

TRAJECTORIES = 8  # samples that --trajectory shows


@command
def main(argv: list[str] | None = None) -> None:
    args = generate_arguments(argv)
    if args.dry_run:
        if launched_rank() == 0:
            print(planned(args))
        return
    processes = start_processes()
    logging.basicConfig(level=logging.INFO if processes.is_main_process else logging.WARNING, format="%(message)s")
    logging.getLogger("timm").setLevel(logging.WARNING)
    set_sampling_numerics(args)
    for note in launcher_notes(mixed_precision=(args.precision, f"--precision {precision_name(args)}")):
        logging.info(note)

    # Load the run; what can be refused is refused before anything is written.
    with main_first(), blaming_preset(args):
        check_sampling_flags(args)
        check_evaluation_flags(args)
        require_preset_run(args)
        trained = load_trained(args.exp_path, args.train_steps, args.vae_ckpt, ema=args.ema)
        job = sampling_job(args, trained)
        store = open_store(args, output_name(args, trained, job.guide), trained.resolution)
        if processes.is_main_process:
            description, output = job.description(processes.device), output_options(args, store)
            if not args.overwrite:
                store.clear_finished(description)
            store.check(description, **output)
        network = feature_network(args, trained.resolution)
    published = published_result(args)
    if published is not None:
        logging.info(preset_line(published))
    evaluator = build_evaluator(args, network, trained.resolution, processes.device)
    with main_first():
        if processes.is_main_process:
            store.create(description, **output)
            for note in job.notes:
                logging.getLogger(__name__).warning(note)

    try:
        # Draw what is missing, by rank 0's word: another process may look only when the first batches are finished.
        missing = from_main(store.missing() if processes.is_main_process else None)
        job.to(processes.device)
        if args.compile:
            for sit in job.networks:
                sit.compile_blocks()  # a guidance interval makes two batch sizes: compiled for each
        going_on = "interrupted; the samples that are finished stay, and the same command draws the others"
        with together(), when_interrupted(lambda: going_on):
            speed = draw_missing(job, store, evaluator, missing, processes)

        # Measure, and give the result its names.
        results = None if evaluator is None else evaluator.result()
        if processes.is_main_process:
            record = description | job.record(processes) | speed | {"preset": published}
            if results is not None:
                given = {"reference": args.evaluate, "features": network.label}
                record["evaluation"] = given | {"notes": evaluator.reference.notes} | results
            finish(job, store, record)
        processes.wait_for_everyone()
    finally:
        store.release()
    processes.end_training()


def planned(args: argparse.Namespace) -> str:
    """What the job is and what it costs; no weights are read but the VAE's, and nothing is written."""
    with blaming_preset(args):
        check_sampling_flags(args)
        check_evaluation_flags(args)
        require_preset_run(args)
        trained = load_trained(args.exp_path, args.train_steps, args.vae_ckpt, ema=args.ema, by_shape=True)
        job = sampling_job(args, trained)
        store = open_store(args, output_name(args, trained, job.guide), trained.resolution)
        output = output_options(args, store)
        store.check(store.interrupted() or {}, **output)
    return plan_text(job, store, args.dry_run, output["extra_bytes"])


def draw_missing(
    job: SamplingJob, store: SampleStore, evaluator: Evaluator | None, missing: list[int], processes
) -> dict[str, float]:
    """This process's share of the batches, drawn or, if `--save-png` or `--evaluate` want them, read back.

    A batch is written and handed on here while a thread draws the next one.

    Returns:
        `drawn`: samples, by all processes; `seconds`; `images_per_second`: from the first batch's noise to the last
        one's mark on the disk, if all processes are as fast as this one (0 where it drew nothing): writing and
        `--evaluate` count where the drawing waits for them.
    """
    start, rank, world = time.perf_counter(), processes.process_index, processes.num_processes
    if job.args.save_png or evaluator is not None:
        finished = sorted(set(range(store.num_batches)) - set(missing))
        for batch in finished[rank::world]:
            hand_on(job.args, store, evaluator, store.read(batch), store.indices(batch))

    mine, left, began = missing[rank::world], threading.Event(), time.perf_counter()

    def begin(batch: int) -> Callable[[], np.ndarray]:
        return job.begin(store.padded_indices(batch), give_up)

    def give_up(*_) -> None:  # Ctrl-C need not wait for the whole batch
        if left.is_set():
            raise CancelledError

    with ahead(map(begin, mine), left) as begun:
        progress = tqdm(mine, disable=rank > 0, unit="batch", desc=store.target.stem)
        for batch, arrive in zip(progress, begun, strict=True):
            images = arrive()
            store.write(batch, images)
            hand_on(job.args, store, evaluator, images, store.indices(batch))
    drawn, drawing = sum(len(store.indices(batch)) for batch in mine), time.perf_counter() - began
    return {
        "drawn": sum(len(store.indices(batch)) for batch in missing),
        "seconds": time.perf_counter() - start,
        "images_per_second": world * drawn / drawing if drawn else 0.0,
    }


def hand_on(
    args: argparse.Namespace, store: SampleStore, evaluator: Evaluator | None, images: np.ndarray, indices: range
) -> None:
    """Finished images uint8 (B, H, W, 3) to whoever else wants them; without those that only fill up the last batch."""
    images = images[: len(indices)]
    if args.save_png:
        folder = png_folder(store)
        folder.mkdir(exist_ok=True)
        files = (folder / f"{i:06d}.png" for i in indices)
        with ThreadPoolExecutor() as pool:  # not one by one to the disk: a restart writes those of all batches again
            list(pool.map(lambda image, file: Image.fromarray(image).save(file), images, files))
    if evaluator is not None:
        evaluator.add(torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(indices))


def finish(job: SamplingJob, store: SampleStore, record: dict) -> None:
    """The contact sheet, the record of how the samples came about, and last the `.npz`: with it the job is done."""
    args, target = job.args, store.target
    target.unlink(missing_ok=True)  # an old result must not lie beside the new record; the samples are safe
    rows, columns = args.grid
    shown = store.images()[: rows * columns].transpose(0, 3, 1, 2)
    save_png(image_grid(shown, min(columns, store.count)), target.with_suffix(".png"))
    if args.trajectory:
        frames = job.trajectory(store.padded_indices(0), shown=min(TRAJECTORIES, store.count))
        save_png(image_grid(frames.flatten(0, 1), columns=frames.shape[1]), trajectory_file(store))
    write_json(target.with_suffix(".json"), record)
    store.finish(job.labels(range(store.count)).numpy())

    print(f"{target}: {store.count} samples, {record['drawn']} of them drawn now; {record['seconds']:.1f} s")
    for name, value in record.get("evaluation", {}).items():
        if name != "notes":  # they were said when the reference was read
            print(f"  {name:<32} {value if isinstance(value, str) else format(value, '.6g')}")


# What is written


def open_store(args: argparse.Namespace, name: str, resolution: int) -> SampleStore:
    target = Path(args.sample_dir) / f"{name}.npz"
    return SampleStore(target, count=args.num_fid_samples, resolution=resolution, batch_size=args.pproc_batch_size)


def png_folder(store: SampleStore) -> Path:
    return store.target.with_suffix("")


def trajectory_file(store: SampleStore) -> Path:
    return store.target.with_name(f"{store.target.stem}-trajectory.png")


def output_options(args: argparse.Namespace, store: SampleStore) -> dict:
    """What else than the `.npz` will be written, as `SampleStore.check` takes it."""
    others = [store.target.with_suffix(".json"), store.target.with_suffix(".png")]
    others += [trajectory_file(store)] if args.trajectory else []
    others += [png_folder(store)] if args.save_png else []
    return {"overwrite": args.overwrite, "others": others, "extra_bytes": math.prod(store.shape) * args.save_png}


# Evaluation in the same job


def check_evaluation_flags(args: argparse.Namespace) -> None:
    """Refuse what --evaluate and its companions cannot mean together."""
    inception = args.features == "inception"
    if args.evaluate is None:
        given = {
            "--features": not inception,
            "--enc-ckpt": args.enc_ckpt,
            "--inception-weights": args.inception_weights,
        }
        for flag in filter(given.get, given):
            raise InputError(f"{flag} goes with --evaluate REFERENCE, which was not given")
    elif args.num_fid_samples <= NEIGHBOUR:
        raise InputError(f"--num-fid-samples: {args.num_fid_samples} was given; --evaluate needs more than {NEIGHBOUR}")
    elif (args.enc_ckpt if inception else args.inception_weights) is not None:
        flag = "--enc-ckpt" if inception else "--inception-weights"
        raise InputError(f"{flag} was given, but --features {args.features} does not read it")


def feature_network(args: argparse.Namespace, resolution: int) -> nn.Module | None:
    """The network of --features, once it is clear that --evaluate names something of the samples' size."""
    if args.evaluate is None:
        return None
    size = (resolution, resolution)
    with about("--evaluate"):
        images = reference_images(args.evaluate)
        if images is not None:
            require_size(images, size, "the samples have")
    weights = args.inception_weights if args.features == "inception" else args.enc_ckpt
    return load_features(args.features, size, weights=weights)


def build_evaluator(
    args: argparse.Namespace, network: nn.Module | None, resolution: int, device: torch.device
) -> Evaluator | None:
    """The reference's features, by all processes together."""
    if network is None:
        return None
    network.to(device)
    with about("--evaluate"):
        return Evaluator(network, read_reference(args.evaluate, network, (resolution, resolution), device), device)


if __name__ == "__main__":
    main()
