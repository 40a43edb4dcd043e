"""Two processes do what one does: on two cards over NCCL, on one card over gloo.

`make test` asks the same of two CPU processes in tests/scripts/test_distributed.py; here, on a CPU, it is a slow test.
"""

import pytest
import torch

from tests.gpu import steps
from tests.support import small
from tests.support.processes import assert_draws_and_data_of_one, assert_equal_on_both, run_on_two
from tests.support.workers.recorder import recording

SCRIPTS = ("train_repae", "train_ldm_only")
LOSSES, MOVEMENTS = 1e-3, 1e-2  # as in test_b_steps.py; in float32 without TF32 only the order of the sums differs


@pytest.mark.usefixtures("leaves_numerics")
@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_two_processes_do_what_one_does(device, place, tmp_path, bounded):
    """Draws, data and gradients to the bit; weights equal on both, and near to those of one process.

    The discriminator's BatchNorm is of a process: what it learns differs, so that it does not speak to the VAE here.
    """
    how = dict(compile=False, allow_tf32=False)
    alone = how | dict(loss_cfg_path=small.write_loss_config(tmp_path / "loss.yaml", discriminator_weight=0))
    options = {"train_repae": alone, "train_ldm_only": how}
    jobs = {
        script: (script, small.OPTIONS[script](place, tmp_path, f"two-{script}", **options[script]))
        for script in SCRIPTS
    }
    first, second = run_on_two(tmp_path, jobs)
    backend = "nccl" if torch.cuda.device_count() >= 2 else "gloo"
    assert (first["device"], first["backend"]) == (device, backend)

    for script in SCRIPTS:
        with recording() as whole:
            steps.train(script, place, tmp_path, f"one-{script}", **options[script])
        assert_draws_and_data_of_one(whole, [first[script], second[script]])
        assert_equal_on_both(whole, [first[script], second[script]])
        names, of_a_process = (f"two-{script}", f"one-{script}"), ("d_loss", "lecam_loss")
        bounded(f"losses of {script}", steps.loss_distance(tmp_path, *names, without=of_a_process), LOSSES)
        found, expected = (steps.movements(tmp_path, name) for name in names)
        for net in expected.keys() - {"discriminator"}:
            apart = steps.movement_distance(found[net], expected[net])
            bounded(f"movement of {net} of {script}", apart, MOVEMENTS)
