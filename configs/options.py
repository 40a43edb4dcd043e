"""The option tables of README.md, rendered from the parsers: `python -m configs.options README.md` rewrites them."""

import argparse
import re
import sys
from pathlib import Path

from configs import arguments

PARSERS = {
    "preprocessing.py": arguments.preprocessing_parser,
    "train_vae.py": arguments.vae_parser,
    "train_repae.py": arguments.repae_parser,
    "save_vae_weights.py": arguments.save_vae_parser,
    "cache_latents.py": arguments.cache_parser,
    "train_ldm_only.py": arguments.ldm_only_parser,
    "generate.py": arguments.generate_parser,
    "evaluate.py": arguments.evaluate_parser,
}


def table(parser: argparse.ArgumentParser) -> str:
    """A Markdown table with a row for each flag: its spellings, default, choices and meaning."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for action in parser._actions:
        if action.dest == "help":
            continue
        spellings = ", ".join(f"`{flag}`" for flag in action.option_strings)
        if action.required:
            default = "required"
        elif isinstance(action, argparse.BooleanOptionalAction) and action.default is not None:
            default = "on" if action.default else "off"
        else:
            default = "" if action.default is None else f"`{action.default}`"
        meaning = action.help
        if action.choices and action.metavar is None:
            meaning += f" ({', '.join(f'`{choice}`' for choice in action.choices)})"
        rows.append(f"| {spellings} | {default} | {meaning} |".replace("%%", "%"))
    return "\n".join(rows)


def with_tables(text: str) -> str:
    """The text with the table of each script between its two markers, `<!-- options: NAME -->` and `<!-- end -->`."""

    def rendered(match: re.Match) -> str:
        return f"<!-- options: {match[1]} -->\n\n{table(PARSERS[match[1]]())}\n\n<!-- end -->"

    return re.sub(r"<!-- options: (\S+) -->.*?<!-- end -->", rendered, text, flags=re.DOTALL)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(with_tables(file.read_text()))
