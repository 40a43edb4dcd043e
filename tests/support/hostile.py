"""Files that are broken at random or made to do harm, for the tests that read them; `hypothesis` draws them."""

import json
import os

import torch
from hypothesis import settings
from hypothesis import strategies as st

from utils.errors import InputError

FEW = settings(max_examples=max(settings.default.max_examples // 4, 1))  # for what takes long
NAMES = st.sampled_from(["a\nb", "../../x", "/etc/passwd", "nul\0", "\udcff", "\x1b[2J", "..", "", "\u2028"]) | st.text(
    max_size=5
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([10**30, -(2**63), 10**400, 2**31])
    | st.floats()
    | NAMES
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=6
)
NESTED = ['{"a":' * depth + "1" + "}" * depth for depth in (30, 900)]
DEEP = ["[" * 100_000, *NESTED, "9" * 5000, "\ufeff{}", "", "nan"]


def outcome(call, *args, **options):
    """What a reader makes of a file: a value, or None where it refuses it in one line; another error is a fault."""
    try:
        return call(*args, **options)
    except InputError as error:
        assert str(error) and str(error).isprintable(), repr(str(error))
        return None


@st.composite
def changed(draw, value):
    """A JSON value with something else at one place in it: another kind, nothing, or one thing more."""
    if not (isinstance(value, dict | list) and value) or draw(st.integers(0, 3)) == 0:
        return draw(JSON)
    value = value.copy()
    place = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    if draw(st.integers(0, 4)) == 0:
        del value[place]
    else:
        value[place] = draw(changed(value[place]))
    return value


@st.composite
def broken_json(draw, value):
    """The text of a JSON file that is not quite what it should be: bytes."""
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return draw(st.sampled_from(DEEP)).encode()
    whole = json.dumps(draw(changed(value))).encode()
    return draw(broken(whole)) if kind == 1 else whole


@st.composite
def broken(draw, whole: bytes):
    """A file's bytes with some flipped, cut off, put in or repeated."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.integers(0, 4)):
            case 0:
                del data[place:]
            case 1:
                data[place:place] = draw(st.binary(min_size=1, max_size=8))
            case 2:
                data[place : place + 8] = b""
            case 3:
                data[place:place] = data[place : place + 64]
            case _:
                data[place : place + 1] = bytes([draw(st.integers(0, 255))])
    return bytes(data)


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, -1, -2, 10**5, 10**15, 2**62, 2**70, True]), max_size=4).map(tuple)
PLAIN = ["|u1", "<i8", ">i8", "<f4", ">f4", "<f2", "<f8", "<f16", "<c8", "|b1", "|S0", "<U3", "<U0", "|V4", "<m8[s]"]
ODD = [[("x", "<f4")], ("<f4", (10**9,)), "|O", [("x", "|O")], [], "x", 3, None, "<U900000000"]
DTYPES = st.sampled_from(PLAIN + ODD)
HEADERS = ["(" * 300, "{'descr': '|u1'", "{", "\n  1\n 2", "{1: 2, 'a': 3}", "{[]: 1}", "9" * 5000, "\0", "-" * 9000]


@st.composite
def npy(draw, data: bytes = bytes(64)):
    """An .npy with a header that its numbers may not fit."""
    description = {"descr": draw(DTYPES), "fortran_order": draw(st.booleans()), "shape": draw(SHAPES)}
    header = draw(st.sampled_from(HEADERS)) if draw(st.integers(0, 5)) == 0 else repr(description)
    version = draw(st.sampled_from([1, 1, 1, 2, 3, 9]))
    length = len(header).to_bytes(2 if version == 1 else 4, "little")
    start = b"\x93NUMPY" + bytes([version, 0]) + length + header.encode("latin1")
    return start + data[: draw(st.integers(0, len(data)))]


# Weights

TENSOR_SHAPES = [(), (0,), (3,), (2, 3), (4, 4, 2, 2), (2, 4, 3, 3), (1, 1, 1, 1, 1), (0, 4, 2, 2)]
THINGS = [*map(torch.zeros, TENSOR_SHAPES), torch.ones(3).long(), torch.zeros(1).expand(3), "text", None, {}, [], 3]


@st.composite
def another_state(draw, state: dict):
    """A state dict with some entries left out, renamed or replaced."""
    state = dict(state)
    for key in draw(st.lists(st.sampled_from(sorted(state)), min_size=1, max_size=3, unique=True)):
        match draw(st.integers(0, 3)):
            case 0:
                del state[key]
            case 1:
                parts = key.split(".")
                place = draw(st.integers(0, len(parts) - 1))
                parts[place] = draw(st.sampled_from(["99999999999", "-1", "", "x", "7", "9" * 5000]))
                state[".".join(parts)] = state.pop(key)
            case 2:
                state[draw(NAMES | st.integers() | st.booleans())] = state.pop(key)
            case _:
                state[key] = draw(st.sampled_from(THINGS))
    return state


class Planted:
    """An object whose pickle would write a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)
