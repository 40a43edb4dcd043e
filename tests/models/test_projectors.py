"""Projection heads, against iREPA's."""

import pytest
import torch

from loss.alignment import alignment_loss, normalize_spatially
from loss.velocity import velocity_loss
from models.interpolant import interpolate
from models.projectors import ConvProjector, build_projector
from models.sit import SiT
from models.sit_files import config_of_state_dict
from tests.support.golden_data import close, filled, load
from tests.support.golden_sit import ABS, REL

ARRAYS, META = load("options/irepa")
IGNORED = "qkv.bias"  # its middle third is rounding noise


def ours(state: dict, kind: str) -> dict:
    """Weights under our names: REPA's head lies one level deeper in iREPA, and its linear one is a kernel of 1 x 1."""
    if kind == "linear":
        return {key: x.view(*x.shape, 1, 1) if x.ndim == 2 else x for key, x in state.items()}
    return {key.replace(".projection_layer", "") if kind == "mlp" else key: x for key, x in state.items()}


@pytest.mark.parametrize("kind", META["layers"])
def test_projectors_are_those_of_irepa(kind):
    weights = ours(filled(META["layers"][kind]["manifest"]), kind)
    head = build_projector({"linear": "conv1"}.get(kind, kind), 48, 64, 32, grid=4)
    head.load_state_dict({key.removeprefix("projectors.0."): x for key, x in weights.items()})
    tokens = torch.from_numpy(ARRAYS["proj.in"]).requires_grad_()
    out = head(tokens)
    (out * torch.from_numpy(ARRAYS["proj.weight"])).sum().backward()
    close(out, ARRAYS[f"proj.{kind}.out"], REL, ABS)
    close(tokens.grad, ARRAYS[f"proj.{kind}.grad_in"], REL, ABS)
    gradients = {f"projectors.0.{key}": parameter.grad for key, parameter in head.named_parameters()}
    for key in META["layers"][kind]["manifest"]:
        (name,) = ours({key: torch.zeros(1)}, kind)
        found = gradients[name] if kind != "linear" else gradients[name].squeeze()
        close(found, ARRAYS[f"proj.{kind}.grad.{key}"], REL, ABS, key)


def test_tokens_are_the_grid_row_by_row():
    head = ConvProjector(8, 6, 3, rows=3)
    manifest = {f"projectors.0.{key}": x.shape for key, x in head.state_dict().items()}
    head.load_state_dict({key.removeprefix("projectors.0."): x for key, x in filled(manifest).items()})
    close(head(torch.from_numpy(ARRAYS["proj.hw3x5.in"])), ARRAYS["proj.hw3x5.out"], REL, ABS)


@pytest.mark.parametrize("case", META["full"])
def test_a_whole_step_is_that_of_irepa(case):
    settings = META["full"][case]
    mlp = settings["projection_layer_type"] == "mlp"
    kind = "mlp" if mlp else f"conv{settings['kernel_size']}"
    sit = SiT(**META["config"], projector=kind)
    weights = filled(settings["manifest"])
    found = sit.load_state_dict(ours(weights, kind), strict=False)
    assert not found.unexpected_keys and {key.split(".")[0] for key in found.missing_keys} == {"pos_embed", "bn"}
    x_0, noise, t = (torch.from_numpy(ARRAYS[f"in.{key}"]) for key in ("x_0", "noise", "t"))
    targets = torch.from_numpy(ARRAYS["in.zs_raw.0"])
    if settings["spnorm"] == "zscore":
        targets = normalize_spatially(targets, settings["zscore_alpha"])
    close(targets, ARRAYS[f"{case}.zs.0"], REL, ABS)

    x_t, velocity_target = interpolate(x_0, noise, t.flatten(), "linear")
    velocity, projections = sit(x_t, t.flatten(), torch.tensor(settings["labels_after_drop"]))
    denoising, alignment = velocity_loss(velocity, velocity_target), alignment_loss(projections, [targets])
    total = denoising.mean() + settings["proj_coeff"] * alignment
    total.backward()
    close(projections[0], ARRAYS[f"{case}.zs_tilde.0"], REL, ABS)
    close(denoising, ARRAYS[f"{case}.denoising_loss"], REL, ABS)
    close(alignment, settings["proj_loss_unweighted"], REL, ABS)
    close(settings["proj_coeff"] * alignment, ARRAYS[f"{case}.proj_loss_weighted"], REL, ABS)
    close(total, ARRAYS[f"{case}.total"], REL, ABS)

    gradients = {key: parameter.grad for key, parameter in sit.named_parameters() if parameter.grad is not None}
    for key, norm in settings["grad_l2"].items():
        (name,) = ours({key: torch.zeros(1)}, kind)
        if norm is not None and IGNORED not in key:
            close(gradients[name].double().norm(), norm, 1e-5, 1e-7, key)
            if f"{case}.grad.{key}" in ARRAYS:
                close(gradients[name], ARRAYS[f"{case}.grad.{key}"], REL, ABS, key)


@pytest.mark.parametrize("kind", ["mlp", "conv1", "conv3"])
def test_a_file_shows_its_projectors(kind):
    shape = dict(hidden_size=48, depth=1, num_heads=3, encoder_depth=1, projector_dim=16, qk_norm=True)
    sit = SiT(input_size=4, **shape, z_dims=[8, 12], projector=kind)
    config = config_of_state_dict(sit.state_dict())
    assert config["z_dims"] == [8, 12] and config.get("projector", "mlp") == kind
    SiT(**config).load_state_dict(sit.state_dict())


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="conv5"):
        build_projector("conv5", 8, 8, 8, grid=2)
    shape = dict(hidden_size=48, depth=1, num_heads=3, encoder_depth=1, projector_dim=16, qk_norm=True)
    state = SiT(input_size=4, **shape, z_dims=[8], projector="conv3").state_dict()
    with pytest.raises(ValueError, match="conv5"):
        config_of_state_dict(state | {"projectors.0.projection_layer.weight": torch.zeros(8, 48, 5, 5)})
