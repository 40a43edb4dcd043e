"""A gradient or a batch that is not finite: what stands still, and what goes on as if nothing were."""

import math

import pytest
import torch

from tests.gpu import steps
from tests.support import small

pytestmark = pytest.mark.usefixtures("leaves_numerics")
# Optimiser -> its network in a checkpoint and in a row.
NETWORKS = {"opt": ("model", "sit"), "opt_vae": ("vae", "vae"), "opt_disc": ("discriminator", "disc")}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # they follow batches, not gradients
THREE_STEPS = dict(max_train_steps=3, checkpointing_steps=1, compile=False, deterministic=True)
# fp16 is slow on a CPU, where test_b_steps.py has its overflow.
WHERE = [
    pytest.param(device, precision, marks=[getattr(pytest.mark, mark)] if mark else [])
    for device, precision, mark in (
        ("cpu", "no", ""),
        ("cpu", "fp16", "slow"),
        ("cuda", "no", "gpu"),
        ("cuda", "bf16", "gpu"),
        ("cuda", "fp16", "gpu"),
    )
]


def parameters(state: dict) -> dict:
    return {name: tensor.clone() for name, tensor in state.items() if not name.endswith(BUFFERS)}


@pytest.fixture(scope="module")
def plain(place, tmp_path_factory):
    """`plain(device, precision)`: the checkpoint of step 2 of an ordinary run; made once."""
    output, made = tmp_path_factory.mktemp("plain"), set()

    def run(device: str, precision: str) -> dict:
        name = f"{device}-{precision}"
        if name not in made:
            steps.train("train_repae", place, output, name, mixed_precision=precision, **THREE_STEPS)
            made.add(name)
        return small.checkpoint(output, name, 2)

    return run


@pytest.mark.parametrize(("device", "precision"), WHERE)
@pytest.mark.parametrize("planted", NETWORKS)
def test_a_bad_gradient_stops_its_network_for_its_step_alone(
    planted, device, precision, plain, place, tmp_path, monkeypatch
):
    """Its weights and moments are those of the step before; the others' are those of a run without it, bit for bit."""

    def around(step, call, nets, optimizers):
        weight = next(p for p in vars(optimizers)[planted].parameters if p.requires_grad)
        bad = math.nan if precision == "bf16" else math.inf
        handle = weight.register_hook(lambda grad: torch.full_like(grad, bad)) if step == 1 else None
        logs = call()
        if handle:
            handle.remove()
        return logs

    ordinary = plain(device, precision)
    steps.around_steps(monkeypatch, "train_repae", around)
    steps.train("train_repae", place, tmp_path, "run", mixed_precision=precision, **THREE_STEPS)
    one, two, three = (small.checkpoint(tmp_path, "run", step) for step in (1, 2, 3))
    rows = small.metrics(tmp_path, "run")
    for key, (network, name) in NETWORKS.items():
        stands = key == planted
        expected = one if stands else ordinary
        small.assert_same(parameters(two[network]), parameters(expected[network]))
        small.assert_same(two[key], expected[key])
        with pytest.raises(AssertionError):
            small.assert_same(parameters(three[network]), parameters(two[network]))
        assert [row[f"skipped_steps_{name}"] for row in rows] == [0, int(stands), 0]
        assert [row[f"grad_norm_{name}"] is None for row in rows] == [False, stands, False]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_batch_with_bad_latents_costs_its_step_alone(device, place, tmp_path, monkeypatch, caplog):
    """One NaN of the encoder at step 1: nothing learns, no checkpoint is written; step 2 is an ordinary one again."""

    def spoil(encoder, inputs, output):
        return output.index_fill(0, torch.tensor([0], device=output.device), math.nan)

    def around(step, call, nets, optimizers):
        networks = [nets.sit, nets.vae, nets.discriminator]
        before = [parameters(network.state_dict()) for network in networks]
        handle = nets.vae.vae.encoder.register_forward_hook(spoil) if step == 1 else None
        logs = call()
        if handle:
            handle.remove()
        for network, old in zip(networks, before, strict=True):
            moved = any(not torch.equal(tensor, old[name]) for name, tensor in parameters(network.state_dict()).items())
            assert moved == (step != 1), (step, type(network))
        for module in (nets.sit, nets.ema, nets.vae, nets.discriminator_loss):
            assert all(tensor.isfinite().all() for tensor in module.state_dict().values()), (step, type(module))
        return logs

    steps.around_steps(monkeypatch, "train_repae", around)
    steps.train("train_repae", place, tmp_path, "run", **THREE_STEPS)
    rows = small.metrics(tmp_path, "run")
    for name in ("sit", "vae", "disc"):
        assert [row[f"skipped_steps_{name}"] for row in rows] == [0, 1, 0]
    assert [row["sit_loss"] is None for row in rows] == [row["latent_std"] is None for row in rows]
    assert [row["sit_loss"] is None for row in rows] == [False, True, False]
    assert sorted(path.stem for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["0000001", "0000003"]
    assert "step 2: no checkpoint is written; not finite: vae_loss" in caplog.text
