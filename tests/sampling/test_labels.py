"""The label of every sample: drawn, dealt, of classes that the run saw, or null."""

import numpy as np
import pytest

from configs.arguments import generate_parser
from sampling.labels import label_scheme, seen_classes
from tests.support import small
from tests.support.sampling import CLASSES, COUNT
from utils.errors import InputError
from utils.rng import sample_labels


def asked(count: int = COUNT, **options):
    return generate_parser().parse_args(small.argv(exp_path="x", num_fid_samples=count, **options))


def scheme(count: int = COUNT, **options) -> np.ndarray:
    return label_scheme(asked(count, **options), CLASSES)(range(count)).numpy()


def test_labels_are_drawn_or_dealt_as_asked_for():
    random = scheme(5000)
    assert np.array_equal(random, sample_labels(0, range(5000), CLASSES).numpy())
    assert np.bincount(random, minlength=CLASSES).min() > 400
    assert np.array_equal(np.bincount(scheme(50, label_sampling="equal")), [5] * CLASSES)
    assert np.array_equal(scheme(6, classes="7,2, 3", label_sampling="equal"), [7, 2, 3, 7, 2, 3])
    some = scheme(300, classes="7,2")
    assert set(some) == {2, 7} and 100 < (some == 7).sum() < 200
    assert set(scheme(300, num_classes=3)) == {0, 1, 2}
    assert not np.array_equal(scheme(100, global_seed=1), scheme(100))


def test_labels_come_from_the_classes_that_the_run_saw():
    seen = seen_classes({"seen_classes": "2,7-8"}, CLASSES)
    drawn = label_scheme(asked(300), CLASSES, seen=seen)(range(300)).numpy()
    assert np.array_equal(drawn, seen[sample_labels(0, range(300), 3).numpy()]) and set(drawn) == {2, 7, 8}
    dealt = label_scheme(asked(6, label_sampling="equal"), CLASSES, seen=seen)(range(6)).numpy()
    assert np.array_equal(dealt, [2, 7, 8, 2, 7, 8])
    asked_for_more = label_scheme(asked(300, num_classes=CLASSES), CLASSES, seen=seen)(range(300)).numpy()
    assert set(asked_for_more) == set(range(CLASSES))
    assert np.array_equal(seen_classes({}, CLASSES), np.arange(CLASSES))  # of the public code: nothing is recorded


@pytest.mark.parametrize("recorded", ["0-99", "x", 3.5, "0-99999999999"])
def test_recorded_classes_that_the_model_lacks_are_refused(recorded):
    with pytest.raises(InputError, match="the run's args name the classes"):
        seen_classes({"seen_classes": recorded}, CLASSES)


def test_null_needs_a_null_label_and_no_guidance():
    null = label_scheme(asked(cfg_scale=1, classes="null"), CLASSES, null_label=CLASSES)
    assert set(null(range(5)).tolist()) == {CLASSES}
    with pytest.raises(InputError, match="has no null label"):
        label_scheme(asked(cfg_scale=1, classes="null"), CLASSES)
    with pytest.raises(InputError, match=r"--cfg-scale: 1\.5 was given; .*--classes null needs 1"):
        label_scheme(asked(classes="null"), CLASSES, null_label=CLASSES)
