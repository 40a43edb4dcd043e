import pytest

from utils.costs import flops_lines, memory_lines, time_lines
from utils.parts import Part


def test_shares_and_sums():
    flops = {Part("a"): 1e9, Part("a", True): 2e9, Part("b"): 1e9}
    lines = [line.split() for line in flops_lines(flops, "image")]
    assert lines == [
        ["GFLOP", "of", "one", "image", "forward", "backward", "share"],
        ["a", "1.0", "2.0", "75.0%"],
        ["b", "1.0", "25.0%"],
        ["together", "2.0", "2.0", "4.0"],
    ]
    assert flops_lines({Part("b"): 1e9}, "image")[0].split()[4:] == ["forward", "share"]


def test_time_is_flops_over_peak_and_mfu():
    head, h100, _ = time_lines(8 * 989e12 * 86400, 8, half=True, tf32=True, unit="days")
    assert head.startswith("days on 8 cards") and h100.split() == ["H100", "10", "5", "3.33", "2.22"]
    half, full = (time_lines(1e18, 1, half=half, tf32=False, unit="hours")[1].split()[1] for half in (True, False))
    assert float(full) / float(half) == pytest.approx(989 / 67, rel=0.01)


def test_memory_adds_up(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    lines = memory_lines({"weights": 2**30, "activations": 2**31, "EMA": 0})
    assert [line.split()[-1] for line in lines[1:]] == ["1.00", "2.00", "3.00"]
