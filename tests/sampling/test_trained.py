"""A trained run as sampling reads it: whose latent statistics, and what is refused."""

import numpy as np
import pytest
import torch

from sampling.trained import load_trained
from tests.support.refusals import refusal
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


def test_a_vae_that_the_args_name_is_no_flag_that_somebody_gave(exps, tmp_path):
    contents = torch.load(exps / "ldm" / "checkpoints" / "0000007.pt")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "page.pt").write_text("<html>404</html>")
    checkpoint = tmp_path / "checkpoints" / "0000007.pt"
    for arch, name, said in (
        (
            "f4d4-tiny",
            tmp_path / "gone.pt",
            f"its args name the VAE {tmp_path / 'gone.pt'}, which does not exist; give",
        ),
        ("auto", tmp_path / "gone", f"its args name the VAE {tmp_path / 'gone'}, which does not exist; give"),
        ("f4d4-tiny", tmp_path / "page.pt", f"its args name a VAE that cannot be used: {tmp_path / 'page.pt'} is"),
    ):
        torch.save(contents | {"args": contents["args"] | {"vae": arch, "vae_ckpt": str(name)}}, checkpoint)
        message = refusal(load_trained, tmp_path)
        assert message.startswith(f"{checkpoint}: {said}") and message.endswith("as --vae-ckpt")
    assert load_trained(tmp_path, vae_ckpt=str(exps / "vae" / "vae.pt")).vae_path == exps / "vae" / "vae.pt"


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
