"""Labels of a tree of images: every class folder has one, and what is odd about them is said."""

from collections import Counter

import pytest

from dataset.class_labels import LabelledImages, empty_classes, list_images, some
from dataset.image_files import ImageTree
from tests.dataset.test_image_files import touch
from utils.errors import InputError


def test_class_folders_keep_their_label_whatever_they_hold(tmp_path, caplog):
    touch(tmp_path, "b/1.bmp", "c/1.heic", "d/1.png", "f/deep/1.jpe")
    for name in "ae":
        (tmp_path / name).mkdir()
    found = list_images(tmp_path)
    assert found.class_names == list("abcdef") and found.num_classes == 6
    assert found.files == ["b/1.bmp", "d/1.png", "f/deep/1.jpe"] and found.labels == [1, 3, 5]
    assert f"{tmp_path}: no image in a, c, e (3 of 6 class folders); every class keeps its label" in caplog.text


def test_a_folder_of_images_with_other_folders_beside_has_no_classes(tmp_path):
    touch(tmp_path, "1.png", "2.png", "notes/n.txt")
    found = list_images(tmp_path)
    assert (found.labels, found.class_names, found.num_classes) == ([0, 0], [], 1)


@pytest.mark.parametrize(
    "names, said",
    [
        (["0", "1", "2", "10"], "classes are labelled in the order 0, 1, 10, 2: the order of text"),
        (["class1", "class2", "class10"], "in the order class1, class10, class2: the order of text"),
        (["00", "01", "10"], None),
        (["0", "1", "9"], None),
        (["n02", "n1", "m3"], None),
    ],
)
def test_numbers_out_of_order_are_said(tmp_path, caplog, names, said):
    touch(tmp_path, *(f"{name}/1.png" for name in names))
    assert list_images(tmp_path).class_names == sorted(names)
    assert (said in caplog.text) if said else not caplog.text


def test_parts_of_a_data_set_are_refused_unless_a_file_says_the_labels(tmp_path):
    touch(tmp_path, "train/a/1.png", "val/a/1.png")
    with pytest.raises(InputError, match=f"^--imagenet-path: {tmp_path} holds train, val: .* give {tmp_path}/train or"):
        list_images(tmp_path)
    (tmp_path / "dataset.json").write_text('{"labels": [["train/a/1.png", 0], ["val/a/1.png", 1]]}')
    found = list_images(tmp_path)
    assert found.labels == [0, 1] and not found.tree.left_out  # the file was read


def test_classes_that_may_not_be_meant_are_said(tmp_path, caplog):
    touch(tmp_path, "x/set/cat/1.png", "x/set/dog/1.png", "x/more/1.png", "y/train/1.png", "y/val/1.png", "y/cat/1.png")
    list_images(tmp_path / "y")
    assert "train, val are taken as classes, like the folders beside them" in caplog.text
    caplog.clear()
    (tmp_path / "z").mkdir()
    (tmp_path / "x").rename(tmp_path / "z" / "x")
    list_images(tmp_path / "z")
    assert f"of one class, x; its 2 folders are no classes: for those give {tmp_path / 'z' / 'x'}" in caplog.text
    caplog.clear()
    (tmp_path / "w" / "u").mkdir(parents=True)
    (tmp_path / "z" / "x").rename(tmp_path / "w" / "u" / "x")
    list_images(tmp_path / "w")
    assert f"of one class, u; its 2 folders are no classes: for those give {tmp_path / 'w/u/x'}" in caplog.text


def test_names_are_said_in_one_line_whatever_is_in_them():
    assert some(["a\nb", "c\udcff", "Köln", 3]) == "a\\nb, c\\udcff, Köln, 3"


def test_a_file_of_labels_fixes_the_number_of_classes(tmp_path):
    touch(tmp_path, "1.png", "2.png", "3.png")
    (tmp_path / "dataset.json").write_text('{"labels": [["1.png", 0], ["2.png", 1], ["3.png", 6]]}')
    found = list_images(tmp_path)
    assert found.num_classes == found.at_most(2).num_classes == 7


def test_a_part_of_the_images_has_as_many_of_every_class_as_can_be():
    labels = [0] * 5 + [1] * 2 + [2] * 9
    whole = LabelledImages([f"{i:02}.png" for i in range(16)], labels, ["a", "b", "c"], 3, ImageTree(None))
    for count in range(1, 17):
        part = whole.at_most(count)
        assert part.files == sorted(part.files) and len(part.files) == count
        assert part.labels == [labels[int(name[:2])] for name in part.files] and part.num_classes == 3
        number = Counter(part.labels)
        level = max(number.values())
        assert all(number[c] >= min(level - 1, labels.count(c)) for c in range(3))
        for c in range(3):  # the first of each class
            assert [name for name, label in zip(part.files, part.labels, strict=True) if label == c] == (
                whole.files[labels.index(c) :][: number[c]]
            )
    assert whole.at_most(None) == whole.at_most(99) == whole


def test_empty_classes_are_counted():
    assert empty_classes([0, 1, 2], 3) is None
    assert empty_classes([1, 3], 5) == {"count": 3, "first": [0, 2, 4]}
    assert empty_classes([2**31 - 1], 2**31) == {"count": 2**31 - 1, "first": list(range(100))}
