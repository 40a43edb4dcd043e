"""The scaling model: closed forms, an oracle that follows the buckets one by one, and what it counts."""

import json
import math

import pytest

import train_repae
from benchmarks import scaling, train_step
from benchmarks.common import arguments
from benchmarks.scaling import BUCKET, GPUS, Job, Link, exposed_seconds, link_between, rows_of

SIZE = 20.5 * BUCKET
NAMES = ("32_each", "256_in_all")


@pytest.fixture
def options():
    """The link's options, as they are without flags."""
    parser = arguments("")
    parser.set_defaults(nvlink=200, adapter=40, adapters=1, nvlink_hop=3.4, network_hop=9.6)
    return parser.parse_args([])


def one_bucket(size: float, devices: int, link: Link) -> float:
    return 2 * (devices - 1) / devices * size / math.ceil(size / BUCKET) / link.bandwidth + link.latency


def followed(size: float, backward: float, devices: int, link: Link) -> float:
    """Exposed seconds, bucket after bucket."""
    buckets, free = math.ceil(size / BUCKET), 0.0
    for number in range(1, buckets + 1):
        free = max(free, number / buckets * backward) + one_bucket(size, devices, link)
    return free - backward


@pytest.mark.parametrize("devices", [2, 8, 64])
@pytest.mark.parametrize("bandwidth", [1e9, 4e9, 40e9, 200e9])
def test_exposed_seconds_are_those_of_buckets_one_after_the_other(devices, bandwidth):
    link = Link(bandwidth, latency=1e-4)
    for size in (1e6, BUCKET, SIZE):
        for backward in (0.0, 0.1, 1.0):
            exposed = exposed_seconds(size, backward, devices, link)
            assert exposed == pytest.approx(followed(size, backward, devices, link))
            assert exposed >= one_bucket(size, devices, link)


def test_the_last_bucket_is_never_hidden_and_without_a_backward_pass_none_is():
    link = Link(bandwidth=100e9, latency=0.0)
    assert exposed_seconds(SIZE, 10.0, 2, link) == pytest.approx(SIZE / 21 / 100e9)
    assert exposed_seconds(SIZE, 0.0, 2, link) == pytest.approx(SIZE / 100e9)


def test_every_bucket_pays_the_latency():
    assert exposed_seconds(SIZE, 0.0, 4, Link(math.inf, latency=1e-3)) == pytest.approx(21e-3)


def test_one_gpu_has_no_communication_and_efficiency_falls_with_their_number(options):
    rows = rows_of(Job("job", 100.0, {"SiT": (2.7e9, 0.6), "VAE": (0.3e9, 0.2)}), options)
    assert [row["gpus"] for row in rows] == list(GPUS)
    for name in NAMES:
        efficiency = [row[f"efficiency_{name}"] for row in rows]
        assert efficiency[0] == 1 and rows[0][f"images_per_second_{name}"] == 100
        assert efficiency == sorted(efficiency, reverse=True) and efficiency[-1] > 0
        for row in rows:
            assert row[f"images_per_second_{name}"] == pytest.approx(100 * row["gpus"] * row[f"efficiency_{name}"])


def test_both_plans_are_the_same_on_8_gpus_of_the_public_batch(options):
    row = rows_of(Job("job", 100.0, {"SiT": (2.7e9, 0.6)}), options)[GPUS.index(8)]
    assert row["efficiency_32_each"] == row["efficiency_256_in_all"]


def test_a_ring_goes_over_the_network_once_a_node(options):
    assert link_between(8, options) == Link(200e9, pytest.approx(14 * 3.4e-6))
    assert link_between(16, options) == Link(40e9, pytest.approx((28 * 3.4 + 2 * 9.6) * 1e-6))
    options.adapters = 8  # which are faster together than NVLink
    assert link_between(16, options).bandwidth == 200e9


@pytest.fixture
def tiny(monkeypatch):
    size = dict(vae="f4d4-tiny", resolution=32, model="SiT-T/2", encoder_depth=2)
    monkeypatch.setitem(train_step.SIZES, "tiny", ("repae", size, {}))


def test_gradients_and_shares_are_counted(tiny, monkeypatch):
    plans, planned = [], train_repae.planned
    monkeypatch.setattr(train_repae, "planned", lambda args: plans.append(planned(args)) or plans[0])
    networks = scaling.networks_of("tiny")
    assert list(networks) == ["SiT", "VAE", "discriminator"]
    for name, (size, _) in networks.items():
        assert size == 4 * sum(parameter.numel() for parameter in plans[0].networks[name].parameters())
    backward = sum(flops for part, flops in plans[0].flops.items() if part.backward) / plans[0].flops_per_image
    assert 0 == networks["discriminator"][1] < networks["SiT"][1] < networks["VAE"][1] < backward


def test_the_benchmark_writes_its_assumptions_and_a_picture(tiny, tmp_path):
    flags = ["--rate", "tiny=100", "--rate", "tiny=50", "--nvlink", "300", "--picture", str(tmp_path / "picture.svg")]
    scaling.main([*flags, "--device", "cpu", "--threads", "1", "--output", str(tmp_path)])
    (file,) = tmp_path.glob("scaling-*.json")
    result = json.loads(file.read_text())
    assert result["options"]["rate"] == [["tiny", 100], ["tiny", 50]] and result["options"]["nvlink"] == 300
    assert len(result["rows"]) == 2 * len(GPUS) and "assumed" in result["notes"][-1]
    assert (tmp_path / "picture.svg").read_text().count("tiny, 50 each") == 1


@pytest.mark.parametrize("text", ["nothing=3", "repae-f8d4", "repae-f8d4=0", "repae-f8d4=fast"])
def test_a_rate_that_says_nothing_is_refused(text, capsys):
    with pytest.raises(SystemExit) as leaving:
        scaling.main(["--rate", text])
    assert leaving.value.code == 2 and "--rate" in capsys.readouterr().err
