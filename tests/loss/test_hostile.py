"""YAML that is broken or made to do harm: weights of the losses, or one line."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from loss.config import VAELossConfig, read_loss_config
from tests.support.hostile import JSON, broken, changed, outcome
from tests.support.refusals import refusal

WEIGHTS = {"reconstruction_loss": "l2", "kl_weight": 1e-3, "discriminator_start": 3, "lecam_ema_decay": 0.5}
WHOLE = yaml.safe_dump({"losses": WEIGHTS}).encode()
ODD = st.sampled_from([10**400, 2**20000, float("nan"), "1e999", "0x10", "2001-99-99", [], {}]) | JSON
# Each list holds the one before it nine times.
LAUGHS = "a0: &a0 [1]\n" + "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i}, ' * 9}]\n" for i in range(30))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("yaml") / "x.yaml"


@given(st.fixed_dictionaries(dict.fromkeys(("kl_weight", "perceptual_weight"), st.floats(0, 1e30))))
def test_weights_that_are_written_read_back(path, weights):
    path.write_text(yaml.safe_dump(weights))
    assert read_loss_config(path) == VAELossConfig(**weights)


@given(broken(WHOLE) | changed({"losses": WEIGHTS}).map(lambda x: yaml.dump(x).encode(errors="replace")))
def test_broken_weights_are_one_line_or_a_configuration(path, data):
    path.write_bytes(data)
    outcome(read_loss_config, path)


@given(st.sampled_from(sorted(WEIGHTS)), ODD)
def test_a_weight_of_another_kind_is_one_line_or_a_number(path, key, value):
    path.write_text(f"{key}: {value if isinstance(value, str) else hex(value) if type(value) is int else value!r}")
    outcome(read_loss_config, path)


@pytest.mark.parametrize(
    "text",
    [
        "kl_weight: 2001-99-99",
        "kl_weight: !!int ''",
        "kl_weight: !!python/object/apply:os.system ['touch trace']",
        "? 0x" + "f" * 5000 + "\n: 1",
        "a: &a {b: *a}",
        "kl_weight: &a [*a]",
        "[" * 5000,
        "{a: " * 2000,
        LAUGHS,
    ],
)
def test_what_python_or_its_memory_would_end_at_is_one_line(path, text):
    path.write_text(text)
    assert len(refusal(read_loss_config, path)) < 1000
    assert not (path.parent / "trace").exists()
