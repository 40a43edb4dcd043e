"""Classes as text: there and back, and what is no list of classes."""

import numpy as np
import pytest

from dataset.classes import class_ranges, classes_of


@pytest.mark.parametrize(
    ("labels", "ranges"),
    [(range(1000), "0-999"), ([3, 3, 0, 1, 2, 7], "0-3,7"), ([5], "5"), ([1, 2, 9, 10, 4], "1-2,4,9-10")],
)
def test_ranges_name_each_class_once_and_give_them_back(labels, ranges):
    assert class_ranges(labels) == ranges
    assert np.array_equal(classes_of(ranges, 1000), sorted(set(labels)))


@pytest.mark.parametrize("ranges", ["", "a", "3-1", "0-10", "10", "0-999999999999", "-1", "1,,2"])
def test_what_is_no_list_of_the_models_classes_is_refused(ranges):
    with pytest.raises(ValueError):
        classes_of(ranges, 10)
