"""LPIPS against the public implementation, and where its VGG16 comes from."""

import pytest
import torch

import loss.perceptual
from loss.perceptual import load_lpips
from tests.support.loss_data import ARRAYS, check_lpips, inputs
from utils.errors import InputError


def test_lpips_and_its_gradient_are_those_of_the_public_code(lpips):
    check_lpips(lpips)
    for i in range(5):
        assert torch.equal(getattr(lpips, f"lin{i}").model[1].weight, torch.from_numpy(ARRAYS[f"lpips.lin{i}"]))


def test_only_the_reconstruction_leaves_a_graph(lpips):
    """The trunk keeps no activation of the real images for a backward pass that never comes."""
    pixels, reconstruction, _ = inputs()
    graphs = []
    hook = lpips.net.slice5.register_forward_hook(lambda _, __, features: graphs.append(features.requires_grad))
    lpips(pixels, reconstruction.requires_grad_())
    hook.remove()
    assert graphs == [False, True]  # images first


def test_lpips_is_frozen_and_takes_no_random_draw(vgg_file, capfd):
    before = torch.get_rng_state()
    lpips = load_lpips(vgg_file)
    assert torch.equal(torch.get_rng_state(), before)
    assert not lpips.training and not any(parameter.requires_grad for parameter in lpips.parameters())
    assert capfd.readouterr().out == ""


def test_other_files_than_vgg16_are_refused(vgg_file, tmp_path):
    with pytest.raises(InputError, match=r"--lpips-weights: .*none.pth does not exist; fetch https.*vgg16.*528 MB"):
        load_lpips(tmp_path / "none.pth")
    (tmp_path / "page.pth").write_text("<html>")
    with pytest.raises(InputError, match=r"--lpips-weights: .*page.pth is no torch"):
        load_lpips(tmp_path / "page.pth")
    state = torch.load(vgg_file)
    torch.save(state | {"features.2.weight": torch.zeros(3)}, tmp_path / "shape.pth")
    with pytest.raises(InputError, match=r"'features.2.weight' has shape \(3,\); vgg16 needs \(64, 64, 3, 3\)"):
        load_lpips(tmp_path / "shape.pth")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"is not a torchvision vgg16 state dict: it lacks 'features.0.weight'"):
        load_lpips(tmp_path / "other.pth")


def test_without_connection_the_message_says_where_to_put_which_file(monkeypatch, tmp_path, vgg_file):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def refuse(url, *_, **__):
        raise OSError(f"no route to {url}")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    place = tmp_path / "checkpoints" / "vgg16-397923af.pth"
    with pytest.raises(InputError, match="cannot be downloaded") as error:
        load_lpips()
    for part in (loss.perceptual.VGG16_URL, str(place), "--lpips-weights", "528 MB"):
        assert part in str(error.value)
    place.write_bytes(vgg_file.read_bytes())  # put there by hand
    assert load_lpips().lin0.model[1].weight.shape == (1, 64, 1, 1)
