"""What samples are measured against: ADM's reference files, ours, or any set of images.

Our file is an `.npz` with ADM's names for the moments: `mu`, `sigma`, `mu_s`, `sigma_s`. Where ADM's files hold images,
it has `features` (pooled, of the images that count for precision and recall); `probe`, the features of one fixed image,
gives away another network or other weights; `meta` is JSON.
"""

import json
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dataset.data import evenly_spaced
from dataset.image_sources import Source, open_images, require_size
from evaluation.evaluator import FeatureSet, extract, require_neighbours
from evaluation.features import probe, same_network
from utils.distributed import main_first, rank
from utils.errors import InputError
from utils.npz import open_npz, write_npz

logger = logging.getLogger(__name__)

FORMAT = 1
NEIGHBOUR_IMAGES = 10000  # for precision and recall, as many as ADM's reference files hold


def reference_images(path: str | Path) -> Source | None:
    """The images of a reference, opened but not read; None for a file that holds moments alone.

    Raises:
        InputError: the reference is missing or damaged.
    """
    path = Path(path)
    return open_images(path) if not path.is_file() or "arr_0" in open_npz(path) else None


def read_reference(
    path: str | Path, network: nn.Module, size: tuple[int, int], device: torch.device, *, batch_size: int = 64
) -> FeatureSet:
    """The feature set of a reference, computed where the file does not hold it, by all processes together.

    Args:
        path: ADM's `.npz` (stored Inception moments are used, precision and recall take its images `arr_0`), any other
            `.npz` with `arr_0`, a file of `save_reference`, a data folder, or a folder of images.
        network: as `load_features` gives it, on `device`.
        size: height and width of the samples.
    Raises:
        InputError: unreadable, of another size, or of another feature space.
    """
    # What can be refused without reading an image; and what the file holds already.
    path = Path(path)
    with main_first():
        arrays = open_npz(path) if path.is_file() else {}
        if "meta" in arrays:
            return _own_file(path, arrays, network, size, device)
        source = reference_images(path)
        if source is not None:
            require_size(source, size, "the samples have")
            require_neighbours(str(path), len(source))
        stored = "mu" in arrays and network.label == "inception"
        if stored:
            pool, spatial = _moments(path, arrays, "mu", "sigma", network.dim), None
            if "mu_s" in arrays:
                spatial = _moments(path, arrays, "mu_s", "sigma_s", network.spatial_dim)
        elif source is None:
            raise InputError(f"{path} holds Inception's moments alone; --features {network.label} needs images")

    # All from the images, where no moments in this space are stored.
    if not stored:
        if "mu" in arrays:
            others = f"those in the space of {network.label} are of its {len(source)} images"
            _say(f"{path}: the stored moments are Inception's; {others}")
        # A folder may hold a whole training set: it gives precision and recall 10,000 images, evenly spread.
        keep = None if path.is_file() else torch.tensor(evenly_spaced(len(source), NEIGHBOUR_IMAGES))
        return extract(source, network, device, batch_size=batch_size, keep=keep, description="reference")

    # Stored moments: FID is then the published one. Precision and recall still need images.
    images = None
    if source is not None:
        images = extract(source, network, device, batch_size=batch_size, description="reference images")
    missing = [name for name, found in (("sFID", spatial), ("precision and recall", images)) if found is None]
    if missing:
        _say(f"{path} has nothing to compute {' or '.join(missing)} from")
    return FeatureSet(None, pool, spatial, None if images is None else images.features)


def save_reference(
    path: str | Path,
    reference: FeatureSet,
    network: nn.Module,
    size: tuple[int, int],
    device: torch.device,
    source: str,
) -> None:
    """Write a feature set as a reference file; call it on one process.

    Args:
        reference: in the space of `network`, which is on `device`.
        size: height and width of its images.
        source: where they came from, for whoever reads the file.
    """
    meta = {"format": FORMAT, "features": network.label, "size": list(size), "count": reference.count, "source": source}
    arrays = {"mu": reference.pool[0], "sigma": reference.pool[1], "probe": probe(network, size, device)}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial[0], "sigma_s": reference.spatial[1]}
    if reference.features is not None:
        arrays["features"] = reference.features
    arrays = {name: tensor.numpy() for name, tensor in arrays.items()}
    write_npz(path, arrays | {"meta": np.array(json.dumps(meta))})


def _own_file(path: Path, arrays: dict, network: nn.Module, size: tuple[int, int], device) -> FeatureSet:
    """The feature set in a file of `save_reference`, made in this network's space from images of this size."""
    try:
        meta = json.loads(str(np.asarray(arrays["meta"])))
        label, made_for, count = meta["features"], tuple(meta["size"]), meta["count"]
        known = meta["format"] <= FORMAT
        if not isinstance(count, int):
            raise TypeError(f"count {count!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: 'meta' is not that of a --save-stats file ({error!r})") from error
    if not known:
        raise InputError(f"{path} has format {meta['format']}; this code reads up to {FORMAT}")
    if label != network.label:
        raise InputError(f"{path} was made in the space of {label}; --features asks for {network.label}")
    if made_for != tuple(size):
        raise InputError(f"{path} was made from {made_for} images; {tuple(size)} is needed")

    # The label names a network; the features of the fixed image tell whether its weights were these.
    stored = {name: _tensor(path, arrays, name) for name in ("probe", "features") if name in arrays}
    if "probe" not in stored or not same_network(stored["probe"], probe(network, size, device)):
        raise InputError(f"{path} was made with other weights of {label}; make it again with --save-stats")

    features = stored.get("features")
    if features is not None and (features.ndim != 2 or features.shape[1] != network.dim):
        raise InputError(f"{path}: features are {tuple(features.shape)}; (images, {network.dim}) are needed")
    spatial = _moments(path, arrays, "mu_s", "sigma_s", network.spatial_dim) if network.spatial_dim else None
    return FeatureSet(count, _moments(path, arrays, "mu", "sigma", network.dim), spatial, features)


def _moments(path: Path, arrays: dict, mean: str, covariance: str, dim: int) -> tuple[Tensor, Tensor]:
    for name, shape in ((mean, (dim,)), (covariance, (dim, dim))):
        found = arrays[name].shape if name in arrays else "absent"
        if found != shape:
            raise InputError(f"{path}: {name} is {found}; {shape} is needed")
    return _tensor(path, arrays, mean).double(), _tensor(path, arrays, covariance).double()


def _tensor(path: Path, arrays: dict, name: str) -> Tensor:
    array = np.array(arrays[name])
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise InputError(f"{path}: {name} is {array.dtype} or not finite; finite numbers are needed")
    return torch.from_numpy(array)


def _say(message: str) -> None:
    """On rank 0 alone."""
    if rank() == 0:
        logger.warning(message)
