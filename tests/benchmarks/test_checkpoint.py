"""benchmarks.checkpoint: training waits for a copy, and no longer for the file."""

import json
import time

from benchmarks import checkpoint


def test_a_slow_disk_is_not_waited_for(tmp_path, monkeypatch):
    write = checkpoint.write_checkpoint

    def slow(path, contents):
        time.sleep(0.2)
        write(path, contents)

    monkeypatch.setattr(checkpoint, "write_checkpoint", slow)
    monkeypatch.setattr("training.saver.write_checkpoint", slow)
    checkpoint.main(["--device", "cpu", "--gigabytes", "0.02", "--output", str(tmp_path)])
    (file,) = tmp_path.glob("checkpoint-*.json")
    (row,) = json.loads(file.read_text())["rows"]
    assert row["at_once_seconds"] > 0.2 and row["behind_seconds"] > 0.1 > row["stall_seconds"]
