"""SiT's weights as they are found: the original SiT's convention, LightningDiT's and REPA's files, another grid, a
start from an LDM."""

import pytest
import torch

from models.sit import SiT, sincos_positions
from models.sit_files import config_of_state_dict, find_sit_state, fit_positions, load_sit, start_from
from tests.support.golden_data import close, load
from tests.support.golden_lightning import ABS, REL, build
from tests.support.sampling import random_sit
from utils.errors import InputError

PATCH, CHANNELS = 2, 4


@pytest.fixture(scope="module")
def sit():
    return random_sit(1).eval()


def original(sit: SiT) -> dict[str, torch.Tensor]:
    """A state dict as the original SiT's, with the weights of ours and a last layer of twice the channels."""
    state = {key: value for key, value in sit.state_dict().items() if not key.startswith(("bn.", "projectors."))}
    generator = torch.Generator().manual_seed(0)
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state[key].unflatten(0, (PATCH, PATCH, CHANNELS))
        other = torch.randn(rows.shape, generator=generator)
        state[key] = torch.cat([rows, other], dim=2).flatten(0, 2)
    return state


@torch.no_grad()
def test_the_original_sit_becomes_ours_with_time_and_velocity_turned(sit):
    """Its forward is that of our network with the same weights, at s = 1 - t; the further channels are not read."""
    state, notes = find_sit_state(original(sit), "SiT-XL-2-256x256.pt")
    ours = SiT(**config_of_state_dict(state, num_heads=3)).eval()
    ours.load_state_dict(state | {key: value for key, value in ours.state_dict().items() if key.startswith("bn.")})
    x, t, labels = torch.randn(5, 4, 6, 6), torch.tensor([0.0, 0.1, 0.5, 0.77, 1.0]), torch.arange(5)
    torch.testing.assert_close(ours(x, t, labels)[0], -sit(x, 1 - t, labels)[0], rtol=1e-5, atol=1e-6)
    assert len(notes) == 1 and "the original SiT's" in notes[0]


@pytest.fixture(scope="module")
def lightning():
    """A LightningDiT with weights as theirs: a function of their time."""
    return build(load("options/ldit_net")[1]["cases"]["full"]).eval()


def without_bn(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if not key.startswith("bn.")}


@torch.no_grad()
def test_lightning_dit_becomes_ours_with_time_and_velocity_turned_once(lightning):
    theirs, (arrays, _) = without_bn(lightning.state_dict()), load("options/ldit_net")
    other = {key: value + 1 for key, value in theirs.items()}
    arguments = [torch.from_numpy(arrays[f"full.{key}"]) for key in ("in.x", "ours.t", "in.y")]
    for contents, said in (
        ({"model": other, "ema": theirs, "opt": {}, "config": {}}, 1),
        ({"model": theirs, "config": {}}, 2),  # no average: said
        (theirs, 1),
        ({f"module.{key}": value for key, value in theirs.items()}, 1),
    ):
        state, notes = find_sit_state(contents, "lightningdit-xl-imagenet256-64ep.pt")
        assert len(notes) == said and "LightningDiT's, whose t = 1 is data" in notes[-1]
        ours = SiT(**config_of_state_dict(state)).eval()
        ours.load_state_dict(state, strict=False)
        close(ours(*arguments)[0], arrays["full.ours.velocity"], REL, ABS)

    # Joint training can start from it, with fresh projectors and its VAE's statistics.
    joint = SiT(**config_of_state_dict(state) | dict(z_dims=[8], projector_dim=16))
    (note,) = start_from(joint, state, "lightningdit.pt")
    assert "this run's start fresh" in note
    assert torch.equal(joint.blocks[0].mlp.w3.weight, state["blocks.0.mlp.w3.weight"])

    # What training here made has a normaliser: it is ours already.
    own = ours.state_dict()
    state, notes = find_sit_state({"ema": own, "model": own}, "x.pt")
    assert notes == [] and all(torch.equal(state[key], own[key]) for key in own)


def test_lightning_dit_of_other_positions_is_refused(lightning):
    theirs = without_bn(lightning.state_dict())
    halves = theirs["feat_rope.freqs_cos"].unflatten(1, (2, -1)).flip(1).flatten(1)  # columns, then rows
    with pytest.raises(InputError, match=r"x\.pt: feat_rope\.freqs_cos is not the table of rotary positions"):
        find_sit_state(theirs | {"feat_rope.freqs_cos": halves}, "x.pt")
    with pytest.raises(InputError, match="heads of 10 channels, which 48 do not make"):
        find_sit_state(theirs | {"feat_rope.freqs_cos": torch.zeros(16, 10)}, "x.pt")
    with pytest.raises(InputError, match="holds no 'model', the weights that were asked for"):
        find_sit_state({"ema": theirs}, "x.pt", ema=False)


def test_rotary_positions_are_made_for_another_grid(lightning):
    larger = SiT(**config_of_state_dict(lightning.state_dict()) | {"input_size": 8})
    before = larger.feat_rope.freqs_cos.clone()
    (note,) = load_sit(larger, lightning.state_dict(), "x.pt: model")
    assert "4 x 4 tokens become 8 x 8" in note and torch.equal(larger.feat_rope.freqs_cos, before)


def test_weights_are_found_in_every_wrapping(sit):
    own = sit.state_dict()
    repas = without_bn(own)
    other = {key: value + 1 for key, value in repas.items()}
    decoder = {
        f"decoder_{key.replace('blocks.1', 'blocks.0')}" if key.startswith("blocks.1.") else key: value
        for key, value in repas.items()
    }
    for contents in (
        {"ema": repas, "model": other, "steps": 5},
        repas | {"args": {}},
        {f"module.{key}": value for key, value in repas.items()},
        {"ema": {f"_orig_mod.module.{key}": value for key, value in repas.items()}},
        decoder,  # REPA's first release counted the blocks after the alignment anew
    ):
        state, notes = find_sit_state(contents, "x.pt")
        assert state.keys() == repas.keys() and notes == []
        assert all(torch.equal(state[key], repas[key]) for key in state)
    assert torch.equal(
        find_sit_state({"ema": own, "model": other}, "x.pt", ema=False)[0]["pos_embed"], other["pos_embed"]
    )


@pytest.mark.parametrize(
    ("contents", "needed"),
    [
        ({"weights": torch.zeros(1)}, "lacks 'x_embedder.proj.weight'"),
        ({"model": {"x": torch.zeros(1)}}, "holds no 'ema', the weights that were asked for, but 'model'"),
        ({"ema": {}}, "holds no SiT"),
    ],
)
def test_what_is_no_sit_is_refused(contents, needed):
    with pytest.raises(InputError, match=needed):
        find_sit_state(contents, "x.pt")


def test_a_direction_of_time_that_nothing_tells_is_refused(sit):
    bare = {key: value for key, value in sit.state_dict().items() if not key.startswith(("bn.", "projectors."))}
    with pytest.raises(InputError, match="does not show which way its time runs"):
        find_sit_state(bare, "x.pt")
    with pytest.raises(InputError, match="one set of weights"):
        find_sit_state(original(sit), "x.pt", ema=False)


def test_positions_for_another_grid_are_sines_and_keep_what_was_learnt():
    table = sincos_positions(48, 3)
    assert torch.equal(fit_positions(table, 3), table)
    torch.testing.assert_close(fit_positions(table, 6), sincos_positions(48, 6), rtol=0, atol=1e-6)
    torch.testing.assert_close(fit_positions(table + 0.25, 6), sincos_positions(48, 6) + 0.25, rtol=0, atol=1e-5)


def test_another_grid_is_loaded_and_said_and_nothing_else_may_differ(sit):
    larger = SiT(**config_of_state_dict(sit.state_dict(), num_heads=3) | {"input_size": 12})
    (note,) = load_sit(larger, sit.state_dict(), "x.pt: model")
    assert "3 x 3 tokens become 6 x 6" in note
    assert load_sit(random_sit(2), sit.state_dict(), "x.pt: model") == []
    state = dict(sit.state_dict())
    del state["final_layer.linear.bias"]
    with pytest.raises(InputError, match=r"x\.pt: model lacks final_layer\.linear\.bias"):
        load_sit(larger, state, "x.pt: model")


def test_a_start_from_an_ldm_keeps_the_normaliser_and_projectors_of_other_encoders(sit):
    config = config_of_state_dict(sit.state_dict(), num_heads=3)
    fresh = SiT(**config | {"z_dims": [8, 16]})
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    (note,) = start_from(fresh, sit.state_dict(), "ldm.pt")
    assert "projectors" in note
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, before[key] if key.startswith(("bn.", "projectors.")) else sit.state_dict()[key]), key
    assert start_from(SiT(**config), sit.state_dict(), "ldm.pt") == []
    with pytest.raises(InputError, match=r"^ldm\.pt has blocks 2, not 3; rows of the label table 11, not 4"):
        start_from(SiT(**config | {"depth": 3, "num_classes": 3}), sit.state_dict(), "ldm.pt")
