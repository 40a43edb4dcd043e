"""Train the small vision transformer that plays DINOv2's part on the digits: under a minute on 2 CPU cores.

The public encoders know nothing about 24 x 24 digits, so the example makes its own. It is trained with labels (ten
classes, cross-entropy on the mean of the patch tokens) because 1,797 images and a minute are too few for
self-supervision. So, unlike DINOv2, this representation has seen the class of every training image.

The folder is timm's: `--enc-type timm:local-dir:build/digits/encoder` or `timm.create_model("local-dir:...",
pretrained=True)` loads it.

    python -m examples.digits.pretrain_encoder --data-dir build/digits/data --out build/digits/encoder
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from torch import nn

from configs.parsing import natural_int, positive_int
from utils.errors import InputError, command

PATCH = 8
HELD_OUT = 10  # every tenth image is never trained on


def build_encoder(size: int, num_classes: int) -> nn.Module:
    """A ViT with the token grid of SiT-T/2; the final norm comes before pooling, so that tokens are normalised."""
    shape = dict(img_size=size, patch_size=PATCH, embed_dim=96, depth=4, num_heads=3)
    head = dict(class_token=False, global_pool="avg", fc_norm=False, num_classes=num_classes)
    record = {"tag": "digits", "license": "mit"}
    model = timm.create_model("vit_tiny_patch16_224", **shape, **head, pretrained_cfg_overlay=record)
    nn.init.normal_(model.pos_embed, std=0.5)  # timm's 0.02 is drowned by the patches for most of so short a training
    return model


def load_data(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels in [-1, 1] (N, 3, H, W) and labels (N,) of a data folder written by preprocessing.py."""
    if not (folder / "images.npy").is_file() or not (folder / "labels.npy").is_file():
        raise InputError(f"--data-dir: {folder} has no images.npy and labels.npy; preprocessing.py writes them")
    images, labels = np.load(folder / "images.npy"), np.load(folder / "labels.npy")
    if len(images) <= HELD_OUT or images.shape[-1] != images.shape[-2] or images.shape[-1] % PATCH:
        needed = f"more than {HELD_OUT} of them, square, with a side that {PATCH} divides, are needed"
        raise InputError(f"--data-dir: {folder} has images of {images.shape}; {needed}")
    return torch.from_numpy(images).float() / 127.5 - 1, torch.from_numpy(labels)


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn by up to 10 degrees, scale by up to 10 %, shift by up to a sixteenth, add noise of std 0.1."""
    draw = 2 * torch.rand(4, len(pixels), generator=generator) - 1  # angle, scale, shift across and down, in [-1, 1)
    angle, scale = draw[0] * math.radians(10), 1 + 0.1 * draw[1]
    cos, sin, shift = scale * angle.cos(), scale * angle.sin(), draw[2:] / 8  # the grid runs from -1 to 1
    theta = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], dim=1).view(-1, 2, 3)  # an affine map for each
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return moved + 0.1 * torch.randn(moved.shape, generator=generator)


def train(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor, *, steps: int, batch_size: int, seed: int):
    """Yield (step, mean loss since the last yield) about ten times while AdamW minimises the cross-entropy."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps + 1, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    losses = []
    for step in range(1, steps + 1):
        chosen = torch.randint(len(pixels), (batch_size,), generator=generator)
        loss = F.cross_entropy(model(augment(pixels[chosen], generator)), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % max(1, steps // 10) == 0 or step == steps:
            yield step, sum(losses) / len(losses)
            losses.clear()


@torch.inference_mode()
def accuracy(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of images that the encoder's own classifier reads as their label."""
    return (model.eval()(pixels).argmax(dim=1) == labels).float().mean().item()


def save_encoder(model: nn.Module, folder: Path, size: int) -> None:
    """Write config.json and model.safetensors: what timm's `local-dir:` reads."""
    half = (0.5, 0.5, 0.5)  # pixels in [-1, 1], as in training
    data = {"input_size": (3, size, size), "mean": half, "std": half, "interpolation": "bicubic", "crop_pct": 1.0}
    save_for_hf(model, folder, data_config=data, safe_serialization=True)


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("build/digits/data"), help="written by preprocessing.py")
    parser.add_argument("--out", type=Path, default=Path("build/digits/encoder"), help="folder to write")
    parser.add_argument("--steps", type=positive_int, default=600, help="optimiser steps")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images of a step")
    parser.add_argument("--seed", type=natural_int, default=0, help="of initial weights, batches and augmentation")
    args = parser.parse_args(argv)

    start = time.perf_counter()
    pixels, labels = load_data(args.data_dir)
    held_out = torch.arange(len(pixels)) % HELD_OUT == 0
    torch.manual_seed(args.seed)
    model = build_encoder(pixels.shape[-1], num_classes=int(labels.max()) + 1)
    options = dict(steps=args.steps, batch_size=args.batch_size, seed=args.seed)
    for step, loss in train(model, pixels[~held_out], labels[~held_out], **options):
        print(f"step {step:4d}  loss {loss:.3f}  {time.perf_counter() - start:4.0f} s", flush=True)

    save_encoder(model, args.out, pixels.shape[-1])
    right = accuracy(model, pixels[held_out], labels[held_out])
    print(f"held-out accuracy {right:.1%} of {int(held_out.sum())} images; encoder in {args.out}")


if __name__ == "__main__":
    main()
