"""A foreign checkpoint is read for its tensors: nothing that it describes runs, whatever it asks for."""

import copy
import io
import pickle
import sys
import zipfile
from collections import OrderedDict, defaultdict
from types import ModuleType

import pytest
import torch

from tests.support.refusals import refusal
from tests.utils.test_torch_files import compress
from utils.inert import read_inert
from utils.torch_files import ForeignObject, read_torch_file

NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)


@pytest.fixture
def callback(monkeypatch):
    """An object of a class that will not be there when its file is read."""
    module = ModuleType("lightning_like")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": "lightning_like"})
    monkeypatch.setitem(sys.modules, "lightning_like", module)
    thing = module.ModelCheckpoint()
    thing.best = torch.ones(3)
    return thing


def test_tensors_come_back_bit_for_bit_and_foreign_objects_are_counted(callback, tmp_path):
    torch.manual_seed(0)
    state = OrderedDict((str(dtype), (99 * torch.rand(3, 5)).to(dtype)) for dtype in NUMBERS)
    base = torch.randn(4, 6)
    state |= {"turned": base.t(), "part": base[1:, 2:4], "empty": torch.zeros(0, 3), "flag": torch.tensor(True)}
    state["parameter"] = torch.nn.Parameter(torch.randn(2))
    state._metadata = {"": {"version": 1}}  # as a module's state dict has it
    contents = {"state_dict": state, "callbacks": {type(callback): callback}, "hyper": [callback, 1, "text", 2.5]}
    contents |= {"epoch": 3, "by_name": defaultdict(int, {"a": 1}), "nothing": None, "set": frozenset([2]), (1, 2): 3}
    torch.save(contents, tmp_path / "x.ckpt")
    sys.modules.pop("lightning_like")

    with pytest.raises(ForeignObject, match=r"lightning_like\.ModelCheckpoint"):
        read_torch_file(tmp_path / "x.ckpt")
    found, left_out = read_inert(tmp_path / "x.ckpt")
    assert list(found["state_dict"]) == list(state)
    for key, tensor in state.items():
        assert found["state_dict"][key].dtype == tensor.dtype and torch.equal(found["state_dict"][key], tensor), key
    assert found["epoch"] == 3 and found["hyper"] == [1, "text", 2.5] and found["by_name"] == {"a": 1}
    assert found["nothing"] is None and found["set"] == [2] and (1, 2) not in found
    # The class, and one object.
    assert found["callbacks"] == {} and left_out == {"lightning_like.ModelCheckpoint": 2, "tuple as a key": 1}


def test_a_tensor_of_another_kind_is_left_out_and_counted(tmp_path, callback):
    contents = {"weight": torch.ones(2), "phase": torch.ones(2, dtype=torch.complex64), "foreign": callback}
    torch.save(contents, tmp_path / "x.ckpt")
    found, left_out = read_inert(tmp_path / "x.ckpt")
    assert list(found) == ["weight"] and left_out["torch.ComplexFloatStorage"] == 1


def test_a_tensor_whose_signs_are_still_to_be_turned_is_left_out_and_counted(tmp_path, callback):
    torch.save({"weight": torch.ones(2)._neg_view(), "foreign": callback}, tmp_path / "x.ckpt")
    found, left_out = read_inert(tmp_path / "x.ckpt")
    assert found == {} and left_out["tensor with metadata"] == 1


def test_a_dict_that_holds_itself_is_read(tmp_path, callback):
    contents = {"weight": torch.ones(2), "foreign": callback}
    contents["self"] = contents
    torch.save(contents, tmp_path / "x.ckpt")
    found, _ = read_inert(tmp_path / "x.ckpt")
    assert torch.equal(found["weight"], torch.ones(2))


# Files that would fill the memory


def test_no_more_memory_is_taken_than_the_file_has_bytes(tmp_path):
    remembers = b"\x80\x02}q\x00" + text("a") + glob("os", "system") + b"r\xff\xff\xff\x07s."
    names = b"\x80\x02}" + text("a") + b"(" + b"".join(glob("x", str(i)) for i in range(10_001)) + b"ls."
    for pickled, words in (
        (remembers, "it remembers 134217727 values in "),
        (names, "it names more than 10000 classes"),
    ):
        assert words in refusal(read_inert, archive(tmp_path / "x.ckpt", pickled))

    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as file:  # one member under many names
        file.writestr("archive/data.pkl", bytes(1000))
        for name in range(9):
            twin = copy.copy(file.filelist[0])
            twin.filename = twin.orig_filename = f"archive/data/{name}"
            file.filelist.append(twin)
    assert "its members are together larger than the file" in refusal(read_inert, tmp_path / "x.ckpt")

    torch.save({"w": torch.zeros(1000)}, tmp_path / "plain.pt")
    compress(tmp_path / "plain.pt", tmp_path / "x.ckpt")
    assert "its members are compressed" in refusal(read_inert, tmp_path / "x.ckpt")


def test_a_key_of_shared_tuples_is_left_out_at_once(tmp_path):
    nested = text("a")
    for _ in range(20):  # as text it would have a million parts
        nested += b"2\x86"
    pickled = b"\x80\x02}" + text("w") + b"K\x01s" + nested + b"K\x02s."
    assert read_inert(archive(tmp_path / "x.ckpt", pickled)) == ({"w": 1}, {"tuple as a key": 1})


# Files that would act


def archive(path, pickled: bytes):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/data/0", bytes(16))
    return path


class Calls:
    """Pickles as a call of `function(*args)`, then as what is done to its result."""

    def __init__(self, function, *args, state=None, items=None):
        self.call = (function, args, state, items)

    def __reduce__(self):
        return self.call


def plants(trace):
    """{name: an object that leaves `trace` when it is unpickled in the ordinary way}."""
    import builtins
    import os

    touch = f"touch {trace}"
    return {
        "open": Calls(builtins.open, str(trace), "w"),
        "system": Calls(os.system, touch),
        "exec": Calls(builtins.exec, f"open({str(trace)!r}, 'w')"),
        "argument": Calls(builtins.list, [Calls(os.system, touch)]),
        "state": Calls(OrderedDict, state={"x": Calls(os.system, touch)}),
        "items": Calls(list, items=iter([Calls(os.system, touch)])),
    }


@pytest.mark.parametrize("name", ["open", "system", "exec", "argument", "state", "items"])
def test_a_planted_call_does_not_run(name, tmp_path):
    trace = tmp_path / "trace"
    pickled = pickle.dumps({"weight": 1, "payload": plants(trace)[name]}, protocol=2)
    pickle.loads(pickled)
    assert trace.exists(), "the plant must act where it is unpickled freely"
    trace.unlink()

    found, _ = read_inert(archive(tmp_path / "x.ckpt", pickled))
    assert found["weight"] == 1 and not trace.exists()


def text(word: str) -> bytes:
    return b"X" + len(word).to_bytes(4, "little") + word.encode()


def glob(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


SYSTEM = glob("os", "system")
SETATTR = glob("builtins", "setattr")
GADGETS = {
    # setattr(a class of torch, "__setstate__", os.system), then its state is set
    "setattr": SETATTR + b"(" + glob("torch", "Tensor") + text("__repr__") + SYSTEM + b"tR",
    # a chain: getattr(os, "system")("touch trace")
    "getattr": glob("builtins", "getattr")
    + b"("
    + glob("os", "path")
    + text("system")
    + b"tR("
    + text("TOUCH")
    + b"tR",
    # state that would become attributes of a parameter, and hooks that would be called
    "parameter": glob("torch._utils", "_rebuild_parameter_with_state")
    + b"(N\x88"
    + SYSTEM
    + b"}("
    + text("__class__")
    + SYSTEM
    + b"utR",
    "build": glob("torch", "Tensor") + b")\x81}(" + text("__class__") + SYSTEM + b"ub",
    "build_slots": glob("x", "Y") + b")\x81N}(" + text("name") + text("collections.OrderedDict") + b"u\x86b",
    "class_state": glob("x", "Y") + b"}(" + text("name") + SYSTEM + b"ub",
    "inst": b"(" + text("TOUCH") + b"ios\nsystem\n",
    "obj": b"(" + SYSTEM + text("TOUCH") + b"o",
    "newobj_ex": b"\x80\x04" + SYSTEM + b"(" + text("TOUCH") + b"t}\x92",
    "stack_global": b"\x80\x04" + text("os") + text("system") + b"\x93(" + text("TOUCH") + b"tR",
    "persistent": b"(" + SYSTEM + text("TOUCH") + b"tQ",
    "extension": b"\x82\x01",
}


@pytest.mark.parametrize("name", GADGETS)
def test_opcodes_that_call_or_set_do_nothing(name, tmp_path):
    trace, before = tmp_path / "trace", dict(vars(torch.Tensor))
    command = f"touch {trace}"
    gadget = GADGETS[name].replace(text("TOUCH"), text(command))
    pickled = b"\x80\x02}(" + text("weight") + b"K\x01" + text("payload") + gadget + b"u."
    try:
        found, _ = read_inert(archive(tmp_path / "x.ckpt", pickled))
        assert found["weight"] == 1 and not callable(found.get("payload"))
    except ValueError as error:  # refused is as good, in one line
        assert "\n" not in str(error) and "truncated" in str(error)
    assert not trace.exists() and dict(vars(torch.Tensor)) == before


def test_a_tensor_beyond_its_numbers_is_refused(tmp_path):
    def tensor(offset, size, count):
        storage = b"(" + text("storage") + glob("torch", "FloatStorage") + text("0") + text("cpu")
        storage += b"K" + bytes([count]) + b"tQ"
        shape = storage + offset + b"K" + bytes([size]) + b"\x85K\x01\x85\x89}t"
        return b"\x80\x02}" + text("w") + glob("torch._utils", "_rebuild_tensor_v2") + b"(" + shape + b"Rs."

    found, _ = read_inert(archive(tmp_path / "x.ckpt", tensor(b"K\x00", 4, 4)))
    assert torch.equal(found["w"], torch.zeros(4))
    for offset, size, count in ((b"K\x00", 5, 4), (b"K\x01", 4, 4), (b"K\x00", 4, 8), (b"J\xff\xff\xff\xff", 1, 4)):
        assert "x.ckpt is" in refusal(read_inert, archive(tmp_path / "x.ckpt", tensor(offset, size, count)))


def test_what_is_no_archive_is_refused(tmp_path):
    for contents in (b"", b"PK\x03\x04cut", b"<html>"):
        (tmp_path / "x.ckpt").write_bytes(contents)
        assert "truncated or no torch checkpoint" in refusal(read_inert, tmp_path / "x.ckpt")
    assert "holds no dict" in refusal(read_inert, archive(tmp_path / "y.ckpt", pickle.dumps([1])))
    buffer = io.BytesIO()
    torch.save([torch.ones(1)], buffer)
    (tmp_path / "z.ckpt").write_bytes(buffer.getvalue())
    assert "holds no dict" in refusal(read_inert, tmp_path / "z.ckpt")
