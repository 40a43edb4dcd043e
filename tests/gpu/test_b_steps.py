"""Training steps of the scripts: half precision, overflow, compiling, waiting, resuming, memory.

Each test runs on the CPU (`make test`, a few in `make test-slow`), on networks that are tiny, and on a GPU (`make
test-gpu`), on SiT-S/2 at 128 pixels, with the same bounds.
"""

import contextlib
import math

import pytest
import torch

from tests.gpu import steps
from tests.support import small
from utils.rng import Draws

pytestmark = pytest.mark.usefixtures("leaves_numerics")
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
EVERYWHERE = pytest.mark.parametrize("device", ["cpu", GPU])
# On the CPU what takes a second or two; the others are slow tests there.
QUICK = [("train_repae", "no"), ("train_repae", "bf16"), ("train_ldm_only", "fp16"), ("train_vae", "no")]
HALF_PRECISION = pytest.mark.parametrize(
    ("script", "precision", "device"),
    [
        pytest.param(script, precision, device, marks=[getattr(pytest.mark, mark)] if mark else [])
        for script in steps.SCRIPTS
        for precision in ("bf16", "fp16")
        for device, mark in (("cuda", "gpu"), ("cpu", "" if (script, precision) in QUICK else "slow"))
    ],
)
# Nothing is compiled on the CPU: what looks on there keeps graphs from being used.
EAGER = [(script, precision, False) for script in steps.SCRIPTS for precision in ("no", "bf16", "fp16")]
COMPILED = [("train_repae", "fp16", True), ("train_repae", "bf16", True), ("train_ldm_only", "fp16", True)]
NO_WAIT = pytest.mark.parametrize(
    ("script", "precision", "compiled", "device"),
    [(*case, False, "cpu") for case in QUICK]
    + [pytest.param(*case, "cuda", marks=pytest.mark.gpu) for case in EAGER + COMPILED],
)

# Of |a - b| / (|b| + 0.1): bf16 keeps 8 bits of the network's values, fp16 11.
LOSSES = {"bf16": 0.1, "fp16": 0.03}
# Of 1 - cosine: AdamW's first steps are signs of gradients, which rounding turns over where these are near zero.
MOVEMENTS = {"bf16": 0.15, "fp16": 0.1}
ROUNDING = 2e-3  # of a compiled graph
GROWTH = 2**16  # bytes; 512 a step, the least that CUDA gives, would be more


@HALF_PRECISION
def test_half_precision_is_near_float32(script, precision, device, place, tmp_path, bounded):
    for name in ("no", precision):
        steps.train(script, place, tmp_path, name, mixed_precision=name, compile=False, allow_tf32=False)
    bounded("losses", steps.loss_distance(tmp_path, precision, "no"), LOSSES[precision])
    found, expected = (steps.movements(tmp_path, name) for name in (precision, "no"))
    for net in expected:
        bounded(f"movement of {net}", steps.movement_distance(found[net], expected[net]), MOVEMENTS[precision])


@EVERYWHERE
def test_an_overflow_skips_one_network_alone(device, place, tmp_path, monkeypatch):
    """An inf comes into one network's gradients at a time: it rests, its scale halves, the others go on."""
    overflows, seen = {1: "opt", 2: "opt_vae", 3: "opt_disc"}, {}

    def around(step, call, nets, optimizers):
        every = vars(optimizers)
        if step == 0:
            for one in every.values():
                one.scaler = torch.amp.GradScaler(one.parameters[0].device.type, init_scale=2.0**8)
        before = {key: [p.detach().clone() for p in one.parameters] for key, one in every.items()}
        scales = {key: one.scaler.get_scale() for key, one in every.items()}
        with contextlib.ExitStack() as hooked:
            if step in overflows:
                weight = next(p for p in every[overflows[step]].parameters if p.requires_grad)
                handle = weight.register_hook(lambda grad: torch.full_like(grad, math.inf))
                hooked.callback(handle.remove)
            logs = call()
        for key, one in every.items():
            moved = any(not torch.equal(a, b) for a, b in zip(before[key], one.parameters, strict=True))
            seen[step, key] = moved, one.scaler.get_scale() / scales[key]
        return logs

    steps.around_steps(monkeypatch, "train_repae", around)
    steps.train("train_repae", place, tmp_path, "run", mixed_precision="fp16", compile=False)
    assert len(seen) == 12
    for (step, key), found in seen.items():
        assert found == ((False, 0.5) if overflows.get(step) == key else (True, 1)), (step, key)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), GPU])
@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("train_repae", {}),
        ("train_repae", dict(stop_grad=False)),
        ("train_repae", dict(vae_every=2, grad_checkpoint="vae,sit")),
        ("train_ldm_only", {}),
        ("train_vae", {}),
    ],
    ids=str,
)
def test_compiled_is_eager(script, options, device, place, tmp_path, bounded, monkeypatch):
    """Near losses, the very same tensors move, and nothing is compiled after the second step."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    steps.train(script, place, tmp_path, "eager", compile=False, allow_tf32=False, **options)
    graphs = []

    def around(step, call, nets, optimizers):
        logs = call()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return logs

    steps.around_steps(monkeypatch, script, around)
    steps.train(script, place, tmp_path, "compiled", compile=True, allow_tf32=False, **options)
    bounded("losses", steps.loss_distance(tmp_path, "compiled", "eager"), ROUNDING)
    found, expected = (steps.movements(tmp_path, name) for name in ("compiled", "eager"))
    bounded("tensors moved by one alone", sum(len(found[net].keys() ^ expected[net].keys()) for net in expected), 0)
    assert graphs[0] > 0
    bounded("graphs after two steps", graphs[-1] - graphs[1], 0)


@NO_WAIT
def test_no_step_waits_for_the_device(script, precision, compiled, device, place, tmp_path, monkeypatch):
    """Nor does what a run does between steps that are no interval's end: collecting scalars, sending the next batch.

    The first two steps fill caches and compile; steps 2 and 3 are looked at, with all that comes before step 4.
    On CUDA nothing may wait, under fp16 either: AdamW is fused there, and an overflow skips its step on the device.
    On a CPU AdamW is fused as on CUDA for it, and under fp16 the scaler, which looks for overflows there, rests.
    """
    torch._dynamo.reset()
    with contextlib.ExitStack() as looking:

        def around(step, call, nets, optimizers):
            if step == 2:
                for one in steps.optimizers_of(optimizers).values() if device == "cpu" else ():
                    one.adamw.param_groups[0]["fused"] = True
                    monkeypatch.setattr(one.scaler, "step", lambda *_: None)
                looking.enter_context(steps.no_look())
            if step == 4:
                looking.close()
            return call()

        steps.around_steps(monkeypatch, script, around)
        one_row = dict(max_train_steps=5, log_steps=5, checkpointing_steps=5)
        steps.train(script, place, tmp_path, "run", mixed_precision=precision, compile=compiled, **one_row)
    assert len(small.metrics(tmp_path, "run")) == 1


RESUMED = [(script, False) for script in steps.SCRIPTS] + [("train_repae", True), ("train_ldm_only", True)]


@pytest.mark.parametrize(("script", "compiled"), RESUMED)
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), GPU])
def test_resumed_is_uninterrupted(script, compiled, device, place, vgg_file, tmp_path):
    """To the last bit, under --deterministic and with LPIPS, whose pooling may have no deterministic gradient.

    On a CPU tests/scripts/test_training.py asks it of eager runs, without LPIPS.
    """
    torch._dynamo.reset()
    how = dict(deterministic=True, compile=compiled)
    if script != "train_ldm_only":
        loss = small.write_loss_config(tmp_path / "loss.yaml", perceptual_weight=1.0)
        how |= dict(loss_cfg_path=loss, lpips_weights=vgg_file)
    steps.train(script, place, tmp_path, "whole", **how)
    steps.train(script, place, tmp_path, "run", max_train_steps=2, **how)
    steps.train(script, place, tmp_path, "run", resume="latest", **how)
    found, expected = small.checkpoint(tmp_path, "run", 4), small.checkpoint(tmp_path, "whole", 4)
    assert found.pop("args") and expected.pop("args")
    small.assert_same(found, expected)


@EVERYWHERE
def test_two_processes_draw_what_one_does(device):
    one = Draws(0, 3, 0, 8, 0, 1, torch.device(device))
    halves = [Draws(0, 3, 0, 8, rank, 2, torch.device(device)) for rank in range(2)]
    for kind in ("normal", "uniform"):
        whole = getattr(one, kind)("noise", 4, 6, 6)
        assert whole.device.type == device
        assert torch.equal(whole, torch.cat([getattr(half, kind)("noise", 4, 6, 6) for half in halves]))


@pytest.mark.parametrize(("device", "length"), [("cpu", 20), pytest.param("cuda", 200, marks=pytest.mark.gpu)])
def test_memory_is_flat(device, length, place, tmp_path, monkeypatch, bounded):
    """Bytes of tensors after the last step, above those after the tenth."""
    found = {}

    def around(step, call, nets, optimizers):
        found[step] = steps.live_bytes() if step in (10, length - 1) else None
        return call()

    steps.around_steps(monkeypatch, "train_repae", around)
    far = dict(max_train_steps=length, checkpointing_steps=length)
    steps.train("train_repae", place, tmp_path, "run", compile=False, **far)
    bounded("growth in bytes", found[length - 1] - found[10], GROWTH)
