"""LPIPS (arXiv 1801.03924), the `lpips` package's own network, with the VGG16 trunk loaded from a named file."""

import inspect
import warnings
from pathlib import Path

import torch
from torch import nn

from utils.errors import InputError, about
from utils.hub import cache_path, download, fetch_once
from utils.torch_files import read_torch_file

VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"  # torchvision, IMAGENET1K_V1, 528 MB
VGG16_SHA256 = "397923af"  # its beginning


def load_lpips(weights: str | Path | None = None, *, flag: str = "--lpips-weights") -> nn.Module:
    """Frozen LPIPS v0.1 over VGG16, in eval mode: (pixels, pixels), each [-1, 1] (B, 3, H, W), -> (B, 1, 1, 1).

    Args:
        weights: state dict of torchvision's vgg16 (only its `features.*` count); None: the file in torch's hub cache,
            downloaded there once.

    Raises:
        InputError: the file is missing, unreadable or not a vgg16; or there is none and no way to download it.
    """
    # The trunk is torchvision's VGG16.
    path = _downloaded(flag) if weights is None else Path(weights)
    if not path.is_file():
        raise InputError(f"{flag}: {path} does not exist; {_where_to_put_it(flag)}")
    with about(flag):
        trunk = read_torch_file(path)

    # Weights: trunk from the file, calibration ("lin" layers) from the package, and the scaling of its constructor.
    network = lpips_by_shape()
    packaged = Path(inspect.getfile(type(network))).parent / "weights/v0.1/vgg.pth"
    calibration = torch.load(packaged, map_location="cpu", weights_only=True)
    state = {"scaling_layer.shift": network.scaling_layer.shift, "scaling_layer.scale": network.scaling_layer.scale}
    for key, parameter in network.state_dict().items():
        if key.startswith("net."):  # net.slice2.5.weight is torchvision's features.5.weight
            state[key] = _trunk_tensor(trunk, f"features.{key.split('.', 2)[2]}", parameter.shape, f"{flag}: {path}")
        elif key.startswith("lin"):  # each layer is registered twice: lin0.* and lins.0.*
            state[key] = calibration[key.replace("lins.", "lin")]
    network.load_state_dict(state, assign=True)
    return network


def lpips_by_shape() -> nn.Module:
    """The network of `load_lpips` without weights, on the meta device: no download, and no draw from torch's global
    generator."""
    import lpips  # late: it pulls in torchvision and scipy, and a perceptual weight of 0 needs none of it

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lpips still says `pretrained=` to torchvision
        network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    return network.requires_grad_(False).eval()


def _trunk_tensor(trunk: dict, key: str, shape: torch.Size, where: str) -> torch.Tensor:
    tensor = trunk.get(key)
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{where} is not a torchvision vgg16 state dict: it lacks {key!r}")
    if tensor.shape != shape:
        raise InputError(f"{where}: {key!r} has shape {tuple(tensor.shape)}; vgg16 needs {tuple(shape)}")
    return tensor.to(torch.float32, copy=True)


def _downloaded(flag: str) -> Path:
    """The trunk in torch's hub cache; when absent, downloaded by one process while the others wait for it."""
    try:
        return fetch_once(VGG16_URL, lambda path: download(VGG16_URL, path, VGG16_SHA256))
    except (OSError, RuntimeError) as error:
        problem = f"LPIPS needs VGG16, and it cannot be downloaded ({error})"
        raise InputError(f"{problem}; {_where_to_put_it(flag)}") from None


def _where_to_put_it(flag: str) -> str:
    return (
        f"fetch {VGG16_URL} (528 MB) and put it at {cache_path(VGG16_URL)} or name it with {flag}; "
        "perceptual_weight: 0 in the loss configuration needs none"
    )
