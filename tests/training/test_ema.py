"""The moving average against the public implementation."""

import copy

import pytest
import torch

from models.sit import SiT
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


def test_tables_of_rotary_positions_do_not_drift():
    sit = SiT(input_size=12, hidden_size=16, num_heads=1, depth=1, encoder_depth=1, lightning=True)
    ema, before = copy.deepcopy(sit), copy.deepcopy(sit.feat_rope.state_dict())
    for _ in range(20):
        update_ema(ema, sit, 0.9999)
    assert all(torch.equal(before[key], value) for key, value in ema.feat_rope.state_dict().items())
    assert not torch.equal(ema.pos_embed, sit.pos_embed)  # as any other constant does, for example the position table
