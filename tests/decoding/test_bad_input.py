"""What users of caches can get wrong, and what they are told."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import topgather as tg
from tests.common.tensors import random_tensor

pytestmark = pytest.mark.sanitize

OPTIONS: dict[str, Any] = {"block_size": 4, "max_seq_len": 32}
ops = torch.ops.topgather


def make(device: torch.device | str = "cpu", paged: bool = False, **changes: Any) -> Any:
    options = {**OPTIONS, "device": device, **changes}
    return (tg.PagedMobaCache if paged else tg.MobaCache)(2, 2, 8, **options)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"block_size": 0}, ValueError, "block_size must be between 1"),
        ({"block_size": 2.0}, TypeError, "block_size must be an int"),
        ({"max_seq_len": 0}, ValueError, "max_seq_len must be between 1"),
        ({"max_seq_len": None}, TypeError, "max_seq_len must be an int"),
        ({"value_dim": -1}, ValueError, "value_dim must be between 0"),
        ({"dtype": torch.int32}, TypeError, "dtype must be one of torch.float32"),
        ({"conv_weight": torch.zeros(2, 7, 3)}, ValueError, r"conv_weight must have shape \[2, 8, width\]"),
        ({"conv_weight": [1]}, TypeError, "conv_weight must be a torch.Tensor"),
    ],
    ids=str,
)
@pytest.mark.parametrize("paged", [False, True])
def test_making_a_cache(paged: bool, changes: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make(paged=paged, **changes)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"page_size": 6}, ValueError, "page_size must be a multiple of block_size, 4, got 6"),
        ({"page_size": 0}, ValueError, "page_size must be between 1"),
        ({"num_pages": -1}, ValueError, "num_pages must be between 0"),
        ({"num_pages": 2.5}, TypeError, "num_pages must be an int"),
    ],
    ids=str,
)
def test_making_a_paged_cache(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make(paged=True, **changes)


def new(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (lambda: ([1], new(2, 2, 3, 8)), TypeError, "key must be a torch.Tensor"),
        (lambda: (new(2, 2, 3, 8), None), TypeError, "value must be a torch.Tensor"),
        (
            lambda: (new(2, 2, 3, 8), new(2, 2, 3, 8, dtype=torch.float16)),
            TypeError,
            "value must have the cache's dtype",
        ),
        (lambda: (new(2, 2, 3, 8, dtype=torch.int64),) * 2, TypeError, "key must have the cache's dtype"),
        (lambda: (new(2, 2, 8),) * 2, ValueError, r"key must have shape \[2, 2, tokens, 8\]"),
        (lambda: (new(3, 2, 3, 8),) * 2, ValueError, r"key must have shape \[2, 2, tokens, 8\]"),
        (lambda: (new(2, 1, 3, 8),) * 2, ValueError, r"key must have shape \[2, 2, tokens, 8\]"),
        (lambda: (new(2, 2, 3, 7),) * 2, ValueError, r"key must have shape \[2, 2, tokens, 8\]"),
        (lambda: (new(2, 2, 3, 8), new(2, 2, 2, 8)), ValueError, "value must have shape.*same tokens"),
        (lambda: (new(2, 2, 8, 3).mT,) * 2, ValueError, "key must have a contiguous last dimension"),
        (lambda: (new(2, 2, 3, 8).requires_grad_(),) * 2, ValueError, "key must not require grad"),
        (lambda: (new(2, 2, 3, 8, device="meta"),) * 2, ValueError, "key must be on the cache's device"),
        (lambda: (new(2, 2, 3, 8), new(2, 2, 3, 8), 3), TypeError, "num_tokens must be ints"),
        (lambda: (new(2, 2, 3, 8), new(2, 2, 3, 8), "ab"), TypeError, "num_tokens must be ints"),
        (lambda: (new(2, 2, 3, 8), new(2, 2, 3, 8), [1]), ValueError, "num_tokens must have one number a sequence, 2"),
        (lambda: (new(2, 2, 3, 8), new(2, 2, 3, 8), [1, 4]), ValueError, "num_tokens must be at most.* 3, got 4"),
        (lambda: (new(2, 2, 3, 8), new(2, 2, 3, 8), [1, -1]), ValueError, "num_tokens must be between 0"),
        (lambda: (new(2, 2, 3, 8), new(2, 2, 3, 8), [1, 1.0]), TypeError, "num_tokens must be an int"),
        (lambda: (new(2, 2, 3, 8), new(2, 2, 3, 8), torch.tensor([1.0, 2])), TypeError, "num_tokens must have dtype"),
        (lambda: (new(2, 2, 3, 8), new(2, 2, 3, 8), torch.tensor([[1, 2]])), ValueError, "num_tokens must have shape"),
    ],
)
@pytest.mark.parametrize("paged", [False, True])
def test_appending(paged: bool, arguments: Callable[[], tuple[Any, ...]], error: type[Exception], match: str) -> None:
    cache = make(paged=paged)
    with pytest.raises(error, match=match):
        cache.append(*arguments())
    assert cache.lengths == [0, 0]


@pytest.mark.parametrize(
    ("query", "options", "error", "match"),
    [
        (lambda: "query", {}, TypeError, "query must be a torch.Tensor"),
        (lambda: new(2, 4, 1, 8, dtype=torch.bfloat16), {}, TypeError, "query must have the cache's dtype"),
        (lambda: new(2, 4, 1, 8, device="meta"), {}, ValueError, "query must be on the cache's device"),
        (lambda: new(2, 4, 8), {}, ValueError, r"query must have shape \[2, heads, tokens, 8\]"),
        (lambda: new(1, 4, 1, 8), {}, ValueError, r"query must have shape \[2, heads, tokens, 8\]"),
        (lambda: new(2, 4, 1, 9), {}, ValueError, r"query must have shape \[2, heads, tokens, 8\]"),
        (lambda: new(2, 3, 1, 8), {}, ValueError, "query must have a multiple of the cache's heads"),
        (lambda: new(2, 0, 1, 8), {}, ValueError, "query must have a multiple of the cache's heads"),
        (lambda: new(2, 4, 8, 2).mT, {}, ValueError, "query must have a contiguous last dimension"),
        (lambda: new(2, 4, 1, 8).requires_grad_(), {}, ValueError, "query must not require grad"),
        (lambda: new(2, 4, 1, 8), {"top_k": 0}, ValueError, "top_k must be between 1"),
        (lambda: new(2, 4, 1, 8), {"top_k": 1.5}, TypeError, "top_k must be an int"),
        (lambda: new(2, 4, 1, 8), {"scale": "1"}, TypeError, "scale must be a float"),
        (lambda: new(2, 4, 1, 8), {"scale": float("nan")}, ValueError, "scale must be finite"),
        (lambda: new(2, 4, 1, 8), {"return_lse": 1}, TypeError, "return_lse must be a bool"),
        (lambda: new(2, 4, 1, 8), {"num_tokens": [2, 1]}, ValueError, "num_tokens must be at most"),
        (lambda: new(2, 4, 1, 8), {"routing": torch.zeros(1)}, TypeError, "routing must be a topgather.BlockRouting"),
    ],
)
@pytest.mark.parametrize("paged", [False, True])
def test_decoding(
    paged: bool, query: Callable[[], Any], options: dict[str, Any], error: type[Exception], match: str
) -> None:
    cache = make(paged=paged)
    cache.append(new(2, 2, 9, 8), new(2, 2, 9, 8))
    with pytest.raises(error, match=match):
        tg.moba_decode(query(), cache, **options)


def routing(block: Any, block_size: int = 4, slots: int = 2) -> tg.BlockRouting:
    return tg.BlockRouting(torch.tensor(block, dtype=torch.int32).expand(2, 4, 1, slots), block_size)


@pytest.mark.parametrize(
    ("chosen", "error", "match"),
    [
        (lambda: routing([0, 1], block_size=8), ValueError, "routing must have the cache's block_size, 4, got 8"),
        (lambda: routing([0, 3]), IndexError, "block_indices holds 3 at query head 0, query 0"),
        (lambda: routing([0, -2]), IndexError, "block_indices holds -2"),
        (lambda: routing([1, 1]), ValueError, "block_indices names block 1 more than once"),
        (
            lambda: tg.BlockRouting(torch.zeros(2, 3, 1, 2, dtype=torch.int32), 4),
            ValueError,
            r"block_indices must have shape \[2, heads, 1, top_k\] with heads those of query \(4\), those of key \(2\)",
        ),
    ],
)
def test_routing(chosen: Callable[[], tg.BlockRouting], error: type[Exception], match: str) -> None:
    cache = make()
    cache.append(new(2, 2, 9, 8), new(2, 2, 9, 8))
    with pytest.raises(error, match=match):
        tg.moba_decode(new(2, 4, 1, 8), cache, routing=chosen())


def test_a_block_after_the_own_one_named_twice() -> None:
    """It would add nothing, and is refused all the same."""
    cache = make()
    cache.append(new(2, 2, 9, 8), new(2, 2, 9, 8))
    slots = torch.tensor([0, -1, -1], dtype=torch.int32).repeat(2, 4, 7, 1)
    slots[1, 3, 0] = torch.tensor([0, 2, 2])
    with pytest.raises(ValueError, match="block_indices names block 2 more than once"):
        tg.moba_decode(new(2, 4, 7, 8), cache, routing=tg.BlockRouting(slots, 4))


def test_a_block_named_twice_in_parts_that_workers_share_out() -> None:
    """Among so many keys that a query's slots are split, first and last slot the same."""
    cache = tg.MobaCache(1, 1, 4, block_size=64, max_seq_len=6400)
    cache.append(new(1, 1, 6400, 4), new(1, 1, 6400, 4))
    slots = torch.arange(100, dtype=torch.int32)
    slots[-1] = 0
    with pytest.raises(ValueError, match="block_indices names block 0 more than once"):
        tg.moba_decode(new(1, 1, 1, 4), cache, routing=tg.BlockRouting(slots.expand(1, 1, 1, 100), 64))


def test_a_cache_is_needed() -> None:
    with pytest.raises(TypeError, match=r"cache must be a topgather\.MobaCache or PagedMobaCache, got tuple"):
        tg.moba_decode(new(2, 4, 1, 8), (1, 2))  # type: ignore[arg-type]


def test_other_tokens_than_a_ragged_append() -> None:
    cache = make()
    cache.append(new(2, 2, 3, 8), new(2, 2, 3, 8), [1, 3])
    with pytest.raises(
        ValueError, match=r"query must have as many tokens as the last append, 3.*got 1; give num_tokens"
    ):
        tg.moba_decode(new(2, 4, 1, 8), cache)
    assert tg.moba_decode(new(2, 4, 1, 8), cache, num_tokens=[1, 1]).shape == (2, 4, 1, 8)


@pytest.mark.parametrize(
    ("method", "argument", "error", "match"),
    [
        ("truncate", [10, 9], ValueError, "lengths must be at most what a sequence holds, 9 for 0, got 10"),
        ("truncate", [-1, 9], ValueError, "lengths must be between 0"),
        ("truncate", [1.0, 9], TypeError, "lengths must be an int"),
        ("truncate", [9], ValueError, "lengths must have one number a sequence, 2, got 1"),
        ("truncate", None, TypeError, "lengths must be an int or ints"),
        ("reorder", [0, 2], IndexError, "indices must be between 0 and 1, got 2"),
        ("reorder", [0, -1], IndexError, "indices must be between 0 and 1, got -1"),
        ("reorder", [0, 0.5], TypeError, "indices must be ints, got 0.5"),
        ("reorder", torch.zeros(2, 2, dtype=torch.int64), ValueError, "indices must have one dimension"),
        ("reorder", 1, TypeError, "indices must be ints or a tensor"),
        ("reserve", [1], ValueError, "num_tokens must have one number a sequence"),
        ("reserve", "12", TypeError, "num_tokens must be an int or ints"),
        ("reserve", 24, ValueError, "max_seq_len, 32"),
    ],
)
def test_changes(method: str, argument: Any, error: type[Exception], match: str) -> None:
    for paged in (False, True):
        cache = make(paged=paged)
        if not hasattr(cache, method):
            continue
        cache.append(new(2, 2, 9, 8), new(2, 2, 9, 8))
        with pytest.raises(error, match=match):
            getattr(cache, method)(argument)
        assert cache.lengths == [9, 9]


# --- the ops themselves: what only a caller of torch.ops can get wrong ------------------------------------------------


def pages(table: list[list[int]] | None = None, lengths: tuple[int, int] = (5, 3), **changes: Any) -> dict[str, Any]:
    """Arguments by name: two sequences in pages of four tokens."""
    numbers = [[0, 1, 2], [3, 4, 5]] if table is None else table
    arguments = {
        "new": random_tensor((2, 2, 1, 8), torch.float32, torch.device("cpu"), 0),
        "key_pages": torch.zeros(6, 2, 4, 8),
        "value_pages": torch.zeros(6, 2, 4, 8),
        "centroids": torch.zeros(6, 2, 2, 8),
        "seq_lens": torch.tensor(lengths, dtype=torch.int32),
        "page_table": torch.tensor(numbers, dtype=torch.int32),
        "num_tokens": None,
        "block_size": 2,
    }
    return {**arguments, **changes}


def append(a: dict[str, Any]) -> Any:
    tail = (a["seq_lens"], a["page_table"], a["num_tokens"], a["block_size"])
    return ops.moba_cache_append(a["new"], a["new"], a["key_pages"], a["value_pages"], a["centroids"], *tail)


def route(a: dict[str, Any]) -> Any:
    tail = (a["seq_lens"], a["page_table"], a["num_tokens"], a["block_size"], a["key_pages"].size(2), 2)
    return ops.moba_decode_route(a["new"], a["centroids"], *tail)


def decode(a: dict[str, Any]) -> Any:
    tail = (a["seq_lens"], a["page_table"], a["num_tokens"], a["block_size"], 1.0)
    choice = torch.zeros(2, 2, 1, 2, dtype=torch.int32)
    choice[..., 1] = -1
    return ops.moba_decode(a["new"], a["key_pages"], a["value_pages"], choice, *tail)


@pytest.mark.parametrize("op", [append, route, decode])
@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (lambda: pages([[0, 6, 2], [3, 4, 5]]), IndexError, "page_table holds 6 at column 1 for sequence 0"),
        (lambda: pages([[0, 1, 2], [-1, -1, -1]]), IndexError, "page_table holds -1 at column 0 for sequence 1"),
        (lambda: pages(lengths=(13, 3)), ValueError, "seq_lens must be between 0 and.* 12, got 13 for sequence 0"),
        (lambda: pages(lengths=(1, -1)), ValueError, "seq_lens must be between 0 and.* 12, got -1 for sequence 1"),
        (
            lambda: pages(num_tokens=torch.tensor([1, 2], dtype=torch.int32)),
            ValueError,
            "num_tokens must be between 0 and the number of new tokens, 1, got 2 for sequence 1",
        ),
        (lambda: pages(num_tokens=torch.tensor([1, 1])), TypeError, "num_tokens must have dtype torch.int32"),
        (lambda: pages(seq_lens=torch.tensor([1, 1])), TypeError, "seq_lens must have dtype torch.int32"),
        (lambda: pages(seq_lens=torch.zeros(3, dtype=torch.int32)), ValueError, r"seq_lens must have shape \[2\]"),
        (lambda: pages(page_table=torch.zeros(2, 3)), TypeError, "page_table must have dtype torch.int32"),
        (
            lambda: pages(page_table=torch.zeros(3, 3, dtype=torch.int32)),
            ValueError,
            r"page_table must have shape \[2, pages of a sequence\]",
        ),
        (lambda: pages(page_table=None), ValueError, "without page_table there must be one page a sequence, got 6"),
        (lambda: pages(block_size=0), ValueError, "block_size must be between 1"),
        (
            lambda: pages(block_size=3),
            ValueError,
            "page_size must be a multiple of block_size with a page_table, got page_size 4 and block_size 3",
        ),
        (lambda: pages(new=torch.zeros(2, 2, 1, 8).int()), TypeError, "must have one of the dtypes"),
        (lambda: pages(new=torch.zeros(2, 2, 1, 8).double()), TypeError, "must have dtype torch.float64"),
        (lambda: pages(new=torch.zeros(2, 2, 1, 7)), ValueError, "must have size 7 in dimension 3"),
    ],
)
def test_ops(
    op: Callable[[dict[str, Any]], Any], arguments: Callable[[], dict[str, Any]], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        op(arguments())


def test_no_place_for_new_tokens() -> None:
    with pytest.raises(ValueError, match="key has 1 new tokens for sequence 0, which holds 12 and has room for 12"):
        append(pages(lengths=(12, 3)))


@pytest.mark.parametrize("name", ["key_pages", "value_pages", "centroids"])
def test_pages_of_another_shape(name: str) -> None:
    for shape in [(5, 2, 4, 8), (6, 1, 4, 8), (6, 2, 3, 8), (6, 2, 4), (6, 2, 4, 9)]:
        with pytest.raises(ValueError, match="must have"):
            append(pages(**{name: torch.zeros(shape)}))
