import pytest

from sampling.generation import SamplerConfig
from sampling.plan import GUIDE, GUIDED, PLAIN, evaluations


@pytest.mark.parametrize(
    ("options", "plain", "guided"),
    [
        (dict(), 10, 0),
        (dict(guidance_scale=2.0), 0, 10),
        (dict(heun=True), 19, 0),
        # times 1, 0.9 ... 0.1: guided from 0.5 down to 0.1
        (dict(guidance_scale=2.0, guidance_interval=(0.0, 0.5)), 5, 5),
        (dict(guidance_scale=2.0, guidance_interval=(0.0, 0.5), heun=True), 10, 9),
        # times 1 to 0.04 in ten
        (dict(guidance_scale=2.0, guidance_interval=(0.9, 1.0), mode="sde"), 9, 1),
    ],
)
def test_evaluations_are_those_of_the_sampler(options, plain, guided):
    sampler = SamplerConfig(num_steps=10, **options)
    counted = evaluations(sampler)
    assert (counted[PLAIN], counted[GUIDED]) == (plain, guided)
    assert counted.total() == sampler.nfe()


def test_a_guide_is_evaluated_beside_the_network_where_samples_are_guided():
    sampler = SamplerConfig(num_steps=10, guidance_scale=2.0, guidance_interval=(0.0, 0.5))
    assert evaluations(sampler, guide=True) == {PLAIN: 10, GUIDE: 5}
