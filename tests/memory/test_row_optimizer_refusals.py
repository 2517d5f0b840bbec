"""What row optimizers refuse, and that it changes nothing; and what torch's do to a parameter besides stepping it."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import topgather as tg
import topgather.distributed
from topgather import optim
from topgather.ops import _memory_update

ROWS, WIDTH = 12, 6
INDICES = torch.tensor([[0, 1], [1, 3]])
OPTIMIZERS: dict[str, Callable[[Any], optim.RowOptimizer]] = {
    "RowSGD": lambda tables: optim.RowSGD(tables, lr=0.1, momentum=0.9),
    "RowAdagrad": lambda tables: optim.RowAdagrad(tables, lr=0.1),
    "RowAdam": lambda tables: optim.RowAdam(tables, lr=0.1, weight_decay=0.1),
}


def draw(rows: int = ROWS, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype))


def backward(table: Tensor) -> None:
    tg.memory_lookup(table, INDICES).square().sum().backward()


def stepped(table: nn.Parameter, make: Callable[[Any], optim.RowOptimizer]) -> optim.RowOptimizer:
    optimizer = make([table])
    backward(table)
    optimizer.step()
    return optimizer


def everything(optimizer: optim.RowOptimizer) -> Any:
    tables = [table for group in optimizer.param_groups for table in group["params"]]
    return copy.deepcopy([(table.detach(), optimizer.state[table]) for table in tables])


def assert_unchanged(optimizer: optim.RowOptimizer, before: Any) -> None:
    for (table, state), (old_table, old_state) in zip(everything(optimizer), before, strict=True):
        assert torch.equal(table, old_table)
        assert state.keys() == old_state.keys()
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(old_state[name])), name


# --- construction -----------------------------------------------------------------------------------------------------


def test_a_refused_group_leaves_the_tables_of_others_alone() -> None:
    table = draw()
    with pytest.raises(ValueError, match="params must have 2 dimensions") as caught:
        optim.RowAdam([{"params": [table]}, {"params": [nn.Parameter(torch.randn(3))]}])
    backward(table)
    assert table.grad is not None, caught  # whose traceback keeps what there is of the optimizer
    table.grad = None
    with pytest.raises(ValueError, match="name each table once"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what it will refuse some day
        optim.RowAdam([table, table])
    stepped(table, OPTIMIZERS["RowAdam"])


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_refused_step_changes_no_table(name: str) -> None:
    """One that only the second table's state makes impossible; put right, it is the step that it would have been."""
    for state in ("steps", "first", "second", "decayed"):
        tables, others = [draw(), draw()], [draw(), draw()]
        optimizer, expected = OPTIMIZERS[name](tables), OPTIMIZERS[name](others)
        for each, step in ((tables, optimizer), (others, expected)):
            for table in each:
                backward(table)
            step.step()
            for table in each:
                backward(table)
        right = optimizer.state[tables[1]].get(state)
        if right is None:
            continue
        optimizer.state[tables[1]][state] = right[1:]
        before = everything(optimizer)
        with pytest.raises(ValueError, match=f"{state} must have"):
            optimizer.step()
        assert_unchanged(optimizer, before)
        optimizer.state[tables[1]][state] = right
        optimizer.step()
        expected.step()
        assert_unchanged(optimizer, everything(expected))


def test_a_table_converted_between_backward_and_step() -> None:
    """As torch's own: what was recorded is converted with it."""
    pools = [tg.nn.MemoryPool(4, WIDTH) for _ in range(2)]
    pools[1].load_state_dict(pools[0].state_dict())
    options = {"lr": 1.0, "stochastic_rounding": False}
    optimizer = optim.RowSGD([pools[0].values], **options)
    theirs = torch.optim.SGD([pools[1].values], lr=1.0)
    for pool in pools:
        backward(pool.values)
        pool.to(torch.bfloat16)
    optimizer.step()
    theirs.step()
    torch.testing.assert_close(pools[0].values, pools[1].values)


@pytest.mark.parametrize(
    ("before", "after"), [(torch.float32, torch.float64), (torch.float64, torch.bfloat16)], ids=str
)
def test_states_follow_a_converted_table(before: torch.dtype, after: torch.dtype) -> None:
    pool = tg.nn.MemoryPool(4, WIDTH, dtype=before)
    optimizer = stepped(pool.values, OPTIMIZERS["RowAdam"])
    first = optimizer.state[pool.values]["first"].clone()
    pool.to(after)
    backward(pool.values)
    optimizer.step()
    state = optimizer.state[pool.values]
    assert state["first"].dtype == (torch.float64 if after == torch.float64 else torch.float32)
    assert state["steps"][1] == 2
    torch.testing.assert_close(state["first"][5:].double(), first[5:].double())


def test_states_made_in_inference_mode_are_written_to_outside() -> None:
    table = draw()
    optimizer = optim.RowAdam([table], weight_decay=0.1)
    backward(table)
    with torch.inference_mode():
        optimizer.step()
    backward(table)
    optimizer.step()
    optimizer.settle()


# --- saved states -----------------------------------------------------------------------------------------------------


def saved(table: nn.Parameter, make: Callable[[Any], Any]) -> dict[str, Any]:
    optimizer = make([table])
    backward(table)
    optimizer.step()
    state: dict[str, Any] = optimizer.state_dict()
    if isinstance(optimizer, optim.RowOptimizer):
        optimizer.detach()
    return state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: saved(draw(), torch.optim.AdamW), "must be of a RowAdam, but its groups have no"),
        (lambda: saved(draw(), OPTIMIZERS["RowSGD"]), "must be of a RowAdam, but its groups have no betas"),
        (lambda: saved(draw(ROWS + 1), OPTIMIZERS["RowAdam"]), "steps must have shape"),
        (lambda: saved(draw(width=WIDTH + 1), OPTIMIZERS["RowAdam"]), "first must have shape"),
        (
            lambda: {**saved(draw(), OPTIMIZERS["RowAdam"]), "state": {0: {"exp_avg": torch.zeros(ROWS, WIDTH)}}},
            "holds exp_avg",
        ),
        (
            lambda: {**saved(draw(), OPTIMIZERS["RowAdam"]), "state": {0: {"first": torch.zeros(ROWS, WIDTH)}}},
            "has no num_steps, decay, steps",
        ),
    ],
)
def test_another_state_is_not_loaded(make: Callable[[], dict[str, Any]], message: str) -> None:
    optimizer = stepped(draw(), OPTIMIZERS["RowAdam"])
    before = everything(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(make())
    assert_unchanged(optimizer, before)


def test_a_hook_may_make_the_state_one_that_fits() -> None:
    table = draw()
    optimizer = optim.RowAdam([table])
    right = saved(draw(), OPTIMIZERS["RowAdam"])
    optimizer.register_load_state_dict_pre_hook(lambda _, found: found["right"])
    optimizer.load_state_dict({"right": right})
    assert torch.equal(optimizer.state[table]["steps"], right["state"][0]["steps"])
    assert optimizer.state[table]["steps"].dtype == torch.int32


# --- what else is done to parameters ----------------------------------------------------------------------------------


def test_a_hook_on_the_gradient_that_is_not_made_is_refused() -> None:
    table = draw()
    optimizer = optim.RowSGD([table], lr=1.0)
    hook = table.register_hook(lambda grad: grad)
    for look_up in (
        lambda: tg.memory_lookup(table, INDICES),
        lambda: tg.expert_lookup(torch.randn(2, WIDTH), table, table, INDICES, torch.ones(2, 2)),
    ):
        with pytest.raises(RuntimeError, match="must have no hooks on its gradient"):
            look_up()
    hook.remove()
    backward(table)
    optimizer.step()


def test_forward_mode_is_that_of_a_table_alone() -> None:
    alone = draw()
    attached = nn.Parameter(alone.detach().clone())
    optimizer = optim.RowSGD([attached])
    weights, x = torch.rand(2, 2), torch.randn(2, WIDTH)
    found = []
    for table in (alone, attached):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(weights, weights.cos())
            first = tg.memory_lookup(table, INDICES, dual)
            second = tg.expert_lookup(forward_ad.make_dual(x, x.cos()), table, table, INDICES, dual)
            found.append([forward_ad.unpack_dual(out).tangent.detach() for out in (first, second)])
    torch.testing.assert_close(found[1], found[0])
    optimizer.detach()


@pytest.mark.parametrize("way", ["to", "load_state_dict"])
def test_a_table_that_is_swapped_in_place_keeps_its_optimizer(way: str) -> None:
    """As modules convert and load their parameters if they are told to."""
    pool = tg.nn.MemoryPool(4, WIDTH)
    optimizer = optim.RowSGD([pool.values], lr=1.0, stochastic_rounding=False)
    values = pool.values
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        if way == "to":
            pool.to(torch.bfloat16)
        else:
            pool.load_state_dict({"values": torch.randn(16, WIDTH)})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert pool.values is values
    alone = nn.Parameter(values.detach().clone())
    backward(values)
    backward(alone)
    assert values.grad is None and _memory_update.is_marked(values)
    optimizer.step()
    torch.testing.assert_close(values.detach(), alone.detach() - alone.grad)
    optimizer.detach()


def test_no_copy_of_a_table_counts_as_one_that_an_optimizer_has() -> None:
    """A compiled lookup would make a sparse gradient of it."""
    pool = tg.nn.MemoryPool(4, WIDTH)
    optimizer = optim.RowSGD([pool.values])
    assert _memory_update.is_marked(pool.values)
    stored = io.BytesIO()
    torch.save({"values": pool.values}, stored)
    stored.seek(0)
    for copied in (
        copy.deepcopy(pool).values,
        pickle.loads(pickle.dumps(pool)).values,
        torch.load(stored, weights_only=True)["values"],
    ):
        assert not _memory_update.is_marked(copied)
    optimizer.detach()


# --- clipping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse_grad", [False, True, "padded"])
@pytest.mark.parametrize("max_norm", [0.1, float("inf")])
def test_clipping_beside_tables_with_gradients(sparse_grad: bool | str, max_norm: float) -> None:
    """As torch clips dense ones; a row that stands several times in a padded gradient counts with its sum."""
    tables = [draw(), draw()]
    theirs = [nn.Parameter(table.detach().clone()) for table in tables]
    optimizer = optim.RowSGD(tables[:1], lr=1.0)
    for one, expected in zip(tables, theirs, strict=True):
        tg.memory_lookup(one, INDICES, sparse_grad=sparse_grad).square().sum().backward()
        backward(expected)
    norm = optim.clip_grad_norm_(tables, max_norm, optimizer)
    torch.testing.assert_close(norm.float(), nn.utils.clip_grad_norm_(theirs, max_norm))
    assert tables[1].grad is not None
    torch.testing.assert_close(tables[1].grad.to_dense(), theirs[1].grad)
    optimizer.step()
    torch.testing.assert_close(tables[0].detach(), theirs[0].detach() - theirs[0].grad)


def test_recorded_gradients_that_would_not_count_are_no_part_of_a_norm() -> None:
    table, other = draw(), nn.Parameter(torch.ones(2))
    optimizer = optim.RowSGD([table])
    other.grad = torch.ones(2)
    for clip in (optim.clip_grad_norm_, tg.distributed.clip_grad_norm_):
        assert float(clip([table, other], 10.0)) == pytest.approx(2**0.5)
    backward(table)
    for clip in (optim.clip_grad_norm_, tg.distributed.clip_grad_norm_):
        with pytest.raises(ValueError, match="row_optimizers"):
            clip([table, other], 10.0)
    assert float(optim.clip_grad_norm_([table, other], 10.0, optimizer)) > 2**0.5


def test_the_norm_of_float16_gradients_is_not_infinite() -> None:
    parameter = nn.Parameter(torch.zeros(100, dtype=torch.float16))
    parameter.grad = torch.full((100,), 3e4, dtype=torch.float16)
    assert float(optim.clip_grad_norm_(parameter, 1.0)) == pytest.approx(3e5, rel=1e-3)
    torch.testing.assert_close(parameter.grad, torch.full((100,), 0.1, dtype=torch.float16))
