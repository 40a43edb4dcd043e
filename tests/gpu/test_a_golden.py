"""The public code's numbers in float32 without TF32, by the checks that the CPU passes at a tenth of these tolerances.

Of SiT, losses, LPIPS, TensorFlow's Inception and training; those of the VAE and the samplers are in test_c_networks.py.
"""

import pytest
import torch

from evaluation.inception import load_inception
from tests.support.evaluation_data import check_inception, inception_file
from tests.support.golden_data import Tally
from tests.support.golden_sit import check_frozen, check_training
from tests.support.loss_data import META, check_losses, check_lpips
from tests.support.trajectories import REPAE_LOG_TOLERANCES, check_ldm_only, check_repae

SITS = pytest.mark.parametrize("name", ["sit_a", "sit_b"])
PATHS = pytest.mark.parametrize("path", ["linear", "cosine"])


@pytest.fixture(autouse=True)
def float32(leaves_numerics):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.mark.gpu
@SITS
@PATHS
def test_golden_sit_training(name, path, of_tolerances):
    of_tolerances(check_training, name, path, "cuda")


@pytest.mark.gpu
@SITS
@PATHS
def test_golden_sit_frozen(name, path, of_tolerances):
    of_tolerances(check_frozen, name, path, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("variant", META["variants"])
def test_golden_losses(variant, lpips, of_tolerances):
    of_tolerances(check_losses, variant, lpips, "cuda")


@pytest.mark.gpu
def test_golden_lpips(lpips, of_tolerances):
    of_tolerances(check_lpips, lpips, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("side", [32, 64, 256, 320])
def test_golden_inception(side, tmp_path, of_tolerances):
    of_tolerances(check_inception, load_inception(inception_file(tmp_path)), side, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", REPAE_LOG_TOLERANCES)
def test_golden_repae(name, lpips, of_tolerances):
    of_tolerances(check_repae, name, lpips, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["traj_ldm_a", "traj_ldm_b"])
def test_golden_ldm_only(name, of_tolerances):
    of_tolerances(check_ldm_only, name, torch.device("cuda"))


# The table of it, on the CPU


def test_a_golden_check_on_the_cpu_takes_its_whole_tolerance_at_most(of_tolerances, request):
    of_tolerances(check_training, "sit_a", "linear", "cpu")
    found = {what: share for _, (what, share, _) in request.node.user_properties}
    kinds = ("outputs", "losses", "latent statistics", "gradients", "gradient norms")
    assert found.keys() == {f"{kind}, in tolerances of the CPU" for kind in kinds}
    assert all(0 <= share <= 1 for share in found.values())


def test_every_kind_is_in_the_table_also_where_one_fails(of_tolerances, request):
    def check(tally: Tally) -> None:
        tally.within("losses", 30, 2)
        tally.close("outputs", torch.tensor([1.0, 2.0]), [1.0, 2.5], rel=0.1)

    with pytest.raises(AssertionError, match=r"\{'losses': 15\.0\}"):
        of_tolerances(check)
    assert [check[1:] for _, check in request.node.user_properties] == [(15.0, 10), (2.0, 10)]
    with pytest.raises(AssertionError, match="losses : off by nan"):
        of_tolerances(lambda tally: tally.within("losses", float("nan"), 1))
