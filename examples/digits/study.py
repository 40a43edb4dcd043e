"""Does end-to-end training help? Five ways to train the same SiT on digits, at equal steps and equal seeds.

    make study        # or: python -m examples.digits.study --folder build/digits-study

SiT: on the latents of a VAE trained alone.  REPA: the same with alignment.  REPA-E: SiT and VAE together.  E2E-VAE: SiT
with alignment on the frozen VAE that REPA-E tuned.  no stop-grad: REPA-E with the diffusion loss let into the VAE, the
paper's negative control.  Judged by a small classifier trained on the real digits, not by the alignment encoder; the
VAEs by their reconstructions. It prints whatever comes out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs.parsing import positive_int
from evaluation.metrics import psnr
from evaluation.reconstruction import reconstruct
from examples.digits import judge, make_images
from sampling.trained import load_trained
from utils.errors import command

METHODS = {
    "SiT": "plain SiT, frozen VAE",
    "REPA": "SiT + alignment, frozen VAE",
    "REPA-E": "SiT and VAE together",
    "E2E-VAE": "SiT + alignment, frozen VAE tuned by REPA-E",
    "no stop-grad": "REPA-E, diffusion loss let into the VAE",
}
# What waits for what; the longest first.
CHAINS = [("REPA-E", "E2E-VAE"), ("no stop-grad",), ("SiT",), ("REPA",)]
VAE = "f4d4-tiny"
SAMPLES = 1000
CORES = os.cpu_count()


def run(*words: object, threads: int = 1) -> float:
    """One of the repository's scripts, quietly; its output is shown when it fails.

    Returns:
        seconds of a core that it took: unlike those of the clock, not those of its neighbours.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, *map(str, words)], stdout=output, stderr=output, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(map(str, words))}\n{output.read()}")
    return usage.ru_utime + usage.ru_stime


def flags(**options: object) -> list:
    """Options as a script takes them: num_workers=2 is --num-workers 2; a bool is --name or --no-name."""
    words = []
    for name, value in options.items():
        name = name.replace("_", "-")
        words += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", value]
    return words


def prepare(folder: Path, vae_steps: int) -> None:
    """Data, encoder, and the VAE that every method starts from; once for all seeds."""
    images, data = folder / "images", folder / "data"
    size = dict(resolution=make_images.SIZE, num_workers=2)
    run("-m", "examples.digits.make_images", *flags(out=images))
    run("preprocessing.py", *flags(imagenet_path=images, output_path=data, **size, overwrite=True))
    run("-m", "examples.digits.pretrain_encoder", *flags(data_dir=data, out=folder / "encoder"), threads=CORES)

    training = training_options(folder) | vae_options(rate=1e-3)
    run("train_vae.py", *flags(exp_name="vae", vae=VAE, max_train_steps=vae_steps, **training), threads=CORES)
    cache(folder, folder / "exps/vae/vae.pt", "vae")


def training_options(folder: Path) -> dict:
    """Of all training scripts."""
    data = dict(data_dir=folder / "data", resolution=make_images.SIZE, num_workers=0, batch_size=32)
    machine = dict(mixed_precision="no", compile=False)
    output = dict(output_dir=folder / "exps", report_to="none", log_steps=20, num_preview=0, overwrite=True)
    return data | machine | output


def vae_options(rate: float) -> dict:
    """Of the scripts that train a VAE."""
    return dict(loss_cfg_path="examples/digits/digits_l1_kl_gan.yaml", vae_learning_rate=rate)


def sit_options(folder: Path, steps: int, seed: int) -> dict:
    """Of the scripts that train SiT: the same for every method."""
    network = dict(model="SiT-T/2", encoder_depth=3, vae=VAE, num_classes=10)
    schedule = dict(learning_rate=1e-3, ema_decay=0.98, max_train_steps=steps, seed=seed)
    return training_options(folder) | network | schedule


def cache(folder: Path, vae: Path, name: str) -> None:
    """The data set's latents by this VAE, under this name."""
    latents = dict(vae_arch=VAE, vae_ckpt_path=vae, vae_latents_name=name)
    data = dict(data_dir=folder / "data", output_dir=folder / "data", num_workers=0)
    run("cache_latents.py", *flags(**latents, **data, overwrite=True))


def run_name(method: str, seed: int) -> str:
    """The folder of a run, and the beginning of its samples' file."""
    return f"{method.lower().replace(' ', '-')}-{seed}"


def train(folder: Path, method: str, steps: int, seed: int) -> str:
    """Train one method with one seed; returns the run's name."""
    name, exps = run_name(method, seed), folder / "exps"
    options = sit_options(folder, steps, seed) | dict(exp_name=name)
    aligned = dict(enc_type=f"timm:local-dir:{folder / 'encoder'}")

    # SiT and VAE together, from the VAE and the discriminator that `prepare` trained.
    if method in ("REPA-E", "no stop-grad"):
        start = dict(vae_ckpt=exps / "vae/vae.pt", disc_pretrained_ckpt=exps / "vae/vae-discriminator-ckpt.pt")
        options |= aligned | vae_options(rate=1e-4) | start
        run("train_repae.py", *flags(**options, stop_grad=method == "REPA-E"))
        return name

    # SiT on a frozen VAE: the one that `prepare` trained, or the one that REPA-E tuned with this seed.
    vae, latents = exps / "vae/vae.pt", "vae"
    if method == "E2E-VAE":
        checkpoint = exps / run_name("REPA-E", seed) / f"checkpoints/{steps:07d}.pt"
        latents = f"e2e-{seed}"
        run("save_vae_weights.py", *flags(repae_ckpt=checkpoint, vae_name=latents, save_dir=exps, overwrite=True))
        vae = exps / latents / f"{latents}.pt"
        cache(folder, vae, latents)
    alignment = dict(enc_type="None", proj_coeff=0) if method == "SiT" else aligned
    run("train_ldm_only.py", *flags(**options, **alignment, vae_ckpt=vae, vae_latents_name=latents))
    return name


def samples_of(folder: Path, name: str, steps: int) -> tuple[Tensor, Tensor]:
    """The images and labels that `measure` drew of a run; sample i has the class i modulo 10."""
    (file,) = (folder / "samples").glob(f"{name}_{steps:07d}_*.npz")
    return judge.load_samples(file)


def measure(folder: Path, name: str, steps: int, seed: int, network, real) -> dict[str, float]:
    """Distance and class accuracy of 1,000 samples without guidance, 100 of each class; the VAE's PSNR."""
    place = dict(exp_path=folder / "exps" / name, train_steps=steps, sample_dir=folder / "samples")
    samples = dict(num_fid_samples=SAMPLES, label_sampling="equal", pproc_batch_size=250, global_seed=seed)
    run("generate.py", *flags(**place, **samples, cfg_scale=1, num_steps=25, overwrite=True))
    images, labels = samples_of(folder, name, steps)
    with torch.no_grad():
        reconstructions, _ = reconstruct(load_trained(folder / "exps" / name, str(steps)).vae, real)
    return {
        "fd": judge.distance(network, images, real),
        "accuracy": judge.accuracy(network, images, labels),
        "psnr": psnr(reconstructions / 255, real / 255).mean().item(),
    }


def table(results: dict[str, list[dict]], steps: int, held_out: float) -> str:
    """Mean and standard deviation over seeds, a row for each method, as Markdown.

    Args:
        results: method -> what `measure` found, and `seconds` of training, for each seed.
        held_out: the judge's accuracy on real digits that it never saw.
    """
    seeds = len(results["SiT"])
    rows = [
        f"{steps} steps, {SAMPLES} samples without guidance, {seeds} seed(s): mean (standard deviation)",
        f"The judge recognises {held_out:.1%} of real digits that it never saw.",
        "",
        f"| {'method':12} | {'FD':>16} | {'accuracy':>15} | {'VAE, dB':>12} | minutes | what |",
        f"|{'---|' * 6}",
    ]
    for method, runs in results.items():
        cells = []
        for key, form in (("fd", ".2f"), ("accuracy", ".1%"), ("psnr", ".2f")):
            values = [run[key] for run in runs]
            spread = f" ({statistics.stdev(values):{form}})" if seeds > 1 else ""
            cells.append(f"{statistics.mean(values):{form}}{spread}")
        minutes = statistics.mean(run["seconds"] for run in runs) / 60
        numbers = f"{cells[0]:>16} | {cells[1]:>15} | {cells[2]:>12} | {minutes:.1f}"
        rows.append(f"| {method:12} | {numbers} | {METHODS[method]} |")
    return "\n".join(rows)


def plot(results: dict[str, list[dict]], strips: dict[str, np.ndarray], path: Path, steps: int) -> None:
    """Both numbers, a dot for each seed; and a strip of samples of each method, uint8 (H, W, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.5, 1))

    # Left: the numbers.
    axes = left.subplots(1, 2)
    panels = (("fd", "Fréchet distance to real digits (lower is better)"), ("accuracy", "class accuracy of samples"))
    for ax, (key, title) in zip(axes, panels, strict=True):
        for i, runs in enumerate(results.values()):
            values = [run[key] for run in runs]
            ax.hlines(statistics.mean(values), i - 0.3, i + 0.3, color=f"C{i}")
            ax.plot([i] * len(values), values, "o", color=f"C{i}", alpha=0.6)
        ax.set_xticks(range(len(results)), results, fontsize=9)
        ax.set_title(title, fontsize=10)
        ax.grid(axis="y", which="both", alpha=0.3)
    axes[0].set_yscale("log")
    left.suptitle(f"{steps} steps; a dot for each seed, a line for the mean", fontsize=10)

    # Right: the samples.
    for ax, (method, strip) in zip(right.subplots(len(strips), 1), strips.items(), strict=True):
        ax.imshow(strip)
        ax.set_ylabel(method, rotation=0, ha="right", va="center", fontsize=9)
        ax.set(xticks=[], yticks=[])
    right.suptitle("the first ten samples of seed 0: asked to be 0 to 9", fontsize=10)
    FigureCanvasAgg(figure).print_png(path)


def sample_strip(images: Tensor) -> np.ndarray:
    """The first ten images of (N, 3, H, W) side by side: uint8 (H, 10 W, 3)."""
    return np.concatenate(list(images[:10].permute(0, 2, 3, 1).numpy()), axis=1)


def follow(args, seed: int, chain: tuple[str, ...], network, real) -> dict[tuple[str, int], dict]:
    """Train and measure the methods of a chain, one after the other."""
    measured = {}
    for method in chain:
        start = time.perf_counter()
        name = train(args.folder, method, args.steps, seed)
        seconds = time.perf_counter() - start
        found = measure(args.folder, name, args.steps, seed, network, real) | {"seconds": seconds}
        numbers = f"FD {found['fd']:.2f}, accuracy {found['accuracy']:.1%}, {seconds:.0f} s"
        print(f"seed {seed}, {method}: {numbers}", flush=True)
        measured[method, seed] = found
    return measured


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/digits-study"))
    parser.add_argument("--steps", type=positive_int, default=600)
    parser.add_argument("--vae-steps", type=positive_int, default=600)
    parser.add_argument("--seeds", type=positive_int, default=3)
    args = parser.parse_args(argv)

    # Once for all: data, encoder, VAE, judge.
    torch.set_num_threads(1)
    started = time.perf_counter()
    args.folder.mkdir(parents=True, exist_ok=True)
    prepare(args.folder, args.vae_steps)
    real, labels = judge.load_digits_data(args.folder / "data")
    network, held_out = judge.train_judge(real, labels)

    # Every method with every seed; a chain is a task, as its methods build on each other.
    chains = [(seed, chain) for chain in CHAINS for seed in range(args.seeds)]
    with ThreadPoolExecutor(CORES) as pool:  # a process of one thread for each core
        found = list(pool.map(lambda task: follow(args, *task, network, real), chains))
    measured = {key: value for part in found for key, value in part.items()}
    results = {method: [measured[method, seed] for seed in range(args.seeds)] for method in METHODS}

    # What came out.
    (args.folder / "results.json").write_text(json.dumps(results, indent=1))
    report = table(results, args.steps, held_out)
    (args.folder / "study.md").write_text(report + "\n")
    strips = {method: sample_strip(samples_of(args.folder, run_name(method, 0), args.steps)[0]) for method in METHODS}
    plot(results, strips, args.folder / "study.png", args.steps)
    print(f"\n{report}\n\n{args.folder / 'study.png'}; {(time.perf_counter() - started) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
