"""cache_latents.py: the same cache from one job, or from one that was killed and started again; bad input."""

import json
import signal

import numpy as np
import pytest
import torch

import cache_latents
from dataset.data import ImageData, LatentData
from models.posterior import encode_moments, measure_latent_statistics, to_mean_std
from models.vae import build_vae
from models.vae_files import save_vae_files
from models.vae_keys import to_ldm
from tests.support import small
from tests.support.forks import Fork
from utils.errors import REQUEUE, SIGNALS
from utils.files import sha256
from utils.images import to_signed
from utils.locks import JobLock

COUNT = 37  # not a multiple of the batch


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return build_vae("f4d4-tiny").eval()


@pytest.fixture(scope="module")
def place(vae, tmp_path_factory):
    """A folder with a data folder `data` and a VAE `vae.pt`."""
    folder = tmp_path_factory.mktemp("cache")
    torch.save(to_ldm(vae), folder / "vae.pt")
    make_data(folder / "data", COUNT)
    return folder


def make_data(folder, count, size=32):
    folder.mkdir()
    np.save(folder / "images.npy", np.random.default_rng(count).integers(0, 256, (count, 3, size, size), np.uint8))
    np.save(folder / "labels.npy", np.arange(count) % 3)
    (folder / "dataset.json").write_text(json.dumps({"count": count, "resolution": size, "sources": []}))


def flags(place, name, *more, batch=8):
    vae, where = (
        dict(vae_arch="f4d4-tiny", vae_ckpt_path=place / "vae.pt"),
        dict(data_dir=place / "data", output_dir=place),
    )
    return [*small.argv(**vae, **where, vae_latents_name=name, pproc_batch_size=batch, num_workers=0), *more]


def refused(capsys, arguments):
    with pytest.raises(SystemExit) as leaving:
        cache_latents.main(arguments)
    message = capsys.readouterr().err.splitlines()[-1]
    assert leaving.value.code == 2 and message.count("error:") == 1
    return message


@pytest.fixture(scope="module")
def whole(place):
    cache_latents.main(flags(place, "whole"))
    return LatentData(place / "whole", ImageData(place / "data"))


@torch.no_grad()
def test_the_cache_holds_the_posteriors_and_says_of_what(whole, place, vae):
    data = ImageData(place / "data")
    pixels = to_signed(data.__getitems__(range(COUNT))[0])
    expected = to_mean_std(encode_moments(vae, pixels))
    torch.testing.assert_close(whole.__getitems__(range(COUNT)), expected, rtol=1e-4, atol=1e-5)
    info = whole.info
    assert info["vae_sha256"] == sha256(place / "vae.pt") and info["vae"] == str(place / "vae.pt")
    assert (info["count"], info["shape"], info["dtype"]) == (COUNT, [COUNT, 8, 8, 8], "float32")
    again = build_vae(info["vae_config"])
    again.load_state_dict(vae.state_dict())
    torch.testing.assert_close(to_mean_std(encode_moments(again, pixels)), expected)
    scale, bias = measure_latent_statistics(vae, data, device="cpu")  # the file has none beside it
    torch.testing.assert_close(torch.tensor(info["latents_scale"]), scale.flatten())
    torch.testing.assert_close(torch.tensor(info["latents_bias"]), bias.flatten(), rtol=1e-4, atol=1e-6)


def test_a_killed_job_goes_on(whole, place, monkeypatch):
    """Killed within its third batch of four; then finished in this process, which does only the rest."""
    arguments = flags(place, "killed", batch=4)
    job = Fork("tests/support/workers/killed_cache.py", *arguments).wait()
    assert job.returncode == -signal.SIGKILL, job.stderr
    assert not (place / "killed.npy").exists()
    done = int(np.load(place / "killed.done.tmp-cache").sum())
    assert done == 8

    encoded, encode = [], cache_latents.encode_moments
    noted = lambda vae, pixels: encoded.append(len(pixels)) or encode(vae, pixels)  # noqa: E731
    monkeypatch.setattr(cache_latents, "encode_moments", noted)
    cache_latents.main(arguments)
    assert sum(encoded) == COUNT - done
    np.testing.assert_allclose(np.load(place / "killed.npy"), whole.array, rtol=1e-4, atol=1e-5)
    assert not list(place.glob("killed.*tmp*"))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_all_processes_of_a_job_loses_nothing(place, tmp_path, number):
    """Loader processes too; the next job has the name at once."""
    arguments = [*flags(place, "stopped", batch=1), *small.argv(output_dir=tmp_path, num_workers=2)]
    job = Fork("tests/support/workers/signalled_cache.py", number.name, *arguments).wait()
    assert job.returncode == (130 if number == signal.SIGINT else REQUEUE)
    assert job.stderr.splitlines()[-1].endswith("finished stay, and the same command goes on from them")
    assert "Traceback" not in job.stderr and not (tmp_path / "stopped.lock").exists()
    assert np.load(tmp_path / "stopped.done.tmp-cache").sum() == 3


def test_a_second_job_is_refused(place, tmp_path, capsys):
    lock = JobLock(tmp_path / "z.lock")
    lock.acquire("")
    assert "another job is at work on" in refused(capsys, flags(place, "z", "--output-dir", str(tmp_path)))
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_vaes_own_statistics_are_kept_from_a_file_or_a_folder(whole, place, vae):
    scale, bias = torch.full((4,), 2.0), torch.arange(4.0)
    folder = save_vae_files(place, "saved", vae, scale, bias)
    for name, path in (("file", folder / "saved.pt"), ("folder", folder / "diffusers")):
        cache_latents.main(flags(place, name, "--vae-ckpt-path", str(path), "--vae-arch", "auto", "--dtype", "float16"))
        latents = LatentData(place / name)
        assert latents.array.dtype == np.float16
        assert np.array_equal(latents.array, whole.array.astype(np.float16))
        assert latents.info["latents_scale"] == [2.0] * 4 and latents.info["latents_bias"] == [0.0, 1.0, 2.0, 3.0]


def test_it_lies_beside_the_images_unless_told_otherwise(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vae = dict(vae_arch="f4d4-tiny", vae_ckpt_path=place / "vae.pt", num_workers=0)
    cache_latents.main(small.argv(**vae, data_dir=place / "data", vae_latents_name="beside"))
    assert (place / "data" / "beside.npy").is_file() and not list(tmp_path.iterdir())


def test_a_finished_cache_is_left_alone(whole, place, capsys):
    before = (place / "whole.npy").stat().st_mtime_ns
    cache_latents.main(flags(place, "whole"))
    assert "is there already" in capsys.readouterr().out
    assert "exists already, of another VAE, data set or dtype" in refused(
        capsys, flags(place, "whole", "--dtype", "float16")
    )
    assert (place / "whole.npy").stat().st_mtime_ns == before


def test_bad_input_is_refused(place, capsys):
    make_data(place / "odd", 3, size=30)
    for message, more in {
        "--data-dir: none is not a folder": ["--data-dir", "none"],
        "--vae-ckpt-path: none.pt does not exist": ["--vae-ckpt-path", "none.pt"],
        "vae.pt has 4 latent channels; --vae-arch f16d32 needs 32": ["--vae-arch", "f16d32"],
        "--vae-arch: f4d4-tiny needs images of a multiple of 4 pixels": ["--data-dir", str(place / "odd")],
        "--vae-latents-name: '../x' was given": ["--vae-latents-name", "../x"],
        "vae.pt cannot be written": ["--output-dir", str(place / "vae.pt")],
    }.items():
        assert message in refused(capsys, flags(place, "bad", *more))
    assert not list(place.glob("bad*"))


def test_latents_that_are_not_finite_are_refused(place, vae, capsys):
    broken = to_ldm(vae)
    broken["quant_conv.bias"] = torch.full_like(broken["quant_conv.bias"], float("nan"))
    torch.save(broken, place / "nan.pt")
    message = refused(capsys, flags(place, "nan", "--vae-ckpt-path", str(place / "nan.pt")))
    assert "--vae-ckpt-path: the VAE's latents of images 0 to 7 are not finite" in message
    assert not (place / "nan.npy").exists()
