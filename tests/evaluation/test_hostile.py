"""References that are broken or made to do harm: the moments that were written, or one line, and little memory."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataset.image_sources import open_images
from evaluation.reference import read_reference, save_reference
from tests.support.evaluation_data import TinyInception, feature_set, random_images
from tests.support.hostile import NESTED, broken, changed, npy, outcome
from tests.support.refusals import refusal

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network():
    return TinyInception()


@pytest.fixture(scope="module")
def saved(network, tmp_path_factory):
    """{name: array} of a file that --save-stats writes, and its folder."""
    folder = tmp_path_factory.mktemp("hostile")
    reference = feature_set(random_images(12, 8, 1), network)
    save_reference(folder / "whole.npz", reference, network, (8, 8), CPU, "x")
    with np.load(folder / "whole.npz") as arrays:
        return dict(arrays), folder


def read(path, network):
    return outcome(read_reference, path, network, (8, 8), CPU)


@given(data=st.data())
def test_broken_statistics_are_one_line_or_what_was_written(saved, network, data):
    arrays, folder = saved
    whole = (folder / "whole.npz").read_bytes()
    (folder / "x.npz").write_bytes(data.draw(broken(whole)))
    found = read(folder / "x.npz", network)
    assert found is None or found.pool[0].shape == arrays["mu"].shape


@given(data=st.data())
def test_statistics_of_another_description_are_used_or_refused(saved, network, data):
    arrays, folder = saved
    meta = data.draw(changed(json.loads(str(arrays["meta"]))).map(json.dumps) | st.sampled_from([*NESTED, "["]))
    np.savez(folder / "x.npz", **arrays | {"meta": np.array(meta)})
    found = read(folder / "x.npz", network)
    assert found is None or all(note.isprintable() for note in found.notes)


@given(name=st.sampled_from(["mu", "sigma", "mu_s", "features", "probe", "meta", "arr_0"]), data=npy())
def test_statistics_with_a_made_up_array_are_used_or_refused(saved, network, name, data):
    arrays, folder = saved
    buffer = io.BytesIO()
    np.savez(buffer, **{key: value for key, value in arrays.items() if key != name})
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}.npy", data)
    (folder / "x.npz").write_bytes(buffer.getvalue())
    read(folder / "x.npz", network)


@pytest.mark.parametrize("kind", [">f8", "<f4", "<f2", np.longdouble])
def test_moments_of_any_machine_are_read(saved, network, kind):
    arrays, folder = saved
    moments = {name: arrays[name].astype(np.float16).astype(kind) for name in ("mu", "sigma")}
    np.savez(folder / "x.npz", **moments)
    found = read_reference(folder / "x.npz", network, (8, 8), CPU)
    np.testing.assert_array_equal(found.pool[1].numpy(), arrays["sigma"].astype(np.float16).astype(np.float64))


# Small files of many zeros


def archive(path, name: str, description: str, size: int, method=zipfile.ZIP_DEFLATED):
    """An .npz whose one array has `size` bytes of zeros, which pack to a thousandth or less."""
    header = b"\x93NUMPY\x01\x00" + len(description).to_bytes(2, "little") + description.encode()
    with zipfile.ZipFile(path, "w", method, compresslevel=1) as file, file.open(f"{name}.npy", "w") as member:
        member.write(header)
        block = bytes(1 << 20)
        for _ in range(size >> 20):
            member.write(block)
    return path


def described(kind: str, shape: tuple, fortran: bool = False) -> str:
    return repr({"descr": kind, "fortran_order": fortran, "shape": shape})


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("arr_0", described("|u1", (1, 300 << 10, 1024, 1))),
        ("meta", described("<U78643200", ())),
        ("sigma", described("<f4", (75 << 10, 1024), fortran=True)),
    ],
)
def test_an_archive_that_unpacks_to_much_at_once_is_refused(tmp_path, network, name, description):
    bomb = archive(tmp_path / "x.npz", name, description, 300 << 20)
    assert bomb.stat().st_size < 3 << 20
    with_images = name == "arr_0"
    message = refusal(open_images, bomb) if with_images else refusal(read_reference, bomb, network, (8, 8), CPU)
    assert "0.315 GB of a compressed array are needed at once" in message


def test_an_archive_whose_reader_unpacks_blindly_is_refused(tmp_path, network):
    bomb = archive(tmp_path / "x.npz", "arr_0", described("|u1", (1 << 20,)), 1 << 20, zipfile.ZIP_BZIP2)
    assert "is packed in a way that numpy does not write" in refusal(read_reference, bomb, network, (8, 8), CPU)
