"""An independent judge of digit samples: a small CNN that has nothing to do with the alignment encoder.

It gives the Frechet distance between samples and the real digits in its penultimate features (64 numbers), and the
share of samples that it takes for the class they were asked to be. It is trained on the real digits in seconds.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.metrics import Statistics, frechet_distance

HELD_OUT = 10  # every tenth image is never trained on


class Judge(nn.Module):
    """Images uint8 (N, 3, 24, 24) -> features (N, 64) and logits (N, 10)."""

    def __init__(self):
        super().__init__()
        layers = []
        for before, after in ((1, 16), (16, 32), (32, 64)):  # 24 x 24 -> 12 x 12 -> 6 x 6 -> 3 x 3
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 9, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        """(N, 64), of the grey values."""
        return self.body(images.float().mean(1, keepdim=True) / 127.5 - 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def train_judge(images: Tensor, labels: Tensor, *, epochs: int = 40, seed: int = 0) -> tuple[Judge, float]:
    """A judge trained on real digits, shifted by up to two pixels, and its accuracy on the tenth it never saw."""
    # torch's global generator, which draws the weights, is left as it was.
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        judge = Judge()

    held_out = torch.arange(len(images)) % HELD_OUT == 0
    train_images, train_labels = images[~held_out], labels[~held_out]
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    steps = epochs * -(-len(train_images) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(train_images), generator=generator).split(64):
            shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
            moved = train_images[chosen].roll(shift, dims=(2, 3))
            loss = F.cross_entropy(judge(moved), train_labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    judge.eval().requires_grad_(False)
    return judge, accuracy(judge, images[held_out], labels[held_out])


def load_digits_data(folder: Path) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, 24, 24) and labels (N,) of a data folder."""
    return torch.from_numpy(np.load(folder / "images.npy")), torch.from_numpy(np.load(folder / "labels.npy"))


def load_samples(path: Path) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, 24, 24) and the labels asked for (N,), of an .npz of generate.py."""
    with np.load(path) as arrays:
        return torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2), torch.from_numpy(arrays["arr_1"])


def accuracy(judge: Judge, images: Tensor, labels: Tensor) -> float:
    """The share of images that the judge reads as their label."""
    return (judge(images).argmax(1) == labels).float().mean().item()


def distance(judge: Judge, images: Tensor, real: Tensor) -> float:
    """Frechet distance in the judge's features."""
    moments = []
    for batch in (images, real):
        statistics = Statistics(64)
        statistics.add(judge.features(batch))
        moments += statistics.moments()
    return frechet_distance(*moments)
