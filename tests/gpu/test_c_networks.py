"""Networks and samplers on a device: against the public code's numbers, and against the CPU's.

Bounds are of the largest value. Float32 without TF32 comes within 1e-4 whatever the order of the sums (the CPU's own
tests hold it to 1e-5 and 2e-5); bf16 keeps 8 bits, a unit of 4e-3, of which a network's layers gather some.
"""

import pytest
import torch
from torch import Tensor, nn

from evaluation.inception import load_inception
from models.encoders import encoders_by_shape
from models.posterior import TrainableVAE
from models.sit import SiT
from models.vae import build_vae
from models.vae_keys import from_ldm, to_ldm
from sampling.samplers import euler, euler_maruyama, heun
from tests.gpu.full_size import with_random_weights
from tests.support.evaluation_data import as_images, inception_file, random_images
from tests.support.golden_data import filled, load
from utils.images import to_signed

EVERYWHERE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
FLOAT32, BF16 = 1e-4, 5e-2
SAMPLES, RUNS = load("samplers")


@pytest.fixture(autouse=True)
def float32(leaves_numerics):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def distance(found: Tensor, expected) -> float:
    """Largest difference over the largest value expected."""
    found, expected = found.detach().cpu().double(), torch.as_tensor(expected).double()
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def golden_sit() -> SiT:
    sit = SiT(**RUNS["config"])
    sit.load_state_dict(filled(load("sit_a")[1]["manifest"]), strict=False)
    return sit.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("arch", "device"),
    [
        pytest.param("f8d4", "cpu", marks=pytest.mark.slow),
        ("f16d32", "cpu"),
        pytest.param("f8d4", "cuda", marks=pytest.mark.gpu),
        pytest.param("f16d32", "cuda", marks=pytest.mark.gpu),
    ],
)
@torch.no_grad()
def test_golden_vae(arch, device, bounded):
    arrays, _ = load(f"vae_{arch}")
    vae = build_vae(arch)
    vae.load_state_dict(from_ldm(filled({key: tensor.shape for key, tensor in to_ldm(vae).items()}), vae.config))
    image, eps = (torch.from_numpy(arrays[f"in.{key}"]).to(device) for key in ("image_u8", "eps"))
    _, z, reconstruction = TrainableVAE(vae.to(device))(to_signed(image), eps)
    bounded("z", distance(z, arrays["z"]), FLOAT32)
    bounded("reconstruction", distance(reconstruction, arrays["recon"]), FLOAT32)


@EVERYWHERE
@pytest.mark.parametrize(("precision", "bound"), [("float32", FLOAT32), ("bfloat16", BF16)])
@pytest.mark.parametrize("run", RUNS["runs"], ids=lambda run: run["name"])
@torch.no_grad()
def test_golden_samples(run, precision, bound, device, bounded):
    sit = golden_sit().to(device)

    def velocity(x_t, t, labels):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            return sit(x_t, t, labels)[0].float()

    noise, labels = (torch.from_numpy(SAMPLES[key]).to(device) for key in ("in.latents", "in.y"))
    interval = (run["guidance_low"], run["guidance_high"])
    settings = dict(num_steps=run["num_steps"], guidance_scale=run["cfg_scale"], guidance_interval=interval)
    settings |= dict(null_label=1000)
    if run["kind"] == "sde":
        steps = torch.from_numpy(SAMPLES[f"{run['name']}.noise"]).to(device)
        settings |= dict(path_type=run["path_type"], step_noise=lambda i: steps[i])
    out = {"euler": euler, "heun": heun, "sde": euler_maruyama}[run["kind"]](velocity, noise, labels, **settings)
    bounded("samples", distance(out, SAMPLES[f"{run['name']}.out"]), bound)


@EVERYWHERE
@pytest.mark.parametrize("name", ["inception", "encoder"])
@torch.no_grad()
def test_features_are_the_cpus(name, device, tmp_path, bounded):
    """A batch on the device against one image after another on the CPU."""
    images, network = as_images(random_images(2, 64, 0)), feature_network(name, tmp_path)
    expected = torch.cat([features(network, image) for image in images.split(1)])
    bounded("features", distance(features(network.to(device), images.to(device)), expected), FLOAT32)


def feature_network(name: str, folder) -> nn.Module:
    if name == "inception":
        return load_inception(inception_file(folder))
    with torch.device("meta"):
        (encoder,) = encoders_by_shape("mocov3-vit-s", 64)
    torch.manual_seed(0)
    return with_random_weights(encoder).eval()


def features(network: nn.Module, images: Tensor) -> Tensor:
    found = network(images)
    return (found[0] if isinstance(found, tuple) else found).cpu()
