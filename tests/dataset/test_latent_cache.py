"""The cache of latents while it is being written: killed, shared, refused, or in the way of another."""

import numpy as np
import pytest
import torch

from dataset.data import LatentData
from dataset.latent_cache import LatentCache
from tests.support.small import listing
from utils.errors import InputError

COUNT, SHAPE = 10, (10, 4, 3, 3)  # 2 channels of mean, 2 of std


def description(**changes):
    base = {"name": "z", "vae": "vae.pt", "vae_sha256": "aa", "dataset_fingerprint": "bb", "count": COUNT}
    return base | {"shape": list(SHAPE), "dtype": "float32", "resolution": 24} | changes


def rows():
    return torch.from_numpy(np.random.default_rng(0).random(SHAPE, np.float32) + 0.1)


def opened(tmp_path, **changes):
    cache = LatentCache(tmp_path / "z", description(**changes))
    assert cache.start()
    cache.open()
    cache.close()  # another may come: one that was killed holds nobody up
    return cache


def write(cache, block):
    cache.write(block.start, rows()[block.start : block.stop])


def test_a_killed_writer_goes_on(tmp_path):
    cache = opened(tmp_path)
    assert cache.missing_blocks(4) == [range(4), range(4, 8), range(8, 10)]
    write(cache, range(4, 8))
    cache.flush()
    write(cache, range(0, 4))  # killed before it is flushed: not to be trusted

    again = opened(tmp_path)
    assert again.missing_blocks(4) == [range(4), range(8, 10)]
    assert again.missing_blocks(5) == [range(5), range(5, 10)]  # another batch size: what is not whole is done again
    assert not (tmp_path / "z.npy").exists() and not (tmp_path / "z.json").exists()
    for block in again.missing_blocks(4):
        write(again, block)
    again.flush()
    scale, bias = again.statistics()
    again.finish(latents_bias=bias.flatten().tolist())

    latents = LatentData(tmp_path / "z")
    assert torch.equal(latents.__getitems__(range(COUNT)), rows())
    assert latents.info == description() | {"latents_bias": bias.flatten().tolist()}
    mean, std = rows().double().chunk(2, dim=1)
    variance = mean.var(dim=(0, 2, 3), correction=0) + std.square().mean(dim=(0, 2, 3))
    torch.testing.assert_close(1 / scale.flatten().double() ** 2, variance)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["z.json", "z.npy"]


def test_two_writers_share_the_rows(tmp_path):
    first, second = opened(tmp_path), opened(tmp_path)
    for cache, start in ((first, 0), (second, 3)):
        for block in cache.missing_blocks(3)[start // 3 :: 2]:
            write(cache, block)
        cache.flush()
    first.finish()
    assert torch.equal(LatentData(tmp_path / "z").__getitems__(range(COUNT)), rows())


def test_a_second_job_is_refused_and_touches_nothing(tmp_path, monkeypatch):
    finished(tmp_path)
    first, second = (LatentCache(tmp_path / "z", description()) for _ in range(2))
    assert first.start(overwrite=True)
    before = listing(tmp_path)
    for overwrite in (False, True):  # also one that would find the old cache finished
        with pytest.raises(InputError, match=r"--vae-latents-name: another job is at work on .*z\.npy"):
            second.start(overwrite=overwrite)
    assert listing(tmp_path) == before
    with monkeypatch.context() as patch:
        patch.setattr("dataset.latent_cache.rank", lambda: 1)  # a process of the first job
        assert second.start(overwrite=True)
    first.close()
    assert sorted(path.name for path in tmp_path.glob("*.lock")) == []
    assert second.start() is False and not list(tmp_path.glob("*.tmp-cache"))


def test_what_half_precision_cannot_hold_is_refused(tmp_path):
    cache = opened(tmp_path, dtype="float16")
    write(cache, range(COUNT))
    with pytest.raises(InputError, match="images 2 to 3 are not finite in float16"):
        cache.write(2, torch.full((2, *SHAPE[1:]), 1e6))
    cache.flush()
    cache.finish()
    assert np.load(tmp_path / "z.npy").dtype == np.float16
    assert torch.equal(LatentData(tmp_path / "z").__getitems__([3]), rows()[[3]].half().float())


def finished(tmp_path, **changes):
    cache = opened(tmp_path, **changes)
    write(cache, range(COUNT))
    cache.flush()
    cache.finish()


@pytest.mark.parametrize("change", [{"vae_sha256": "cc"}, {"dataset_fingerprint": "cc"}, {"dtype": "float16"}])
def test_what_belongs_to_others_is_refused(tmp_path, change):
    finished(tmp_path)
    assert LatentCache(tmp_path / "z", description(vae="moved/vae.pt")).start() is False  # the same cache: done
    before = (tmp_path / "z.npy").read_bytes()
    with pytest.raises(InputError, match="exists already, of another VAE"):
        LatentCache(tmp_path / "z", description(**change)).start()
    assert (tmp_path / "z.npy").read_bytes() == before

    other = LatentCache(tmp_path / "z", description(**change))
    assert other.start(overwrite=True)
    other.close()
    assert (tmp_path / "z.npy").read_bytes() == before  # until the new one is whole
    (tmp_path / "z.npy").unlink()
    (tmp_path / "z.json").unlink()
    with pytest.raises(InputError, match="is an unfinished cache of another"):
        LatentCache(tmp_path / "z", description()).start()


def test_a_writer_killed_between_the_two_renames_goes_on(tmp_path):
    cache = opened(tmp_path)
    write(cache, range(COUNT))
    cache.flush()
    (tmp_path / "z.json").write_text("{}")  # of an older cache, or already the new one
    again = opened(tmp_path)
    assert again.missing_blocks(4) == []
    again.finish()
    assert torch.equal(LatentData(tmp_path / "z").__getitems__(range(COUNT)), rows())


def test_disk_and_folder_are_checked_first(tmp_path):
    with pytest.raises(InputError, match="--output-dir: the latents 'z'"):
        LatentCache(tmp_path / "z", description(shape=[10**12, 4, 32, 32])).start()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--output-dir: .* cannot be written"):
        LatentCache(tmp_path / "file" / "z", description()).start()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("kind", ["npy", "done"])
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-1], lambda data: data.replace(b"(", b"(-")])
def test_an_unfinished_cache_whose_files_are_damaged_is_begun_anew(tmp_path, caplog, kind, damage):
    part = tmp_path / f"z.{kind}.tmp-cache"
    cache = opened(tmp_path)
    write(cache, range(COUNT))
    cache.flush()
    part.write_bytes(damage(part.read_bytes()))
    again = opened(tmp_path)
    assert (
        again.missing_blocks(5) == [range(5), range(5, 10)]
        and "is damaged: all latents are encoded anew" in caplog.text
    )
