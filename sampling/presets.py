"""What `generate.py --preset` says of a job: the published number, and where the job is not what it was measured on."""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.arguments import generate_parser
from configs.parsing import flag_of
from configs.presets import PRESETS
from sampling.job import FREE
from utils.errors import InputError


def published_result(args: argparse.Namespace) -> dict | None:
    """The published number that `--preset` names, for the record; None without a preset.

    Returns:
        `name`; `published_gfid`, which the authors state and nobody measured here; `of`: their checkpoint; `changed`:
        flags, with what they are here, that the samples depend on and that are not those of the preset.
    """
    if args.preset is None:
        return None
    preset = PRESETS[args.preset]
    return {
        "name": args.preset,
        "published_gfid": preset.gfid,
        "of": f"{preset.hub}, step {preset.options['train_steps']}",
        "changed": changed_options(args),
    }


def changed_options(args: argparse.Namespace) -> dict[str, object]:
    """Flags that the samples depend on and that are not those of the preset, with their values.

    --pproc-batch-size is none of them, as it moves a level in ten thousand. Another --exp-path is one, although the
    same checkpoint may lie there.
    """
    default, options = generate_parser().get_default, PRESETS[args.preset].options
    counting = vars(args).keys() - FREE - {"pproc_batch_size"} | {"exp_path", "tf32", "vae_ckpt", "label_file"}
    counting |= {"guide_exp_path", "guide_train_steps"}
    counting |= set() if args.train_steps is None else {"train_steps"}  # None: the latest, of another run
    return {
        flag_of(name): value
        for name, value in vars(args).items()
        if name in counting and value != options.get(name, default(name))
    }


def preset_line(result: dict) -> str:
    """What the start of a job says of `published_result`."""
    line = f"--preset {result['name']}: the authors state gFID {result['published_gfid']}"
    line += f" (of {result['of']}; not measured with this code)"
    changed = ", ".join(f"{flag} {value}" for flag, value in result["changed"].items())
    return f"{line}; this job differs from theirs in {changed}" if changed else line


@contextmanager
def blaming_preset(args: argparse.Namespace) -> Iterator[None]:
    """An option that is refused and that `--preset` set is reported as the preset's, not as a flag that nobody gave."""
    try:
        yield
    except InputError as error:
        default, options = generate_parser().get_default, PRESETS[args.preset].options if args.preset else {}
        its_own = {
            flag_of(name): value for name, value in options.items() if vars(args)[name] == value != default(name)
        }
        named = [f"{flag} {its_own[flag]}" for flag in its_own if re.search(rf"{flag}(?![\w-])", str(error))]
        if named and "--preset" not in str(error):
            error.args = (f"{error} (--preset {args.preset} sets {', '.join(named)})",)
        raise


def require_preset_run(args: argparse.Namespace) -> None:
    """Refuse a preset whose checkpoint was not fetched, with the command that fetches it."""
    if args.preset is None:
        return
    preset = PRESETS[args.preset]
    folder = preset.options["exp_path"]
    if args.exp_path == folder and not Path(folder).is_dir():
        fetch = f"`hf download {preset.hub} --local-dir {folder}`"
        raise InputError(f"--preset {args.preset}: {folder} is no folder; {fetch} fetches it, or --exp-path names it")
