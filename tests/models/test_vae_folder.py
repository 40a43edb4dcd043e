"""A VAE in diffusers folders: variants, other classes, and by its name on a hub, which a local server plays here."""

import json
import shutil
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants

from models.vae import build_vae, load_vae, vae_config
from models.vae_files import save_vae_files
from models.vae_state import WEIGHTS
from tests.support.refusals import refusal
from tests.utils.test_torch_files import compress

TINY = "f4d4-tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return build_vae(TINY).eval()


def equal_weights(one, other):
    other = other.state_dict()
    return all(torch.equal(tensor, other[key]) for key, tensor in one.state_dict().items())


# Variants


def test_a_folder_with_one_variant_alone_loads_and_says_so(tiny, tmp_path):
    half = build_vae(TINY)
    half.load_state_dict(tiny.state_dict())
    for name, options in {"safe": {}, "bin": {"safe_serialization": False}}.items():
        said, folder = [], tmp_path / name / "vae"
        half.half().save_pretrained(folder, variant="fp16", **options)
        for path in (folder, folder.parent):
            vae = load_vae("auto", path, say=said.append)
            assert equal_weights(vae, half.float())
            assert {parameter.dtype for parameter in vae.parameters()} == {torch.float32}
        assert said == [f"{folder}: it has only the variant 'fp16' of its weights, which was taken"] * 2


def test_plain_weights_go_before_variants_and_two_variants_are_not_guessed(tiny, tmp_path):
    other = build_vae(TINY)
    tiny.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path, variant="fp16")
    said = []
    assert equal_weights(load_vae("auto", tmp_path, say=said.append), tiny) and said == []
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    other.save_pretrained(tmp_path, variant="non_ema")
    assert "has its weights only as fp16, non_ema; a folder with one of them" in refusal(load_vae, "auto", tmp_path)


def test_a_preset_that_is_another_network_than_the_folder_is_refused(tiny, tmp_path):
    for key, value in {"norm_num_groups": 4, "act_fn": "relu", "use_quant_conv": False, "layers_per_block": 2}.items():
        build_vae(vae_config(tiny) | {key: value}).save_pretrained(tmp_path / key)
        assert f"{key} has {key} {value}; --vae f4d4-tiny has " in refusal(load_vae, TINY, tmp_path / key)
        assert load_vae("auto", tmp_path / key).config[key] == value
    build_vae(vae_config(tiny) | {"sample_size": 64, "scaling_factor": 1.0}).save_pretrained(tmp_path / "same")
    load_vae(TINY, tmp_path / "same")


def test_a_configuration_of_a_whole_pipeline_does_not_hide_its_vae(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "vae")
    for config in ({"model_type": "pipeline"}, {"_class_name": "UNet2DModel"}, []):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert equal_weights(load_vae("auto", tmp_path), tiny)


@pytest.mark.parametrize("safe", [True, False])
def test_integers_in_a_folder_are_no_weights(safe, tiny, tmp_path):
    tiny.save_pretrained(tmp_path, safe_serialization=safe)
    state = {key: (50 * tensor).to(torch.int8) for key, tensor in tiny.state_dict().items()}
    if safe:
        safetensors.torch.save_file(state, tmp_path / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
    else:
        torch.save(state, tmp_path / f"{WEIGHTS}.bin")
    message = refusal(load_vae, "auto", tmp_path)
    assert f"{WEIGHTS}." in message and "is torch.int8; floating point is needed" in message


def test_a_folder_with_compressed_weights_has_its_numbers(tiny, tmp_path):
    tiny.save_pretrained(tmp_path, safe_serialization=False)
    weights = tmp_path / f"{WEIGHTS}.bin"
    compress(weights, tmp_path / "packed")
    (tmp_path / "packed").replace(weights)
    assert equal_weights(load_vae("auto", tmp_path), tiny)


# The hub


class Hub:
    """What a hub's server answers: files of repositories, as huggingface_hub asks for them."""

    def __init__(self):
        self.files, self.gated, self.asked = {}, set(), []

    def add(self, repository, folder, source):
        for file in source.iterdir():
            self.files[f"{repository}/{folder}{file.name}"] = file.read_bytes()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, with an empty cache."""
    here = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            path = self.path.split("?")[0].strip("/")
            repository, _, file = path.partition("/resolve/main/")
            if not file:
                repository, _, file = path.partition(f"/resolve/{COMMIT}/")
            here.asked.append((self.command, f"{repository}/{file}"))
            contents, error = here.files.get(f"{repository}/{file}"), None
            if repository in here.gated:
                status, error = 403, "GatedRepo"
            elif not any(name.startswith(f"{repository}/") for name in here.files):
                status, error = 404, "RepoNotFound"
            elif contents is None:
                status, error = 404, "EntryNotFound"
            else:
                status = 200
            self.send_response(status)
            self.send_header("X-Repo-Commit", COMMIT)
            if error:
                self.send_header("X-Error-Code", error)
            body = contents if status == 200 else b""
            self.send_header("ETag", f'"{len(body)}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    for name in ("http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_to(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)  # so that no local folder has a repository's name
    yield here
    server.shutdown()
    server.server_close()


def point_to(monkeypatch, endpoint):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("name", ["org/pipe", "org/pipe/vae", "org/pipe:vae", "org/alone"])
def test_a_hub_name_loads_once_from_the_hub_and_then_from_the_cache(name, hub, tiny, folder, monkeypatch):
    hub.add("org/alone", "", folder)
    hub.add("org/pipe", "vae/", folder)
    said = []
    assert equal_weights(load_vae("auto", name, say=said.append), tiny)
    assert said == [f"{name}: taken from the hub, revision {COMMIT[:12]}"]

    # With a filled cache nothing is asked, online or not.
    hub.asked.clear()
    assert equal_weights(load_vae("auto", name, say=said.append), tiny)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert equal_weights(load_vae("auto", name, say=said.append), tiny)
    assert said[1:] == [f"{name}: taken from the hub's cache, revision {COMMIT[:12]}"] * 2 and hub.asked == []


def test_a_repository_with_the_fp16_variant_alone(hub, tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "source", variant="fp16")
    hub.add("org/half", "vae/", tmp_path / "source")
    said = []
    assert equal_weights(load_vae("auto", "org/half", say=said.append), tiny)
    assert "only the variant 'fp16'" in said[1]


def test_a_configuration_of_a_whole_repository_does_not_hide_its_vae(hub, tiny, folder):
    hub.add("org/pipe", "vae/", folder)
    hub.files["org/pipe/config.json"] = b'{"model_type": "pipeline"}'
    for _ in ("from the hub", "from its cache"):
        assert equal_weights(load_vae("auto", "org/pipe"), tiny)
        hub.files["org/pipe/vae/config.json"] = b"gone"


def test_what_the_hub_refuses_is_one_line(hub, folder):
    hub.add("org/other", "unet/", folder)
    hub.gated.add("org/gated")
    assert "org/none is no local path, and no repository on 127.0.0.1" in refusal(load_vae, "auto", "org/none")
    assert "config.json and vae/config.json are not on the hub" in refusal(load_vae, "auto", "org/other")
    message = refusal(load_vae, "auto", "org/gated:vae")
    assert "accept its terms on https://127.0.0.1/org/gated and log in with `hf auth login`" in message
    hub.files["org/empty/config.json"] = b'{"_class_name": "AutoencoderKL"}'
    assert "the hub has no diffusion_pytorch_model.safetensors" in refusal(load_vae, "auto", "org/empty")
    hub.files["org/unet/config.json"] = b'{"_class_name": "UNet2DModel"}'
    hub.files["org/unet/diffusion_pytorch_model.safetensors"] = b""
    assert "holds a UNet2DModel" in refusal(load_vae, "auto", "org/unet")


def test_without_a_connection_it_is_one_line_within_seconds(hub, monkeypatch):
    start = time.monotonic()
    point_to(monkeypatch, "http://127.0.0.1:9")
    for name in ("org/name", "org/name/vae", "org/name:vae"):
        message = refusal(load_vae, "auto", name)
        assert message.startswith(
            f"--vae-ckpt: {name} is no local path and not in the hub's cache, and 127.0.0.1 was not"
        )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "and HF_HUB_OFFLINE is set" in refusal(load_vae, "auto", "org/name")
    assert time.monotonic() - start < 5 and hub.asked == []


def test_a_hub_that_takes_connections_and_does_not_answer_is_left(hub, monkeypatch):
    monkeypatch.setattr("models.vae_folder._ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_to(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        assert "127.0.0.1 was not reached (" in refusal(load_vae, "auto", "org/name")
        assert time.monotonic() - start < 3


def test_paths_that_begin_in_a_local_folder_are_no_hub_names(hub, tmp_path):
    (tmp_path / "exps").mkdir()
    for name in ("exps/vae.pt", "exps/missing", "exps/run/vae", "gone/vae.safetensors"):
        assert f"{name} does not exist" in refusal(load_vae, "auto", name)
    assert "does not exist" in refusal(load_vae, TINY, "org/name") and hub.asked == []


# Other classes


def test_another_class_is_named(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "v")
    config = json.loads((tmp_path / "v" / "config.json").read_text())
    (tmp_path / "v" / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderKLWan"}))
    message = refusal(load_vae, "auto", tmp_path / "v")
    assert "holds a AutoencoderKLWan; one of AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage" in message


def test_the_folder_of_ours_moves_with_its_name(tiny, tmp_path):
    folder = save_vae_files(tmp_path, "v", tiny, torch.ones(4), torch.zeros(4))
    shutil.move(folder / "diffusers", tmp_path / "moved")
    assert equal_weights(load_vae("auto", tmp_path / "moved"), tiny)
