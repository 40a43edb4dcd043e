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
SAMPLES = 1000
CORES = os.cpu_count()


def run(*words: object, threads: int = 1) -> None:
    """One of the repository's scripts, quietly; its output is shown when it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}")


def prepare(folder: Path, vae_steps: int) -> None:
    """Data, encoder, and the VAE that every method starts from; once for all seeds."""
    run("-m", "examples.digits.make_images", "--out", folder / "images")
    run(
        "preprocessing.py",
        "--imagenet-path",
        folder / "images",
        "--output-path",
        folder / "data",
        "--resolution",
        make_images.SIZE,
        "--num-workers",
        2,
        "--overwrite",
    )
    run(
        "-m",
        "examples.digits.pretrain_encoder",
        "--data-dir",
        folder / "data",
        "--out",
        folder / "encoder",
        threads=CORES,
    )
    run(
        "train_vae.py",
        "--exp-name",
        "vae",
        "--vae",
        "f4d4-tiny",
        "--max-train-steps",
        vae_steps,
        *training_flags(folder),
        *vae_loss_flags(1e-3),
        threads=CORES,
    )
    cache(folder, folder / "exps/vae/vae.pt", "vae")


def training_flags(folder: Path) -> list:
    return [
        "--data-dir",
        folder / "data",
        "--resolution",
        make_images.SIZE,
        "--num-classes",
        10,
        "--num-workers",
        0,
        "--batch-size",
        32,
        "--output-dir",
        folder / "exps",
        "--mixed-precision",
        "no",
        "--no-compile",
        "--report-to",
        "none",
        "--log-steps",
        20,
        "--num-preview",
        0,
        "--overwrite",
    ]


def vae_loss_flags(rate: float) -> list:
    return ["--loss-cfg-path", "examples/digits/digits_l1_kl_gan.yaml", "--vae-learning-rate", rate]


def sit_flags(folder: Path, steps: int, seed: int) -> list:
    return [
        *training_flags(folder),
        "--model",
        "SiT-T/2",
        "--encoder-depth",
        3,
        "--learning-rate",
        1e-3,
        "--ema-decay",
        0.98,
        "--max-train-steps",
        steps,
        "--seed",
        seed,
        "--vae",
        "f4d4-tiny",
    ]


def cache(folder: Path, vae: Path, name: str) -> None:
    run(
        "cache_latents.py",
        "--vae-arch",
        "f4d4-tiny",
        "--vae-ckpt-path",
        vae,
        "--vae-latents-name",
        name,
        "--data-dir",
        folder / "data",
        "--output-dir",
        folder / "data",
        "--num-workers",
        0,
        "--overwrite",
    )


def run_name(method: str, seed: int) -> str:
    return f"{method.lower().replace(' ', '-')}-{seed}"


def train(folder: Path, method: str, steps: int, seed: int) -> str:
    """Train one method with one seed; returns the run's name."""
    name = run_name(method, seed)
    flags = [*sit_flags(folder, steps, seed), "--exp-name", name]
    aligned = ["--enc-type", f"timm:local-dir:{folder / 'encoder'}"]
    if method in ("REPA-E", "no stop-grad"):
        start = folder / "exps/vae"
        run(
            "train_repae.py",
            *flags,
            *aligned,
            *vae_loss_flags(1e-4),
            "--vae-ckpt",
            start / "vae.pt",
            "--disc-pretrained-ckpt",
            start / "vae-discriminator-ckpt.pt",
            *(["--no-stop-grad"] if method == "no stop-grad" else []),
        )
        return name
    vae, latents = folder / "exps/vae/vae.pt", "vae"
    if method == "E2E-VAE":
        checkpoint = folder / f"exps/{run_name('REPA-E', seed)}/checkpoints/{steps:07d}.pt"
        latents = f"e2e-{seed}"
        run(
            "save_vae_weights.py",
            "--repae-ckpt",
            checkpoint,
            "--vae-name",
            latents,
            "--save-dir",
            folder / "exps",
            "--overwrite",
        )
        vae = folder / f"exps/{latents}/{latents}.pt"
        cache(folder, vae, latents)
    alignment = ["--enc-type", "None", "--proj-coeff", 0] if method == "SiT" else aligned
    run("train_ldm_only.py", *flags, *alignment, "--vae-ckpt", vae, "--vae-latents-name", latents)
    return name


def samples_of(folder: Path, name: str, steps: int) -> tuple[Tensor, Tensor]:
    """The images and labels that `measure` drew of a run; sample i has the class i modulo 10."""
    (file,) = (folder / "samples").glob(f"{name}_{steps:07d}_*.npz")
    return judge.load_samples(file)


def measure(folder: Path, name: str, steps: int, seed: int, network, real) -> dict[str, float]:
    """Distance and class accuracy of 1,000 samples without guidance, 100 of each class; the VAE's PSNR."""
    run(
        "generate.py",
        "--exp-path",
        folder / "exps" / name,
        "--sample-dir",
        folder / "samples",
        "--num-fid-samples",
        SAMPLES,
        "--label-sampling",
        "equal",
        "--cfg-scale",
        1,
        "--num-steps",
        25,
        "--pproc-batch-size",
        250,
        "--global-seed",
        seed,
        "--overwrite",
    )
    images, labels = samples_of(folder, name, steps)
    with torch.no_grad():
        reconstructions, _ = reconstruct(load_trained(folder / "exps" / name).vae, real)
    return {
        "fd": judge.distance(network, images, real),
        "accuracy": judge.accuracy(network, images, labels),
        "psnr": psnr(reconstructions / 255, real / 255).mean().item(),
    }


def table(results: dict[str, list[dict]], steps: int, held_out: float) -> str:
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
        rows.append(
            f"| {method:12} | {cells[0]:>16} | {cells[1]:>15} | {cells[2]:>12} | {minutes:.1f} | {METHODS[method]} |"
        )
    return "\n".join(rows)


def plot(results: dict[str, list[dict]], strips: dict[str, np.ndarray], path: Path, steps: int) -> None:
    """Both numbers, a dot for each seed; and a strip of samples of each method, uint8 (H, W, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.5, 1))
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
    torch.set_num_threads(1)
    started = time.perf_counter()
    args.folder.mkdir(parents=True, exist_ok=True)
    prepare(args.folder, args.vae_steps)
    real, labels = judge.load_digits_data(args.folder / "data")
    network, held_out = judge.train_judge(real, labels)

    chains = [(seed, chain) for chain in CHAINS for seed in range(args.seeds)]
    with ThreadPoolExecutor(CORES) as pool:  # a process of one thread for each core
        found = list(pool.map(lambda task: follow(args, *task, network, real), chains))
    measured = {key: value for part in found for key, value in part.items()}
    results = {method: [measured[method, seed] for seed in range(args.seeds)] for method in METHODS}
    (args.folder / "results.json").write_text(json.dumps(results, indent=1))
    report = table(results, args.steps, held_out)
    (args.folder / "study.md").write_text(report + "\n")
    strips = {method: sample_strip(samples_of(args.folder, run_name(method, 0), args.steps)[0]) for method in METHODS}
    plot(results, strips, args.folder / "study.png", args.steps)
    print(f"\n{report}\n\n{args.folder / 'study.png'}; {(time.perf_counter() - started) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
