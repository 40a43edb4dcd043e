"""Evaluation of sets of images in a feature space: FID, sFID, Inception Score, precision, recall, or FD elsewhere.

    network = load_features("inception", (256, 256)).to(device)
    reference = read_reference("VIRTUAL_imagenet256_labeled.npz", network, (256, 256), device)
    evaluator = Evaluator(network, reference, device)
    evaluator.add(images, indices)  # uint8 (B, 3, H, W) and the samples' numbers, on every process its own
    results = evaluator.result()  # {"fid": ..., ...}, the same on every process

Every process of the process group, if there is one, must call `result` (and `extract`). No random number is drawn.
"""

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataset.image_sources import read_batches
from evaluation.features import exact_float32
from evaluation.metrics import Statistics, frechet_distance, inception_score, kernel_distance, precision_recall
from utils.distributed import all_sum, from_main, gather_rows, main_first, rank, together, world_size
from utils.errors import InputError

logger = logging.getLogger(__name__)

NEIGHBOUR = 3  # k of precision and recall
KERNEL_SUBSET = 1000  # images of a subset of the kernel distance
NOTHING = torch.empty(0, dtype=torch.int64)  # keep no feature
FEATURE_BLOCK = 5000  # rows; also the block of the Inception Score


@dataclass(frozen=True)
class FeatureSet:
    """What the metrics need of a set of images; moments are (mean (D,), covariance (D, D)), float64, on the CPU.

    Attributes:
        count: images behind the moments; None where a file does not say.
        pool, spatial: moments in either space; `spatial` is None in spaces that have no spatial features.
        features: pooled features float32 (M, D) of the images kept, in their order; None: no precision, recall, KID.
        notes: lines on what a number from this set is not; for the record.
    """

    count: int | None
    pool: tuple[Tensor, Tensor]
    spatial: tuple[Tensor, Tensor] | None
    features: Tensor | None
    notes: tuple[str, ...] = ()


class FeatureStream:
    """Images in, `FeatureSet` out; in between only sums and the kept features are held.

    The network always sees batches of one size (the last one is padded), so that a feature does not depend on how the
    images arrived: kernels may round differently at another batch size.

    Args:
        network: as `load_features` gives it, on `device`.
        batch_size: of the network.
        keep: sorted numbers of the images whose features are kept (None: all of them).
    """

    def __init__(self, network: nn.Module, device: torch.device, *, batch_size: int = 64, keep: Tensor | None = None):
        self.network, self.device, self.batch_size, self.keep = network, torch.device(device), batch_size, keep
        self.pool = Statistics(network.dim, self.device)
        self.spatial = Statistics(network.spatial_dim, self.device) if network.spatial_dim else None
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._features: list[Tensor] = []
        self._indices: list[Tensor] = []

    def add(self, images: Tensor, indices: Tensor) -> None:
        """Take in images uint8 (B, 3, H, W) with their numbers int64 (B,), any B, each number once."""
        assert images.dtype == torch.uint8 and len(images) == len(indices), (images.dtype, images.shape, indices.shape)
        self._waiting.append((images.to(self.device), torch.as_tensor(indices).cpu()))

        # Whole batches go through the network; what is left over waits for the next call, or for `finish`.
        if sum(len(images) for images, _ in self._waiting) >= self.batch_size:
            images, indices = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
            whole = len(images) - len(images) % self.batch_size
            for start in range(0, whole, self.batch_size):
                self._extract(images[start : start + self.batch_size], indices[start : start + self.batch_size])
            self._waiting = [(images[whole:], indices[whole:])] if whole < len(images) else []

    def _extract(self, images: Tensor, indices: Tensor) -> None:
        """One batch through the network, its features into the sums; at most `batch_size` images."""
        count = len(images)
        if count < self.batch_size:
            images = torch.cat([images, images[-1:].expand(self.batch_size - count, -1, -1, -1)])
        with exact_float32(self.device):
            pool, spatial = (None if features is None else features[:count] for features in self.network(images))
        self.pool.add(pool)
        if self.spatial is not None:
            self.spatial.add(spatial)
        kept = torch.ones(count, dtype=torch.bool) if self.keep is None else torch.isin(indices, self.keep)
        self._features.append(pool.cpu()[kept])
        self._indices.append(indices[kept])

    def finish(self) -> FeatureSet:
        """The set over all processes, on each of them.

        Raises:
            InputError: fewer than two images, or features that are not finite.
        """
        if self._waiting:
            self._extract(*(torch.cat(parts) for parts in zip(*self._waiting, strict=True)))
            self._waiting = []

        # The sums of all processes, the same on each from here on.
        spaces = [statistics for statistics in (self.pool, self.spatial) if statistics is not None]
        for tensor in [tensor for statistics in spaces for tensor in statistics.tensors()]:
            all_sum(tensor)
        count = int(self.pool.count)
        with main_first():  # all have the same sums: rank 0 speaks
            if not all(statistics.outer.isfinite().all() for statistics in spaces):
                problem = f"the {self.network.label} features of some image are not finite"
                raise InputError(f"{problem}: its weights are damaged")
            if count < 2:
                raise InputError(f"{count} images were given; a covariance needs two at least")

        # The kept features of all processes, in the order of the images.
        features = torch.cat(self._features) if self._features else torch.empty(0, self.network.dim)
        indices = torch.cat(self._indices) if self._indices else torch.empty(0, dtype=torch.int64)
        features, indices = gather_rows(features), gather_rows(indices)
        order = indices.argsort()
        assert (indices[order].diff() > 0).all(), "an image was added twice"

        pool, *spatial = [tuple(moment.cpu() for moment in statistics.moments()) for statistics in spaces]
        return FeatureSet(count, pool, spatial[0] if spatial else None, features[order])


def extract(
    source,
    network: nn.Module,
    device: torch.device,
    *,
    batch_size: int = 64,
    keep: Tensor | None = None,
    description: str = "features",
) -> FeatureSet:
    """The feature set of a source of images (`dataset.image_sources`), extracted by all processes together.

    What the source leaves out or changes is said first; how many images EXIF asks to turn, when all are read.
    """
    notes = list(source.notes)
    say(*notes)
    stream = FeatureStream(network, device, batch_size=batch_size, keep=keep)
    bar = tqdm(total=len(source), desc=description, unit="image", disable=rank() > 0)
    with together(), bar:
        for indices, images in read_batches(source, batch_size, rank=rank(), world_size=world_size()):
            stream.add(images, indices)
            bar.update(min(len(source) - bar.n, batch_size * world_size()))
    notes += turn_notes(source)
    return replace(stream.finish(), notes=tuple(notes))


def turn_notes(source) -> list[str]:
    """How many images of a source, read once by all processes together, EXIF asks to turn: said, and for the record."""
    turns = torch.tensor(float(source.turns))
    all_sum(turns)
    notes = (
        [f"{source.name}: {int(turns)} images ask by EXIF to be turned; they were read as they lie"] if turns else []
    )
    say(*notes)
    return notes


class Evaluator:
    """Measures samples against a reference while they are being made; see the head of this file."""

    def __init__(self, network: nn.Module, reference: FeatureSet, device: torch.device, *, batch_size: int = 64):
        self.network, self.reference, self.device = network, reference, torch.device(device)
        self._stream = FeatureStream(network, device, batch_size=batch_size)

    def add(self, images: Tensor, indices: Tensor) -> None:
        """Take in images uint8 (B, 3, H, W) with their numbers int64 (B,), each number once over all processes."""
        self._stream.add(images, indices)

    def result(self) -> dict[str, float]:
        """The metrics of all samples of all processes, on each of them; see `compare`."""
        return compare(self._stream.finish(), self.reference, self.network, self.device)


def compare(samples: FeatureSet, reference: FeatureSet, network: nn.Module, device: torch.device) -> dict[str, float]:
    """All metrics of samples against a reference, on every process.

    Returns:
        In Inception's space fid, sfid, inception_score, inception_score_std, precision, recall, precision_adm,
        recall_adm (as ADM's suite rounds them), kid, kid_std; in any other fd_<label>, precision_<label>,
        recall_<label>, kd_<label>, kd_std_<label>. What the reference cannot give (no images, no spatial moments) is
        left out. kid_subset_size, where the sets are too small for subsets of 1000.
    Raises:
        InputError: too few images for the k-th neighbour.
    """
    # Names: FID and its kin belong to Inception's space; elsewhere a number carries the label of its space.
    inception = network.label == "inception"
    suffix = "" if inception else f"_{network.label}"
    kernel = "kid" if inception else "kd"
    advice = "" if reference.features is None else f", or take {kernel}{suffix}, which has no such bias"
    warn_if_few("samples", samples.count, network.dim, advice)
    warn_if_few("reference", reference.count, network.dim, advice)

    # From moments and from Inception's classifier: on rank 0, which has them all.
    results = {}
    if rank() == 0:
        results["fid" if inception else f"fd{suffix}"] = frechet_distance(*samples.pool, *reference.pool)
        if samples.spatial and reference.spatial:
            results["sfid"] = frechet_distance(*samples.spatial, *reference.spatial)
        if inception:
            results |= _inception_score(samples.features, network, device)

    # From all pairs of features: shared out to the processes.
    if reference.features is not None:
        for form, half in (("", False), ("_adm", True)) if inception else (("", False),):
            names = (f"precision{form}{suffix}", f"recall{form}{suffix}")
            values = _precision_recall(reference.features, samples.features, device, half)
            results |= zip(names, values, strict=True)
        names = (f"{kernel}{suffix}", f"{kernel}_std{suffix}")
        size = kernel_subset_size(len(reference.features), len(samples.features))
        results |= zip(names, _kernel_distance(samples.features, reference.features, device, size), strict=True)
        if size < KERNEL_SUBSET:
            results[f"{kernel}_subset_size"] = size
    return from_main(results)


def _inception_score(features: Tensor, network: nn.Module, device: torch.device) -> dict[str, float]:
    with exact_float32(device):
        blocks = features.split(FEATURE_BLOCK)
        probabilities = torch.cat([network.probabilities(block.to(device)).cpu() for block in blocks])
    return dict(zip(("inception_score", "inception_score_std"), inception_score(probabilities), strict=True))


def _precision_recall(real: Tensor, fake: Tensor, device: torch.device, half: bool) -> tuple[float, float]:
    with main_first():
        require_neighbours("the reference", len(real))
        require_neighbours("the samples", len(fake))
    processes = {"rank": rank(), "world_size": world_size(), "all_reduce": all_sum}
    with exact_float32(device):
        return precision_recall(real.to(device), fake.to(device), neighbour=NEIGHBOUR, half=half, **processes)


def kernel_subset_size(count_1: int, count_2: int) -> int:
    """1000, or half of the smaller set: subsets that are nearly the whole of it would hardly deviate."""
    return min(KERNEL_SUBSET, min(count_1, count_2) // 2)


def _kernel_distance(fake: Tensor, real: Tensor, device: torch.device, subset_size: int) -> tuple[float, float]:
    """Subsets of the samples are drawn before those of the reference, as in torch-fidelity."""
    processes = {"rank": rank(), "world_size": world_size(), "all_reduce": all_sum}
    with exact_float32(device):
        return kernel_distance(fake.to(device), real.to(device), subset_size=subset_size, **processes)


def require_neighbours(what: str, count: int) -> None:
    """Refuse fewer images than the k-th neighbour needs."""
    if count <= NEIGHBOUR:
        raise InputError(f"{what}: {count} images were given; precision and recall need more than {NEIGHBOUR}")


def warn_if_few(what: str, count: int | None, dim: int, more_advice: str = "") -> None:
    """Say, on rank 0, that a Frechet distance from so few images is biased."""
    if count is not None and count <= dim:
        problem = "the covariance is singular, and the distance far larger than from many images"
        advice = "compare it only with distances from equally many"
        say(f"{what}: {count} images for {dim} dimensions: {problem}; {advice}{more_advice}")


def say(*messages: str) -> None:
    """On rank 0 alone."""
    if rank() == 0:
        for message in messages:
            logger.warning("%s", message)
