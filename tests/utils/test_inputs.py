"""Missing files and taken folders are refused before the heavy imports, in the words of what refuses them later."""

import pytest

import cache_latents
import generate
import save_vae_weights
import train_ldm_only
import train_repae
import train_vae
from tests.support import small

RUN = {"train_repae": train_repae, "train_ldm_only": train_ldm_only, "train_vae": train_vae}


@pytest.fixture
def refused(capsys, monkeypatch):
    """`refused(script, words)`: the line of a script that imports neither torch nor numpy for it; its `main` alone
    has the same."""

    def run(script, words: list[str]) -> str:
        name = f"{script.__name__}.py"
        done = small.run_python("-X", "importtime", name, *words)
        *imports, line = done.stderr.splitlines()
        assert done.returncode == 2 and {"torch", "numpy"}.isdisjoint(row.split("|")[-1].strip() for row in imports)
        monkeypatch.setattr("sys.argv", [name])
        with pytest.raises(SystemExit) as leaving:
            script.main([str(word) for word in words])
        assert leaving.value.code == 2 and capsys.readouterr().err.splitlines()[-1] == line
        return line

    return run


@pytest.mark.parametrize("script", [*RUN.values(), cache_latents])
def test_a_missing_data_folder(script, refused, tmp_path):
    named = ["--exp-name", "x", "--output-dir", tmp_path] if script.__name__ in RUN else []
    assert "--data-dir: " in refused(script, [*named, "--data-dir", tmp_path / "none"])


@pytest.mark.parametrize("script", RUN)
def test_a_taken_run_folder(script, refused, place, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").touch()
    assert "give another name" in refused(RUN[script], small.OPTIONS[script](place, tmp_path, "run"))


@pytest.mark.parametrize("script", RUN)
def test_a_missing_vae(script, refused, place, tmp_path):
    words = small.OPTIONS[script](place, tmp_path, "run", vae_ckpt=tmp_path / "none.pt")
    assert f"--vae-ckpt: {tmp_path / 'none.pt'} does not exist" in refused(RUN[script], words)


def test_a_missing_run(refused, tmp_path):
    assert "--exp-path: " in refused(generate, ["--exp-path", tmp_path / "none"])
    assert "--repae-ckpt: " in refused(save_vae_weights, ["--repae-ckpt", tmp_path / "none.pt"])


def test_a_plan_needs_no_data(tmp_path):
    done = small.run_python("train_vae.py", "--exp-name", "x", "--vae", "f4d4-tiny", "--resolution", 32, "--dry-run")
    assert done.returncode == 0, done.stderr
