"""Row optimizers against torch's own: each row as a parameter of its own, with a gradient where an entry names it."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import topgather as tg
from tests.common.runs import assert_all_equal
from tests.memory.row_steps import CASES, check_row_steps
from topgather import optim
from topgather.ops import _memory_update

CPU = torch.device("cpu")
ROWS, WIDTH, TOKENS, BAG = 14, 70, 12, 4
# Ours, torch's, the options of both.
PAIRS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "SGD": (optim.RowSGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.02}),
    "SGD with momentum": (
        optim.RowSGD,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.02, "maximize": True},
    ),
    "Nesterov": (optim.RowSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "Adagrad": (
        optim.RowAdagrad,
        torch.optim.Adagrad,
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.02, "initial_accumulator_value": 0.3},
    ),
    "Adam": (optim.RowAdam, torch.optim.Adam, {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.02}),
    "AdamW": (optim.RowAdam, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.2}),
}


def draw_bags(number: int, dtype: torch.dtype, num_rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, weights and the gradient of a lookup."""
    generator = torch.Generator().manual_seed(number)
    indices = torch.randint(0, num_rows, (TOKENS, BAG), generator=generator)
    weights = torch.randn(TOKENS, BAG, generator=generator).to(dtype)
    return indices, weights, torch.randn(TOKENS, WIDTH, generator=generator).to(dtype)


def draw_table(dtype: torch.dtype, device: torch.device = CPU) -> nn.Parameter:
    return nn.Parameter(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(9)).to(device, dtype))


def backward(table: Tensor, number: int, num_rows: int = ROWS) -> None:
    indices, weights, grad = (tensor.to(table.device) for tensor in draw_bags(number, table.dtype, num_rows))
    tg.memory_lookup(table, indices, weights).backward(grad)


def row_gradients(number: int, dtype: torch.dtype, num_rows: int) -> list[Tensor | None]:
    indices, weights, grad = draw_bags(number, dtype, num_rows)
    terms = (weights.unsqueeze(2) * grad.unsqueeze(1)).flatten(0, 1)
    grads = torch.zeros(ROWS, WIDTH, dtype=dtype).index_add_(0, indices.flatten(), terms)
    return [grads[row] if bool((indices == row).any()) else None for row in range(ROWS)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_equals_torchs_optimizer_row_by_row(name: str, dtype: torch.dtype) -> None:
    """With a schedule. Decoupled decay is made up for: of the steps that did not touch a row too."""
    ours, theirs, options = PAIRS[name]
    table = draw_table(dtype)
    rows = [nn.Parameter(row.clone()) for row in table.detach()]
    options_of_ours = {"decoupled_weight_decay": False} if name == "Adam" else {}
    optimizer, expected = ours([table], **options, **options_of_ours), theirs(rows, **options)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(each, 0.7) for each in (optimizer, expected)]
    for number in range(5):
        num_rows = 6 if number % 2 else ROWS - 1
        backward(table, number, num_rows)
        assert table.grad is None
        kept = 1 - expected.param_groups[0]["lr"] * options.get("weight_decay", 0) if name == "AdamW" else 1
        for row, grad in zip(rows, row_gradients(number, dtype, num_rows), strict=True):
            row.grad = grad
            if grad is None:
                row.data.mul_(kept)
        for each in (optimizer, expected, *schedules):
            each.step()
    optimizer.settle()
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(table.detach(), torch.stack([row.detach() for row in rows]), atol=tolerance, rtol=0)
    optimizer.detach()


@pytest.mark.usefixtures("cpu_target")
@pytest.mark.parametrize("name", CASES)
def test_takes_the_steps_of_torchs_own_ops(name: str, device: torch.device) -> None:
    """By the same random bits, so that hardly a number rounds elsewhere."""
    check_row_steps(CASES[name], device)


def train(table: nn.Parameter, optimizer: optim.RowOptimizer, first: int = 0, last: int = 3) -> nn.Parameter:
    for number in range(first, last):
        backward(table, number)
        optimizer.step()
    return table


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    """With a hot row, whose blocks threads share, and stochastic rounding."""
    results = []
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        table = nn.Parameter(torch.ones(3000, 40))
        optimizer = optim.RowAdam([table], state_dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(0)
        indices = torch.randint(0, 3000, (600, 20), generator=generator)
        indices[:, 3:9] = 7
        weights = torch.randn(600, 20, generator=generator)
        tg.memory_lookup(table, indices, weights).backward(torch.randn(600, 40, generator=generator))
        square = optimizer.grad_square()
        optimizer.step()
        terms = torch.einsum("tk,tk->", weights.double(), weights.double())
        assert float(square) > 0.1 * float(terms)
        results.append({"table": table.detach(), "square": square, **optimizer.state[table]})
        optimizer.detach()
    assert_all_equal(*({name: value for name, value in each.items() if torch.is_tensor(value)} for each in results))


def test_a_shared_table_and_micro_batches_make_one_step(device: torch.device) -> None:
    """What a dense gradient adds up; on the row that both lookups name too."""
    dtype = torch.float32
    table, dense = draw_table(dtype, device), draw_table(dtype, device)
    ours, theirs = optim.RowAdam([table]), torch.optim.AdamW([dense], weight_decay=0)
    everything = torch.arange(ROWS, device=device).unsqueeze(0)
    for each in (table, dense):
        x = torch.linspace(-1, 1, WIDTH, device=device).unsqueeze(0).requires_grad_()
        for _ in range(2):
            first = tg.memory_lookup(each, everything, torch.ones(1, ROWS, device=device))
            second = tg.expert_lookup(x, each, each, everything[:, :5], torch.ones(1, 5, device=device))
            (first.sin() + second).sum().backward()
        assert (each.grad is None) == (each is table)
        assert x.grad is not None
    ours.step()
    theirs.step()
    torch.testing.assert_close(table.detach(), dense.detach(), atol=2e-5, rtol=0)
    ours.detach()


def test_clipping_by_the_norm_of_all_gradients(device: torch.device) -> None:
    table, dense = draw_table(torch.float32, device), draw_table(torch.float32, device)
    other, same = (nn.Parameter(torch.ones(3, device=device)) for _ in range(2))
    ours = optim.RowSGD([table], lr=1.0)
    for each, beside in ((table, other), (dense, same)):
        backward(each, 0)
        (beside.sum() * 5).backward()
    norm = optim.clip_grad_norm_([table, other], 0.5, ours)
    expected = nn.utils.clip_grad_norm_([dense, same], 0.5)
    torch.testing.assert_close(norm.float(), expected)
    ours.step()
    torch.optim.SGD([dense], lr=1.0).step()
    torch.testing.assert_close(table.detach(), dense.detach())
    torch.testing.assert_close(other.grad, same.grad)
    ours.detach()


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_dicts_go_on_where_they_stopped(state_dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"state_dtype": state_dtype, "weight_decay": 0.1}
    table, resumed = draw_table(torch.float32), draw_table(torch.float32)
    optimizer = optim.RowAdam([table], **options)
    train(table, optimizer, 0, 2)
    state = copy.deepcopy(optimizer.state_dict())
    resumed.data.copy_(table.data)
    other = optim.RowAdam([resumed], lr=7.0)
    other.load_state_dict(state)
    assert other.state[resumed]["first"].dtype == state_dtype
    assert_all_equal({"table": train(resumed, other, 2, 4).detach()}, {"table": train(table, optimizer, 2, 4).detach()})
    optimizer.detach()
    other.detach()


def test_frozen_rows_keep_their_bits_and_do_not_decay() -> None:
    table = draw_table(torch.float32)
    optimizer = optim.RowAdam([table], lr=0.1, weight_decay=0.5)
    train(table, optimizer, 0, 1)
    optimizer.settle()
    before = table.detach().clone()
    optimizer.set_trainable_rows(table, torch.tensor([2, 5]))
    train(table, optimizer, 1, 2)
    state = copy.deepcopy(optimizer.state_dict())
    assert "trainable" not in optimizer.state[table]
    optimizer.set_trainable_rows(table, None)
    optimizer.load_state_dict(state)  # which has the mask
    train(table, optimizer, 2, 4)
    optimizer.set_trainable_rows(table, None)
    optimizer.settle()
    changed = (table.detach() != before).any(1).nonzero().flatten().tolist()
    assert changed == [2, 5]
    with pytest.raises(IndexError, match="rows must be between 0 and 13"):
        optimizer.set_trainable_rows(table, torch.tensor([14]))
    optimizer.detach()


def test_rows_by_tfidf() -> None:
    counts = torch.tensor([8, 8, 2, 0, 1])
    found = optim.tfidf_rows(counts, torch.tensor([9, 0, 0, 0, 9]), num_batches=9, num_rows=2)
    assert found.tolist() == [False, True, True, False, False]
    assert optim.tfidf_rows(counts, torch.zeros(5), num_batches=9, num_rows=9).tolist() == (counts > 0).tolist()
    table = draw_table(torch.float32)
    optimizer = optim.RowSGD([table])
    backward(table, 0)
    assert optimizer.row_counts(table).equal(torch.bincount(draw_bags(0, torch.float32)[0].flatten(), minlength=ROWS))
    optimizer.detach()


def test_stochastic_rounding_keeps_small_steps_on_average() -> None:
    """A step of a sixteenth of a bfloat16's last bit: to nearest none of it would be left."""
    means = {}
    for is_stochastic in (True, False):
        table = nn.Parameter(torch.ones(1, 4096, dtype=torch.bfloat16))
        optimizer = optim.RowSGD([table], lr=2**-11, stochastic_rounding=is_stochastic)
        for _ in range(8):
            weights = torch.ones(1, 1, dtype=torch.bfloat16)
            tg.memory_lookup(table, torch.zeros(1, 1, dtype=torch.int64), weights).sum().backward()
            optimizer.step()
        means[is_stochastic] = float(table.detach().double().mean())
        optimizer.detach()
    assert means[False] == 1.0
    assert means[True] == pytest.approx(1 - 8 * 2**-11, abs=2e-4)


def test_what_is_recorded_and_what_not() -> None:
    table = draw_table(torch.float32)
    optimizer = optim.RowSGD([table])
    indices, weights, grad = draw_bags(0, torch.float32)
    weights.requires_grad_()
    out = tg.memory_lookup(table, indices, weights)
    torch.autograd.grad(out, [weights], grad, retain_graph=True)  # does not ask for the table
    assert float(optimizer.grad_square()) == 0
    out.backward(grad)
    expected = torch.einsum("tw,tkw->tk", grad, table.detach()[indices])
    torch.testing.assert_close(weights.grad, expected, atol=1e-4, rtol=1e-4)
    assert float(optimizer.grad_square()) > 0
    optimizer.zero_grad()
    before = table.detach().clone()
    optimizer.step()
    assert torch.equal(table.detach(), before)
    table.grad = torch.sparse_coo_tensor(
        [[3]], torch.ones(1, WIDTH), table.shape, check_invariants=True
    )  # as DistributedDataParallel reduces
    optimizer.step()
    assert (table.detach() != before).any(1).nonzero().flatten().tolist() == [3] and table.grad is None
    table.grad = torch.ones_like(table)
    with pytest.raises(RuntimeError, match="dense gradient"):
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="params must belong to one optimizer"):
        optim.RowAdam([table])
    with pytest.raises(ValueError, match="params must have 2 dimensions"):
        optim.RowAdam([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=r"betas\[1\] must be at least 0 and below 1"):
        optim.RowAdam([nn.Parameter(torch.ones(3, 2))], betas=(0.9, 1.0))
    optimizer.detach()
    backward(table, 0)
    assert table.grad is not None
    # One that is gone records no more, though nobody detached it.
    left = draw_table(torch.float32)
    optim.RowSGD([left])
    gc.collect()
    assert _memory_update.recorder_of(left) is None
    _memory_update.detach(left)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copy_has_tables_of_its_own(copied: Callable[[Any], Any]) -> None:
    """With what was recorded, frozen rows and states; neither touches the other's table."""
    table = draw_table(torch.float32)
    optimizer = optim.RowAdam([table], lr=0.1)
    backward(table, 0)
    optimizer.step()
    optimizer.set_trainable_rows(table, torch.arange(0, ROWS, 2))
    backward(table, 1)
    optimizer.scale_grad_(0.5)
    other_table, other = copied((table, optimizer))
    start = table.detach().clone()
    optimizer.step()
    assert torch.equal(other_table.detach(), start) and not torch.equal(table.detach(), start)
    other.step()
    assert torch.equal(other_table.detach(), table.detach())
    for each_table, each in ((table, optimizer), (other_table, other)):
        backward(each_table, 2)
        assert each_table.grad is None
        each.step()
    assert torch.equal(other_table.detach(), table.detach())


def test_a_refused_step_changes_nothing() -> None:
    tables = [draw_table(torch.float32), draw_table(torch.float32)]
    optimizer = optim.RowAdam([{"params": [table]} for table in tables], lr=0.1, weight_decay=0.5)
    before = tables[0].detach().clone()
    group = optimizer.param_groups[1]

    def refused(name: str, value: Any, match: str) -> None:
        good, group[name] = group[name], value
        for table in tables:
            backward(table, 0)
        with pytest.raises(ValueError, match=match):
            optimizer.step()
        assert all(torch.equal(table.detach(), before) for table in tables) and not optimizer.state
        group[name] = good

    refused("weight_decay", 10.0, "lr \\* weight_decay must be below 1, got 1.0")
    refused("lr", -1.0, "lr must be at least 0")
    refused("eps", float("nan"), "eps must be")
    optimizer.scale_grad_(float("nan"))
    refused("lr", 0.1, "the factors of scale_grad_ must be finite")
    optimizer.zero_grad()
    backward(tables[0], 0)
    optimizer.step()
    assert not torch.equal(tables[0].detach(), before)


def test_gradients_of_a_scaled_loss() -> None:
    """``GradScaler`` finds none to divide, and says what to call, which steps as an unscaled loss does."""
    table, expected = draw_table(torch.float32), draw_table(torch.float32)
    optimizer, unscaled = optim.RowSGD([table], lr=0.5), optim.RowSGD([expected], lr=0.5)
    before = table.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    indices, weights, grad = draw_bags(0, torch.float32)

    def scaled_backward() -> None:
        scaler.scale((tg.memory_lookup(table, indices, weights) * grad).sum()).backward()

    for unscales in (False, True):
        scaled_backward()
        if unscales:
            scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match=r"GradScaler cannot step .*scale_grad_\(1 / scaler.get_scale\(\)\)"):
            scaler.step(optimizer)
        assert torch.equal(table.detach(), before)
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled_backward()
    backward(expected, 0)
    optimizer.scale_grad_(1 / scaler.get_scale())
    assert bool(optimizer.grad_square().isfinite())
    optimizer.step()
    unscaled.step()
    torch.testing.assert_close(table, expected)
    off = torch.amp.GradScaler("cpu", enabled=False)
    off.scale((tg.memory_lookup(table, indices, weights) * grad).sum()).backward()
    backward(expected, 0)
    off.step(optimizer)
    unscaled.step()
    torch.testing.assert_close(table, expected)


def test_a_gradient_that_is_asked_for_is_refused() -> None:
    table = draw_table(torch.float32)
    optimizer = optim.RowSGD([table])
    indices, weights, grad = draw_bags(0, torch.float32)
    out = tg.memory_lookup(table, indices, weights)
    with pytest.raises(
        RuntimeError, match=r"torch\.autograd\.grad of a table that an optimizer of topgather\.optim has"
    ):
        torch.autograd.grad(out, [table], grad)
    assert float(optimizer.grad_square()) == 0


def test_an_optimizer_that_is_dropped_lets_go_of_its_tables() -> None:
    """Lookups make gradients again, and compile into one graph."""
    table = torch.nn.Parameter(torch.randn(8, 4))
    optimizer = tg.optim.RowAdam([table])
    assert _memory_update.is_recording
    del optimizer
    gc.collect()
    assert _memory_update.recorder_of(table) is None
    assert not _memory_update.is_recording
    torch._dynamo.reset()
    look_up = torch.compile(tg.memory_lookup, fullgraph=True, backend="eager")
    look_up(table, torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3)).sum().backward()
    assert table.grad is not None


def test_compiled_lookups_of_tables_with_and_without_an_optimizer() -> None:
    """One graph each. That of a table without one does not change with another table's; an attached table's gradient is
    sparse, which the step takes: once attached it is compiled anew, and again when it is let go of.
    """
    torch._dynamo.reset()
    tables = [draw_table(torch.float32) for _ in range(4)]
    attached, other, eager, taken = tables
    ours, same = optim.RowAdam([attached]), optim.RowAdam([eager])
    counter = CompileCounterWithBackend("aot_eager")

    def layers(table: Tensor, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        first = tg.memory_lookup(table * 1, indices, weights)  # what is computed from a table is none
        return (
            first.detach()
            + tg.memory_lookup(table, indices, weights)
            + tg.expert_lookup(x, table, table, indices, weights)
        )

    compiled = torch.compile(layers, fullgraph=True, backend=counter)
    indices, weights, grad = draw_bags(0, torch.float32)
    x = torch.linspace(-1, 1, TOKENS * WIDTH).view(TOKENS, WIDTH)
    for table, call in ((attached, compiled), (other, compiled), (eager, layers)):
        for _ in range(2):
            call(table, x, indices, weights).backward(grad)
    assert attached.grad is not None and attached.grad.is_sparse
    assert other.grad is not None and not other.grad.is_sparse and eager.grad is None
    torch.testing.assert_close(attached.grad.to_dense(), other.grad, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(ours.grad_square(), same.grad_square())
    ours.step()
    same.step()
    torch.testing.assert_close(attached.detach(), eager.detach(), atol=1e-6, rtol=0)
    num_graphs = counter.frame_count
    assert num_graphs == 2
    third = optim.RowAdam([taken])
    compiled(other, x, indices, weights).backward(grad)
    assert counter.frame_count == num_graphs
    ours.detach()
    attached.grad = None
    compiled(attached, x, indices, weights).backward(grad)
    assert attached.grad is not None and not attached.grad.is_sparse
    assert counter.frame_count == num_graphs
    for each in (same, third):
        each.detach()
