"""Missing inputs are refused before the heavy imports, in the words of what reads them."""

import pytest

from dataset.data import ImageData
from tests.support import small
from utils.errors import InputError

SCRIPTS = {"train_repae": ["--exp-name", "x"], "train_ldm_only": ["--exp-name", "x"], "train_vae": ["--exp-name", "x"]}


@pytest.mark.parametrize("script", [*SCRIPTS, "cache_latents"])
def test_a_missing_data_folder_is_refused_without_torch(script, tmp_path):
    words = [f"{script}.py", *SCRIPTS.get(script, []), "--data-dir", tmp_path / "none"]
    done = small.run_python("-X", "importtime", *words)
    *imports, line = done.stderr.splitlines()
    assert done.returncode == 2 and not any(name.split("|")[-1].strip() in ("torch", "numpy") for name in imports)
    with pytest.raises(InputError) as refused:
        ImageData(tmp_path / "none", resolution=256 if script in SCRIPTS else None)
    assert line == f"{script}.py: error: {refused.value}"


def test_a_plan_needs_no_data(tmp_path):
    done = small.run_python("train_vae.py", "--exp-name", "x", "--vae", "f4d4-tiny", "--resolution", 32, "--dry-run")
    assert done.returncode == 0, done.stderr
