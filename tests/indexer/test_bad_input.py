"""What the indexer refuses: an error that names the argument, on every device."""

from typing import Any

import pytest
import torch

import topgather as tg
from tests.indexer.helpers import IndexCase, make_attention, make_index


def route(device: torch.device, **changed: Any) -> Any:
    given = {**make_index(IndexCase(query_len=20), torch.float32, device), "block_size": 8, "top_k": 4}
    return tg.index_route(**(given | changed))


def loss(device: torch.device, **changed: Any) -> Any:
    case = IndexCase(query_len=20)
    given: dict[str, Any] = {**make_index(case, torch.float32, device), **make_attention(case, torch.float32, device)}
    given |= {"lse": torch.zeros(1, 4, 20, device=device), "block_size": 8}
    return tg.index_loss(**(given | changed))


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Any:
    return lambda device: torch.zeros(shape, dtype=dtype, device=device)


def choice(*shape: int, fill: int = 0, block_size: int = 8) -> Any:
    return lambda device: tg.BlockRouting(torch.full(shape, fill, dtype=torch.int32, device=device), block_size)


OF_BOTH: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"index_query": zeros(1, 3, 20, 16), "index_key": zeros(1, 2, 20, 16)},
        ValueError,
        "index_query must have a mult",
    ),
    ({"index_key": zeros(2, 1, 20, 16)}, ValueError, "index_key must have size 1 in dimension 0"),
    ({"index_key": zeros(1, 1, 20, 15)}, ValueError, "index_key must have size 16 in dimension -?[13]"),
    ({"index_query": zeros(1, 2, 20, 0), "index_key": zeros(1, 1, 20, 0)}, ValueError, "index_query must have a last"),
    ({"reduction": "sum"}, ValueError, "reduction must be one of 'max', 'mean', 'relu_sum', got 'sum'"),
    ({"reduction": 1}, TypeError, "reduction must be a str"),
    ({"num_choices": 1}, ValueError, "num_choices must be the heads of index_query, 2, for reduction='max'"),
    ({"num_choices": 3, "reduction": "relu_sum"}, ValueError, "num_choices must divide the heads of index_query, 2"),
    ({"weights": zeros(1, 2, 20)}, ValueError, "weights must be None for reduction='max'"),
    ({"weights": zeros(1, 2, 19), "reduction": "relu_sum"}, ValueError, r"weights must have shape \[1, 2, 20\]"),
    (
        {"weights": zeros(1, 2, 20, dtype=torch.bfloat16), "reduction": "relu_sum"},
        TypeError,
        "weights must have the dtype of index_query",
    ),
]
OF_ROUTE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"force_first": 2, "force_last": 3}, ValueError, "force_first and force_last must together be at most top_k, 4"),
    ({"force_last": 2, "is_causal": False}, ValueError, "force_last must be 1, or 0, without is_causal"),
    ({"force_last": -1}, ValueError, "force_last must be between 0"),
    ({"top_k": 0}, ValueError, "top_k must be between 1"),
    ({"top_k": 2**30}, ValueError, "top_k must be at most 3"),
]
OF_LOSS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": zeros(1, 4, 19, 8)}, ValueError, "query must have size 20 in dimension 2"),
    ({"key": zeros(1, 2, 21, 8)}, ValueError, "key must have size 20 in dimension 2"),
    ({"key": zeros(1, 3, 20, 8)}, ValueError, "query must have a multiple of key's heads"),
    ({"query": zeros(1, 3, 20, 8), "key": zeros(1, 1, 20, 8)}, ValueError, "lse must have shape|query must have a mul"),
    ({"lse": zeros(1, 2, 20)}, ValueError, r"lse must have shape \[1, 4, 20\]"),
    ({"lse": zeros(1, 4, 20, dtype=torch.bfloat16)}, TypeError, "lse must have dtype torch.float32"),
    ({"routing": 3}, TypeError, "routing must be a topgather.BlockRouting or None, got int"),
    ({"routing": choice(1, 2, 20, 2, block_size=4)}, ValueError, "block_size must be that of routing, 4, got 8"),
    ({"routing": choice(2, 20, 2)}, ValueError, "block_indices must have 4 dimensions"),
    ({"routing": choice(1, 2, 19, 2)}, ValueError, r"block_indices must have shape \[1, 2, 20, top_k\]"),
    ({"routing": choice(1, 2, 20, 2), "num_choices": 1}, ValueError, "num_choices must be that of routing, 2"),
    ({"routing": choice(1, 4, 20, 2)}, ValueError, "num_choices must divide the heads of index_query, 2, got 4"),
]


def refuses(call: Any, changed: dict[str, Any], exception: type[Exception], message: str, device: torch.device) -> None:
    given = {name: value(device) if callable(value) else value for name, value in changed.items()}
    with pytest.raises(exception, match=message):
        call(device, **given)


@pytest.mark.parametrize(("changed", "exception", "message"), [*OF_BOTH, *OF_ROUTE])
def test_route(changed: dict[str, Any], exception: type[Exception], message: str, device: torch.device) -> None:
    refuses(route, changed, exception, message, device)


@pytest.mark.parametrize(("changed", "exception", "message"), [*OF_BOTH, *OF_LOSS])
def test_loss(changed: dict[str, Any], exception: type[Exception], message: str, device: torch.device) -> None:
    refuses(loss, changed, exception, message, device)


@pytest.mark.parametrize("block", [-2, 3, 2**31 - 1])
def test_blocks_that_do_not_exist(block: int) -> None:
    """On the CPU, where what a tensor holds is looked at."""
    cpu = torch.device("cpu")
    refuses(loss, {"routing": choice(1, 2, 20, 2, fill=block)}, IndexError, f"block_indices holds {block}", cpu)


def test_a_block_named_twice() -> None:
    """It would have two shares of the attention's mass. Unused slots may be many."""
    cpu = torch.device("cpu")
    refuses(loss, {"routing": choice(1, 2, 20, 2)}, ValueError, "block_indices names block 0 twice for a query", cpu)
    apart = torch.tensor([2, -1, 1, -1, 2], dtype=torch.int32).expand(1, 2, 20, 5)
    refuses(loss, {"routing": lambda device: tg.BlockRouting(apart, 8)}, ValueError, "names block 2 twice", cpu)
    assert loss(cpu, routing=tg.BlockRouting(apart[..., :4].contiguous(), 8)).isfinite()


def test_wide_heads_on_cuda(cuda_device: torch.device) -> None:
    wide = {"index_query": zeros(1, 2, 20, 257), "index_key": zeros(1, 1, 20, 257)}
    for call in (route, loss):
        refuses(call, wide, ValueError, "index_query must have a last dimension of at most 256 on CUDA", cuda_device)


def test_mixed_precision() -> None:
    """16-bit attention beside a float32 indexer is fine; float64 goes with float64 alone."""
    cpu = torch.device("cpu")
    case = IndexCase(query_len=20)
    attention = make_attention(case, torch.bfloat16, cpu)
    assert loss(cpu, **attention).dtype == torch.float32
    doubles = {name: tensor.double() for name, tensor in attention.items()}
    lse = torch.zeros(1, 4, 20, dtype=torch.float64)
    refuses(loss, {**doubles, "lse": lse}, TypeError, "query must be float64 exactly where index_query is", cpu)
