"""Every argument of the functions of memory layers, given wrong: an error that names the argument.

An index that names no row raises on the CPU alone; ``test_cuda_contract.py`` has what CUDA does instead.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.common.bad_input import CPU, EITHER, TYPE, VALUE, Change, alter, assert_refused, put

pytestmark = pytest.mark.sanitize

INDEX = (IndexError,)


def topk_arguments() -> dict[str, Any]:
    return {"query": torch.randn(6, 3, 8), "keys": torch.randn(3, 2, 10, 4), "top_k": 5}


def lookup_arguments() -> dict[str, Any]:
    return {
        "values": torch.randn(20, 6),
        "indices": torch.randint(0, 20, (5, 4)),
        "weights": torch.rand(5, 4),
        "sparse_grad": False,
    }


def expert_arguments() -> dict[str, Any]:
    return {
        "x": torch.randn(5, 8),
        "values_in": torch.randn(20, 8),
        "values_out": torch.randn(20, 6),
        "indices": torch.randint(0, 20, (5, 4)),
        "weights": torch.rand(5, 4),
        "activation": "silu",
        "sparse_grad": False,
    }


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "product_key_topk": (tg.product_key_topk, topk_arguments),
    "memory_lookup": (tg.memory_lookup, lookup_arguments),
    "expert_lookup": (tg.expert_lookup, expert_arguments),
}
LOOKUPS = ["memory_lookup", "expert_lookup"]
TENSORS = [
    (function, name)
    for function, (_, make_arguments) in FUNCTIONS.items()
    for name, value in make_arguments().items()
    if isinstance(value, Tensor)
]
FLOATING = [pair for pair in TENSORS if pair[1] != "indices"]
ROWS = [pair for pair in FLOATING if pair[1] not in ("weights", "x")]
TABLES = {"memory_lookup": ["values"], "expert_lookup": ["values_in", "values_out"]}


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


@pytest.mark.parametrize(("function", "name"), [pair for pair in FLOATING if pair[1] not in ("weights", "values")])
def test_mixed_dtypes(function: str, name: str, device: torch.device) -> None:
    others = "keys|values_out|x" if name in ("query", "values_in") else name
    refuse(function, alter(name, Tensor.bfloat16), others + "|" + name, TYPE, device)


@pytest.mark.parametrize("function", LOOKUPS)
def test_weights_of_another_dtype(function: str, device: torch.device) -> None:
    """That of the table or float32, no other."""
    refuse(function, alter("weights", Tensor.half), "weights", TYPE, device)
    refuse(function, alter("weights", Tensor.double), "weights", TYPE, device)


@pytest.mark.parametrize(("function", "name"), ROWS)
def test_last_dimension_not_contiguous(function: str, name: str, device: torch.device) -> None:
    def spread(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(2, dim=-1)[..., ::2]

    refuse(function, alter(name, spread), name, VALUE, device)
    refuse(function, alter(name, lambda tensor: tensor[..., :1].expand(tensor.shape)), name, VALUE, device)


@pytest.mark.parametrize("function", LOOKUPS)
@pytest.mark.parametrize("name", ["indices", "weights", "x"])
def test_what_varies_by_token_may_have_any_strides(function: str, name: str, device: torch.device) -> None:
    """Not an error, and not misread."""
    arguments = arguments_of(function, device)
    if name not in arguments:
        return
    expected = FUNCTIONS[function][0](**arguments)
    for strided in (arguments[name].T.contiguous().T, arguments[name].repeat_interleave(2, dim=1)[:, ::2]):
        assert torch.equal(FUNCTIONS[function][0](**{**arguments, name: strided}), expected)


def test_shapes_of_the_search_that_do_not_fit(device: torch.device) -> None:
    function, named = "product_key_topk", "query|keys"
    refuse(function, alter("query", lambda query: query[..., :7]), "query", VALUE, device)
    refuse(function, alter("query", lambda query: query[..., :6]), named, VALUE, device)
    refuse(function, alter("query", lambda query: query[..., :0]), "query", VALUE, device)
    refuse(function, alter("query", lambda query: query[:, :2]), named, VALUE, device)
    refuse(function, alter("keys", lambda keys: keys[:2]), "keys", VALUE, device)
    refuse(function, alter("keys", lambda keys: keys[:, :1]), "keys", VALUE, device)
    refuse(function, alter("keys", lambda keys: keys[:, [0, 1, 1]]), "keys", VALUE, device)
    refuse(function, alter("keys", lambda keys: keys[..., :3]), named, VALUE, device)
    refuse(function, alter("keys", lambda keys: keys[:, :, :0]), "keys", VALUE, device)
    too_many = torch.empty(4, device=device).as_strided((3, 2, 46341, 4), (0, 0, 0, 1))
    refuse(function, put("keys", too_many), "keys", VALUE, device)


@pytest.mark.parametrize("function", LOOKUPS)
def test_shapes_of_lookups_that_do_not_fit(function: str, device: torch.device) -> None:
    refuse(function, alter("weights", lambda weights: weights[:4]), "weights", VALUE, device)
    refuse(function, alter("weights", lambda weights: weights[:, :3]), "weights", VALUE, device)
    refuse(function, alter("weights", lambda weights: weights.T), "weights", VALUE, device)
    refuse(function, alter("indices", lambda indices: indices[:4]), "indices|weights|x", VALUE, device)
    refuse(function, alter("indices", lambda indices: indices[:, :3]), "indices|weights", VALUE, device)
    if function == "expert_lookup":
        refuse(function, alter("x", lambda x: x[:4]), "x", VALUE, device)
        refuse(function, alter("x", lambda x: x[:, :7]), "x", VALUE, device)
        refuse(function, alter("values_in", lambda values: values[:, :7]), "x|values_in", VALUE, device)
        refuse(function, alter("values_in", lambda values: values[:19]), "values_in|values_out", VALUE, device)
        refuse(function, alter("values_out", lambda values: values[1:]), "values_out", VALUE, device)


@pytest.mark.parametrize(("function", "name"), [(f, name) for f, names in TABLES.items() for name in names])
def test_more_rows_than_are_numbered(function: str, name: str) -> None:
    huge = torch.empty(1).as_strided((2**31 - 1, 1), (0, 1))
    arguments = arguments_of(function, CPU)
    for table in TABLES[function]:
        arguments[table] = huge
    arguments["x"] = arguments.get("x", huge)[:, :1]
    arguments = {key: value for key, value in arguments.items() if key in FUNCTIONS[function][1]()}
    with pytest.raises(ValueError, match=TABLES[function][0]):
        FUNCTIONS[function][0](**arguments)
    assert name


def test_more_keys_than_there_are(device: torch.device) -> None:
    refuse("product_key_topk", put("top_k", 101), "top_k", VALUE, device)


@pytest.mark.parametrize("wrong", ["swish", "GELU", "", None, torch.nn.functional.gelu, 1, ["gelu"]], ids=repr)
def test_unknown_activation(wrong: Any, device: torch.device) -> None:
    refuse("expert_lookup", put("activation", wrong), "activation", EITHER, device)


BAD_INDICES = [-1, 20, 21, 2**31 - 1, -(2**31), 2**32, 2**32 + 3, -(2**32), 2**63 - 1, -(2**63)]


def with_index(number: int, token: int, entry: int) -> Change:
    def change(arguments: dict[str, Any]) -> None:
        indices = arguments["indices"].clone()
        indices = indices.int() if abs(number) < 2**31 and token % 2 else indices
        indices[token, entry] = number
        arguments["indices"] = indices

    return change


@pytest.mark.parametrize("function", LOOKUPS)
@pytest.mark.parametrize("number", BAD_INDICES)
def test_index_out_of_range(function: str, number: int) -> None:
    """Any entry of any token, int64 or int32; the message has the number and the count of rows."""
    for token, entry in ((0, 0), (1, 2), (4, 3)):
        refuse(function, with_index(number, token, entry), "indices", INDEX)
        refuse(function, with_index(number, token, entry), "20 rows", INDEX)
        refuse(function, with_index(number, token, entry), f"got {number}", INDEX)


@pytest.mark.parametrize("function", LOOKUPS)
def test_index_into_a_table_without_rows(function: str) -> None:
    def change(arguments: dict[str, Any]) -> None:
        for name in TABLES[function]:
            arguments[name] = arguments[name][:0]

    refuse(function, change, "indices", INDEX)


@pytest.mark.parametrize("name", ["memory_lookup", "memory_dot", "memory_backward", "memory_backward_sparse"])
def test_registered_ops_check_indices_too(name: str) -> None:
    values, indices, weights = torch.randn(20, 6), torch.randint(0, 20, (5, 4)), torch.rand(5, 4)
    rows = torch.randn(5, 6)
    arguments: dict[str, tuple[Any, ...]] = {
        "memory_lookup": (values, indices, weights),
        "memory_dot": (values, indices, rows),
        "memory_backward": (rows, values, indices, weights, True),
        "memory_backward_sparse": (rows, values, indices, weights, False),
    }
    op = getattr(torch.ops.topgather, name)
    op(*arguments[name])
    for number in BAD_INDICES:
        bad = indices.clone()
        bad[2, 1] = number
        with pytest.raises(IndexError, match="indices"):
            op(*(bad if argument is indices else argument for argument in arguments[name]))


def test_registered_ops_check_too(device: torch.device) -> None:
    """Calling torch.ops.topgather past the public functions still gives an error, never a crash."""
    ops = torch.ops.topgather
    arguments = arguments_of("memory_lookup", device)
    values, indices, weights = arguments["values"], arguments["indices"], arguments["weights"]
    rows = torch.randn(5, 6, device=device)
    search = arguments_of("product_key_topk", device)
    query, keys = search["query"], search["keys"]
    wrong_calls: list[Callable[[], Any]] = [
        lambda: ops.product_key_topk(query, keys, 0),
        lambda: ops.product_key_topk(query, keys, 101),
        lambda: ops.product_key_topk(query, keys[:2], 5),
        lambda: ops.product_key_topk(query.int(), keys.int(), 5),
        lambda: ops.memory_lookup(values, indices, weights[:4]),
        lambda: ops.memory_lookup(values, indices.float(), weights),
        lambda: ops.memory_lookup(values[0], indices, weights),
        lambda: ops.memory_dot(values, indices, rows[:4]),
        lambda: ops.memory_dot(values, indices, rows[:, :5]),
        lambda: ops.memory_dot(values, indices, rows.bfloat16()),
    ]
    for op in (ops.memory_backward, ops.memory_backward_sparse):
        wrong_calls += [
            lambda op=op: op(rows[:4], values, indices, weights, True),
            lambda op=op: op(rows[:, :5], values, indices, weights, True),
            lambda op=op: op(rows.bfloat16(), values, indices, weights, True),
            lambda op=op: op(rows, values, indices, weights[:, :3], False),
            lambda op=op: op(rows, values.T, indices, weights, False),
        ]
    for call in wrong_calls:
        with pytest.raises((ValueError, TypeError)):
            call()
