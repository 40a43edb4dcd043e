import torch
from torch import nn

from utils.parts import OTHER, Part, Parts


def followed(run, *, name_backward=True, **modules) -> list[Part]:
    """The parts in the order in which they ran; `run` gets an object whose `backward` starts a backward pass."""
    seen = []
    parts = Parts(seen.append)
    optimizer = Optimizer()
    with torch.enable_grad():
        stack = [parts.module(name, module) for name, module in modules.items()]
        stack.append(parts.method(OTHER.name, optimizer, "backward"))
        for one in stack:
            one.__enter__()
        run(optimizer)
        for one in reversed(stack):
            one.__exit__(None, None, None)
    assert "backward" not in vars(optimizer)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules.values())
    return seen


class Optimizer:
    def backward(self, loss):
        loss.backward()


def test_forward_and_backward_of_each_part_in_order():
    encode, decode = nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
    x = torch.randn(4, 3)  # needs no gradient: the backward pass through `encode` ends with the whole pass

    def step(optimizer):
        optimizer.backward(decode(encode(x).sin()).square().sum())
        decode(torch.zeros(1, 2))

    seen = followed(step, encode=encode, decode=decode)
    assert seen == [
        Part("encode"), OTHER, Part("decode"), OTHER,
        Part("decode", True), OTHER, Part("encode", True), OTHER,  # OTHER: of `sin`
        Part("decode"), OTHER,
    ]  # fmt: skip


def test_a_frozen_part_has_a_backward_pass_only_towards_its_input():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    assert Part("frozen", True) not in followed(lambda o: frozen(torch.ones(1, 2)), frozen=frozen)
    x = torch.ones(1, 2, requires_grad=True)
    assert Part("frozen", True) in followed(lambda o: o.backward(frozen(x * 2).sum()), frozen=frozen)


def test_a_name_may_depend_on_the_call_and_a_method_is_a_part_of_its_own():
    network, seen = nn.Linear(2, 2), []
    parts = Parts(seen.append)
    named = parts.module(lambda: "training" if network.training else "evaluation", network)
    with named, parts.method("half", network, "half"):
        network.eval()(torch.ones(1, 2))
        network.half()
    network.float()
    assert [part.name for part in seen] == ["evaluation", "other", "half", "other"]


def test_two_modules_of_one_part_in_a_row():
    first, second, seen = nn.Linear(3, 2), nn.Linear(2, 2), []
    parts, x = Parts(seen.append), torch.randn(4, 3)
    with parts.module("encode", first), parts.module("encode", second):
        second(first(x)).sum().backward()
    assert seen == [Part("encode"), OTHER, Part("encode"), OTHER, Part("encode", True)]
