"""``torch.export`` with dynamic sizes of every layer over images, and one compiled graph for all sizes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

import topgather as tg
from tests.common.torch_versions import needs_torch
from topgather.models.sparse_vit import PatchEmbedding
from topgather.nn._one_graph import PatchConv2d


def small_vit(base_size: int | None = 64) -> nn.Module:
    return tg.models.SparseViT(
        depths=(1, 1, 1, 1),
        dims=(8, 8, 8, 8),
        head_dim=8,
        rates=((1,), (1,)),
        base_size=base_size,
        fusion_dim=8,
        init_value=1.0,
    ).eval()


def patches() -> nn.Module:
    """Patches of two sizes, and single tokens."""
    return nn.Sequential(PatchEmbedding(3, 8, 4), PatchEmbedding(8, 16, 2), PatchConv2d(16, 8, 1))


class TwoMaps(nn.Module):
    """A fusion of a map and of what a stride leaves of it."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.fusion = tg.nn.LearnableFeatureFusion([8, 8], 8, init_value=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fusion([x[:, :, :: self.stride, :: self.stride], x])


def attention(**options: Any) -> nn.Module:
    return tg.nn.SparseSelfAttention2d(8, 2, **options)


TOKENS = [(8, 8), (13, 7), (40, 20), (5, 9)]
# A size that may be 1 somewhere inside is another graph to torch, with a plain convolution too: 32 pixels are a token.
PIXELS = [(70, 90), (64, 64), (33, 47)]  # both sides change first, or torch would take one for constant
# The module, channels, the least size, one to export with, and others.
LAYERS: dict[str, tuple[Callable[[], nn.Module], int, int, tuple[int, int], list[tuple[int, int]]]] = {
    "grid": (lambda: attention(grid_size=4), 8, 4, (16, 24), TOKENS),
    "grid, relative": (lambda: attention(grid_size=4, relative_position_bias=True), 8, 4, (16, 24), TOKENS),
    "grid of two sides": (lambda: attention(grid_size=(3, 5), relative_position_bias=True), 8, 4, (16, 24), TOKENS),
    "stride": (lambda: attention(stride=2), 8, 4, (16, 24), TOKENS),
    "window": (lambda: attention(window_size=4), 8, 2, (16, 24), [*TOKENS, (2, 3)]),
    "window, relative": (
        lambda: attention(window_size=4, relative_position_bias=True),
        8,
        2,
        (16, 24),
        [*TOKENS, (2, 3)],
    ),
    "fusion": (lambda: TwoMaps(2), 8, 4, (16, 24), TOKENS),
    "fusion, a third": (lambda: TwoMaps(3), 8, 4, (16, 24), TOKENS),
    "SparseViT": (small_vit, 3, 33, (64, 96), PIXELS),
    "SparseViT of strides": (lambda: small_vit(None), 3, 33, (64, 96), PIXELS),
}


# Of these the sizes inside follow from quotients of the image's.
QUOTIENTS = ["grid, relative", "grid of two sides", "window, relative", "fusion", "fusion, a third"]
OLD_EXPORTS = {
    **dict.fromkeys(QUOTIENTS, needs_torch(2, 8, "takes no bounds of sizes that are quotients")),
    **dict.fromkeys(["SparseViT", "SparseViT of strides"], needs_torch(2, 13, "asks what sizes of several stages are")),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=OLD_EXPORTS.get(name, ())) for name in LAYERS])
def test_an_exported_layer_serves_other_sizes(name: str) -> None:
    make, channels, least, first, others = LAYERS[name]
    layer = make()
    sizes = {2: Dim("H", min=least, max=4096), 3: Dim("W", min=least, max=4096)}
    program = export(layer, (torch.randn(1, channels, *first),), dynamic_shapes=(sizes,)).module()
    for size in [first, *others]:
        image = torch.randn(1, channels, *size)
        torch.testing.assert_close(program(image), layer(image), rtol=1e-5, atol=1e-5)


class Sum(nn.Module):
    """Layers over the same map, in one graph: what one of them asks of a size, the graph asks."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([LAYERS[name][0]() for name in names])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers]).sum(0)


@pytest.mark.parametrize(
    "names",
    [
        ("grid", "stride", "window"),
        ("grid, relative", "grid of two sides", "window, relative"),
        ("fusion", "fusion, a third"),
    ],
    ids=", ".join,
)
def test_one_compiled_graph_for_all_sizes(names: tuple[str, ...]) -> None:
    """A second one at most: torch takes a size that changes for dynamic when it has seen it change."""
    layer = Sum(*names)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for size in [(16, 24), *TOKENS, (9, 10), (7, 30), (18, 14)]:
        image = torch.randn(1, 8, *size, requires_grad=True)
        actual, expected = compiled(image), layer(image)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        leaves = [image, *layer.parameters()]
        gradients = [torch.autograd.grad(out.square().sum(), leaves) for out in (actual, expected)]
        for left, right in zip(*gradients, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2


@needs_torch(2, 8, "recurses too deep over them")
@pytest.mark.parametrize(
    "make, channels, sizes",
    [
        (lambda: TwoMaps(2), 8, [(12, 20), (20, 12), (8, 8), (16, 16), (7, 30)]),
        (patches, 3, [(64, 96), (33, 47), (260, 304)]),
        (small_vit, 3, [(64, 96), *PIXELS, (64, 48), (260, 304)]),
    ],
    ids=["fusion", "patches", "SparseViT"],
)
def test_a_dynamic_graph_is_the_only_one(
    make: Callable[[], nn.Module], channels: int, sizes: list[tuple[int, int]]
) -> None:
    """Where no sizes of the first image are alike, by which torch would take one for the other. The model's groups grow
    with the image; strides, which do not, are compiled above, and exported with it.

    Torch's convolution of patches would have one graph for inputs of up to 20480 numbers and one for larger ones, and
    its norms would throw the first graph away.
    """
    layer = make()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for size in sizes:
        image = torch.randn(1, channels, *size, requires_grad=True)
        torch.testing.assert_close(compiled(image), layer(image), rtol=1e-5, atol=1e-5)
    # Before 2.13 torch compiles the convolution of patches, whose input has 3 channels, anew for the second size.
    assert counter.frame_count == (2 if torch.__version__ < (2, 13) and channels == 3 else 1)


def test_block_attention_of_any_length() -> None:
    """Of one block, of fewer than ``top_k`` and of many: one program, two graphs at most, the numbers of the layer."""
    layer = tg.nn.MobaAttention(16, 2, block_size=8, top_k=3, kernel_size=3)
    program = export(layer, (torch.randn(1, 32, 16),), dynamic_shapes=({1: Dim("N", min=2, max=4096)},)).module()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for num_tokens in (32, 20, 100, 7, 2):
        tokens = torch.randn(1, num_tokens, 16)
        for run in (program, compiled):
            torch.testing.assert_close(run(tokens), layer(tokens), rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2
