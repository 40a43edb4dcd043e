"""Three steps of each golden training trajectory, on the CPU."""

import pytest
import torch

from tests.support.trajectories import REPAE_LOG_TOLERANCES, check_ldm_only, check_lightning, check_repae

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", REPAE_LOG_TOLERANCES)
def test_three_repae_steps_are_those_of_the_public_code(name, lpips):
    check_repae(name, lpips, CPU)


@pytest.mark.parametrize("name", ["traj_ldm_a", "traj_ldm_b"])
def test_three_ldm_only_steps_are_those_of_the_public_code(name):
    check_ldm_only(name, CPU)


def test_three_steps_of_lightningdit_are_those_of_its_own_code():
    check_lightning(CPU)
