"""generate.py and cache_latents.py work on their next batch while one is written; Ctrl-C and a full disk end both."""

import errno
import os
import signal
import threading
import time

import numpy as np
import pytest

import cache_latents
import generate
from dataset.latent_cache import LatentCache
from models.sit import SiT
from sampling.store import SampleStore
from tests.support import sampling, small


class Begun:
    """Counts calls; a fixed number of them makes a batch."""

    def __init__(self, calls_of_a_batch: int):
        self.calls, self.size, self.changed = 0, calls_of_a_batch, threading.Condition()

    def noted(self, method):
        def noted(*args, **kwargs):
            with self.changed:
                self.calls += 1
                self.changed.notify_all()
            return method(*args, **kwargs)

        return noted

    def wait_for(self, batch: int) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: self.calls > batch * self.size, timeout=5)


def test_the_next_samples_are_drawn_while_some_are_written(exps, tmp_path, monkeypatch):
    """And what the drawing waits for counts in `images_per_second`."""
    expected, begun, write, overlapped = sampling.draw(exps, tmp_path / "a"), Begun(3), SampleStore.write, []

    def slow(store, batch, images):
        if batch + 1 < store.num_batches:
            overlapped.append(begun.wait_for(batch + 1))
        time.sleep(0.2)
        write(store, batch, images)

    monkeypatch.setattr(SiT, "forward", begun.noted(SiT.forward))
    monkeypatch.setattr(SampleStore, "write", slow)
    job = sampling.draw(exps, tmp_path / "b")
    assert overlapped == [True, True] and begun.calls == 3 * 3
    assert np.array_equal(job.images, expected.images)
    assert job.record["images_per_second"] < sampling.COUNT / (3 * 0.2)


def test_the_next_latents_are_encoded_while_some_are_written(place, tmp_path, monkeypatch):
    begun, write, overlapped = Begun(1), LatentCache.write, []

    def slow(cache, first, mean_std):
        if first + 8 < small.COUNT:
            overlapped.append(begun.wait_for(first // 8 + 1))
        write(cache, first, mean_std)

    monkeypatch.setattr(cache_latents, "encode_moments", begun.noted(cache_latents.encode_moments))
    monkeypatch.setattr(LatentCache, "write", slow)
    cache_latents.main(small.cache_options(place, "z", output_dir=tmp_path, pproc_batch_size=8))
    assert overlapped == [True, True]
    latents = np.load(tmp_path / "z.npy"), np.load(place.data / f"{place.latents}.npy")
    np.testing.assert_allclose(*latents, rtol=1e-4, atol=1e-5)


def test_ctrl_c_ends_the_drawing_of_a_batch_in_its_middle(exps, tmp_path, monkeypatch, capsys):
    forward, calls = SiT.forward, []

    def interrupting(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return forward(*args)

    monkeypatch.setattr(SiT, "forward", interrupting)
    with pytest.raises(SystemExit, match="130"):
        generate.main(sampling.flags(exps, tmp_path, num_steps=100))
    assert len(calls) < 50 and "stopped: interrupted; the samples that are finished stay" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["generate", "cache_latents"])
def test_a_full_disk_is_one_line(script, exps, place, tmp_path, monkeypatch, capsys):
    def full(path, offset, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    main, argv, module = {
        "generate": (generate.main, sampling.flags(exps, tmp_path), "sampling.store"),
        "cache_latents": (
            cache_latents.main,
            small.cache_options(place, "z", output_dir=tmp_path),
            "dataset.latent_cache",
        ),
    }[script]
    monkeypatch.setattr(f"{module}.write_at", full)
    threads = threading.active_count()
    with pytest.raises(SystemExit, match="1"):
        main(argv)
    (said,) = (line for line in capsys.readouterr().err.splitlines() if "stopped" in line)
    assert said.endswith("No space left on device") and threading.active_count() == threads
