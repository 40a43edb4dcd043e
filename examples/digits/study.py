"""Does end-to-end training help? Five ways to train the same SiT on digits, at equal steps and equal seeds.

    make study        # or: python -m examples.digits.study --folder build/digits-study

SiT: on the latents of a VAE trained alone.  REPA: the same with alignment.  REPA-E: SiT and VAE together.  E2E-VAE: SiT
with alignment on the frozen VAE that REPA-E tuned.  no stop-grad: REPA-E with the diffusion loss let into the VAE, the
paper's negative control.  Judged by a small classifier trained on the real digits, not by the alignment encoder. It
prints whatever comes out.
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

from configs.arguments import positive_int
from examples.digits import judge
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


def run(*words: object) -> None:
    """One of the repository's scripts, quietly; its output is shown when it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}")


def prepare(folder: Path, vae_steps: int) -> None:
    """Data, encoder, and the VAE that every method starts from; once for all seeds."""
    run("-m", "examples.digits.make_images", "--out", folder / "images")
    run("preprocessing.py", "--imagenet-path", folder / "images", "--output-path", folder / "data", "--resolution", 32,
        "--num-workers", 2, "--overwrite")  # fmt: skip
    run("-m", "examples.digits.pretrain_encoder", "--data-dir", folder / "data", "--out", folder / "encoder")
    run("train_vae.py", "--exp-name", "vae", "--vae", "f4d4-tiny", "--max-train-steps", vae_steps,
        *training_flags(folder), *vae_loss_flags(1e-3))  # fmt: skip
    cache(folder, folder / "exps/vae/vae.pt", "vae")


def training_flags(folder: Path) -> list:
    return ["--data-dir", folder / "data", "--resolution", 32, "--num-classes", 10, "--num-workers", 0, "--batch-size",
            32, "--output-dir", folder / "exps", "--mixed-precision", "no", "--no-compile", "--report-to", "none",
            "--log-steps", 20, "--num-preview", 0, "--overwrite"]  # fmt: skip


def vae_loss_flags(rate: float) -> list:
    return ["--loss-cfg-path", "examples/digits/digits_l1_kl_gan.yaml", "--vae-learning-rate", rate]


def sit_flags(folder: Path, steps: int, seed: int) -> list:
    return [*training_flags(folder), "--model", "SiT-T/2", "--encoder-depth", 3, "--learning-rate", 1e-3, "--ema-decay",
            0.98, "--max-train-steps", steps, "--seed", seed, "--vae", "f4d4-tiny"]  # fmt: skip


def cache(folder: Path, vae: Path, name: str) -> None:
    run("cache_latents.py", "--vae-arch", "f4d4-tiny", "--vae-ckpt-path", vae, "--vae-latents-name", name, "--data-dir",
        folder / "data", "--output-dir", folder / "data", "--num-workers", 0, "--overwrite")  # fmt: skip


def train(folder: Path, method: str, steps: int, seed: int) -> str:
    """Train one method with one seed; returns the run's name."""
    name = f"{method.lower().replace(' ', '-')}-{seed}"
    flags = [*sit_flags(folder, steps, seed), "--exp-name", name]
    aligned = ["--enc-type", f"timm:local-dir:{folder / 'encoder'}"]
    if method in ("REPA-E", "no stop-grad"):
        start = folder / "exps/vae"
        run("train_repae.py", *flags, *aligned, *vae_loss_flags(1e-4), "--vae-ckpt", start / "vae.pt",
            "--disc-pretrained-ckpt", start / "vae-discriminator-ckpt.pt",
            *(["--no-stop-grad"] if method == "no stop-grad" else []))  # fmt: skip
        return name
    vae, latents = folder / "exps/vae/vae.pt", "vae"
    if method == "E2E-VAE":
        checkpoint = folder / f"exps/repa-e-{seed}/checkpoints/{steps:07d}.pt"
        latents = f"e2e-{seed}"
        run("save_vae_weights.py", "--repae-ckpt", checkpoint, "--vae-name", latents, "--save-dir", folder / "exps",
            "--overwrite")  # fmt: skip
        vae = folder / f"exps/{latents}/{latents}.pt"
        cache(folder, vae, latents)
    alignment = ["--enc-type", "None", "--proj-coeff", 0] if method == "SiT" else aligned
    run("train_ldm_only.py", *flags, *alignment, "--vae-ckpt", vae, "--vae-latents-name", latents)
    return name


def measure(folder: Path, name: str, seed: int, network, real) -> dict[str, float]:
    """Distance and class accuracy of 1,000 samples without guidance, 100 of each class."""
    samples = folder / "samples"
    run("generate.py", "--exp-path", folder / "exps" / name, "--sample-dir", samples, "--num-fid-samples", SAMPLES,
        "--label-sampling", "equal", "--cfg-scale", 1, "--num-steps", 25, "--pproc-batch-size", 250,
        "--global-seed", seed, "--overwrite")  # fmt: skip
    (file,) = samples.glob(f"{name}_*.npz")
    images, labels = judge.load_samples(file)
    return {"fd": judge.distance(network, images, real), "accuracy": judge.accuracy(network, images, labels)}


def table(results: dict[str, list[dict]], steps: int, held_out: float) -> str:
    seeds = len(results["SiT"])
    rows = [f"{steps} steps, {SAMPLES} samples without guidance, {seeds} seeds: mean (standard deviation)",
            f"The judge recognises {held_out:.1%} of real digits that it never saw.", "",
            f"| {'method':12} | {'FD':>16} | {'accuracy':>15} | minutes | what |", "|---|---|---|---|---|"]  # fmt: skip
    for method, runs in results.items():
        cells = []
        for key, form in (("fd", "{:.2f} ({:.2f})"), ("accuracy", "{:.1%} ({:.1%})")):
            values = [run[key] for run in runs]
            cells.append(form.format(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0))
        minutes = statistics.mean(run["seconds"] for run in runs) / 60
        rows.append(f"| {method:12} | {cells[0]:>16} | {cells[1]:>15} | {minutes:.1f} | {METHODS[method]} |")
    return "\n".join(rows)


def plot(results: dict[str, list[dict]], path: Path, steps: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    panels = (("fd", "Frechet distance to real digits (log scale; lower is better)"), ("accuracy", "class accuracy"))
    for axis, (key, title) in zip(axes, panels, strict=True):
        for i, runs in enumerate(results.values()):
            values = [run[key] for run in runs]
            axis.bar(i, statistics.mean(values), color=f"C{i}", alpha=0.5)
            axis.plot([i] * len(values), values, "ko", markersize=4)
        axis.set_xticks(range(len(results)), results, fontsize=9)
        axis.set_title(title, fontsize=10)
    axes[0].set_yscale("log")
    figure.suptitle(f"Digits, {steps} steps; a dot for each seed, bars are means", fontsize=10)
    figure.savefig(path, dpi=110)


def follow(args, seed: int, chain: tuple[str, ...], network, real) -> dict[tuple[str, int], dict]:
    """Train and measure the methods of a chain, one after the other."""
    measured = {}
    for method in chain:
        start = time.perf_counter()
        name = train(args.folder, method, args.steps, seed)
        seconds = time.perf_counter() - start
        found = measure(args.folder, name, seed, network, real) | {"seconds": seconds}
        numbers = f"FD {found['fd']:.2f}, accuracy {found['accuracy']:.1%}, {seconds:.0f} s"
        print(f"seed {seed}, {method}: {numbers}", flush=True)
        measured[method, seed] = found
    return measured


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/digits-study"))
    parser.add_argument("--steps", type=positive_int, default=250)
    parser.add_argument("--vae-steps", type=positive_int, default=250)
    parser.add_argument("--seeds", type=positive_int, default=3)
    args = parser.parse_args(argv)
    started = time.perf_counter()
    args.folder.mkdir(parents=True, exist_ok=True)
    prepare(args.folder, args.vae_steps)
    real, labels = judge.load_digits_data(args.folder / "data")
    network, held_out = judge.train_judge(real, labels)

    chains = [(seed, chain) for chain in CHAINS for seed in range(args.seeds)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a process of one thread for each core
        found = list(pool.map(lambda task: follow(args, *task, network, real), chains))
    measured = {key: value for part in found for key, value in part.items()}
    results = {method: [measured[method, seed] for seed in range(args.seeds)] for method in METHODS}
    (args.folder / "results.json").write_text(json.dumps(results, indent=1))
    report = table(results, args.steps, held_out)
    (args.folder / "study.md").write_text(report + "\n")
    plot(results, args.folder / "study.png", args.steps)
    print(f"\n{report}\n\n{args.folder / 'study.png'}; {(time.perf_counter() - started) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
