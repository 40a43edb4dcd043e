"""Published results as options of generate.py, each with the gFID that the authors state: `generate.py --preset NAME`.

Source: README.md of the public release (github.com/End2End-Diffusion/REPA-E), "Quantitative Results", in two versions:
of April 2025, whose generate.py draws labels at random, and of October 2025, which measured the frozen-VAE rows again
with 50 images of each class and another guidance. None of these numbers was measured with this code.
"""

from typing import NamedTuple


class Preset(NamedTuple):
    """A published result.

    Attributes:
        gfid: what the authors state, of 50,000 samples, by ADM's TensorFlow suite.
        options: those of generate.py which its command gives, by the names and of the types that parsing makes of them.
    """

    gfid: float
    options: dict[str, str | int | float]

    @property
    def hub(self) -> str:
        """Name of the checkpoint's repository on the Hugging Face hub."""
        return self.options["exp_path"].replace("pretrained/", "REPA-E/")


def _preset(gfid: float, run: str, train_steps: str, labels: str, cfg_scale=1.0, guidance_high=1.0) -> Preset:
    checkpoint = dict(exp_path=f"pretrained/{run}", train_steps=train_steps)
    sampler = dict(num_fid_samples=50000, path_type="linear", mode="sde", num_steps=250)
    guidance = dict(cfg_scale=cfg_scale, guidance_low=0.0, guidance_high=guidance_high)
    return Preset(gfid, checkpoint | sampler | guidance | dict(label_sampling=labels))


PRESETS = {
    # A. SiT and VAE trained together; 80 epochs are 400,000 steps of 256
    "repae-sdvae-80ep": _preset(4.07, "sit-repae-sdvae", "400000", "random"),
    "repae-sdvae-80ep-cfg": _preset(1.67, "sit-repae-sdvae", "400000", "random", 2.2, 0.65),
    "repae-invae-80ep": _preset(4.09, "sit-repae-invae", "400000", "random"),
    "repae-invae-80ep-cfg": _preset(1.61, "sit-repae-invae", "400000", "random", 1.8, 0.825),
    "repae-vavae-80ep": _preset(4.05, "sit-repae-vavae", "400000", "random"),
    "repae-vavae-80ep-cfg": _preset(1.73, "sit-repae-vavae", "400000", "random", 1.9, 0.825),
    # B. SiT on the frozen VAE that REPA-E tuned: as of October 2025, then as of April 2025
    "e2e-vavae-800ep": _preset(1.69, "sit-ldm-e2e-vavae", "4000000", "equal"),
    "e2e-vavae-800ep-cfg": _preset(1.12, "sit-ldm-e2e-vavae", "4000000", "equal", 2.4, 0.73),
    "e2e-vavae-800ep-random": _preset(1.83, "sit-ldm-e2e-vavae", "4000000", "random"),
    "e2e-vavae-800ep-random-cfg": _preset(1.26, "sit-ldm-e2e-vavae", "4000000", "random", 2.5, 0.75),
}
