"""The probe of a server: quick, and through the proxy that the environment sets."""

import socket
import time

import pytest

from utils.network import reachable


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_the_probe_waits_no_longer_than_it_says(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert reachable(f"https://127.0.0.1:{port}/path")
    assert not reachable(f"https://127.0.0.1:{port}")

    def hang(address, timeout):
        time.sleep(1)
        raise TimeoutError

    monkeypatch.setattr("socket.create_connection", hang)
    start = time.monotonic()
    assert not reachable("https://127.0.0.1", seconds=0.1)
    assert time.monotonic() - start < 0.8


def test_where_there_is_a_proxy_it_is_the_one_that_must_answer(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        port = proxy.getsockname()[1]
        for form in (f"http://127.0.0.1:{port}", f"127.0.0.1:{port}"):
            monkeypatch.setenv("https_proxy", form)
            assert reachable("https://host.invalid")
        monkeypatch.setenv("no_proxy", "host.invalid")
        assert not reachable("https://host.invalid", seconds=2)
