"""What is made ahead comes in order and one at a time, fails where it would have come, and ends with its block."""

import threading
import time

import pytest
import torch

from utils.background import HostCopy, ahead


def test_the_next_item_and_no_other_is_made_while_one_is_in_use():
    made = [threading.Event() for _ in range(5)]

    def make(i: int) -> int:
        made[i].set()
        return i

    with ahead(map(make, range(5))) as items:
        for i in items:
            assert all(event.wait(10) for event in made[: i + 2])
            time.sleep(0.02)
            assert not any(event.is_set() for event in made[i + 2 :])
    assert i == 4


def test_an_error_comes_where_its_item_would_have():
    used = []
    with pytest.raises(ZeroDivisionError), ahead(6 // i for i in [1, 2, 0, 3]) as items:
        for item in items:
            used.append(item)
    assert used == [6, 3]


def test_leaving_waits_for_the_thread_which_may_give_up():
    left, gave_up, threads = threading.Event(), [], threading.active_count()

    def make(i: int) -> int:
        if i:
            gave_up.append(left.wait(10))
        return i

    with pytest.raises(KeyboardInterrupt), ahead(map(make, range(3)), left) as items:
        for _ in items:
            raise KeyboardInterrupt
    assert gave_up == [True] and threading.active_count() == threads


def test_a_copy_is_waited_for():
    """On CUDA `_arrived` is the event behind the copy."""
    values, asked = torch.arange(3), iter([False, False, True])
    copy = HostCopy(values)
    assert torch.equal(copy.wait(), values)
    copy._arrived = type("Event", (), {"query": lambda self: next(asked)})()
    assert torch.equal(copy.wait(), values) and next(asked, None) is None
