"""The moving average against the public implementation."""

import pytest
import torch

from tests.support.golden_data import close, load
from training.ema import update_ema

ARRAYS, META = load("ema")


class Small(torch.nn.Module):
    def __init__(self, prefix):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(3, 5))
        self.b = torch.nn.Parameter(torch.zeros(5), requires_grad=False)
        self.register_buffer("aux", torch.zeros(3))
        self.bn = torch.nn.BatchNorm2d(4, affine=False)
        self.load_state_dict({key: torch.from_numpy(ARRAYS[f"{prefix}.{key}"]) for key in self.state_dict()})


@pytest.mark.parametrize("decay", META["decays"])
def test_updates_are_those_of_the_public_code(decay):
    ema, model = Small("ema_before"), Small("model")
    for count in ("one", "two"):
        update_ema(ema, model, decay)
        for key, value in ema.state_dict().items():
            close(value, ARRAYS[f"after.decay{decay}.{count}.{key}"], 1e-6, what=key)
