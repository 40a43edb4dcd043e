"""What samples are measured against: reference files of ADM, of other tools, ours, or any set of images.

Our file is an `.npz` with ADM's names for the moments: `mu`, `sigma`, `mu_s`, `sigma_s`. Where ADM's files hold images,
it has `features` (pooled, of the images that count for precision and recall); `probe`, the features of one fixed image,
gives away another network or other weights; `meta` is JSON.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dataset.data import evenly_spaced
from dataset.image_arrays import Range
from dataset.image_sources import Source, open_images, require_size
from evaluation.evaluator import FeatureSet, extract, require_neighbours, say
from evaluation.features import probe, same_network
from utils.distributed import main_first
from utils.errors import InputError, printable
from utils.npz import open_npz, write_npz
from utils.pickles import read_pickled_numbers

FORMAT = 1
OTHER_RESIZING = "their resizing is another than here, so that the FID compares with neither theirs nor ADM's"
NEIGHBOUR_IMAGES = 10000  # for precision and recall, as many as ADM's reference files hold


def reference_images(path: str | Path, value_range: Range | None = None) -> Source | None:
    """The images of a reference, opened but not read; None for a file that holds moments alone.

    Raises:
        InputError: the reference is missing or damaged, or holds neither images nor moments.
    """
    path = Path(path)
    if not path.is_file() or path.suffix == ".npy":
        return open_images(path, value_range)
    if path.suffix == ".pkl":
        return None
    arrays = open_npz(path)
    if "arr_0" in arrays:
        return open_images(path, value_range)
    if "meta" not in arrays and not {"mu", "sigma"} <= arrays.keys():
        needed = "arr_0 (images), or mu and sigma (Inception's moments), are needed"
        raise InputError(f"{path} holds {', '.join(arrays)}; {needed}")
    return None


def read_reference(
    path: str | Path,
    network: nn.Module,
    size: tuple[int, int],
    device: torch.device,
    *,
    batch_size: int = 64,
    value_range: Range | None = None,
) -> FeatureSet:
    """The feature set of a reference, computed where the file does not hold it, by all processes together.

    Args:
        path: ADM's `.npz` (stored Inception moments are used, precision and recall take its images `arr_0`), an `.npz`
            with `mu` and `sigma` alone, EDM2's `.pkl`, a file of `save_reference`, or images as `open_images` takes
            them.
        network: as `load_features` gives it, on `device`.
        size: height and width of the samples.
        value_range: of images that are floats.
    Raises:
        InputError: unreadable, of another size, or of another feature space.
    """
    # What can be refused without reading an image; and what the file holds already.
    path = Path(path)
    with main_first():
        source = reference_images(path, value_range)
        if path.suffix == ".pkl" and path.is_file():
            return _edm2_file(path, network)
        arrays = open_npz(path) if path.is_file() and path.suffix != ".npy" else {}
        if "meta" in arrays:
            return _own_file(path, arrays, network, size, device)
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
            say(f"{path}: the stored moments are Inception's; {others}")
        # A folder may hold a whole training set: it gives precision and recall 10,000 images, evenly spread.
        keep = None if path.is_file() else torch.tensor(evenly_spaced(len(source), NEIGHBOUR_IMAGES))
        return extract(source, network, device, batch_size=batch_size, keep=keep, description="reference")

    # Stored moments: FID is then the published one. Precision and recall still need images.
    images = None
    if source is not None:
        images = extract(source, network, device, batch_size=batch_size, description="reference images")
    elif spatial is None:
        note = f"{path} holds mu and sigma alone, as pytorch-fid and clean-fid write them: {OTHER_RESIZING}"
        return _moments_alone(path, None, pool, note)
    missing = [name for name, found in (("sFID", spatial), ("precision, recall or KID", images)) if found is None]
    notes = [] if images is None else list(images.notes)
    if missing:
        notes.append(f"{path} has nothing to compute {' or '.join(missing)} from")
        say(notes[-1])
    return FeatureSet(None, pool, spatial, None if images is None else images.features, tuple(notes))


def _moments_alone(path: Path, count: int | None, pool: tuple[Tensor, Tensor], *notes: str) -> FeatureSet:
    """A reference of another tool, of which nothing but the Frechet distance can be had."""
    notes = (*notes, f"{path} has nothing to compute sFID, precision, recall or KID from")
    say(*notes)
    return FeatureSet(count, pool, None, None, notes)


def _edm2_file(path: Path, network: nn.Module) -> FeatureSet:
    """The moments of this network's space in a reference of EDM2 (its calculate_metrics.py)."""
    contents = read_pickled_numbers(path)
    spaces = [name for name, value in contents.items() if isinstance(value, dict)]
    name = {"inception": "fid", "dinov2-vit-l": "fd_dinov2"}.get(network.label)
    if name not in spaces:
        known = "fid (--features inception) and fd_dinov2 (--features dinov2-vit-l) are read"
        given = f"--features {network.label} was given"
        raise InputError(f"{path} holds {', '.join(contents) or 'nothing'}; {known}, {given}")
    count = contents.get("num_images")
    arrays = {key: value for key, value in contents[name].items() if isinstance(value, np.ndarray)}
    pool = _moments(path, arrays, "mu", "sigma", network.dim)
    return _moments_alone(path, count if type(count) is int else None, pool)


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
    if reference.notes:
        meta["notes"] = reference.notes
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
        notes = tuple(printable(str(note)) for note in meta.get("notes", ()))
        if not (count is None or (type(count) is int and count > 0)):  # None: moments of a file that does not say
            raise TypeError("count")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: 'meta' is not that of a --save-stats file ({error!r})") from None
    if not known:
        raise InputError(f"{path} has format {meta['format']}; this code reads up to {FORMAT}")
    if label != network.label:
        raise InputError(f"{path} was made in the space of {label}; --features asks for {network.label}")
    if made_for != tuple(size):
        raise InputError(f"{path} was made from {made_for} images; {tuple(size)} is needed")

    # The label names a network; the features of the fixed image tell whether its weights were these.
    own = probe(network, size, device)
    has_probe = "probe" in arrays and arrays["probe"].shape == own.shape
    if not has_probe or not same_network(_tensor(path, arrays, "probe"), own):
        raise InputError(f"{path} was made with other weights of {label}; make it again with --save-stats")

    shape = arrays["features"].shape if "features" in arrays else (0, network.dim)
    if shape[1:] != (network.dim,):
        raise InputError(f"{path}: features are {shape}; (images, {network.dim}) are needed")
    features = _tensor(path, arrays, "features") if "features" in arrays else None
    spatial = _moments(path, arrays, "mu_s", "sigma_s", network.spatial_dim) if "mu_s" in arrays else None
    say(*notes)
    return FeatureSet(count, _moments(path, arrays, "mu", "sigma", network.dim), spatial, features, notes)


def _moments(path: Path, arrays: dict, mean: str, covariance: str, dim: int) -> tuple[Tensor, Tensor]:
    for name, shape in ((mean, (dim,)), (covariance, (dim, dim))):
        found = arrays[name].shape if name in arrays else "absent"
        if found != shape:
            raise InputError(f"{path}: {name} is {found}; {shape} is needed")
    return _tensor(path, arrays, mean).double(), _tensor(path, arrays, covariance).double()


def _tensor(path: Path, arrays: dict, name: str) -> Tensor:
    array = np.asarray(arrays[name])
    kind = array.dtype
    if kind.kind == "f":  # torch has neither other machines' byte order nor more than 64 bits
        array = np.array(array, np.float64 if kind.itemsize > 8 else kind.newbyteorder("="))
    if kind.kind != "f" or not np.isfinite(array).all():
        raise InputError(f"{path}: {name} is {kind} or not finite; finite numbers are needed")
    return torch.from_numpy(array)
