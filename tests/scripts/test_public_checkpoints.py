"""Checkpoints as the public code writes them, and ours beside the structure of those (golden checkpoint_*.json)."""

import json
from argparse import Namespace

import pytest
import torch

import generate
import save_vae_weights
import train_ldm_only
import train_repae
import train_vae
from loss.adversarial import DiscriminatorLoss
from loss.config import VAELossConfig
from models.discriminator import PatchDiscriminator
from models.posterior import TrainableVAE
from models.sit import SiT
from models.vae import build_vae
from models.vae_keys import ldm_parameters, to_ldm
from tests.support import small
from tests.support.golden_data import GOLDEN
from training.optimizer import Optimizer

OURS = {"format", "vae_config", "scalers", "loss_buffers", "param_names"}  # entries that public files lack


def described(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def publish(checkpoint: dict, structure: str) -> dict:
    """Our checkpoint in the public form: no entries of ours, Namespace arguments, optimisers without names, and the
    discriminator's among the parameters of the loss module."""
    meta = described(structure)
    public = {key: checkpoint[key] for key in meta["top_level_keys"]}
    fields = {key: checkpoint["args"].get(key) for key in meta["args_fields"]}
    public["args"] = Namespace(**fields)
    if "opt_disc" in public:
        expected = meta["structure"]["opt_disc"]
        count = expected["param_group_0"]["params"]["count"]
        group = public["opt_disc"]["param_groups"][0] | {"params": list(range(count))}
        moments = {1 + index: entry for index, entry in public["opt_disc"]["state"].items()}
        assert list(moments) == expected["state_param_ids"]
        public["opt_disc"] = {"state": moments, "param_groups": [group]}
    return public


@pytest.fixture(scope="module")
def runs(place, tmp_path_factory):
    """Two runs of 4 steps, `repae` and `ldm`, and the public form of both after 2: `public-repae`, `public-ldm`."""
    folder = tmp_path_factory.mktemp("public")
    loss = small.write_loss_config(folder / "loss.yaml", lecam_regularization_weight=0)  # its state is not public
    train_repae.main(small.repae_options(place, folder, "repae", loss_cfg_path=loss))
    train_ldm_only.main(small.ldm_options(place, folder, "ldm"))
    for name, structure in (("repae", "checkpoint_repae_f8d4"), ("ldm", "checkpoint_ldm_a")):
        checkpoints = folder / f"public-{name}" / "checkpoints"
        checkpoints.mkdir(parents=True)
        torch.save(publish(small.checkpoint(folder, name, 2), structure), checkpoints / "0000002.pt")
    return folder


def test_a_public_repae_run_goes_on(runs, place, tmp_path):
    """As the same run of ours would have, bit for bit."""
    going_on = dict(resume_step=2, continue_train_exp_dir=runs / "public-repae")
    train_repae.main(small.repae_options(place, tmp_path, "run", loss_cfg_path=runs / "loss.yaml", **going_on))
    actual, expected = small.checkpoint(tmp_path, "run", 4), small.checkpoint(runs, "repae", 4)
    assert actual.pop("args") and expected.pop("args")
    small.assert_same(actual, expected)


def test_a_public_ldm_only_run_goes_on(runs, place, tmp_path):
    """Index 0 of its optimiser, the fixed position table, has no state."""
    public = torch.load(runs / "public-ldm" / "checkpoints" / "0000002.pt", weights_only=False)
    assert isinstance(public["args"], Namespace) and 0 not in public["opt"]["state"] and 1 in public["opt"]["state"]
    going_on = dict(resume_step=2, continue_train_exp_dir=runs / "public-ldm")
    train_ldm_only.main(small.ldm_options(place, tmp_path, "run", **going_on))
    actual, expected = small.checkpoint(tmp_path, "run", 4), small.checkpoint(runs, "ldm", 4)
    assert actual.pop("args") and expected.pop("args")
    small.assert_same(actual, expected)


@pytest.mark.parametrize("kind", ["repae", "ldm"])
def test_samples_of_a_public_checkpoint_are_those_of_ours(kind, runs, tmp_path):
    archives = []
    job = dict(train_steps="2", num_fid_samples=3, pproc_batch_size=2, num_steps=2)
    for name in (kind, f"public-{kind}"):
        generate.main(small.argv(exp_path=runs / name, sample_dir=tmp_path / name, **job))
        (archive,) = (tmp_path / name).glob("*.npz")
        archives.append(archive.read_bytes())
    assert archives[0] == archives[1]


def test_the_vae_of_a_public_checkpoint_is_that_of_ours(runs, tmp_path):
    for name in ("repae", "public-repae"):
        path = runs / name / "checkpoints" / "0000002.pt"
        save_vae_weights.main(small.argv(repae_ckpt=path, vae_name="e2e", save_dir=tmp_path / name))
    ours, public = (tmp_path / name / "e2e" for name in ("repae", "public-repae"))
    names = sorted(path.name for path in ours.iterdir())
    assert names == ["diffusers", "e2e-discriminator-ckpt.pt", "e2e-latents-stats.pt", "e2e.pt"]
    for name in names[1:]:
        small.assert_same(torch.load(public / name), torch.load(ours / name))


# Ours beside the golden structure


def stepped(parameters, rate: float = 1e-4) -> Optimizer:
    """An optimiser after a step; on the meta device, where full-size networks cost nothing."""
    optimizer = Optimizer(
        list(parameters), lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, max_grad_norm=1.0, scale_loss=False
    )
    for parameter in optimizer.parameters:
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.adamw.step()
    return optimizer


def check_weights(state: dict, expected: dict) -> None:
    keys = list(state)
    assert (len(keys), keys[:3], keys[-3:]) == (expected["n_keys"], expected["first3"], expected["last3"])
    assert sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}) == expected["dtypes"]


def check_optimizer(state: dict, expected: dict, *, discriminator: bool = False) -> None:
    """The same parameter group and moments; the discriminator's parameters alone, where theirs are a loss module's."""
    (group,), example = state["param_groups"], expected["state_entry_example"]
    for key, value in expected["param_group_0"].items():
        if key == "params":
            assert discriminator or group["params"] == list(range(value["count"]))
        else:
            assert (list(group[key]) if key == "betas" else group[key]) == value
    assert len(state["state"]) == expected["n_state_entries"]
    absent = sorted(set(group["params"]) - state["state"].keys())
    assert absent == ([] if discriminator else expected["missing_param_ids"])
    found = {key: [list(tensor.shape), "float32"] for key, tensor in state["state"][min(state["state"])].items()}
    assert found == example and all(
        tensor.dtype == torch.float32 for tensor in state["state"][min(state["state"])].values()
    )


@pytest.mark.parametrize("name", ["repae_f8d4", "repae_f16d32", "ldm_a", "ldm_b"])
def test_our_checkpoints_have_the_public_structure(name, tmp_path):
    golden, trajectory = described(f"checkpoint_{name}"), described(f"traj_{name}")
    jointly = name.startswith("repae")
    with torch.device("meta"):
        sit = SiT(**trajectory["config"]["sit"], learn_pos_embed=jointly)
        nets = Namespace(sit=sit, ema=sit)
        if jointly:
            nets.vae, nets.discriminator = TrainableVAE(build_vae(trajectory["config"]["vae"])), PatchDiscriminator()
            nets.discriminator_loss = DiscriminatorLoss(VAELossConfig())
    arguments = Namespace(**dict.fromkeys(golden["args_fields"]))
    optimizer = stepped(sit.named_parameters())
    if jointly:
        optimizers = Namespace(
            opt=optimizer,
            opt_vae=stepped(ldm_parameters(nets.vae.vae)),
            opt_disc=stepped(nets.discriminator.named_parameters()),
        )
        contents = train_repae.checkpoint_contents(arguments, nets, optimizers, 3)
    else:
        contents = train_ldm_only.checkpoint_contents(arguments, nets, optimizer, 3)

    assert [key for key in contents if key not in OURS] == golden["top_level_keys"]
    for key, expected in golden["structure"].items():
        if key.startswith("opt"):
            check_optimizer(contents[key], expected, discriminator=key == "opt_disc")
        else:
            check_weights(contents[key], expected)
    assert contents["args"].keys() == set(golden["args_fields"]) and contents["steps"] == 3
    if jointly:
        files = golden["save_vae_weights_outputs"]
        assert len(to_ldm(nets.vae.vae)) == files["e2e-vae.pt"]["n_keys"]


def test_the_arguments_hold_every_public_field(runs):
    """What public code reads from our files; `vars(args)` of the parser as it is."""
    for name, structure in (("repae", "checkpoint_repae_f8d4"), ("ldm", "checkpoint_ldm_a")):
        saved = small.checkpoint(runs, name, 2)
        assert type(saved["args"]) is dict
        assert set(described(structure)["args_fields"]) <= saved["args"].keys()
    assert train_vae.CHECKPOINT_ENTRIES == ("vae", "discriminator", "opt_vae", "opt_disc", "steps")
