"""Public weights in torch hub's cache: where a file lies there, and its download by one process for all."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock


def cache_path(url: str) -> Path:
    """Where torch hub keeps the file of this address: under the address's own name."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def fetch_once(url: str, fetch: Callable[[Path], None]) -> Path:
    """The cached file of an address, made by `fetch(path)` if it is absent, by one process while the others wait.

    Raises:
        OSError: the cache cannot be written; and whatever `fetch` raises.
    """
    path = cache_path(url)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                fetch(path)
    return path


def download(url: str, path: Path, sha256_prefix: str) -> None:
    """Download by torch hub, with a progress bar on the first process of each machine.

    Raises:
        OSError: no connection.
        RuntimeError: what came has another checksum.
    """
    progress = int(os.environ.get("LOCAL_RANK", 0)) == 0
    torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256_prefix, progress=progress)
