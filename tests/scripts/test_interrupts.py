"""A signal ends every script in one line, which says what stays; what is finished stays."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import cache_latents
import evaluate
import generate
import save_vae_weights
import train_ldm_only
from configs.options import PARSERS
from dataset.latent_cache import LatentCache
from sampling.store import SampleStore
from tests.support import sampling, small
from tests.support.forks import Fork
from training.run import Run
from utils.errors import REQUEUE, SIGNALS

PLAIN = dict(enc_type="None", proj_coeff=0)


@pytest.fixture
def stopped(capsys):
    """`stopped(main, argv)`: the one line that a command leaves with when it is interrupted."""

    def run(main, argv, code: int = 130) -> str:
        capsys.readouterr()
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(SystemExit) as leaving:
            main(argv)
        assert signal.getsignal(signal.SIGINT) is before
        lines = [line for line in capsys.readouterr().err.splitlines() if "stopped" in line]
        assert len(lines) == 1 and leaving.value.code == code
        return lines[0]

    return run


def interrupting(method, call: int, number: int = signal.SIGINT):
    """The method, which a signal meets at the beginning of this call, counted from 1."""
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            signal.raise_signal(number)
        return method(*args, **kwargs)

    return interrupted


@pytest.mark.parametrize("number", SIGNALS)
def test_a_run_stops_with_a_checkpoint(number, place, tmp_path, stopped, monkeypatch):
    options = dict(max_train_steps=6, checkpointing_steps=6, log_steps=5, num_preview=2, sampling_steps=3, **PLAIN)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", interrupting(Run.log, 3, number))
        line = stopped(train_ldm_only.main, small.ldm_options(place, tmp_path, "run", **options), REQUEUE)
    assert line.endswith(f"by {number.name}, after step 3; --resume latest goes on from its checkpoint, of step 3")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["0000003.pt"]
    for name in ("run", "whole"):
        train_ldm_only.main(small.ldm_options(place, tmp_path, name, resume="latest", **options))
    small.assert_same_training(tmp_path, "run", (tmp_path, "whole"), 6)
    for step in (3, 6):  # the pictures of step 3 were due when the run stopped, and are made up for
        picture = Path("samples", f"000000{step}-samples.png")
        assert (tmp_path / "run" / picture).read_bytes() == (tmp_path / "whole" / picture).read_bytes()


def test_the_clock_stops_a_run_as_a_signal_does(place, tmp_path, stopped):
    argv = small.ldm_options(place, tmp_path, "run", max_hours=1e-6, **PLAIN)
    line = stopped(train_ldm_only.main, argv, REQUEUE)
    assert line.endswith("by --max-hours 1e-06, after step 1; --resume latest goes on from its checkpoint, of step 1")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, REQUEUE)])
def test_a_second_signal_stops_at_once(number, code, place, tmp_path, stopped, monkeypatch):
    monkeypatch.setattr("training.stopping.SAME_SIGNAL_SECONDS", 0)
    monkeypatch.setattr("training.saver.free_bytes", lambda: 0)  # no copy: the file is whole when `save` returns
    for checkpointing_steps, said in (
        (9, "after step 2; there is no checkpoint yet, and no step of it stays"),
        (2, "after step 2; --resume latest goes on from its last checkpoint, of step 2"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Run, "log", interrupting(interrupting(Run.log, 3, number), 3, number))
            options = dict(checkpointing_steps=checkpointing_steps, overwrite=True, **PLAIN)
            line = stopped(train_ldm_only.main, small.ldm_options(place, tmp_path, "run", **options), code)
        assert line.endswith(f"stopped: interrupted {said}")


def test_the_latents_of_finished_batches_stay(place, tmp_path, stopped, monkeypatch):
    argv = small.cache_options(place, "z", output_dir=tmp_path, pproc_batch_size=4)
    with monkeypatch.context() as patch:
        patch.setattr(LatentCache, "write", interrupting(LatentCache.write, 3))
        assert "finished stay, and the same command goes on" in stopped(cache_latents.main, argv)
    assert int(np.load(tmp_path / "z.done.tmp-cache").sum()) == 2 * 4
    cache_latents.main(argv)
    latents = np.load(tmp_path / "z.npy"), np.load(place.data / f"{place.latents}.npy")
    np.testing.assert_allclose(*latents, rtol=1e-4, atol=1e-5)


def test_finished_samples_stay(exps, tmp_path, stopped, monkeypatch, capsys):
    argv = sampling.flags(exps, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(SampleStore, "write", interrupting(SampleStore.write, 2))
        assert "finished stay, and the same command draws the others" in stopped(generate.main, argv)
    generate.main(argv)
    assert f"{sampling.COUNT} samples, {sampling.COUNT - sampling.BATCH} of them drawn now" in capsys.readouterr().out


@pytest.mark.parametrize("script", [evaluate, save_vae_weights])
def test_a_script_that_starts_again_says_nothing_else(script, place, exps, tmp_path, stopped, monkeypatch):
    checkpoint = exps / "repae" / "checkpoints" / "0000007.pt"
    reconstruction = dict(reconstruct=True, vae_ckpt=place.vae, data_dir=place.data, features="none", lpips=False)
    argv, name = {
        evaluate: (small.argv(**reconstruction, output=tmp_path / "numbers.json"), "measure_reconstruction"),
        save_vae_weights: (small.argv(repae_ckpt=checkpoint, save_dir=tmp_path), "save_vae_files"),
    }[script]
    monkeypatch.setattr(script, name, interrupting(getattr(script, name), 1))
    assert stopped(script.main, argv).endswith("stopped: interrupted")
    assert not list(tmp_path.iterdir())


def test_rank_0_speaks_alone(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(Run, "log", interrupting(Run.log, 1))
    with pytest.raises(SystemExit) as leaving:
        train_ldm_only.main(small.ldm_options(place, tmp_path, "run", **PLAIN))
    assert leaving.value.code == REQUEUE and "stopped" not in capsys.readouterr().err


def test_a_job_out_of_reach_of_ctrl_c_stays_so(place, tmp_path, monkeypatch):
    """As `nohup` and a shell's `&` in a script start them."""
    monkeypatch.setattr(Run, "log", interrupting(Run.log, 1))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train_ldm_only.main(small.ldm_options(place, tmp_path, "run", max_train_steps=1, **PLAIN))
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_real_process_leaves_without_a_traceback(place, tmp_path):
    options = dict(max_train_steps=100_000, checkpointing_steps=10, num_workers=2, **PLAIN)
    job = Fork("train_ldm_only.py", *small.ldm_options(place, tmp_path, "run", **options))
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "0000010.pt").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(job.process.pid, signal.SIGINT)
    done = job.wait()
    assert done.returncode == REQUEUE and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("train_ldm_only.py: stopped: by SIGINT, after step") and "--resume latest" in last


@pytest.mark.parametrize("script", PARSERS)
def test_the_imports_too_end_in_one_line(script, place, exps, tmp_path):
    """Seconds in which a mistake is noticed: Ctrl-C comes with the first import of numpy or torch."""
    for module in ("numpy", "torch"):
        (tmp_path / f"{module}.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    name = script.removesuffix(".py")
    words = {  # what is looked at before the imports is there
        "cache_latents": small.argv(data_dir=place.data),
        "generate": small.argv(exp_path=exps / "repae"),
        "save_vae_weights": small.argv(repae_ckpt=exps / "repae" / "checkpoints" / "0000007.pt"),
        "preprocessing": small.argv(imagenet_path="x"),
        "evaluate": [],
    }.get(name) or small.OPTIONS.get(name, lambda *_: [])(place, tmp_path, "run")
    environment = small.environment(PYTHONPATH=f"{tmp_path}:{small.ROOT}")
    done = small.run_python(script, *words, env=environment)
    assert (done.returncode, done.stderr) == (130, f"{script}: stopped: interrupted\n")
