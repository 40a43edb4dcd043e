"""Scripts as processes of their own, forked from one that has paid for the imports: seconds each.

What a user's process does from its first line on is shown by the fresh ones of `small.run_python`.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.small import ROOT

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # diffusers looks for CUDA when imported; a fork must still start it
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train_repae", "train_vae", "generate", "evaluate", "cache_latents"])


class Fork:
    """`python <words>` from the repository's root; its output is text."""

    def __init__(self, *words):
        self.words, self.output = [str(word) for word in words], tempfile.TemporaryDirectory()
        self.process = FORKS.Process(target=_run, args=(self.words, self.output.name))
        self.process.start()

    def wait(self, timeout: float = 240) -> subprocess.CompletedProcess:
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        with self.output:
            stdout, stderr = (Path(self.output.name, name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(self.words, self.process.exitcode, stdout, stderr)


def _run(words: list[str], output: str) -> None:
    os.chdir(ROOT)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(output, name), os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
