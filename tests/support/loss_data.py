"""The golden case of the losses, and the discriminator that it was recorded with."""

import json

import torch

from models.discriminator import PatchDiscriminator
from tests.support.golden_data import GOLDEN, filled, load
from utils.images import to_signed

ARRAYS, META = load("loss")

DISCRIMINATOR = json.loads((GOLDEN / "manifests.json").read_text())["discriminator"]["state_dict"]


def inputs():
    pixels = to_signed(torch.from_numpy(ARRAYS["in.image_u8"]))
    return pixels, torch.from_numpy(ARRAYS["in.recon"]), torch.from_numpy(ARRAYS["in.moments"])


def filled_discriminator() -> PatchDiscriminator:
    network = PatchDiscriminator()
    network.load_state_dict(filled(DISCRIMINATOR))
    return network
