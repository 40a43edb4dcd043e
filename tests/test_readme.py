"""README.md tells the truth: its option tables are the parsers', its commands parse, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from configs.options import PARSERS, with_tables

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()


def commands():
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                for i, word in enumerate(words):
                    if word in PARSERS:
                        yield pytest.param(word, words[i + 1 :], id=f"{page.name}-{word}")


def test_option_tables_are_current():
    assert with_tables(README) == README, "run: python -m configs.options README.md"


def test_every_script_has_its_table():
    assert set(re.findall(r"<!-- options: (\S+) -->", README)) == set(PARSERS)


@pytest.mark.parametrize(("script", "words"), list(commands()))
def test_every_command_parses(script, words):
    PARSERS[script]().parse_args(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    headings = {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in headings, anchor


def test_encoder_table_is_that_of_the_encoder_page():
    page = (ROOT / "docs" / "encoders.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `") and "ckpts" not in line and "vit" in line]
    assert len(rows) >= 13 and all(row in README for row in rows[:13])
