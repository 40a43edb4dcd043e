"""A trained run as sampling reads it: whose latent statistics, and what is refused."""

import numpy as np
import pytest
import torch

from sampling.trained import load_trained
from tests.support.sampling import draw
from utils.errors import InputError
from utils.files import sha256


def test_ldm_only_takes_the_statistics_stored_with_its_vae(exps, tmp_path):
    trained = load_trained(exps / "ldm")
    stored = torch.load(exps / "vae" / "vae-latents-stats.pt")
    assert torch.equal(trained.latent_stats[0], stored["latents_scale"])
    assert torch.equal(trained.latent_stats[1], stored["latents_bias"])
    bare = tmp_path / "bare.pt"
    bare.write_bytes((exps / "vae" / "vae.pt").read_bytes())
    scale, bias = load_trained(exps / "ldm", vae_ckpt=str(bare)).latent_stats  # then those of the frozen normaliser
    torch.testing.assert_close(scale, torch.full((1, 4, 1, 1), 0.5))
    torch.testing.assert_close(bias, torch.full((1, 4, 1, 1), 0.3))
    job = draw(exps, tmp_path / "s", "ldm", vae_ckpt=bare)
    assert job.record["sha256"]["vae"] == sha256(bare) and job.npz.stem.endswith("vae-bare")
    joint = draw(exps, tmp_path / "b")
    assert np.array_equal(job.images, joint.images)  # the same networks and statistics


def test_repae_takes_the_statistics_of_the_average(exps, tmp_path):
    contents = torch.load(exps / "repae" / "checkpoints" / "0000007.pt")
    contents["ema"]["bn.running_mean"] += 1
    (tmp_path / "checkpoints").mkdir()
    torch.save(contents, tmp_path / "checkpoints" / "0000009.pt")
    for ema in (True, False):
        scale, bias = load_trained(tmp_path, ema=ema).latent_stats
        torch.testing.assert_close(bias, torch.full((1, 4, 1, 1), 1.3))
        torch.testing.assert_close(scale, torch.full((1, 4, 1, 1), 0.5))


def test_weights_of_another_kind_are_refused(exps, tmp_path):
    (tmp_path / "args.json").write_text("[1]")
    (tmp_path / "checkpoints").mkdir()
    contents = torch.load(exps / "repae" / "checkpoints" / "0000007.pt")
    torch.save(contents, tmp_path / "checkpoints" / "0000001.pt")
    with pytest.raises(InputError, match=r"args\.json holds no JSON object"):
        load_trained(tmp_path)
    (tmp_path / "args.json").unlink()
    torch.save(contents | {"ema": {}}, tmp_path / "checkpoints" / "0000001.pt")
    with pytest.raises(InputError, match=r"0000001\.pt holds no SiT that this code knows"):
        load_trained(tmp_path)
