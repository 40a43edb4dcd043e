"""One thread, so that bits do not depend on the machine and tests do not crowd each other; no GPU; and small inputs."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start; before torch reads it

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# Fuzz tests: the same examples every time, and no notes on disk; FUZZ_EXAMPLES=5000 looks longer.
settings.register_profile(
    "repeatable",
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 50)),
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


def pytest_configure(config):
    """Cards are for the tests marked `gpu`: the others, and the processes that they start, are those of a CPU anywhere.

    CUDA reads the variable when it is first asked for, which neither torch's import nor this file does.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Inputs of all training scripts, made once (`tests.support.small.write_place`). Tests leave them as they are."""
    import cache_latents
    from tests.support import small

    size = small.ON_A_CARD if torch.cuda.is_available() else {}
    place = small.write_place(tmp_path_factory.mktemp("place"), **size)
    cache_latents.main(small.cache_options(place, place.latents))
    return place


@pytest.fixture(scope="session")
def vgg_file(tmp_path_factory):
    """VGG16 as torchvision stores it, with filled weights."""
    from tests.support.golden_data import filled_vgg16

    file = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(filled_vgg16() | {"classifier.0.bias": torch.zeros(4096)}, file)
    return file


@pytest.fixture(scope="session")
def lpips(vgg_file):
    from loss.perceptual import load_lpips

    return load_lpips(vgg_file)


@pytest.fixture(scope="session")
def exps(tmp_path_factory):
    """Runs to sample from (`tests.support.sampling.write_runs`), made once. Tests leave them as they are."""
    from tests.support.sampling import write_runs

    return write_runs(tmp_path_factory.mktemp("exps"))


@pytest.fixture
def few_steps():
    """`tests.support.evaluation_data.few_sampling_steps` for a test."""
    from tests.support.evaluation_data import few_sampling_steps

    with few_sampling_steps():
        yield


@pytest.fixture(autouse=True)
def no_logging_left():
    """A script's handlers on the root logger end with the test, also where the script did not reach its end."""
    import logging

    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
    root.setLevel(level)
