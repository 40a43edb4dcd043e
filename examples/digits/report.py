"""Draw what the digits example made, and print a table of its stages: steps, seconds, losses, where things are.

Reads the folder that run.sh filled; writes samples.png (samples per class beside real digits) and report.png (those and
the curves of the three training runs).

    python -m examples.digits.report --folder build/digits
"""

import argparse
import json
from pathlib import Path

import numpy as np

from utils.errors import InputError, command

# Stage -> (folder of its result, scalars of its last row). Stages that train have a metrics.jsonl there.
STAGES = {
    "images": ("images", ()),
    "preprocessing": ("data", ()),
    "encoder": ("encoder", ()),
    "train_vae": ("exps/vae", ("reconstruction_loss",)),
    "train_repae": ("exps/repae", ("reconstruction_loss", "denoising_loss", "proj_loss")),
    "save_vae_weights": ("exps/e2e-vae", ()),
    "cache_latents": ("data", ()),
    "train_ldm_only": ("exps/ldm", ("denoising_loss", "proj_loss")),
    "generate_repae": ("samples", ()),
    "generate_ldm": ("samples", ()),
    "reconstruction": ("reconstruction.png", ()),
}

FD = "fd_encoder-mean-tokens"

# Title of a panel -> its curves: (stage, scalar, sign, name in the legend).
CURVES = {
    "reconstruction: mean |x - x'|, x in [-1, 1]": [
        ("train_vae", "reconstruction_loss", 1, "VAE alone"),
        ("train_repae", "reconstruction_loss", 1, "REPA-E"),
    ],
    "alignment: cosine with the encoder's tokens": [
        ("train_repae", "vae_align_loss", -1, "REPA-E, as the VAE sees it"),
        ("train_repae", "proj_loss", -1, "REPA-E, as SiT sees it"),
        ("train_ldm_only", "proj_loss", -1, "LDM on the tuned VAE"),
    ],
    "denoising: |velocity - target|²": [
        ("train_repae", "denoising_loss", 1, "REPA-E"),
        ("train_ldm_only", "denoising_loss", 1, "LDM on the tuned VAE"),
    ],
    "Fréchet distance, encoder's space, 200 samples": [
        ("train_repae", FD, 1, "REPA-E"),
        ("train_ldm_only", FD, 1, "LDM on the tuned VAE"),
    ],
}


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Rows of a run's evaluations.jsonl, if there is one, then those of its metrics.jsonl; each has `step`, and what
    was not finite is left out."""
    path = run / "metrics.jsonl"
    if not path.is_file() or not path.read_text():
        raise InputError(f"--folder: {path} is missing or empty; run.sh must run to its end first")
    files = filter(Path.is_file, (run / "evaluations.jsonl", path))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def read_samples(folder: Path, run: str) -> tuple[Path, float, np.ndarray, np.ndarray]:
    """The newest .npz of a run: its path, Frechet distance, images uint8 (N, H, W, 3) and labels (N,)."""
    files = sorted(folder.glob(f"{run}_*.npz"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise InputError(f"--folder: {folder} has no {run}_*.npz; run.sh must run to its end first")
    distance = json.loads(files[-1].with_suffix(".json").read_text())["evaluation"][FD]
    with np.load(files[-1]) as arrays:
        return files[-1], distance, arrays["arr_0"], arrays["arr_1"]


def read_real(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, H, W, 3) and labels (N,) of a data folder."""
    try:
        images, labels = np.load(folder / "images.npy"), np.load(folder / "labels.npy")
    except OSError:
        raise InputError(f"--folder: {folder} has no images.npy and labels.npy; run.sh must run first") from None
    return images.transpose(0, 2, 3, 1), labels


def read_seconds(folder: Path) -> dict[str, int]:
    """Stage -> the seconds that run.sh noted for it."""
    path = folder / "seconds.tsv"
    if not path.is_file():
        raise InputError(f"--folder: {folder} has no seconds.tsv; run.sh must run first")
    return {name: int(seconds) for name, seconds in (line.split("\t") for line in path.read_text().splitlines())}


def class_sheet(images: np.ndarray, labels: np.ndarray, columns: int = 10) -> np.ndarray:
    """A row of `columns` images per digit, evenly spread over those there are: uint8 (10 H, columns W, 3)."""
    rows = []
    for digit in range(10):
        chosen = np.flatnonzero(labels == digit)
        rows.append(np.concatenate(images[chosen[np.arange(columns) * len(chosen) // columns]], axis=1))
    return np.concatenate(rows)


def read_by_judge(real: tuple, others: list[tuple]) -> tuple[float, list[float]]:
    """How often a support vector machine on the pixels of real digits reads an image as its class.

    It shares nothing with the encoder that the models were aligned to.

    Args:
        real: images uint8 (N, H, W, 3) and labels (N,); every tenth is held out.
        others: the same of sets of samples.

    Returns:
        Share of held-out real images, and of each other set.
    """
    from sklearn.svm import SVC

    def features(images):
        return images[..., 1].reshape(len(images), -1) / 255.0

    images, labels = features(real[0]), real[1]
    held_out = np.arange(len(labels)) % 10 == 0
    judge = SVC(C=10).fit(images[~held_out], labels[~held_out])
    return judge.score(images[held_out], labels[held_out]), [judge.score(features(x), y) for x, y in others]


def draw(folder: Path, metrics: dict[str, list[dict]], sheets: dict[str, np.ndarray]) -> None:
    """Write samples.png and report.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def show_sheets(axes):
        for ax, (title, sheet) in zip(axes, sheets.items(), strict=True):
            ax.imshow(sheet)
            ax.set_title(title, fontsize=10)
            ax.set_axis_off()

    # The samples alone.
    figure = Figure(figsize=(15, 5.3), layout="constrained")
    show_sheets(figure.subplots(1, 3))
    FigureCanvasAgg(figure).print_png(folder / "samples.png")

    # The curves, and the samples below them.
    figure = Figure(figsize=(18, 10), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.5))
    axes = top.subplots(1, len(CURVES))
    for ax, (title, curves) in zip(axes, CURVES.items(), strict=True):
        for stage, scalar, sign, name in curves:
            rows = [row for row in metrics[stage] if scalar in row]
            ax.plot([row["step"] for row in rows], [sign * row[scalar] for row in rows], label=name)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    for ax in (axes[0], axes[-1]):
        ax.set_yscale("log")
    show_sheets(bottom.subplots(1, len(sheets)))
    FigureCanvasAgg(figure).print_png(folder / "report.png")


def print_table(folder: Path, seconds: dict[str, int], metrics: dict[str, list[dict]]) -> None:
    row = "{:<17}{:>6}{:>9}  {:<70}{}".format
    print("\n" + row("stage", "steps", "seconds", "last row", "where"))
    for stage, spent in seconds.items():
        where, scalars = STAGES[stage]
        last = metrics[stage][-1] if stage in metrics else {}
        losses = "  ".join(f"{name} {last[name]:.4f}" for name in scalars if name in last)
        print(row(stage, last.get("step", ""), spent, losses, folder / where))
    print(row("in all", "", sum(seconds.values()), "", "").rstrip() + "\n")


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/digits"), help="what run.sh filled")
    folder = parser.parse_args(argv).folder

    # What run.sh left.
    seconds = read_seconds(folder)
    metrics = {stage: read_metrics(folder / STAGES[stage][0]) for stage in STAGES if stage.startswith("train_")}
    real = read_real(folder / "data")
    repae_file, repae_distance, *repae = read_samples(folder / "samples", "repae")
    ldm_file, ldm_distance, *ldm = read_samples(folder / "samples", "ldm")

    # The pictures.
    real_share, shares = read_by_judge(real, [repae, ldm])

    titles = (
        f"real digits: {real_share:.0%} read as their class",
        f"REPA-E samples: {shares[0]:.0%}",
        f"samples of the LDM on the tuned VAE: {shares[1]:.0%}",
    )
    sheets = {title: class_sheet(*images) for title, images in zip(titles, (real, repae, ldm), strict=True)}
    draw(folder, metrics, sheets)

    # The numbers.
    print_table(folder, seconds, metrics)
    judge, space = "a support vector machine trained on real pixels", "the real digits in the encoder's space"
    print(f"Read as their class by {judge}, and the Frechet distance to {space}:")
    print(f"  {real_share:6.1%}        held-out real digits")
    print(f"  {shares[0]:6.1%} {repae_distance:6.1f} REPA-E samples, {repae_file}")
    print(f"  {shares[1]:6.1%} {ldm_distance:6.1f} samples of the LDM on its VAE, {ldm_file}")
    print(f"Look at {folder / 'report.png'}, {folder / 'samples.png'}, {folder / 'reconstruction.png'}.")


if __name__ == "__main__":
    main()
