"""Autocast changes the dtype of floating inputs and no check: what is refused without it is refused with it.

Every public op, every tensor of it in turn: other shapes, integers, bool, complex numbers, numbers
of 8 bits.
"""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import topgather as tg

HEADS = (1, 2, 16, 8)
PACKED = (16, 2, 8)
IMAGE = (1, 2, 4, 4, 8)
INDICES = torch.arange(24).view(6, 4)
BOUNDARIES = torch.tensor([0, 7, 16])


def heads() -> dict[str, Tensor]:
    return {name: torch.randn(HEADS) for name in ("query", "key", "value")}


def packed() -> dict[str, Tensor]:
    return {name: torch.randn(PACKED) for name in ("query", "key", "value")}


def image() -> dict[str, Tensor]:
    return {name: torch.randn(IMAGE) for name in ("query", "key", "value")}


def sequences() -> dict[str, Any]:
    return {"cu_seqlens_q": BOUNDARIES, "cu_seqlens_k": BOUNDARIES, "max_seqlen_q": 9, "max_seqlen_k": 9}


def without_value(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in ("query", "key")}


def decode_arguments() -> dict[str, Any]:
    cache = tg.MobaCache(batch_size=1, num_kv_heads=2, head_dim=8, block_size=4, max_seq_len=32)
    cache.append(torch.randn(HEADS), torch.randn(HEADS))
    return {"query": torch.randn(1, 2, 1, 8), "cache": cache, "top_k": 2}


def indexer() -> dict[str, Tensor]:
    return {"index_query": torch.randn(HEADS), "index_key": torch.randn(HEADS)}


def index_loss_arguments() -> dict[str, Any]:
    tensors = heads()
    out = tg.moba_attention(**tensors, block_size=4, return_lse=True)
    return {**indexer(), **without_value(tensors), "lse": out[1], "block_size": 4}


# Arguments that are taken.
ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "ngram_hash": lambda: {"tokens": torch.arange(12).view(2, 6), "num_tables": 2, "rows": 7},
    "block_centroids": lambda: {"key": torch.randn(HEADS), "block_size": 4},
    "moba_route": lambda: {**without_value(heads()), "block_size": 4, "top_k": 2},
    "moba_route_varlen": lambda: {**without_value(packed()), **sequences(), "block_size": 4, "top_k": 2},
    "moba_attention": lambda: {**heads(), "block_size": 4, "top_k": 2},
    "moba_attention_varlen": lambda: {**packed(), **sequences(), "block_size": 4, "top_k": 2},
    "moba_decode": decode_arguments,
    "index_route": lambda: {**indexer(), "block_size": 4, "top_k": 2},
    "index_loss": index_loss_arguments,
    "key_conv": lambda: {"key": torch.randn(HEADS), "weight": torch.randn(2, 8, 3)},
    "product_key_topk": lambda: {"query": torch.randn(6, 2, 8), "keys": torch.randn(2, 2, 4, 4), "top_k": 2},
    "memory_lookup": lambda: {"values": torch.randn(32, 8), "indices": INDICES, "weights": torch.rand(6, 4)},
    "expert_lookup": lambda: {
        "x": torch.randn(6, 8),
        "values_in": torch.randn(32, 8),
        "values_out": torch.randn(32, 8),
        "indices": INDICES,
        "weights": torch.rand(6, 4),
    },
    "quantized_lookup": lambda: {
        "values": torch.ones(32, 8, dtype=torch.int8),
        "scales": torch.rand(32, 1),
        "indices": INDICES,
        "weights": torch.rand(6, 4),
    },
    "grid_attention": lambda: {**image(), "grid_size": 2, "bias": torch.randn(2, 4, 4)},
    "window_attention": lambda: {**image(), "window_size": 2, "bias": torch.randn(2, 4, 4)},
}

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "one_row": lambda t: t[:1],
    "one_column": lambda t: t[..., :1],
    "one_dimension": lambda t: t.flatten(),
    "no_dimension": lambda t: t.flatten()[0],
    "more_dimensions": lambda t: t.expand(2, *t.shape),
    "int64": lambda t: (t * 10).long(),
    "bool": lambda t: t > 0,
    "complex": lambda t: t + 0j,
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "sparse": lambda t: t.to_sparse(),
}


def functions() -> set[str]:
    """The public ops: functions that take a tensor."""
    named = {name: getattr(tg, name) for name in tg.__all__ if inspect.isfunction(getattr(tg, name))}
    return {name for name, each in named.items() if "Tensor" in inspect.get_annotations(each).values()}


def test_every_op_is_tried() -> None:
    assert set(ARGUMENTS) == functions()


def tensors_of(name: str) -> list[str]:
    return [argument for argument, value in ARGUMENTS[name]().items() if isinstance(value, Tensor)]


def refusal(name: str, arguments: dict[str, Any], is_cast: bool) -> tuple[type[Exception] | None, str]:
    """What a call raises, the dtypes of its message left out."""
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            getattr(tg, name)(**arguments)
    except Exception as error:
        message = str(error).partition("\n")[0]
        for dtype in ("torch.float32", "torch.bfloat16"):
            message = message.replace(dtype, "dtype")
        return type(error), message
    return None, ""


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name in ARGUMENTS for argument in tensors_of(name)]
)
def test_the_same_is_refused(name: str, argument: str, change: str) -> None:
    torch.manual_seed(0)
    arguments = ARGUMENTS[name]()
    arguments[argument] = CHANGES[change](arguments[argument])
    plain, message = refusal(name, arguments, is_cast=False)
    cast, message_cast = refusal(name, arguments, is_cast=True)
    assert cast == plain, f"without autocast {plain} {message}, with it {cast} {message_cast}"


@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_is_taken_is_taken(name: str) -> None:
    assert refusal(name, ARGUMENTS[name](), is_cast=False) == (None, "")
    if name != "moba_decode":  # whose cache has a dtype that autocast does not change
        assert refusal(name, ARGUMENTS[name](), is_cast=True) == (None, "")
