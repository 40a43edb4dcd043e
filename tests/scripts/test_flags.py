"""Every flag of every script is read by it: none is accepted and does nothing."""

import argparse
import sys

import numpy as np
import pytest
from PIL import Image

import cache_latents
import evaluate
import generate
import preprocessing
import save_vae_weights
import train_ldm_only
import train_repae
import train_vae
from configs import options, parsing
from tests.support import sampling, small
from tests.support.evaluation_data import TinyInception

MODULES = (train_repae, train_ldm_only, train_vae, cache_latents, save_vae_weights, generate, evaluate, preprocessing)
MAIN = {f"{module.__name__}.py": module.main for module in MODULES}
PUBLIC = {"prediction": "has one choice, v", "wandb_history_path": "is unused in the public code too"}
UNREAD = {"train_repae.py": PUBLIC | {"proj_until": "is refused"}, "train_ldm_only.py": PUBLIC}
# They compare flags with their defaults, to refuse those that the others leave without a meaning: not a use of them.
REFUSALS = ("check_flags", "check_evaluation_flags", "check_sampling_flags")


class Corner(TinyInception):
    """Stands in for Inception, and sees 8 x 8 pixels of larger images."""

    def forward(self, images):
        return super().forward(images[..., :8, :8])


@pytest.fixture
def read(monkeypatch) -> set[str]:
    """Names of the options that have been read since they were parsed; `vars(args)`, for args.json, reads none."""
    names = set()

    class Watched(argparse.Namespace):
        def __getattribute__(self, name):
            if not sys._getframe(1).f_code.co_qualname.startswith(REFUSALS):
                names.add(name)
            return super().__getattribute__(name)

    def parse_args(parser, argv):
        before = set(names)
        args = argparse.ArgumentParser.parse_args(parser, argv, Watched())
        names.intersection_update(before)  # without what argparse itself looks at
        return args

    monkeypatch.setattr(parsing.ArgumentParser, "parse_args", parse_args)
    return names


def command_lines(script: str, place, exps, output) -> list[list[str]]:
    """Runs of a script that together leave none of its parts out."""
    steps = dict(max_train_steps=1, num_preview=1, sampling_steps=1, report_to="tensorboard")
    online = dict(eval_steps=1, eval_reference=place.data, eval_samples=8, eval_features=place.encoder)
    loss = dict(loss_cfg_path=small.write_loss_config(output / "loss.yaml", perceptual_weight=1))
    images = dict(reconstruct=True, vae_ckpt=place.vae, data_dir=place.data)
    for i in range(2):
        Image.fromarray(np.full((30, 40, 3), 40 * i, np.uint8)).save(output / f"{i}.png")
    samples = dict(num_fid_samples=8, evaluate=place.data, overwrite=True, guide_exp_path=exps / "swapped")
    sets = dict(samples=place.data, reference=place.data, save_stats=output / "s.npz", overwrite=True)
    (output / "s.npz").touch()
    checkpoint = exps / "repae" / "checkpoints" / "0000007.pt"
    return {
        "train_repae.py": [small.repae_options(place, output, "run", **steps, **online, **loss)],
        "train_ldm_only.py": [small.ldm_options(place, output, "run", **steps, **online)],
        "train_vae.py": [small.vae_options(place, output, "run", **steps, **loss)],
        "cache_latents.py": [small.cache_options(place, "new", output_dir=output)],
        "save_vae_weights.py": [small.argv(repae_ckpt=checkpoint, save_dir=output)],
        "generate.py": [
            sampling.flags(exps, output, **samples, features=features) for features in ("inception", place.encoder)
        ],
        "evaluate.py": [
            small.argv(**sets, output=output / "1.json"),
            small.argv(**images, features=place.encoder, num_picture=1, output=output / "2.json"),
        ],
        "preprocessing.py": [small.argv(imagenet_path=output, output_path=output / "data", num_workers=1)],
    }[script]


@pytest.mark.parametrize("script", options.PARSERS)
def test_every_flag_is_read(script, read, place, exps, tmp_path, few_steps, lpips, monkeypatch):
    for user in (train_repae, train_vae, evaluate):
        monkeypatch.setattr(user, "load_lpips", lambda weights: lpips)
    monkeypatch.setattr("evaluation.features.load_inception", lambda weights: Corner())
    for argv in command_lines(script, place, exps, tmp_path):
        MAIN[script](argv)
    accepted = {action.dest for action in options.PARSERS[script]()._actions} - {"help"}
    assert accepted - read == set(UNREAD.get(script, ()))
