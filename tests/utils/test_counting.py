"""FLOPs and memory by shapes alone, against closed forms. Below: B batch, N tokens, D width, R side of an image."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from loss.perceptual import lpips_by_shape
from models.posterior import TrainableVAE
from models.sit import SiT, SiTBlock
from models.vae import build_vae, vae_models
from utils.counting import Cost, shapes_alone, to_shapes
from utils.parts import Part, Parts

B = 3


def cost_of(call, *, autocast=False, **modules):
    """The cost of `call()`, in which the modules are parts and their parameters the weights."""
    parts = Parts()
    weights = {tensor for module in modules.values() for tensor in module.parameters()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Cost(parts, {"weights": weights}) as cost:
        named = [parts.module(name, module) for name, module in modules.items()]
        for one in named:
            one.__enter__()
        call()
        for one in named:
            one.__exit__(None, None, None)
    return cost


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_transformer_block(fused, autocast):
    """24 D^2 a token for its four products, 4 N D for scores and values, 12 D^2 a sample for adaLN; twice that back."""
    N, D = 16, 48
    with shapes_alone():
        block = SiTBlock(D, 3, 4.0, qk_norm=False, fused_attn=fused)
        x, c = torch.empty(B, N, D, requires_grad=True), torch.empty(B, D, requires_grad=True)
        cost = cost_of(lambda: block(x, c).sum().backward(), autocast=autocast, block=block)
    forward = B * (N * (24 * D**2 + 4 * N * D) + 12 * D**2)
    assert cost.flops == {Part("block"): forward, Part("block", True): 2 * forward}


def test_a_convolution_counts_backwards_only_what_is_asked_for():
    R = 12
    forward = B * 2 * 5 * 7 * 4 * 4 * (R // 2) ** 2
    for trained, through, times in ((True, True, 2), (True, False, 1), (False, True, 1)):
        with shapes_alone():
            conv = nn.Conv2d(5, 7, 4, stride=2, padding=1).requires_grad_(trained)
            x = torch.empty(B, 5, R, R, requires_grad=through)
            cost = cost_of(lambda conv=conv, x=x: conv(x).sum().backward(), conv=conv)
        assert cost.flops == {Part("conv"): forward, Part("conv", True): times * forward}


def test_attention():
    N, D = 16, 8
    with shapes_alone():
        q = torch.empty(B, 2, N, D, requires_grad=True)
        cost = cost_of(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    assert cost.flops.total() == 3 * B * 2 * (4 * N * N * D)


def test_lpips():
    """VGG16's thirteen convolutions on both images, and five 1 x 1 ones; back through the reconstruction's alone."""
    R, widths, repeats = 32, (64, 128, 256, 512, 512), (2, 2, 3, 3, 3)
    trunk, channels = 0, 3
    for level, (width, repeat) in enumerate(zip(widths, repeats, strict=True)):
        for _ in range(repeat):
            trunk, channels = trunk + 2 * 9 * channels * width * (R >> level) ** 2, width
    heads = sum(2 * width * (R >> level) ** 2 for level, width in enumerate(widths))
    lpips = lpips_by_shape()
    with shapes_alone():
        to_shapes(lpips)
        image, reconstruction = torch.empty(B, 3, R, R), torch.empty(B, 3, R, R, requires_grad=True)
        cost = cost_of(lambda: lpips(image, reconstruction).mean().backward(), lpips=lpips)
    assert cost.flops == {Part("lpips"): B * (2 * trunk + heads), Part("lpips", True): B * (trunk + heads)}


def test_a_network_by_shape_has_the_cost_of_a_real_one():
    with torch.device("meta"):
        sit = SiT(input_size=8, hidden_size=32, depth=2, num_heads=2, encoder_depth=1, z_dims=[8], projector_dim=16)
    with shapes_alone():
        to_shapes(sit)
        x = torch.empty(B, 4, 8, 8)
        cost = cost_of(lambda: sit(x, torch.empty(B), torch.zeros(B, dtype=torch.int64)), sit=sit)
    N, D = 16, 32
    blocks = 2 * B * (N * (24 * D**2 + 4 * N * D) + 12 * D**2)
    embedders = B * (2 * N * 16 * D + 2 * (256 * D + D * D))
    projector = B * N * 2 * (D * 16 + 16 * 16 + 16 * 8)
    last = B * (N * 2 * D * 16 + 4 * D * D)
    assert cost.flops == {Part("sit"): blocks + embedders + projector + last}


def test_memory_is_counted_while_it_is_used():
    with shapes_alone():
        layers = nn.Sequential(nn.Linear(100, 100, bias=False), nn.ReLU(), nn.Linear(100, 50, bias=False))
        x = torch.empty(10, 100)

        def forward():
            out = layers(x)
            kept.update(cost.live)
            out.sum().backward()

        kept, parts = {}, Parts()
        with Cost(parts, {"weights": layers.parameters()}) as cost:
            forward()
            assert cost.live == {"weights": 4 * 15000, "activations": 4 * 15000}  # the gradients
            cost.add(layers[0].weight.grad, "gradients")
            assert cost.live == {"weights": 4 * 15000, "activations": 4 * 5000, "gradients": 4 * 10000}
            layers[0].weight.grad = None
            assert cost.live["gradients"] == 0
    # The first layer's output is freed where nothing needs it: the backward pass is through the ReLU's output.
    assert kept["activations"] == 4 * (10 * 100 + 10 * 50)
    assert cost.peak.total() >= 4 * 30000


def test_norms_keep_float32_under_autocast_as_on_cuda():
    with shapes_alone():
        norm, x = nn.GroupNorm(2, 4), torch.empty(1, 4, 8, 8, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            assert norm(x).dtype == x.softmax(-1).dtype == F.softmax(x, dim=-1).dtype == torch.float32
            assert F.silu(x).dtype == torch.bfloat16
        assert x.softmax(-1).dtype == torch.bfloat16


@contextlib.contextmanager
def cuda_autocast(dtype: torch.dtype):
    """torch.autocast("cuda"), which switches itself off where there is no GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def kept_for_backward(network: nn.Module, shapes: list[tuple[int, ...]], device: str) -> tuple[dict, int]:
    """The memory alive after a forward pass under autocast, on a CPU or a GPU that is not there, and the FLOPs."""
    by_shape = shapes_alone() if device == "cpu" else FakeTensorMode(allow_non_fake_inputs=True)
    autocast = torch.autocast("cpu", torch.bfloat16) if device == "cpu" else cuda_autocast(torch.bfloat16)
    with by_shape:
        to_shapes(network, device)
        inputs = [torch.empty(shape, device=device) for shape in shapes]
        with Cost(Parts(), {"weights": network.parameters()}) as cost, autocast:
            outputs = network(*inputs)
        assert all(x.device.type == device for x in outputs)
        return cost.live.copy(), cost.flops.total()


def test_a_forward_pass_keeps_what_it_keeps_on_cuda():
    """A GPU that is not there does no backward pass, hence the CPU's stand-in; it has no fused attention either."""
    convolutional = vae_models["f4d4-tiny"] | {"mid_block_add_attention": False}
    for build, shapes in (
        (lambda: TrainableVAE(build_vae(convolutional)), [(2, 3, 64, 64), (2, 4, 16, 16)]),
        (lambda: SiTBlock(48, 3, 4.0, qk_norm=True, fused_attn=False), [(2, 16, 48), (2, 48)]),
        (
            lambda: SiTBlock(48, 3, 4.0, qk_norm=True, fused_attn=False, lightning=True),
            [(2, 16, 48), (2, 48), (16, 16), (16, 16)],
        ),
    ):
        with torch.device("meta"):
            networks = build(), build()
        (cpu, flops), (cuda, cuda_flops) = map(kept_for_backward, networks, (shapes, shapes), ("cpu", "cuda"))
        assert (cpu, flops) == (cuda, cuda_flops)
        assert cpu["autocast copies"] > 0


def test_autocast_copies_are_of_weights_alone():
    with shapes_alone():
        linear, x = nn.Linear(100, 100, bias=False), torch.empty(10, 100)
        out = []
        cost = cost_of(lambda: out.append(linear(x)), autocast=True, linear=linear)
        assert out[0].dtype == torch.bfloat16
    assert cost.peak == {"weights": 4 * 10000, "autocast copies": 2 * 10000, "activations": 2 * 2 * 1000}
