"""The order of batches: the same for any number of processes, another in every epoch, and entered anywhere."""

import itertools

import pytest
import torch

from dataset.data import ImageData
from dataset.order import batches, batches_per_epoch, global_batch
from tests.support import small
from tests.support.refusals import refusal


class Indices:
    """A data set whose items are their own indices."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitems__(self, indices):
        return list(indices)


def take(count, iterator):
    return list(itertools.islice(iterator, count))


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def test_processes_share_the_same_global_batches():
    def global_batches(world_size):
        ranks = [
            batches(Indices(50), batch_size=8, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        return [flat(parts) for parts in take(20, zip(*ranks, strict=True))]

    assert global_batches(1) == global_batches(2) == global_batches(4)


def test_every_epoch_is_another_permutation():
    assert batches_per_epoch(51, 10) == 5
    order = take(15, batches(Indices(51), batch_size=10, seed=0))
    epochs = [flat(order[i : i + 5]) for i in (0, 5, 10)]
    for epoch in epochs:
        assert len(set(epoch)) == 50 and set(epoch) <= set(range(51))
    assert epochs[0] != epochs[1] != epochs[2]
    assert take(1, batches(Indices(51), batch_size=10, seed=1)) != order[:1]
    assert sorted(flat(take(5, batches(Indices(50), batch_size=10, seed=0)))) == list(range(50))


def test_a_batch_is_known_by_its_number():
    """Over an epoch's end."""
    order = take(8, batches(Indices(50), batch_size=8, seed=3))
    assert [global_batch(50, batch_size=8, seed=3, number=number) for number in range(8)] == order


def test_the_order_stays_what_it_was():
    """Resumed runs of later versions must see the same order."""
    assert take(2, batches(Indices(10), batch_size=5, seed=0)) == [[8, 0, 3, 7, 6], [4, 1, 5, 2, 9]]


@pytest.mark.parametrize("start", [0, 1, 4, 5, 13])
def test_start_equals_skipping(start):
    whole = take(start + 7, batches(Indices(23), batch_size=4, seed=0))
    assert take(7, batches(Indices(23), batch_size=4, seed=0, start=start)) == whole[start:]


def test_a_far_start_costs_nothing():
    assert len(take(1, batches(Indices(23), batch_size=4, seed=0, start=10**15))[0]) == 4


def test_workers_change_nothing_and_the_training_generator_stays(tmp_path):
    data = ImageData(small.write_data(tmp_path / "data", count=23, resolution=8))
    before = torch.get_rng_state()
    serial, parallel = (
        take(8, batches(data, batch_size=6, seed=0, rank=1, world_size=2, start=2, num_workers=n)) for n in (0, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(serial, parallel, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert serial[0][0].shape == (3, 3, 8, 8)


def test_batch_size_errors_come_at_once():
    message = refusal(batches, Indices(7), batch_size=8, seed=0)
    assert message.startswith("--batch-size: 8 was given; ") and "7 images" in message
    message = refusal(batches, Indices(50), batch_size=10, seed=0, rank=0, world_size=4)
    assert message.startswith("--batch-size: 10 was given; a multiple of 4")
