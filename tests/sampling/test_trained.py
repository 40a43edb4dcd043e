"""A trained run as sampling reads it: whose latent statistics, and what is refused."""

import argparse

import pytest
import torch

from models.sit import SiT
from sampling.trained import load_trained
from tests.support.golden_data import close, load
from tests.support.golden_lightning import build
from tests.support.refusals import refusal
from tests.support.sampling import draw
from utils.errors import InputError


def statistics(state) -> tuple[torch.Tensor, torch.Tensor]:
    return state["bn.running_var"].rsqrt().view(1, -1, 1, 1), state["bn.running_mean"].view(1, -1, 1, 1)


def write(folder, contents):
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(contents, folder / "checkpoints" / "0000009.pt")
    return folder


def test_ldm_only_takes_the_statistics_that_it_was_trained_under(exps, tmp_path):
    """Those of `model`, which are frozen: not the EMA's, which drift, nor those that lie beside the VAE's file now."""
    contents = torch.load(exps / "ldm" / "checkpoints" / "0000007.pt")
    contents["ema"]["bn.running_mean"] += 1
    bare = tmp_path / "bare.pt"
    bare.write_bytes((exps / "vae" / "vae.pt").read_bytes())
    run = write(tmp_path / "run", contents)
    for ema in (True, False):
        for vae_ckpt, said in ((None, 1), (bare, 0)):
            trained = load_trained(run, vae_ckpt=vae_ckpt, ema=ema)
            for value, expected in zip(trained.latent_stats, statistics(contents["model"]), strict=True):
                assert torch.equal(value, expected)
            assert len(trained.notes) == said
    (note,) = load_trained(run).notes
    assert str(exps / "vae" / "vae.pt") in note and "% in the standard deviation" in note
    assert draw(exps, tmp_path / "s", run).record["notes"] == [note]


def test_repae_takes_the_statistics_of_the_weights_that_are_sampled(exps, tmp_path):
    contents = torch.load(exps / "repae" / "checkpoints" / "0000007.pt")
    contents["ema"]["bn.running_mean"] += 1
    run = write(tmp_path / "run", contents)
    for ema, name in ((True, "ema"), (False, "model")):
        trained = load_trained(run, ema=ema)
        assert torch.equal(trained.latent_stats[1], statistics(contents[name])[1]) and trained.notes == []


def test_statistics_that_differ_by_rounding_are_not_spoken_of(exps, tmp_path):
    contents = torch.load(exps / "ldm" / "checkpoints" / "0000007.pt")
    stored = torch.load(exps / "vae" / "vae-latents-stats.pt")
    contents["model"]["bn.running_var"] = stored["latents_scale"].flatten().pow(-2)
    contents["model"]["bn.running_mean"] = stored["latents_bias"].flatten()
    trained = load_trained(write(tmp_path / "run", contents))
    assert trained.notes == []
    torch.testing.assert_close(trained.latent_stats[0], stored["latents_scale"])


def test_repas_and_the_original_sits_checkpoints_are_sampled(exps, tmp_path):
    """Bare or from a run of REPA's; on a VAE of 4 channels under SD-VAE's scale."""
    contents = torch.load(exps / "ldm" / "checkpoints" / "0000007.pt")
    without = {key: value for key, value in contents["ema"].items() if not key.startswith("bn.")}
    bare = tmp_path / "bare-vae.pt"
    bare.write_bytes((exps / "vae" / "vae.pt").read_bytes())
    torch.save({"ema": without, "args": {"model": "SiT-T/2"}}, tmp_path / "last.pt")  # no preset tells its heads
    args = argparse.Namespace(model="SiT-T/2", num_classes=10, vae="mse")
    repa = write(tmp_path / "repa", {"ema": without, "model": without, "args": args, "opt": {}, "steps": 9})

    for exp_path in (tmp_path / "last.pt", repa):
        trained = load_trained(exp_path, vae_ckpt=bare)
        assert torch.equal(trained.latent_stats[0], torch.full((1, 4, 1, 1), 0.18215))
        assert not trained.latent_stats[1].any() and "SD-VAE's scale 0.18215" in trained.notes[-1]
        trained = load_trained(exp_path, vae_ckpt=exps / "vae" / "vae.pt")  # statistics beside it do not change that
        assert torch.equal(trained.latent_stats[0], torch.full((1, 4, 1, 1), 0.18215))
        assert "those stored with" in trained.notes[-1] and "in the standard deviation" in trained.notes[-1]
        with pytest.raises(InputError, match=r"--vae-ckpt: .* its args name none"):
            load_trained(exp_path)
    job = draw(exps, tmp_path / "s", tmp_path / "last.pt", vae_ckpt=bare)
    assert job.npz.name.startswith("last_0000000_cfg1.5") and len(job.record["notes"]) == 1
    with pytest.raises(InputError, match="--train-steps: 7 was given"):
        load_trained(tmp_path / "last.pt", "7")


@torch.no_grad()
def test_lightning_dit_is_sampled_as_its_own_code_does(exps, tmp_path):
    """Their inference.py run whole: the file, its statistics, Euler on their grid, guidance on three channels."""
    arrays, meta = load("options/ldit_data")
    facts = meta["inference"]
    network = {key: value for key, value in build(facts).state_dict().items() if not key.startswith("bn.")}
    torch.save({"model": {}, "ema": network, "opt": {}, "config": {}}, tmp_path / "lightningdit.pt")
    torch.save(
        {key: torch.from_numpy(arrays[f"stats.{key}"]) for key in ("mean", "std")}, tmp_path / "latents_stats.pt"
    )
    trained = load_trained(tmp_path / "lightningdit.pt", vae_ckpt=exps / "vae" / "vae.pt")
    for value, key in zip(trained.latent_stats, ("scale", "bias"), strict=True):
        close(value, arrays[f"ours.latents_{key}"], 1e-6)
    assert "LightningDiT's, whose t = 1 is data" in trained.notes[0] and len(trained.notes) == 2
    assert str(tmp_path / "latents_stats.pt") in trained.notes[1] and trained.name == "lightningdit"

    # s from 0 (noise) to 1 by their formula; our network gets t = 1 - s, and its velocity points the other way.
    x, labels = (torch.from_numpy(arrays[f"inference.in.{key}"]) for key in ("latents", "y"))
    s = torch.linspace(0, 1, facts["points"])
    s = facts["shift"] * s / (1 + (facts["shift"] - 1) * s)
    for i, call in enumerate(facts["network_calls"]):
        assert call["labels"] == [*labels, *[trained.sit.null_label] * len(labels)]
        t = torch.full((len(x),), 1 - s[i])
        velocity = trained.sit(x, t, labels)[0]
        if s[i] >= facts["start"]:
            null = trained.sit(x, t, torch.full_like(labels, trained.sit.null_label))[0]
            velocity[:, :3] = (null + facts["scale"] * (velocity - null))[:, :3]
        x = x - (s[i + 1] - s[i]) * velocity
    scale, bias = trained.latent_stats
    close(x / scale + bias, arrays["inference.decoded_latents"], 1e-5, 1e-7)


def test_lightning_dits_statistics_are_those_beside_it(exps, tmp_path):
    """Then SD-VAE's scale, as for SiT; one line says where a wider VAE's belong, and what is wrong with a file."""
    sit = SiT(input_size=6, hidden_size=48, depth=1, encoder_depth=1, num_heads=3, z_dims=(), lightning=True)
    torch.save({key: value for key, value in sit.state_dict().items() if key[:3] != "bn."}, tmp_path / "ldit.pt")
    vae = exps / "vae" / "vae.pt"
    trained = load_trained(tmp_path / "ldit.pt", vae_ckpt=vae)
    assert torch.equal(trained.latent_stats[0], torch.full((1, 4, 1, 1), 0.18215))
    torch.save({"mean": torch.zeros(1, 4, 1, 1), "std": torch.zeros(1, 4, 1, 1)}, tmp_path / "latents_stats.pt")
    assert refusal(load_trained, tmp_path / "ldit.pt", vae_ckpt=vae).startswith(f"--exp-path: {tmp_path}")
    torch.save({"mean": torch.ones(1, 4, 1, 1), "std": torch.full((1, 4, 1, 1), 4.0)}, tmp_path / "latents_stats.pt")
    assert load_trained(tmp_path / "ldit.pt", vae_ckpt=vae).latent_stats[0].unique() == 0.25
    job = draw(exps, tmp_path / "s", tmp_path / "ldit.pt", vae_ckpt=vae)
    assert job.npz.name.startswith("ldit_0000000_cfg1.5") and len(job.record["notes"]) == 2


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
    with pytest.raises(InputError, match=r"args\.json: a JSON object is needed"):
        load_trained(tmp_path)
    (tmp_path / "args.json").unlink()
    torch.save(contents | {"ema": {}}, tmp_path / "checkpoints" / "0000001.pt")
    with pytest.raises(InputError, match=r"0000001\.pt holds no SiT that this code knows"):
        load_trained(tmp_path)
