"""Take the VAE out of a checkpoint of REPA-E or of train_vae.py: `.pt` files with public keys, a diffusers folder.

    python save_vae_weights.py --repae-ckpt exps/my-run/checkpoints/0400000.pt --vae-name e2e-vae --save-dir exps

writes exps/e2e-vae/e2e-vae.pt, e2e-vae-latents-stats.pt, e2e-vae-discriminator-ckpt.pt and diffusers/.
"""

from configs.arguments import save_vae_parser
from utils.checkpoint_files import require_repae_checkpoint

if __name__ == "__main__":  # --help, a mistyped flag and a missing checkpoint are answered before the heavy imports
    save_vae_parser().answer_before_imports(check=require_repae_checkpoint)

from pathlib import Path

import torch

from models.sit_files import latent_stats_of
from models.vae_files import require_new_vae_files, save_vae_files, vae_of_checkpoint
from utils.checkpoint import read_checkpoint, require_entries
from utils.errors import InputError, about, command
from utils.files import require_disk


def latent_statistics_of(ema: dict, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and bias (1, C, 1, 1) of the latents, from the normaliser of SiT's EMA; no eps, as in public files."""
    for key in ("bn.running_mean", "bn.running_var"):
        if key not in ema:
            raise InputError(f"{path}: ema lacks the key {key!r}, the statistics of the latents")
    return latent_stats_of(ema)


@command
def main(argv: list[str] | None = None) -> None:
    args = save_vae_parser().parse_args(argv)
    path = Path(args.repae_ckpt)

    # Read and check, before anything is written.
    if Path(args.vae_name).name != args.vae_name:
        raise InputError(f"--vae-name: {args.vae_name!r} was given; a name without folders is needed (see --save-dir)")
    if not args.overwrite:
        require_new_vae_files(args.save_dir, args.vae_name)
    require_repae_checkpoint(args)
    with about("--repae-ckpt"):
        checkpoint = read_checkpoint(path, need=())
        jointly = "vae" not in checkpoint or "model" in checkpoint or "ema" in checkpoint  # else of train_vae.py
        require_entries(checkpoint, path, ("model", "ema") if jointly else ("vae",))
        if "vae" not in checkpoint:
            raise InputError(f"{path} holds no VAE: it is a checkpoint of train_ldm_only.py, whose VAE is frozen")
        vae = vae_of_checkpoint(checkpoint, path, args.vae)
        scale, bias = latent_statistics_of(checkpoint["ema"], path) if jointly else (None, None)
        if jointly and scale.numel() != vae.config.latent_channels:
            found = f"ema normalises {scale.numel()} channels"
            raise InputError(f"{path}: {found}; its VAE has {vae.config.latent_channels}")
    discriminator = checkpoint.get("discriminator")

    # The VAE is written twice, under LDM keys and for diffusers.
    weights = [*vae.state_dict().values(), *vae.state_dict().values(), *(discriminator or {}).values()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights)
    require_disk(args.save_dir, size, "--save-dir: the VAE's files")
    folder = save_vae_files(args.save_dir, args.vae_name, vae, scale, bias, discriminator, overwrite=args.overwrite)
    step = f" at step {checkpoint['steps']}" if "steps" in checkpoint else ""
    print(f"VAE of {path}{step}: {', '.join(sorted(file.name for file in folder.iterdir()))} in {folder}")
    if not jointly:
        print("a checkpoint of train_vae.py holds no latent statistics: none were written; training measures its own")


if __name__ == "__main__":
    main()
