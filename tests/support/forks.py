"""Scripts as processes of their own, forked from one that has paid for the imports: seconds each.

What a user's process does from its first line on is shown by the fresh ones of `small.run_python`.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.small import ROOT

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # diffusers looks for CUDA when imported; a fork must still start it
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train_repae", "train_vae", "generate", "evaluate", "cache_latents"])


class Fork:
    """`python <words>` from the repository's root, in a process group of its own; its output is text."""

    def __init__(self, *words, **environment: str):
        self.words, self.output = [str(word) for word in words], tempfile.TemporaryDirectory()
        self.process = FORKS.Process(target=_run, args=(self.words, self.output.name, environment))
        self.process.start()

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        return Path(self.output.name, "stderr").read_text()

    def wait(self, timeout: float = 240) -> subprocess.CompletedProcess:
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        with self.output:
            stdout, stderr = (Path(self.output.name, name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(self.words, self.process.exitcode, stdout, stderr)


def two_processes(*words) -> list[Fork]:
    """`python <words>` twice, as the two processes of a job, without a launcher beside them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return [Fork(*words, RANK=rank, LOCAL_RANK=rank, **job) for rank in "01"]


def _run(words: list[str], output: str, environment: dict[str, str]) -> None:
    os.chdir(ROOT)
    os.setpgid(0, 0)
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # as it is in a user's process, for the loader's processes
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(output, name), os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
