"""Every argument of every public function, given wrong: an error that names the argument.

What only the content of a tensor shows (a routing's blocks, boundaries of sequences) raises on the CPU alone; CUDA does
not wait for it. ``test_cuda_contract.py`` has what happens there instead.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.common.bad_input import CPU, EITHER, TYPE, VALUE, Change, alter, assert_refused, put

pytestmark = pytest.mark.sanitize

RANGE = (ValueError, IndexError)


def dense_arguments() -> dict[str, Any]:
    return {
        "query": torch.randn(2, 4, 20, 8),
        "key": torch.randn(2, 2, 24, 8),
        "value": torch.randn(2, 2, 24, 6),
        "block_size": 8,
        "top_k": 2,
        "is_causal": True,
        "scale": None,
        "return_lse": False,
        "routing": None,
    }


def varlen_arguments() -> dict[str, Any]:
    return {
        "query": torch.randn(20, 4, 8),
        "key": torch.randn(24, 2, 8),
        "value": torch.randn(24, 2, 6),
        "cu_seqlens_q": torch.tensor([0, 12, 12, 20], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 12, 14, 24], dtype=torch.int32),
        "max_seqlen_q": 12,
        "max_seqlen_k": 12,
        "block_size": 8,
        "top_k": 2,
        "is_causal": True,
        "scale": None,
        "return_lse": False,
        "routing": None,
    }


ROUTE_ONLY = ("value", "scale", "return_lse", "routing")


def route_arguments() -> dict[str, Any]:
    return {name: v for name, v in dense_arguments().items() if name not in ROUTE_ONLY}


def route_varlen_arguments() -> dict[str, Any]:
    return {name: v for name, v in varlen_arguments().items() if name not in ROUTE_ONLY}


def centroid_arguments() -> dict[str, Any]:
    return {"key": torch.randn(2, 2, 24, 8), "block_size": 8}


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "moba_attention": (tg.moba_attention, dense_arguments),
    "moba_attention_varlen": (tg.moba_attention_varlen, varlen_arguments),
    "moba_route": (tg.moba_route, route_arguments),
    "moba_route_varlen": (tg.moba_route_varlen, route_varlen_arguments),
    "block_centroids": (tg.block_centroids, centroid_arguments),
}


def arguments_of(function: str, device: torch.device) -> dict[str, Any]:
    """Good arguments, on ``device``."""
    arguments = FUNCTIONS[function][1]()
    return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in arguments.items()}


def refuse(
    function: str,
    change: Change,
    named: str,
    exceptions: tuple[type[Exception], ...],
    device: torch.device = CPU,
) -> None:
    """The call fails with one of ``exceptions``, whose message has one of ``named`` (a|b) as a whole word."""
    assert_refused(FUNCTIONS[function][0], arguments_of(function, device), change, named, exceptions)


TENSORS = [
    (function, name)
    for function, (_, make_arguments) in FUNCTIONS.items()
    for name in ("query", "key", "value")
    if name in make_arguments()
]


@pytest.mark.parametrize(("function", "name"), [pair for pair in TENSORS if pair[0] != "block_centroids"])
def test_mixed_dtypes(function: str, name: str, device: torch.device) -> None:
    refuse(function, alter(name, Tensor.bfloat16), name, EITHER, device)


@pytest.mark.parametrize(("function", "name"), TENSORS)
def test_last_dimension_not_contiguous(function: str, name: str, device: torch.device) -> None:
    def spread(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(2, dim=-1)[..., ::2]

    refuse(function, alter(name, spread), name, VALUE, device)
    refuse(function, alter(name, lambda tensor: tensor[..., :1].expand(tensor.shape)), name, VALUE, device)


@pytest.mark.parametrize("function", ["moba_attention", "moba_attention_varlen", "moba_route", "moba_route_varlen"])
def test_shapes_that_do_not_fit(function: str, device: torch.device) -> None:
    heads = -2 if function.endswith("varlen") else -3
    refuse(function, alter("query", lambda query: query.narrow(heads, 0, 3)), "query|key", VALUE, device)
    refuse(function, alter("key", lambda key: key.narrow(heads, 0, 0)), "query|key", VALUE, device)
    refuse(function, alter("query", lambda query: query[..., :7]), "query|key", VALUE, device)
    refuse(function, alter("key", lambda key: key[..., :7]), "query|key", VALUE, device)

    def no_columns(arguments: dict[str, Any]) -> None:
        arguments["query"], arguments["key"] = arguments["query"][..., :0], arguments["key"][..., :0]

    refuse(function, no_columns, "query|key", VALUE, device)
    if "varlen" not in function:
        refuse(function, alter("query", lambda query: query[:1]), "query|key", VALUE, device)
        refuse(function, alter("key", lambda key: key[:1]), "query|key", VALUE, device)
    if "attention" in function:
        tokens = 0 if function.endswith("varlen") else 2
        refuse(function, alter("value", lambda value: value.narrow(tokens, 0, 20)), "value", VALUE, device)
        refuse(function, alter("value", lambda value: value.narrow(heads, 0, 1)), "value", VALUE, device)
        refuse(function, alter("key", lambda key: key.narrow(heads, 0, 1)), "key|value", VALUE, device)
    if function == "moba_attention":
        refuse(function, alter("value", lambda value: value[:1]), "value", VALUE, device)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("block_size", [2**20, 2**31 - 1])
def test_huge_block_size_is_one_block(function: str, block_size: int, device: torch.device) -> None:
    """Never a wrong answer from overflow: the result of one block that holds all keys."""
    call, arguments = FUNCTIONS[function][0], arguments_of(function, device)
    expected = call(**{**arguments, "block_size": 24})
    actual = call(**{**arguments, "block_size": block_size})
    if isinstance(expected, tg.BlockRouting):
        actual, expected = actual.block_indices, expected.block_indices
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("function", ["moba_attention", "moba_attention_varlen"])
def test_contradicting_top_k_and_routing(function: str, device: torch.device) -> None:
    def contradict(arguments: dict[str, Any]) -> None:
        arguments["routing"] = good_routing(function, device)
        arguments["top_k"] = 3

    refuse(function, contradict, "top_k", VALUE, device)


def good_routing(function: str, device: torch.device = CPU) -> "tg.BlockRouting":
    name = "moba_route_varlen" if function.endswith("varlen") else "moba_route"
    routing = FUNCTIONS[name][0](**arguments_of(name, device))
    assert isinstance(routing, tg.BlockRouting)
    return routing


ROUTED = ["moba_attention", "moba_attention_varlen"]


def attend_routed(
    function: str,
    alter_indices: Callable[[Tensor], Any],
    block_size: Any,
    is_causal: bool,
    device: torch.device = CPU,
) -> None:
    """Construct a BlockRouting of altered indices, and use it: an error may come from either."""
    indices = alter_indices(good_routing(function, device).block_indices.clone())
    routing = tg.BlockRouting(indices, block_size)
    arguments = arguments_of(function, device)
    FUNCTIONS[function][0](**{**arguments, "top_k": None, "is_causal": is_causal, "routing": routing})


def refuse_routing(
    function: str,
    alter_indices: Callable[[Tensor], Any],
    exceptions: tuple[type[Exception], ...],
    named: str = "block_indices|routing",
    block_size: Any = 8,
    is_causal: bool = True,
    device: torch.device = CPU,
) -> None:
    attend_routed(function, lambda indices: indices, 8, is_causal, device)
    with pytest.raises(exceptions) as info:
        attend_routed(function, alter_indices, block_size, is_causal, device)
    assert type(info.value) in (TypeError, ValueError, IndexError)
    assert re.search(rf"\b({named})\b", str(info.value)), f"does not name {named}: {info.value}"


def planted(*numbers: int, query_idx: int = -1) -> Callable[[Tensor], Tensor]:
    """One query of the last head, the last unless said otherwise, chooses ``numbers``."""

    def plant(indices: Tensor) -> Tensor:
        indices.flatten(0, -3)[-1, query_idx] = torch.tensor(numbers, dtype=indices.dtype)
        return indices

    return plant


@pytest.mark.parametrize("function", ROUTED)
@pytest.mark.parametrize("is_causal", [True, False])
def test_routing_out_of_range(function: str, is_causal: bool) -> None:
    """One index too large for the keys (of that sequence, when packed), or below -1."""
    last_block = 1 if function.endswith("varlen") else 2
    for number in (last_block + 1, 2**31 - 1, -2, -(2**31)):
        for numbers in ((0, number), (number, 0), (number, -1)):
            refuse_routing(function, planted(*numbers), RANGE, is_causal=is_causal)
            refuse_routing(function, planted(*numbers, query_idx=0), RANGE, is_causal=is_causal)


def test_routing_out_of_range_of_an_empty_sequence() -> None:
    """A block that another sequence has, and this one has not."""
    arguments = varlen_arguments()
    block_indices = torch.full((4, 20, 2), -1, dtype=torch.int32)
    block_indices[:, :12, 0] = 0
    cu_seqlens_k = torch.tensor([0, 0, 10, 24], dtype=torch.int32)
    arguments |= {"cu_seqlens_k": cu_seqlens_k, "max_seqlen_k": 14, "top_k": None}
    with pytest.raises((ValueError, IndexError), match=r"block_indices|routing"):
        tg.moba_attention_varlen(**{**arguments, "routing": tg.BlockRouting(block_indices, 8)})


@pytest.mark.parametrize("function", ROUTED)
def test_routing_with_duplicates(function: str) -> None:
    refuse_routing(function, planted(0, 0), VALUE)
    refuse_routing(function, planted(1, 1), VALUE)
    # Twice a block that the first query, under the causal mask, does not even see.
    refuse_routing(function, planted(1, 1, query_idx=0), VALUE)

    def far_apart(indices: Tensor) -> Tensor:
        wide = torch.full((*indices.shape[:-1], 70), -1, dtype=torch.int32)
        wide[..., 3] = 0
        wide.flatten(0, -2)[7, 69] = 0
        return wide

    refuse_routing(function, far_apart, VALUE)


@pytest.mark.parametrize("function", ROUTED)
def test_routing_of_the_wrong_kind(function: str, device: torch.device) -> None:
    def put_routing(wrong: Any) -> Change:
        return lambda arguments: arguments.update(top_k=None, routing=wrong)

    for wrong in (good_routing(function, device).block_indices, "blocks", 3, (1, 2)):
        refuse(function, put_routing(wrong), "routing", TYPE, device)
    for dtype in (torch.int64, torch.int16, torch.float32, torch.bool):
        refuse_routing(function, lambda indices, dtype=dtype: indices.to(dtype), EITHER, device=device)
    refuse_routing(function, lambda indices: indices.tolist(), TYPE, device=device)
    refuse_routing(function, lambda indices: indices.to("meta"), EITHER, "block_indices|routing|device", device=device)


@pytest.mark.parametrize("function", ROUTED)
def test_routing_of_the_wrong_shape(function: str, device: torch.device) -> None:
    refuse_routing(function, lambda indices: indices[0], VALUE, device=device)
    refuse_routing(function, lambda indices: indices[None], VALUE, device=device)
    refuse_routing(function, lambda indices: indices[1:], VALUE, device=device)
    refuse_routing(function, lambda indices: indices[..., 1:, :], VALUE, device=device)
    refuse_routing(function, lambda indices: indices[..., 0], VALUE, device=device)
    refuse_routing(function, lambda indices: indices[..., :0], VALUE, device=device)
    refuse_routing(function, lambda indices: indices.repeat_interleave(2, dim=0), VALUE, device=device)


@pytest.mark.parametrize("function", ROUTED)
def test_routing_of_another_block_size(function: str, device: torch.device) -> None:
    refuse_routing(function, lambda indices: indices, VALUE, "block_size", block_size=16, device=device)
    refuse_routing(function, lambda indices: indices, VALUE, "block_size", block_size=0, device=device)
    refuse_routing(function, lambda indices: indices, TYPE, "block_size", block_size=8.0, device=device)
    refuse_routing(function, lambda indices: indices, TYPE, "block_size", block_size=True, device=device)


def test_routing_is_frozen() -> None:
    routing = good_routing("moba_attention")
    with pytest.raises(AttributeError):
        routing.block_size = 4  # type: ignore[misc]


PACKED = ["moba_attention_varlen", "moba_route_varlen"]


def put_numbers(name: str, *values: int) -> Change:
    """Boundaries, on the device of those they replace."""
    return lambda arguments: arguments.update(
        {name: torch.tensor(values, dtype=torch.int32, device=arguments[name].device)}
    )


@pytest.mark.parametrize("function", PACKED)
@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_cu_seqlens_of_the_wrong_kind(function: str, name: str, device: torch.device) -> None:
    total = 20 if name.endswith("q") else 24
    for wrong_kind in ([0, 12, 12, total], None, 3):
        refuse(function, put(name, wrong_kind), name, TYPE, device)
    for dtype in (torch.float32, torch.int16, torch.uint8, torch.bool):
        refuse(function, alter(name, lambda cu, dtype=dtype: cu.to(dtype)), name, EITHER, device)
    refuse(function, put_numbers(name, 0, 12, total), "cu_seqlens_q|cu_seqlens_k", VALUE, device)
    refuse(function, put_numbers(name, 0, 12, 12, 12, total), "cu_seqlens_q|cu_seqlens_k", VALUE, device)
    refuse(function, put_numbers(name), name, VALUE, device)
    refuse(function, put(name, torch.tensor(0, dtype=torch.int32)), name, VALUE, device)
    refuse(function, alter(name, lambda cu: cu[None]), name, VALUE, device)
    refuse(function, alter(name, lambda cu: cu.to("meta")), name + "|device", EITHER, device)


@pytest.mark.parametrize("function", PACKED)
@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_cu_seqlens_that_do_not_delimit_the_tokens(function: str, name: str) -> None:
    total = 20 if name.endswith("q") else 24
    for wrong in (
        (1, 12, 12, total),
        (-1, 12, 12, total),
        (0, 12, 11, total),
        (0, 12, -5, total),
        (0, 12, 12, total - 1),
        (0, 12, 12, total + 1),
        (0, 2**31 - 1, 12, total),
    ):
        refuse(function, put_numbers(name, *wrong), name, VALUE)
    for number in (2**40, -(2**32) + 12):
        refuse(function, put(name, torch.tensor([0, 12, number, total])), name, VALUE)


@pytest.mark.parametrize("function", PACKED)
@pytest.mark.parametrize("name", ["max_seqlen_q", "max_seqlen_k"])
def test_max_seqlen_too_small(function: str, name: str) -> None:
    for wrong in (11, 1, 0):
        refuse(function, put(name, wrong), name, VALUE)


def test_strided_cu_seqlens_work(device: torch.device) -> None:
    """Not an error, and not misread: every other element of a longer tensor."""
    arguments = arguments_of("moba_attention_varlen", device)
    expected = tg.moba_attention_varlen(**arguments)
    spread = torch.tensor([0, 99, 12, 99, 12, 99, 20, 99], dtype=torch.int32, device=device)[::2]
    arguments["cu_seqlens_q"] = spread
    assert torch.equal(tg.moba_attention_varlen(**arguments), expected)


def test_registered_ops_check_too(device: torch.device) -> None:
    """Calling torch.ops.topgather past the public functions still gives an error, never a crash."""
    arguments = arguments_of("moba_attention", device)
    query, key, value = arguments["query"], arguments["key"], arguments["value"]
    ops = torch.ops.topgather
    good = ops.moba_route(query, key, 8, 2, True)
    wrong_calls: list[Callable[[], Any]] = [
        lambda: ops.block_centroids(key, 0),
        lambda: ops.block_centroids(key[0], 8),
        lambda: ops.block_centroids(key.int(), 8),
        lambda: ops.moba_route(query, key, 8, 0, True),
        lambda: ops.moba_route(query, key[..., :7], 8, 2, True),
        lambda: ops.moba_attention(query, key, value, good.long(), 8, True, 0.5),
        lambda: ops.moba_attention(query, key, value, good[:1], 8, True, 0.5),
        lambda: ops.moba_attention(query, key, value, good, -8, True, 0.5),
        lambda: ops.moba_attention(query, key, value[:, :, :5], good, 8, True, 0.5),
    ]
    for call_idx, call in enumerate(wrong_calls):
        with pytest.raises((ValueError, TypeError, IndexError, RuntimeError)):
            call()
        assert call_idx >= 0


def test_registered_backward_checks_too(device: torch.device) -> None:
    arguments = arguments_of("moba_attention", device)
    query, key, value = arguments["query"], arguments["key"], arguments["value"]
    ops = torch.ops.topgather
    good = ops.moba_route(query, key, 8, 2, True)
    out, lse, terms = ops.moba_attention(query, key, value, good, 8, True, 0.5)
    right: list[Any] = [out, lse, query, key, value, out, lse, good, 8, True, 0.5, None, None, 0, 0, False, None, terms]
    ops.moba_attention_backward(*right)
    for argument_idx, wrong in (
        (0, out[:, :, 1:]),
        (0, out.double()),
        (1, lse[:1]),
        (1, lse.double()),
        (5, out[..., :3]),
        (6, lse[..., 1:]),
        (7, good[..., 1:, :]),
        (8, 0),
        (17, terms[..., 0]),
        (17, terms[:, :, 1:]),
        (17, terms.double()),
    ):
        changed = list(right)
        changed[argument_idx] = wrong
        with pytest.raises((ValueError, TypeError, IndexError, RuntimeError)):
            ops.moba_attention_backward(*changed)


def test_registered_ops_check_the_routing_too() -> None:
    query, key, value = (dense_arguments()[name] for name in ("query", "key", "value"))
    ops = torch.ops.topgather
    good = ops.moba_route(query, key, 8, 2, True)
    out, lse, _ = ops.moba_attention(query, key, value, good, 8, True, 0.5)
    with pytest.raises((ValueError, IndexError)):
        ops.moba_attention(query, key, value, good + 7, 8, True, 0.5)
    with pytest.raises((ValueError, IndexError)):
        ops.moba_attention_backward(out, lse, query, key, value, out, lse, good + 7, 8, True, 0.5)
