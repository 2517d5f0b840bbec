"""The indexer's loss: its value and its gradients, against the definition in float64; what it does to an indexer."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.common.runs import run_in_fork
from tests.common.tensors import random_tensor
from tests.common.tolerances import TOLERANCES, accumulation_dtype
from tests.indexer.helpers import IndexCase, make_attention, make_index
from topgather import reference
from topgather.ops import _index_loss

SUM = IndexCase(num_index_heads=4, num_key_heads=2, query_len=30, reduction="relu_sum", num_choices=2, has_weights=True)
CASES = [
    IndexCase(batch=2, query_len=50),
    IndexCase(query_len=30, key_len=45, block_size=7, reduction="mean", force_last=0, force_first=1),
    IndexCase(query_len=45, key_len=30, num_index_heads=4, num_key_heads=2, num_kv_heads=4),
    IndexCase(query_len=30, is_causal=False),
    IndexCase(query_len=30, block_size=64),
    SUM,
    replace(SUM, num_choices=1, has_weights=False, key_len=41),
]


def problem(case: IndexCase, dtype: torch.dtype, device: torch.device, is_routed: bool) -> dict[str, Any]:
    """Arguments of the loss, the leaves requiring grad; the routing is that of the indexer."""
    index, attention = make_index(case, dtype, device), make_attention(case, dtype, device)
    routing = tg.index_route(**index, **case.route()) if is_routed else None
    options: dict[str, Any] = {"block_size": case.block_size, "is_causal": case.is_causal}
    value = attention["key"]
    lse = tg.moba_attention(**attention, value=value, routing=routing, return_lse=True, **options)[1]
    leaves = {name: tensor.requires_grad_() for name, tensor in index.items()}
    num_choices = case.num_choices or case.num_index_heads
    options |= {"reduction": case.reduction, "index_scale": 0.5, "num_choices": num_choices}
    return {**leaves, **attention, "lse": lse, "routing": routing, **options}


def of_reference(given: dict[str, Any]) -> dict[str, Any]:
    routing = given["routing"]
    rest = {name: value for name, value in given.items() if name != "routing"}
    return {**rest, "block_indices": None if routing is None else routing.block_indices}


def leaves_of(given: dict[str, Any]) -> dict[str, Tensor]:
    return {name: given[name] for name in ("index_query", "index_key", "weights") if name in given}


def check(case: IndexCase, dtype: torch.dtype, device: torch.device, is_routed: bool) -> None:
    given = problem(case, dtype, device, is_routed)
    leaves = leaves_of(given)
    loss, expected = tg.index_loss(**given), reference.index_loss(**of_reference(given))
    assert loss.dtype == accumulation_dtype(dtype) and loss.shape == ()
    assert_near("loss", loss, expected, dtype, case)
    assert (float(expected.detach()) > 0) == (case.block_size < case.keys)
    found = torch.autograd.grad(loss, list(leaves.values()))
    wanted = torch.autograd.grad(expected, list(leaves.values()))
    for name, left, right in zip(leaves, found, wanted, strict=True):
        assert left.dtype == leaves[name].dtype
        assert_near(f"d_{name}", left, right, dtype, case)


def assert_near(name: str, found: Tensor, expected: Tensor, dtype: torch.dtype, case: IndexCase) -> None:
    """Up to rounding, by the largest number of all."""
    tolerance = TOLERANCES["index_loss", "loss" if name == "loss" else "gradients"]
    bound = tolerance.relative(dtype, case.dim * case.keys)
    size = max(float(expected.detach().abs().max()), 1.0 if name == "loss" else 0.0)
    error = float((found.detach().double() - expected.detach()).abs().max())
    assert found.shape == expected.shape and error <= bound * size, f"{name}: off by {error:.3g} of {bound * size:.3g}"


@pytest.mark.parametrize("is_routed", [False, True], ids=["dense", "routed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(
    case: IndexCase, dtype: torch.dtype, is_routed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of 16 queries, too."""
    check(case, dtype, torch.device("cpu"), is_routed)
    monkeypatch.setattr(_index_loss, "MAX_PIECE", 16)
    check(case, dtype, torch.device("cpu"), is_routed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_16_bits(dtype: torch.dtype) -> None:
    for case in (CASES[0], SUM):
        check(case, dtype, torch.device("cpu"), True)


@pytest.mark.parametrize("is_routed", [False, True], ids=["dense", "routed"])
@pytest.mark.parametrize(
    "case",
    [IndexCase(query_len=9, block_size=3, dim=3, top_k=2), replace(SUM, query_len=5, dim=3, block_size=2, top_k=2)],
    ids=str,
)
def test_gradcheck(case: IndexCase, is_routed: bool) -> None:
    given = problem(case, torch.float64, torch.device("cpu"), is_routed)
    leaves = leaves_of(given)
    assert torch.autograd.gradcheck(
        lambda *tensors: tg.index_loss(**(given | dict(zip(leaves, tensors, strict=True)))), list(leaves.values())
    )


def test_on_cuda(device: torch.device) -> None:
    check(IndexCase(query_len=30, block_size=5), torch.float32, device, True)


def test_query_and_key_get_no_gradient() -> None:
    given = problem(CASES[0], torch.float32, torch.device("cpu"), True)
    for name in ("query", "key", "lse"):
        given[name].requires_grad_()
    tg.index_loss(**given).backward()
    assert all(given[name].grad is None for name in ("query", "key", "lse"))
    assert given["index_query"].grad is not None


def test_zero_where_the_indexer_is_the_attention() -> None:
    """Blocks of one key, one head: the scores themselves, so that both distributions are one."""
    query, key = (random_tensor((1, 1, 20, 8), torch.float64, torch.device("cpu"), seed) for seed in (0, 1))
    lse = tg.moba_attention(query, key, key, 1, return_lse=True)[1]
    assert abs(float(tg.index_loss(query, key, query, key, lse, block_size=1))) < 1e-12
    routing = tg.index_route(query, key, 1, 5)
    lse = tg.moba_attention(query, key, key, 1, routing=routing, return_lse=True)[1]
    assert abs(float(tg.index_loss(query, key, query, key, lse, routing, block_size=1))) < 1e-12
    assert float(tg.index_loss(-query, key, query, key, lse, routing, block_size=1)) > 0.1


def test_a_few_steps_bring_it_down() -> None:
    given = problem(IndexCase(query_len=60, num_heads=2), torch.float32, torch.device("cpu"), False)
    leaves = [given[name].detach().clone().requires_grad_() for name in ("index_query", "index_key")]
    given |= dict(zip(("index_query", "index_key"), leaves, strict=True))
    optimizer = torch.optim.Adam(leaves, lr=0.05)
    losses = []
    for _ in range(30):
        loss = tg.index_loss(**given)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_no_matrix_of_queries_by_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that a call makes, forward and backward, is far smaller."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, (tuple, list)) else (made,):
                if isinstance(tensor, Tensor):
                    self.numbers = max(self.numbers, tensor.numel())
            return made

    monkeypatch.setattr(_index_loss, "PIECE_NUMBERS", 2**12)
    case = IndexCase(query_len=1024, block_size=64, num_index_heads=2, num_heads=2, dim=4, head_dim=4, top_k=3)
    for is_routed in (False, True):
        given = problem(case, torch.float32, torch.device("cpu"), is_routed)
        # Below the dispatcher's modes lie the kernels: what they call is seen when they are called by themselves.
        names = {name: value for name, value in given.items() if name != "routing"}
        names["block_indices"] = given["routing"].block_indices if is_routed else None
        names |= {"scale": 0.5, "weights": None}
        names["index_query"], names["index_key"] = names["index_query"].detach(), names["index_key"].detach()
        with Largest() as largest:
            made = _index_loss.Problem(**names)
            _index_loss.gradients(_index_loss.losses(made), made)
        assert largest.numbers <= 2**14 < 1024 * 1024 // 32


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_after_a_call_does_not_hang() -> None:
    """Threads that multiplied matrices and ended would leave the child a lock of the library that does."""
    torch.set_num_threads(3)
    case = IndexCase(num_index_heads=2, num_kv_heads=2, query_len=300, key_len=300, block_size=64, dim=40)
    arguments = problem(case, torch.float32, torch.device("cpu"), True)
    expected = float(tg.index_loss(**arguments))

    def work() -> bool:
        torch.set_num_threads(1)
        return float(tg.index_loss(**arguments)) == expected

    for _ in range(20):
        assert float(tg.index_loss(**arguments)) == expected
        assert run_in_fork(work) == 0
