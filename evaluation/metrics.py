"""The mathematics of evaluation: features and images in, numbers out. No network, no file.

Legend: N images, D feature dimensions, K classes. Definitions follow ADM's evaluation suite (Dhariwal & Nichol 2021,
arXiv 2105.05233, `evaluations/evaluator.py`); docs/evaluation.md states them and how other tools differ.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

ADM_BLOCK = 10000  # ADM's block of rows and columns; whether half precision overflowed is decided per block
STRIPE = 256  # dimensions; of D = 2048 this leaves out 7/16 of the products
ROWS = 2000  # rows of a distance block: ROWS x ADM_BLOCK float32 is 80 MB
KERNEL_SEED = 2020  # torch-fidelity's
PSNR_CEILING = 100.0  # dB, for images equal in every value


class Statistics:
    """Mean and covariance of a stream of features, kept as float64 sums: `count`, sum x and half of sum x x^T.

    Sums of several processes add up to those of one: reduce `tensors()` and nothing else.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, features: torch.Tensor) -> None:
        """Take in features (B, D)."""
        features = features.to(self.total)
        self.count += len(features)
        self.total += features.sum(0)
        for first in range(0, features.shape[1], STRIPE):  # x x^T is symmetric: the part below the stripes is left out
            stripe = slice(first, first + STRIPE)
            self.outer[stripe, first:].addmm_(features[:, stripe].T, features[:, first:])

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The sums themselves, for a reduction in place."""
        return self.count, self.total, self.outer

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (D,) and covariance (D, D) with n - 1, float64."""
        assert self.count >= 2, "a covariance needs at least two samples"
        mean = self.total / self.count
        outer = self.outer.triu() + self.outer.triu(1).T
        return mean, (outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(mean_1: torch.Tensor, cov_1: torch.Tensor, mean_2: torch.Tensor, cov_2: torch.Tensor) -> float:
    """Frechet distance of two Gaussians: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    With S1 = A A^T and S2 = B B^T, the trace of the root is the sum of the singular values of A^T B, or of the roots of
    the eigenvalues of A^T S2 A. No matrix square root is taken, and nothing is added to the diagonal.

    Args:
        mean_1, mean_2: (D,); cov_1, cov_2: (D, D), symmetric; computed in float64.
    Returns:
        the squared distance d^2, which is what "FID" reports.
    """
    mean_1, cov_1, mean_2, cov_2 = (tensor.double() for tensor in (mean_1, cov_1, mean_2, cov_2))
    distance = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * _root_trace(cov_1, cov_2)
    return max(distance.item(), 0.0)


def _root_trace(cov_1: torch.Tensor, cov_2: torch.Tensor) -> torch.Tensor:
    """tr (S1 S2)^(1/2)."""
    # Both covariances regular: the roots of the eigenvalues of A^T S2 A.
    factors = [_cholesky(covariance) for covariance in (cov_1, cov_2)]
    if all(factor is not None for factor in factors):
        return torch.linalg.eigvalsh(factors[0].T @ cov_2 @ factors[0]).clamp(min=0).sqrt().sum()

    # Zero eigenvalues come out as about 1e-16 of the largest, and their roots as 1e-8, thousands of times. Singular
    # values need no root; they take longer.
    a = _eigen_factor(cov_1) if factors[0] is None else factors[0]
    b = _eigen_factor(cov_2) if factors[1] is None else factors[1]
    return torch.linalg.svdvals(a.T @ b).sum()


def _rank_tolerance(covariance: torch.Tensor) -> float:
    return len(covariance) * torch.finfo(covariance.dtype).eps


def _cholesky(covariance: torch.Tensor) -> torch.Tensor | None:
    """Lower triangular A with A A^T = covariance, None for a numerically singular one."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    singular = factor.diagonal().min() ** 2 <= _rank_tolerance(covariance) * covariance.diagonal().max()
    return None if failed or singular else factor


def _eigen_factor(covariance: torch.Tensor) -> torch.Tensor:
    """A (D, rank) with A A^T = covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > _rank_tolerance(covariance) * values[-1].clamp(min=0)
    return vectors[:, kept] * values[kept].sqrt()


def inception_score(probabilities: torch.Tensor, split_size: int = 5000) -> tuple[float, float]:
    """Inception Score: exp(mean KL(p(y|x) || p(y))) over consecutive, unshuffled blocks; a short last one counts fully.

    Args:
        probabilities: (N, K), rows sum to one, in the order of the samples; zeros are allowed (0 log 0 = 0).
    Returns:
        mean and (population) standard deviation over the blocks.
    """
    scores = []
    for block in probabilities.split(split_size):
        p = block.double()
        divergence = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0, keepdim=True))
        scores.append(divergence.sum(1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def kernel_distance(
    features_1: torch.Tensor,
    features_2: torch.Tensor,
    *,
    subset_size: int,
    subsets: int = 100,
    rank: int = 0,
    world_size: int = 1,
    all_reduce: Callable[[torch.Tensor], None] | None = None,
) -> tuple[float, float]:
    """Squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, unbiased, over random subsets of both sets.

    In Inception's space this is the Kernel Inception Distance (Binkowski et al. 2018, arXiv 1801.01401). The subsets
    are those that torch-fidelity draws, so that its numbers are these.

    Args:
        features_1, features_2: (N, D), on one device. All processes hold all of them.
        subset_size: of each set, drawn without replacement; subsets: how many pairs.
        rank, world_size, all_reduce: as for `precision_recall`; a process does every `world_size`-th pair.
    Returns:
        mean and (population) standard deviation over the pairs; the mean may be a little below 0.
    """
    assert 2 <= subset_size <= min(len(features_1), len(features_2))
    random = np.random.RandomState(KERNEL_SEED)
    values = torch.zeros(subsets, dtype=torch.float64, device=features_1.device)
    for i in range(subsets):
        chosen = [random.choice(len(x), subset_size, replace=False) for x in (features_1, features_2)]
        if i % world_size == rank:
            x, y = (
                f[torch.from_numpy(c).to(f.device)].double()
                for f, c in zip((features_1, features_2), chosen, strict=True)
            )
            values[i] = _within(x) + _within(y) - 2 * _kernel(x, y).mean()
    if all_reduce:
        all_reduce(values)
    return values.mean().item(), values.std(correction=0).item()


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _within(x: torch.Tensor) -> torch.Tensor:
    """Mean of the kernel over all pairs of two different points."""
    kernel = _kernel(x, x)
    return (kernel.sum() - kernel.trace()) / (len(x) * (len(x) - 1))


def precision_recall(
    real: torch.Tensor,
    fake: torch.Tensor,
    *,
    neighbour: int = 3,
    half: bool = False,
    rank: int = 0,
    world_size: int = 1,
    all_reduce: Callable[[torch.Tensor], None] | None = None,
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), as ADM's suite computes them.

    A point is covered when it lies within the distance of some point of the other set to that point's k-th neighbour
    (itself excluded, `<=`). Precision: share of `fake` covered by `real`; recall: share of `real` covered by `fake`.

    Args:
        real, fake: features (N, D), on one device. All processes hold all of them.
        neighbour: k.
        half: round like ADM, whose distances |u|^2 - 2 u v + |v|^2 are float16 in every term unless a block overflows.
        rank, world_size, all_reduce: a process does every `world_size`-th block of rows; `all_reduce` sums a tensor
            over the processes in place.
    Returns:
        precision, recall.
    """
    assert min(len(real), len(fake)) > neighbour, f"more than {neighbour} points are needed in each set"
    real, fake = _Points(real, half), _Points(fake, half)
    mine = {"rank": rank, "world_size": world_size}

    # The manifold of each set: around every point, a ball that reaches to its k-th neighbour.
    radii_real, radii_fake = (_neighbour_radii(points, neighbour, **mine) for points in (real, fake))
    for tensor in (radii_real, radii_fake) if all_reduce else ():
        all_reduce(tensor)

    # Which points of each lie in a ball of the other; counted, as sums over processes leave 0 and more than 0 apart.
    fake_covered, real_covered = torch.zeros_like(fake.norms), torch.zeros_like(real.norms)
    for rows, columns, distances in _distance_blocks(real, fake, **mine):
        fake_covered[columns] += (distances <= radii_real[rows, None]).any(0)
        real_covered[rows] += (distances <= radii_fake[columns]).any(1)
    for tensor in (fake_covered, real_covered) if all_reduce else ():
        all_reduce(tensor)
    return tuple((covered > 0).double().mean().item() for covered in (fake_covered, real_covered))


class _Points:
    """Features and squared norms; with `half` also rounded to float16, but kept as float32, whose products are fast."""

    def __init__(self, features: torch.Tensor, half: bool):
        self.values = features.float()
        self.norms = self.values.square().sum(1)
        self.half = half
        if half:
            self.half_values = self.values.half().float()
            self.half_norms = self.half_values.square().half().float().sum(1).half()

    def __len__(self) -> int:
        return len(self.values)


def _distances(u: _Points, v: _Points, rows: slice, columns: slice, half: bool) -> torch.Tensor:
    """Squared distances (rows, columns); with `half` every term is rounded to float16, in ADM's order."""
    if not half:
        product = u.values[rows] @ v.values[columns].T
        return product.mul_(-2).add_(u.norms[rows, None]).add_(v.norms[columns]).clamp_(min=0)
    product = (u.half_values[rows] @ v.half_values[columns].T).half()
    return product.mul_(-2).add_(u.half_norms[rows, None]).add_(v.half_norms[columns]).clamp_(min=0).float()


def _blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))


def _distance_blocks(u: _Points, v: _Points, rank: int, world_size: int) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """This process's blocks of the distance matrix, (rows, columns, distances); the same blocks for any world size."""
    for outer in _blocks(0, len(u), ADM_BLOCK):
        for columns in _blocks(0, len(v), ADM_BLOCK):
            half = u.half and _fits_half(u, v, outer, columns)
            for rows in _blocks(outer.start, outer.stop, ROWS):
                if rows.start // ROWS % world_size == rank:
                    yield rows, columns, _distances(u, v, rows, columns, half)


def _fits_half(u: _Points, v: _Points, rows: slice, columns: slice) -> bool:
    """Whether ADM's float16 block is finite throughout (else ADM takes the whole block in float32)."""
    largest = u.norms[rows].max().sqrt() + v.norms[columns].max().sqrt()
    if largest.square() < 0.95 * torch.finfo(torch.float16).max:  # bounds |u|^2 + 2 |u v| + |v|^2; so for Inception
        return True
    return all(_distances(u, v, part, columns, True).isfinite().all() for part in _blocks(rows.start, rows.stop, ROWS))


def _neighbour_radii(points: _Points, neighbour: int, rank: int, world_size: int) -> torch.Tensor:
    """Squared distance to the k-th neighbour, for this process's rows; zero elsewhere. (N,)"""
    nearest = points.norms.new_full((len(points), neighbour + 1), float("inf"))  # each point's nearest is itself
    for rows, _, distances in _distance_blocks(points, points, rank, world_size):
        here = distances.topk(min(neighbour + 1, distances.shape[1]), largest=False)[0]
        nearest[rows] = torch.cat([nearest[rows], here], 1).topk(neighbour + 1, largest=False)[0]
    radii = nearest[:, neighbour]
    return torch.where(radii.isinf(), 0.0, radii)


def psnr(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image in dB (B,); equal images count as `PSNR_CEILING`.

    Args:
        images, references: (B, C, H, W) in [0, 1].
    """
    error = (images.double() - references.double()).square().flatten(1).mean(1)
    return (-10 * error.log10()).clamp(max=PSNR_CEILING)


def ssim(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each image (B,) (Wang et al. 2004): 11 x 11 Gaussian, sigma 1.5, data range 1.

    Windows that lie wholly inside the image count; the channels are averaged.

    Args:
        images, references: (B, C, H, W) in [0, 1], at least 11 x 11.
    """
    offsets = torch.arange(-5, 6, dtype=torch.float64, device=images.device)
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = window / window.sum()

    # The window is a product of two: along the height, then along the width.
    def blur(x: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, C, H - 10, W - 10)
        x = F.conv2d(x.flatten(0, 1)[:, None], window[None, None, :, None])
        return F.conv2d(x, window[None, None, None, :]).unflatten(0, images.shape[:2])[:, :, 0]

    # Local moments, and the index of every window from them (eq. 13 there).
    x, y = images.double(), references.double()
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c_1, c_2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c_1) / (mean_x**2 + mean_y**2 + c_1)
    contrast_structure = (2 * covariance + c_2) / (var_x + var_y + c_2)
    return (luminance * contrast_structure).flatten(1).mean(1)
