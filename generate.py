"""Draw samples from a trained SiT and write the ADM suite's `.npz`.

    torchrun --nproc_per_node=8 generate.py --exp-path exps/my-run --train-steps 400000 --num-fid-samples 50000
    python generate.py --exp-path exps/my-run --num-fid-samples 64 --pproc-batch-size 64 --cfg-scale 2.5

Sample number i depends on (--global-seed, i) alone: not on the batch size, the number of processes, or restarts. A
killed job, started again with the same flags, draws only what is missing.
"""

from configs.arguments import generate_parser

if __name__ == "__main__":  # --help and a mistyped flag answer before the heavy imports
    generate_parser().parse_args()

import hashlib
import json
import logging
import math
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dataset.image_sources import require_size
from evaluation.evaluator import NEIGHBOUR, Evaluator
from evaluation.features import load_features
from evaluation.reference import read_reference, reference_images
from models.vae_files import vae_sha256
from sampling.generation import AUTOCAST, SamplerConfig, draw_images, trajectory
from sampling.store import SampleStore
from sampling.trained import load_trained
from utils.distributed import from_main, main_first, start_processes, together
from utils.errors import InputError, about, command
from utils.files import sha256, write_json
from utils.images import image_grid, save_png
from utils.rng import sample_labels

# Options that the images do not depend on: an interrupted job may be taken up with others. (--train-steps and --tf32
# count through what they come to.)
FREE = (
    "exp_path",
    "train_steps",
    "sample_dir",
    "overwrite",
    "save_png",
    "grid",
    "trajectory",
    "evaluate",
    "features",
    "inception_weights",
    "enc_ckpt",
    "tf32",
)
TRAJECTORIES = 8  # samples that --trajectory shows


@command
def main(argv: list[str] | None = None) -> None:
    args = generate_parser().parse_args(argv)
    processes = start_processes()
    logging.basicConfig(level=logging.INFO if processes.is_main_process else logging.WARNING, format="%(message)s")
    logging.getLogger("timm").setLevel(logging.WARNING)
    set_numerics(args)

    # What can be refused is refused before anything is written.
    with main_first():
        check_flags(args)
        model = load_trained(args.exp_path, args.train_steps, args.vae_ckpt, ema=args.ema)
        config, labels = sampler_config(args, model), label_scheme(args, model.sit.num_classes)
        store = SampleStore(
            Path(args.sample_dir) / f"{output_name(args, model)}.npz",
            count=args.num_fid_samples,
            resolution=model.resolution,
            batch_size=args.pproc_batch_size,
        )
        if processes.is_main_process:
            job, output = describe_job(args, model, processes.device), output_options(args, store)
            store.check(job, **output)
        network = feature_network(args, model.resolution)
    evaluator = build_evaluator(args, network, model.resolution, processes.device)
    with main_first():
        if processes.is_main_process:
            store.create(job, **output)

    try:
        # Rank 0's word on what is missing: another process may look only when the first batches are finished.
        missing = from_main(store.missing() if processes.is_main_process else None)
        move_to(model, processes.device, compile=args.compile)
        with together():
            speed = draw_missing(args, store, model, config, labels, evaluator, missing, processes)
        results = None if evaluator is None else evaluator.result()
        if processes.is_main_process:
            record = job | run_record(args, model, config, labels, processes) | speed
            if results is not None:
                record["evaluation"] = {"reference": args.evaluate, "features": network.label, **results}
            finish(args, store, model, config, labels, record)
        processes.wait_for_everyone()
    finally:
        store.release()
    processes.end_training()


def draw_missing(
    args,
    store: SampleStore,
    model: SimpleNamespace,
    config: SamplerConfig,
    labels: "LabelScheme",
    evaluator: Evaluator | None,
    missing: list[int],
    processes,
) -> dict[str, float]:
    """This process's share of the batches, drawn or, if `--save-png` or `--evaluate` want them, read back.

    Returns:
        `drawn`: samples, by all processes; `seconds`; `images_per_second`: of sampling alone, if all processes are as
        fast as this one (0 where it drew nothing).
    """
    start, rank, world = time.perf_counter(), processes.process_index, processes.num_processes
    if args.save_png or evaluator is not None:
        finished = sorted(set(range(store.num_batches)) - set(missing))
        for batch in finished[rank::world]:
            hand_on(args, store, evaluator, store.read(batch), store.indices(batch))
    drawn, sampling = 0, 0.0
    for batch in tqdm(missing[rank::world], disable=rank > 0, unit="batch", desc=store.target.stem):
        began = time.perf_counter()
        images = sample_batch(model, config, labels, store.padded_indices(batch))
        drawn, sampling = drawn + len(store.indices(batch)), sampling + time.perf_counter() - began
        store.write(batch, images)
        hand_on(args, store, evaluator, images, store.indices(batch))
    return {
        "drawn": sum(len(store.indices(batch)) for batch in missing),
        "seconds": time.perf_counter() - start,
        "images_per_second": world * drawn / sampling if drawn else 0.0,
    }


# What is asked for


def set_numerics(args) -> None:
    """Equal shapes give equal bits; and --precision, or --tf32, for float32 code on CUDA."""
    allowed = args.tf32 if args.precision in (None, *AUTOCAST) else args.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def precision_name(args) -> str:
    return args.precision or ("tf32" if args.tf32 else "fp32")


def check_flags(args) -> None:
    """Refuse what cannot be meant, before anything is read."""
    if args.guidance_low >= args.guidance_high:
        raise InputError(
            f"--guidance-low: {args.guidance_low} was given; less than --guidance-high ({args.guidance_high}) is needed"
        )
    if args.mode == "sde" and args.heun:
        raise InputError("--heun goes with --mode ode, not with --mode sde")
    if args.mode == "sde" and args.num_steps < 2:
        raise InputError(f"--num-steps: {args.num_steps} was given; --mode sde needs at least 2")
    chosen = [f"--{name.replace('_', '-')}" for name in ("num_classes", "classes", "label_file") if getattr(args, name)]
    if len(chosen) > 1:
        raise InputError(f"{chosen[0]} and {chosen[1]} were both given; one is needed")
    if args.label_file and args.label_sampling == "equal":
        raise InputError("--label-sampling equal does not go with --label-file, which names the label of each sample")
    if args.evaluate is None:
        for flag, given in (
            ("--features", args.features != "inception"),
            ("--enc-ckpt", args.enc_ckpt),
            ("--inception-weights", args.inception_weights),
        ):
            if given:
                raise InputError(f"{flag} goes with --evaluate REFERENCE, which was not given")
    elif args.num_fid_samples <= NEIGHBOUR:
        raise InputError(f"--num-fid-samples: {args.num_fid_samples} was given; --evaluate needs more than {NEIGHBOUR}")
    elif (args.enc_ckpt if args.features == "inception" else args.inception_weights) is not None:
        flag = "--enc-ckpt" if args.features == "inception" else "--inception-weights"
        raise InputError(f"{flag} was given, but --features {args.features} does not read it")


def sampler_config(args, model: SimpleNamespace) -> SamplerConfig:
    if args.cfg_scale > 1 and model.sit.null_label is None:
        raise InputError(
            f"--cfg-scale: {args.cfg_scale} was given; 1 is needed by this model, which was trained "
            "without label dropping (--cfg-prob 0) and has no null label"
        )
    path_type = model.args.get("path_type", args.path_type)
    if args.mode == "sde" and path_type != args.path_type:  # along the ODE the velocity alone counts
        raise InputError(f"--path-type: {args.path_type} was given; this model was trained with {path_type}")
    return SamplerConfig(
        args.mode,
        args.heun,
        args.num_steps,
        path_type,
        args.cfg_scale,
        (args.guidance_low, args.guidance_high),
        precision_name(args),
    )


@dataclass(frozen=True)
class LabelScheme:
    """The label of every sample, which depends on the sample's own number and the seed alone.

    Attributes:
        name: "random": a uniform draw from `classes`; "equal": all of `classes` in turn; "file": `classes` is the list.
        classes: int64.
    """

    name: str
    classes: np.ndarray
    seed: int

    def __call__(self, indices: Sequence[int]) -> Tensor:
        """Labels (B,) int64 of these sample numbers."""
        if self.name == "random":
            return torch.from_numpy(self.classes)[sample_labels(self.seed, indices, len(self.classes))]
        # A file may end before the last batch, which is filled up, does.
        return torch.from_numpy(self.classes[np.asarray(indices) % len(self.classes)])


def label_scheme(args, num_classes: int) -> LabelScheme:
    """What --label-file, --classes, --num-classes and --label-sampling ask for, of a model with these classes."""
    name, flag, classes = args.label_sampling, "--num-classes", np.arange(args.num_classes or num_classes)
    if args.classes is not None:
        flag, parts = "--classes", args.classes.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise InputError(f"--classes: {args.classes!r} was given; whole numbers between commas are needed")
        classes = np.array([int(part) for part in parts])
        if len(set(classes)) < len(classes):
            raise InputError(f"--classes: {args.classes} names a class twice")
    if args.label_file is not None:
        name, flag, classes = "file", "--label-file", read_labels(args.label_file, args.num_fid_samples)
    if name == "equal" and args.num_fid_samples % len(classes):
        raise InputError(
            f"--label-sampling equal: {args.num_fid_samples} samples (--num-fid-samples) do not divide by "
            f"{len(classes)} classes; --classes names fewer"
        )
    if classes.max() >= num_classes:
        raise InputError(f"{flag}: class {classes.max()} was asked for; this model has classes 0..{num_classes - 1}")
    return LabelScheme(name, classes, args.global_seed)


def read_labels(path: str, count: int) -> np.ndarray:
    """Labels of the samples 0, 1, ... from a `.npy` file, or a text file with one number a line."""
    try:
        if path.endswith(".npy"):
            labels = np.lib.format.open_memmap(path, mode="r")
        else:
            labels = np.array(Path(path).read_text().split(), dtype=np.int64)
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"--label-file: {path} cannot be read as labels ({error})") from None
    whole = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    if not whole or len(labels) < count or labels.astype(np.int64).min() < 0:
        raise InputError(
            f"--label-file: {path} holds {labels.dtype} of shape {labels.shape}; at least {count} (the "
            "--num-fid-samples) whole numbers >= 0 are needed"
        )
    return labels.astype(np.int64)


# What the result is called, and what it depends on


def output_name(args, model: SimpleNamespace) -> str:
    """`<run>_<step>_cfg<scale>-<low>-<high>`, with a suffix for every other option that is not the default.

    Of the options on which the bytes depend, --pproc-batch-size alone is left out: it moves a level in ten thousand.
    """
    default = generate_parser().get_default
    parts = [f"{model.name}_{model.step:07d}_cfg{args.cfg_scale}-{args.guidance_low}-{args.guidance_high}"]
    if args.mode != default("mode") or args.heun:
        parts.append("heun" if args.heun else args.mode)
    for option, form in (
        ("num_steps", "steps{}"),
        ("global_seed", "seed{}"),
        ("num_fid_samples", "n{}"),
        ("label_sampling", "{}"),
        ("num_classes", "classes{}"),
    ):
        if getattr(args, option) != default(option):
            parts.append(form.format(getattr(args, option)))
    if precision_name(args) != "tf32":
        parts.append(precision_name(args))
    if args.compile:
        parts.append("compile")
    if args.classes is not None:
        parts.append(f"only{args.classes.replace(',', '-')}" if len(args.classes) < 40 else "only-some-classes")
    if args.label_file is not None:
        parts.append(f"labels-{Path(args.label_file).stem}")
    if args.vae_ckpt is not None:
        parts.append(f"vae-{Path(args.vae_ckpt).stem}")
    if not args.ema:
        parts.append("no-ema")
    return "_".join(parts).replace(" ", "")


def describe_job(args, model: SimpleNamespace, device: torch.device) -> dict:
    """All that the images depend on: what an interrupted job must have in common with the one that takes it up."""
    options = {key: value for key, value in vars(args).items() if key not in FREE}
    options |= {"precision": precision_name(args), "path_type": model.args.get("path_type", args.path_type)}
    checksums = {"checkpoint": sha256(model.checkpoint)}
    if model.vae_path is not None:
        checksums["vae"] = vae_sha256(model.vae_path, model.vae)
    if args.label_file is not None:
        checksums["label_file"] = sha256(args.label_file)
    statistics = b"".join(values.numpy().tobytes() for values in model.latent_stats)
    checksums["latent_statistics"] = hashlib.sha256(statistics).hexdigest()
    job = {
        "run": model.name,
        "step": model.step,
        "options": options,
        "sha256": checksums,
        "device": device.type,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "versions": {"torch": torch.__version__} | {name: version(name) for name in ("numpy", "diffusers", "timm")},
    }
    return json.loads(json.dumps(job))


def run_record(args, model: SimpleNamespace, config: SamplerConfig, labels: LabelScheme, processes) -> dict:
    """What the record says beyond the job's description."""
    device = processes.device
    return {
        "checkpoint": str(model.checkpoint),
        "vae": str(model.vae_path or "in the checkpoint"),
        "options": vars(args),
        "sampler": asdict(config),
        "nfe": config.nfe(),
        "labels": labels.name,
        "resolution": model.resolution,
        "processes": processes.num_processes,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {name: version(name) for name in ("numpy", "diffusers", "timm", "accelerate")},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def png_folder(store: SampleStore) -> Path:
    return store.target.with_suffix("")


def trajectory_file(store: SampleStore) -> Path:
    return store.target.with_name(f"{store.target.stem}-trajectory.png")


def output_options(args, store: SampleStore) -> dict:
    """What else than the `.npz` will be written, as `SampleStore.check` takes it."""
    others = [store.target.with_suffix(".json"), store.target.with_suffix(".png")]
    others += [trajectory_file(store)] if args.trajectory else []
    others += [png_folder(store)] if args.save_png else []
    return {"overwrite": args.overwrite, "others": others, "extra_bytes": math.prod(store.shape) * args.save_png}


# Evaluation in the same job


def feature_network(args, resolution: int) -> torch.nn.Module | None:
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


def build_evaluator(args, network: torch.nn.Module | None, resolution: int, device: torch.device) -> Evaluator | None:
    """The reference's features, by all processes together."""
    if network is None:
        return None
    network.to(device)
    with about("--evaluate"):
        return Evaluator(network, read_reference(args.evaluate, network, (resolution, resolution), device), device)


# Samples


def move_to(model: SimpleNamespace, device: torch.device, *, compile: bool) -> None:
    model.sit.to(device)
    model.vae.to(device)
    model.latent_stats = tuple(values.to(device) for values in model.latent_stats)
    if compile:
        model.sit.compile(dynamic=False)  # a guidance interval makes two batch sizes: a graph each


def sample_batch(model: SimpleNamespace, config: SamplerConfig, labels: LabelScheme, indices: range) -> np.ndarray:
    """Images uint8 (B, H, W, 3) of these sample numbers."""
    try:
        images = draw_images(
            model.sit,
            model.vae,
            model.latent_stats,
            indices,
            labels(indices).to(model.sit.pos_embed.device),
            labels.seed,
            config,
        )
    except FloatingPointError:
        reason = "they left fp16's range: --precision bf16" if config.precision == "fp16" else "look at its training"
        raise InputError(f"--exp-path: {model.checkpoint} gives samples that are not finite ({reason})") from None
    return images.permute(0, 2, 3, 1).cpu().numpy()


def hand_on(args, store: SampleStore, evaluator: Evaluator | None, images: np.ndarray, indices: range) -> None:
    """Finished images to whoever else wants them; without those that only fill up the last batch."""
    images = images[: len(indices)]
    if args.save_png:
        folder = png_folder(store)
        folder.mkdir(exist_ok=True)
        files = (folder / f"{i:06d}.png" for i in indices)
        with ThreadPoolExecutor() as pool:  # not one by one to the disk: a restart writes those of all batches again
            list(pool.map(lambda image, file: Image.fromarray(image).save(file), images, files))
    if evaluator is not None:
        evaluator.add(torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(indices))


def finish(
    args, store: SampleStore, model: SimpleNamespace, config: SamplerConfig, labels: LabelScheme, record: dict
) -> None:
    """The contact sheet, the record of how the samples came about, and last the `.npz`: with it the job is done."""
    target = store.target
    target.unlink(missing_ok=True)  # an old result must not lie beside the new record; the samples are safe
    rows, columns = args.grid
    shown = store.images()[: rows * columns].transpose(0, 3, 1, 2)
    save_png(image_grid(shown, min(columns, store.count)), target.with_suffix(".png"))
    if args.trajectory:
        indices = store.padded_indices(0)
        frames = trajectory(
            model.sit,
            model.vae,
            model.latent_stats,
            indices,
            labels(indices).to(model.sit.pos_embed.device),
            labels.seed,
            config,
            shown=min(TRAJECTORIES, store.count),
        )
        sheet = image_grid(frames.flatten(0, 1), columns=frames.shape[1])
        save_png(sheet, trajectory_file(store))
    write_json(target.with_suffix(".json"), record)
    store.finish(labels(range(store.count)).numpy())
    print(f"{target}: {store.count} samples, {record['drawn']} of them drawn now; {record['seconds']:.1f} s")
    for name, value in record.get("evaluation", {}).items():
        print(f"  {name:<32} {value if isinstance(value, str) else format(value, '.6g')}")


if __name__ == "__main__":
    main()
