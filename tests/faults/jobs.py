"""The seven scripts as jobs of seconds: their inputs, their command lines, and the folders that they write into."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import cache_latents
from tests.golden.fill import synth_image
from tests.support import sampling, small

SCRIPTS = (
    "preprocessing",
    "train_repae",
    "save_vae_weights",
    "cache_latents",
    "train_ldm_only",
    "generate",
    "train_vae",
)


@dataclass(frozen=True)
class Job:
    """A command that is started again until it ends.

    Attributes:
        script: its name, without suffix.
        argv: the command line, the same at every start.
        folder: where all its files lie, and nothing else.
        limit: of the checkpoints that stay, in the runs that are disturbed; None: all stay.
    """

    script: str
    argv: list[str]
    folder: Path
    limit: int | None = None

    @property
    def trains(self) -> bool:
        return self.script.startswith("train_")

    def command(self, *, disturbed: bool) -> list[str]:
        retention = ["--checkpoints-total-limit", str(self.limit)] if disturbed and self.limit else []
        return [f"{self.script}.py", *self.argv, *retention]


def write_jobs(root: Path, *, steps: int = 5, log_steps: int = 1) -> dict[str, Job]:
    """The jobs by script, with their inputs; each writes into `<root>/work/<script>`."""
    place = small.write_place(root / "place")
    cache_latents.main(small.cache_options(place, place.latents))
    exps, images, work = sampling.write_runs(root / "exps"), write_images(root / "images"), root / "work"

    train = dict(resume="latest", max_train_steps=steps, checkpointing_steps=1, log_steps=log_steps, num_workers=1)
    pictures = dict(num_preview=2, sampling_steps=2)
    evaluation = dict(eval_steps=3, eval_reference=place.data, eval_features=place.encoder, eval_samples=8)
    argv = {
        "preprocessing": small.argv(
            imagenet_path=images, output_path=work / "preprocessing", resolution=small.RESOLUTION, num_workers=2
        ),
        "train_repae": small.repae_options(place, work / "train_repae", "run", **train, **pictures),
        "train_ldm_only": small.ldm_options(place, work / "train_ldm_only", "run", **train, **pictures, **evaluation),
        "train_vae": small.vae_options(place, work / "train_vae", "run", **train, **pictures),
        "save_vae_weights": small.argv(
            repae_ckpt=exps / "repae" / "checkpoints" / "0000007.pt", vae_name="vae", save_dir=work / "save_vae_weights"
        ),
        "cache_latents": small.cache_options(
            place, "latents", output_dir=work / "cache_latents", pproc_batch_size=2, num_workers=1
        ),
        "generate": sampling.flags(exps, work / "generate", pproc_batch_size=2, save_png=True, trajectory=True),
    }
    limits = {"train_ldm_only": 2}
    return {name: Job(name, argv[name], work / name, limits.get(name)) for name in SCRIPTS}


def write_images(root: Path, *, classes: int = 3, per_class: int = 8) -> Path:
    """A tree of PNG files, one of them damaged."""
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for i in range(per_class):
            pixels = synth_image(40, 32, 100 * label + i)
            Image.fromarray(pixels).save(root / f"class{label}" / f"{i}.png")
    (root / "class1" / "3.png").write_bytes(b"no image")
    return root
