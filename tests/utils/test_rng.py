"""Draws depend on their purpose alone: not on the number of processes, the batch, or the order."""

import numpy as np
import torch

from utils.rng import Draws, sample_labels, sample_normal


def draws(rank=0, world=1, step=3, seed=0, micro=0):
    return Draws(seed, step, micro, batch_size=8, rank=rank, world_size=world, device=torch.device("cpu"))


def test_slices_of_processes_make_up_the_global_draw():
    for make in (lambda d: d.normal("noise", 2, 3), lambda d: d.uniform("time")):
        whole = make(draws())
        for world in (2, 4):
            assert torch.equal(whole, torch.cat([make(draws(rank, world)) for rank in range(world)]))


def test_purpose_step_micro_step_and_seed_all_matter():
    base = draws().normal("noise", 4)
    others = [
        draws().normal("posterior", 4),
        draws(step=4).normal("noise", 4),
        draws(micro=1).normal("noise", 4),
        draws(seed=1).normal("noise", 4),
    ]
    assert all(not torch.equal(base, other) for other in others)
    assert torch.equal(base, draws().normal("noise", 4))


def test_drawing_leaves_the_global_generators_alone():
    before = torch.get_rng_state()
    draws().normal("noise", 4)
    sample_normal(0, "noise", [1], (2,))
    assert torch.equal(before, torch.get_rng_state())


def test_a_sample_depends_on_seed_purpose_and_index_alone():
    many = sample_normal(7, "noise", range(100), (4, 2, 2))
    assert torch.equal(many[[31, 5]], sample_normal(7, "noise", [31, 5], (4, 2, 2)))
    assert not torch.equal(many, sample_normal(8, "noise", range(100), (4, 2, 2)))
    assert not torch.equal(many, sample_normal(7, "step 0", range(100), (4, 2, 2)))
    labels = sample_labels(7, range(5000), 10)
    assert torch.equal(labels[10:20], sample_labels(7, range(10, 20), 10))
    counts = np.bincount(labels.numpy(), minlength=10)
    assert ((counts - 500) ** 2 / 500).sum() < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001
    values = many.flatten().double()
    assert abs(values.mean()) < 4 / len(values) ** 0.5 and abs(values.var() - 1) < 4 * (2 / len(values)) ** 0.5
