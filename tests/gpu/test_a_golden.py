"""The public code's numbers in float32 without TF32: training trajectories."""

import pytest
import torch

from tests.support.trajectories import REPAE_LOG_TOLERANCES, check_ldm_only, check_repae

CUDA = torch.device("cuda")
SLACK = 10  # on the CPU's tolerances; the CPU itself is held to 1 in tests/scripts/test_golden_training.py


@pytest.fixture(autouse=True)
def float32(leaves_numerics):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.mark.gpu
@pytest.mark.parametrize("name", REPAE_LOG_TOLERANCES)
def test_golden_repae(name, lpips):
    check_repae(name, lpips, CUDA, slack=SLACK)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["traj_ldm_a", "traj_ldm_b"])
def test_golden_ldm_only(name):
    check_ldm_only(name, CUDA, slack=SLACK)
