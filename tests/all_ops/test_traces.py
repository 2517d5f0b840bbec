"""Programs that torch records call by call (``torch.jit.trace``, ``make_fx``) give at other sizes what the functions
give, or are refused when they are recorded.

Numbers that follow from sizes, such as how many blocks there are, would be constants of such a program.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import topgather as tg
from tests.common.ops import PUBLIC

CPU = torch.device("cpu")
Arguments = tuple[Tensor, ...]
# Recorded at the first; blocks, groups and windows of the others differ in number.
SIZES = (20, 3, 33, 70)
pytestmark = pytest.mark.filterwarnings("ignore")


def drawn(*shapes: tuple[int, ...]) -> Arguments:
    generator = torch.Generator().manual_seed(len(shapes))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def heads(size: int) -> Arguments:
    return drawn(*((1, 2, size, 8),) * 3)


def image(size: int) -> Arguments:
    return drawn(*((1, 2, size, size + 1, 8),) * 3)


def packed(size: int) -> Arguments:
    return (*drawn(*((size, 2, 8),) * 3), torch.tensor([0, size // 2, size]))


def bag(size: int) -> Arguments:
    indices = torch.randint(0, 16, (size, 3), generator=torch.Generator().manual_seed(size))
    return (*drawn((16, 4)), indices, *drawn((size, 3)))


def layer(make: Callable[[], torch.nn.Module]) -> Callable[..., Any]:
    torch.manual_seed(0)
    return make().requires_grad_(False)


# By name: the function, its arguments for a size, and whether torch.jit.trace takes it.
TRACED: dict[str, tuple[Callable[..., Any], Callable[[int], Arguments], bool]] = {
    "block_centroids": (lambda k, *_: tg.block_centroids(k, 8), heads, True),
    "moba_route": (lambda q, k, _: tg.moba_route(q, k, 8, 4).block_indices, heads, True),
    "moba_route_varlen": (
        lambda q, k, _, bounds: tg.moba_route_varlen(q, k, bounds, bounds, 100, 100, 8, 3).block_indices, packed, True,
    ),
    "moba_attention": (lambda q, k, v: tg.moba_attention(q, k, v, 8, 4, return_lse=True), heads, True),
    "moba_attention (window)": (
        lambda q, k, v: tg.moba_attention(q, k, v, 8, 4, window=5, force_first=1, force_last=2), heads, True,
    ),
    "moba_attention (all blocks)": (lambda q, k, v: tg.moba_attention(q, k, v, 8), heads, False),
    "moba_attention (many slots)": (lambda q, k, v: tg.moba_attention(q, k, v, 8, 100), heads, False),
    "moba_attention_varlen": (
        lambda q, k, v, bounds: tg.moba_attention_varlen(q, k, v, bounds, bounds, 100, 100, 8, 3), packed, False,
    ),
    "index_route": (lambda q, k, _: tg.index_route(q, k[:, :1], 8, 4).block_indices, heads, True),
    "index_loss": (lambda q, k, v: tg.index_loss(q, k, q, v, q[..., 0] + 9, block_size=8), heads, True),
    "key_conv": (lambda k, v, _: tg.key_conv(k, v[0, :, :3].mT[:, :, :3] * 0.1 + torch.ones(2, 8, 3)), heads, True),
    "grid_attention": (lambda q, k, v: tg.grid_attention(q, k, v, stride=3), image, True),
    "grid_attention (grid_size)": (lambda q, k, v: tg.grid_attention(q, k, v, grid_size=3), image, False),
    "window_attention": (lambda q, k, v: tg.window_attention(q, k, v, 3), image, True),
    "product_key_topk": (
        lambda q, k, _: tg.product_key_topk(q[0].transpose(0, 1), k[0, :, None, :3, :4].expand(2, 2, 3, 4), 2), heads,
        True,
    ),
    "memory_lookup": (lambda values, *rows: tg.memory_lookup(values, *rows), bag, True),
    "expert_lookup": (
        lambda values, indices, weights: tg.expert_lookup(weights, values[:, :3], values, indices, weights), bag, True,
    ),
    "quantized_lookup": (
        lambda values, indices, weights: tg.quantized_lookup(*tg.nn.quantize_rows(values), indices, weights), bag, True,
    ),
    "MobaAttention": (
        layer(lambda: tg.nn.MobaAttention(16, 2, block_size=8, top_k=3, kernel_size=3)),
        lambda size: drawn((2, size, 16)), True,
    ),
    "IndexedAttention": (
        layer(lambda: tg.nn.IndexedAttention(16, 2, block_size=8, top_k=3)), lambda size: drawn((2, size, 16)), True,
    ),
    "SparseSelfAttention2d": (
        layer(lambda: tg.nn.SparseSelfAttention2d(16, 2, window_size=3, relative_position_bias=True)),
        lambda size: drawn((2, 16, size, size)), False,
    ),
}  # fmt: skip
# moba_decode: a cache is refused below. Hashes are of torch's ops alone.
ELSEWHERE = {"moba_decode", "ngram_hash"}


def test_every_function_is_tried() -> None:
    assert {case.function.__name__ for case in PUBLIC} - ELSEWHERE <= set(TRACED)


def results_of(found: Any) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


def assert_same_at_all_sizes(
    program: Callable[..., Any], function: Callable[..., Any], arguments: Callable[[int], Arguments]
) -> None:
    for size in SIZES:
        given = arguments(size)
        for found, expected in zip(results_of(program(*given)), results_of(function(*given)), strict=True):
            torch.testing.assert_close(found, expected, msg=lambda text, size=size: f"at size {size}: {text}")


@pytest.mark.parametrize("name", TRACED)
def test_jit_trace(name: str) -> None:
    function, arguments, is_taken = TRACED[name]
    if not is_taken:
        with pytest.raises(NotImplementedError, match=r"topgather: torch.jit.trace keeps numbers that follow from"):
            torch.jit.trace(function, arguments(SIZES[0]), check_trace=False)
        return
    program = torch.jit.trace(function, arguments(SIZES[0]), check_trace=False)
    assert_same_at_all_sizes(program, function, arguments)


@pytest.mark.parametrize("name", [name for name, (function, *_) in TRACED.items() if not hasattr(function, "forward")])
def test_symbolic_make_fx(name: str) -> None:
    function, arguments, _ = TRACED[name]
    program = make_fx(function, tracing_mode="symbolic")(*arguments(SIZES[0]))
    assert_same_at_all_sizes(program, function, arguments)


def test_jit_trace_of_a_cache() -> None:
    """Its lengths would be constants, and the traced program's appends unknown to it."""
    cache = tg.MobaCache(1, 2, 8, block_size=4, max_seq_len=32)
    key, value = torch.randn(2, 1, 2, 5, 8)
    with pytest.raises(NotImplementedError, match=r"torch.jit.trace cannot follow a cache"):
        torch.jit.trace(lambda key, value: cache.append(key, value) or key, (key, value))
    assert cache.lengths == [0]
    cache.append(key, value)
    with pytest.raises(NotImplementedError, match=r"torch.jit.trace cannot follow a cache"):
        torch.jit.trace(lambda query: tg.moba_decode(query, cache), (key,))
