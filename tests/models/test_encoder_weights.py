"""Encoder files: layouts, wrong ones and what they get, where they are looked for, the download."""

import dataclasses
import hashlib
import http.server
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch

from models.encoder_table import ENCODERS
from models.encoder_weights import download, find_weights, load_weights, to_timm_state
from models.encoders import build, load_encoder
from tests.support.encoder_weights import public_checkpoint, refusal, write_public_file

# Layouts


def test_half_precision_matrices_become_float32(tmp_path):
    spec = ENCODERS["clip-vit-L"]
    halves = {
        key: tensor.half() if tensor.ndim > 1 else tensor for key, tensor in public_checkpoint("clip-vit-L").items()
    }
    path = tmp_path / "clip.pt"
    torch.save(halves, path)  # tensors alone: no TorchScript, no checksum
    network = build(spec, 256, depth=2)
    load_weights(network, spec, path)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    torch.testing.assert_close(network.patch_embed.proj.weight, halves["visual.conv1.weight"].float(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["dinov2reg-vit-b", "mae-vit-l"])
def test_timms_converted_copy_is_the_same_encoder(name, tmp_path):
    spec = ENCODERS[name]
    network, copy = build(spec, 256, depth=2), build(spec, 256, depth=2)
    state = to_timm_state(spec, public_checkpoint(name), network, "memory")
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    load_weights(copy, spec, path)
    assert all(torch.equal(tensor, state[key]) for key, tensor in copy.state_dict().items())


# Wrong files


MAE_L = {"model": {"patch_embed.proj.weight": torch.zeros(1024, 3, 16, 16)}}
DINOV2_B = {"patch_embed.proj.weight": torch.zeros(768, 3, 14, 14), "pos_embed": torch.zeros(1, 1370, 768)}


@pytest.mark.parametrize(
    ("name", "contents", "needles"),
    [
        ("dinov2-vit-l", MAE_L, ["'model'", "unexpected"]),
        ("dinov2-vit-l", MAE_L["model"], ["(1024, 3, 16, 16)", "(1024, 3, 14, 14)"]),
        ("dinov2-vit-l", DINOV2_B, ["(768, 3, 14, 14)", "(1024, 3, 14, 14)"]),
        ("dinov2reg-vit-b", DINOV2_B, ["'register_tokens' is missing"]),
        ("dinov2-vit-b", DINOV2_B | {"register_tokens": torch.zeros(1, 4, 768)}, ["it has register tokens"]),
        ("dinov2-vit-b", DINOV2_B, ["'cls_token' is missing (and 171 more)"]),
        ("dinov2-vit-b", DINOV2_B | {"pos_embed": torch.zeros(1, 1000, 768)}, ["999 positions are no square grid"]),
        ("mocov3-vit-b", DINOV2_B, ["'state_dict' is needed", "'patch_embed.proj.weight', 'pos_embed'"]),
        ("jepa-vit-h", MAE_L, ["'encoder' is needed", "'model'"]),
        ("jepa-vit-h", {"encoder": {}, "discriminator": {}}, ["'discriminator' beside 'encoder' is unexpected"]),
        ("mae-vit-l", {"model": {}}, ["'patch_embed.proj.weight' is missing, it has nothing"]),
    ],
)
def test_another_networks_file_is_refused_in_one_line(name, contents, needles, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(contents, path)
    refusal(lambda: load_encoder(name, 256, str(path)), "--enc-ckpt", path, name, *needles)


def test_a_missing_and_an_unknown_key_are_named():
    spec = dataclasses.replace(ENCODERS["mocov3-vit-s"], depth=2)
    network, checkpoint = build(spec, 256), public_checkpoint("mocov3-vit-s")
    state = checkpoint["state_dict"]
    bias = state.pop("module.base_encoder.norm.bias")
    refusal(
        lambda: to_timm_state(spec, checkpoint, network, "f"), "f does not hold mocov3-vit-s", "'norm.bias' is missing"
    )
    state |= {"module.base_encoder.norm.bias": bias[:5]}
    refusal(lambda: to_timm_state(spec, checkpoint, network, "f"), "'norm.bias' has shape (5,), (384,) is needed")
    state |= {"module.base_encoder.norm.bias": bias, "module.base_encoder.norm.gain": bias}
    refusal(lambda: to_timm_state(spec, checkpoint, network, "f"), "'norm.gain' is unexpected")
    del state["module.base_encoder.norm.gain"]
    state["module.teacher.bias"] = bias
    refusal(lambda: to_timm_state(spec, checkpoint, network, "f"), "'module.teacher.bias' is unexpected")


@pytest.mark.parametrize("legacy", [False, True])
def test_files_that_are_no_weights_are_refused(legacy, tmp_path):
    path = tmp_path / "dinov2.pth"

    def load():
        load_encoder("dinov2-vit-b", 256, str(path))

    torch.save({"key": torch.zeros(10000)}, path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[:20000])
    refusal(load, "--enc-ckpt", path, "truncated")
    path.write_bytes(b"")
    refusal(load, path, "truncated")
    path.write_text("\n<!DOCTYPE html><title>404</title>")
    refusal(load, path, "web page")
    torch.save({"args": Path("x")}, path, _use_new_zipfile_serialization=not legacy)
    refusal(load, path, "pathlib")
    broken = path.with_suffix(".safetensors")
    broken.write_bytes(b"\x40" + bytes(30))
    refusal(lambda: load_encoder("dinov2-vit-b", 256, str(broken)), broken, "truncated or no safetensors")
    refusal(lambda: load_encoder("dinov2-vit-b", 256, str(tmp_path)), tmp_path, "folder")
    refusal(lambda: load_encoder("dinov2-vit-b", 256, str(tmp_path / "no.pth")), "no.pth does not exist", "0.35 GB")


def test_only_the_published_torchscript_archive_is_opened(tmp_path):
    path = write_public_file("clip-vit-L", tmp_path, {"visual.proj": torch.zeros(2, 2)})
    refusal(lambda: load_encoder("clip-vit-L", 256, str(path)), path, ENCODERS["clip-vit-L"].sha256, "is opened")
    refusal(lambda: load_encoder("dinov2-vit-b", 256, str(path)), path, "TorchScript", "a file of tensors is opened")


# Where weights come from


@pytest.fixture
def places(tmp_path, monkeypatch):
    """An empty working folder, torch hub's cache and home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path


@pytest.fixture
def server():
    """Serves `server.body` at every address; announces `server.announced` bytes where that is set; counts requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests += 1
            self.send_response(200)
            self.send_header("Content-Length", str(self.server.announced or len(self.server.body)))
            self.end_headers()
            self.wfile.write(self.server.body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.announced, server.body = 0, None, bytes(range(256)) * 9000
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def at(server, name: str, **changes):
    return dataclasses.replace(ENCODERS[name], url=f"http://127.0.0.1:{server.server_port}/x/{name}.pth", **changes)


def test_weights_are_looked_for_in_order(places, server):
    spec = at(server, "clip-vit-L", sha256=None)
    assert find_weights(spec).read_bytes() == server.body and server.requests == 1
    for later in (Path("hub/checkpoints/clip-vit-L.pth"), Path("ckpts/ViT-L-14.pt"), Path("mine.pt")):
        later.parent.mkdir(exist_ok=True)
        later.touch()
        assert find_weights(spec, "mine.pt" if later.name == "mine.pt" else None) in (later, places / later)
    Path("ckpts/ViT-L-14.pt").unlink()
    Path("hub/checkpoints/clip-vit-L.pth").unlink()
    publisher = Path("home/.cache/clip/ViT-L-14.pt")
    publisher.parent.mkdir(parents=True)
    publisher.touch()
    assert find_weights(spec) == places / publisher
    assert server.requests == 1


def test_one_process_downloads_and_the_others_wait(places, server):
    spec, paths = at(server, "mae-vit-l"), []
    threads = [threading.Thread(target=lambda: paths.append(download(spec))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [places / "hub/checkpoints/mae-vit-l.pth"] * 4
    assert paths[0].read_bytes() == server.body and server.requests == 1


def test_a_download_that_goes_wrong_leaves_nothing(places, server):
    checksum = hashlib.sha256(server.body).hexdigest()
    assert download(at(server, "clip-vit-L", sha256=checksum)).is_file()
    cut = at(server, "mae-vit-l")
    server.announced = len(server.body) + 1
    refusal(lambda: download(cut), f"{len(server.body)} of {server.announced} bytes", "1.2 GB", "ckpts/mae_vitl.pth")
    server.announced = None
    refusal(lambda: download(at(server, "dinov2-vit-b", sha256="0" * 64)), "its sha256 is not 000")
    assert [file.name for file in Path("hub/checkpoints").glob("*") if file.suffix != ".lock"] == ["clip-vit-L.pth"]


def test_without_a_connection_the_message_says_what_to_get(places, server):
    server.shutdown()
    server.server_close()
    spec = at(server, "jepa-vit-h")
    refusal(
        lambda: find_weights(spec), "jepa-vit-h", "refused", "10.4 GB", spec.url, "ckpts/ijepa_vith.pth", "--enc-ckpt"
    )
    refusal(lambda: find_weights(ENCODERS["mocov3-vit-l"]), "github.com/LTH14/rcg", "1.2 GB", "ckpts/mocov3_vitl.pth")
