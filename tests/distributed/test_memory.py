"""Sharded memory pools on two and four processes (gloo, CPU), against one process that has all tokens.

All processes are started once, by ``worker.py``; each test looks at what one of its cases left.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.common.tolerances import UNIT_ROUNDOFF
from tests.distributed.ranks import ROOT, results_in, run_once
from tests.distributed.worker import (
    BY_ROWS,
    CASES,
    LEARNING_RATE,
    PROBLEMS,
    WORLD_SIZE,
    Model,
    Problem,
    load,
    make_model,
    make_optimizer,
    make_problem,
    state_of,
    tokens_of,
    train,
)
from tests.memory.helpers import assert_lookup_close
from topgather import reference
from topgather.distributed import MemoryColwise, MemoryRowwise, plan_memory

EXAMPLE = ROOT / "examples" / "sharded_memory.py"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks left their results; pytest's workers, if there are several, share one run."""
    return run_once(tmp_path_factory, "memory_distributed", ["-m", "tests.distributed.worker"])


@pytest.fixture(scope="session")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """Each rank's results, by case."""
    return results_in(folder, WORLD_SIZE)


def results_of(name: str, ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A case's results by rank."""
    for rank, results in enumerate(ranks):
        assert name in results, f"rank {rank} did not come to {name}: {list(results.values())[-1]}"
        assert not isinstance(results[name], str), f"rank {rank}: {results[name]}"
    return [results[name] for results in ranks]


def groups_of(name: str, problem: str, ranks: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The same by groups: those of two, or of one, did the same."""
    results, size = results_of(name, ranks), len(PROBLEMS[problem].token_counts)
    return [results[first : first + size] for first in range(0, WORLD_SIZE, size)]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_every_case_is_run(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert list(results) == list(CASES)


# --- one lookup -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBLEMS)
def test_outputs_and_gradients_equal_one_process(name: str, ranks: list[dict[str, Any]]) -> None:
    """Exactly in scale: the loss is the sum of the ranks' losses."""
    lookup = make_problem(name)
    for group in groups_of(f"lookup_{name}", name, ranks):
        result = {key: torch.cat([rank[key] for rank in group]) for key in ("out", "d_weights")}
        assert_lookup_close({**result, "d_values": group[0]["d_values"]}, lookup)
        for rank in group:
            assert torch.equal(rank["d_values"], group[0]["d_values"])


def test_gradients_of_weights_are_rounded_once(ranks: list[dict[str, Any]]) -> None:
    """Parts of a dot product are added before they are rounded to bfloat16: nearly all are the exact one's rounding."""
    lookup = make_problem("group_bfloat16")
    exact = (lookup.values.double()[lookup.indices] * lookup.grad_out.double().unsqueeze(1)).sum(dim=2)
    d_weights = torch.cat([rank["d_weights"] for rank in results_of("lookup_group_bfloat16", ranks)])
    assert (d_weights == exact.bfloat16()).double().mean() > 0.95


@pytest.mark.parametrize("name", PROBLEMS)
def test_table_is_split_as_torch_chunk_does(name: str, ranks: list[dict[str, Any]]) -> None:
    """And a rank holds on to its own shard only."""
    values = make_problem(name).values
    for group in groups_of(f"lookup_{name}", name, ranks):
        widths = [chunk.size(1) for chunk in values.chunk(len(group), dim=1)]
        widths += [0] * (len(group) - len(widths))
        assert [rank["local_shape"] for rank in group] == [(values.size(0), width) for width in widths]
        for rank, width in zip(group, widths, strict=True):
            assert rank["local_is_contiguous"]
            assert rank["local_bytes"] == values.size(0) * width * values.element_size()


@pytest.mark.parametrize("name", PROBLEMS)
def test_optimizer_step(name: str, ranks: list[dict[str, Any]]) -> None:
    """The table after a step is that of one process, and the next lookup reads it."""
    for group in groups_of(f"lookup_{name}", name, ranks):
        lookup = make_problem(name)
        values, change = lookup.values.double(), LEARNING_RATE * group[0]["d_values"].double()
        rounding = 4 * UNIT_ROUNDOFF[lookup.values.dtype] * (values.abs() + change.abs())
        for rank in group:
            assert ((rank["stepped"].double() - (values - change)).abs() <= rounding).all()
        lookup.values = group[0]["stepped"]
        assert_lookup_close({"out": torch.cat([rank["out_after_step"] for rank in group])}, lookup)


@pytest.mark.parametrize("name", BY_ROWS)
def test_tables_by_rows_equal_one_process(name: str, ranks: list[dict[str, Any]]) -> None:
    """Outputs, gradients, a step; and each way sends what its plan counts."""
    lookup = make_problem(name)
    for group in groups_of(f"rows_{name}", name, ranks):
        result = {key: torch.cat([rank[key] for rank in group]) for key in ("out", "d_weights")}
        assert_lookup_close({**result, "d_values": group[0]["d_values"]}, lookup)
        heights = [chunk.size(0) for chunk in lookup.values.chunk(len(group))]
        heights += [0] * (len(group) - len(heights))
        width = lookup.values.size(1)
        assert [rank["local_shape"] for rank in group] == [(height, width) for height in heights]
        for rank in group:
            change = LEARNING_RATE * group[0]["d_values"].double()
            rounding = 4 * UNIT_ROUNDOFF[lookup.values.dtype] * (lookup.values.double().abs() + change.abs())
            assert ((rank["stepped"].double() - (lookup.values.double() - change)).abs() <= rounding).all()


@pytest.mark.parametrize("name", ["pair", "pair_float32", "group_one_row"])
def test_bytes_of_both_ways_are_those_of_the_plan(name: str, ranks: list[dict[str, Any]]) -> None:
    """All told: what others ask a rank for is not what it asks. Agreeing takes 4 numbers by columns, 2 + G by rows."""
    for group in groups_of(f"rows_{name}", name, ranks):
        size = len(group)
        agreeing = {"MemoryColwise": 4 * 8 * (size - 1) * size, "MemoryRowwise": (2 + size) * 8 * (size - 1) * size}
        sent = {style: sum(rank["sent"][style] for rank in group) - agreeing[style] for style in agreeing}
        plans = [rank["plan"] for rank in group]
        counts = PROBLEMS[name].token_counts
        if len(set(counts)) == 1:  # else some ranks' plans take others' tokens for as many as theirs
            assert sent["MemoryColwise"] == sum(plan.colwise_bytes for plan in plans)
        assert sent["MemoryRowwise"] == sum(plan.rowwise_bytes for plan in plans)
        for plan in plans:
            assert plan.style is (MemoryRowwise if plan.rowwise_bytes < plan.colwise_bytes else MemoryColwise)


@pytest.mark.parametrize(
    ("what", "message"),
    {
        "too large": "IndexError: ",
        "negative": "IndexError: ",
        "gradient": "ValueError: all ranks of the group must have the same need of a gradient for values",
        "nothing wrong": "nothing",
        "other way": "ValueError: the pool's values are sharded already",
        "same again": "nothing",
    }.items(),
)
def test_what_is_refused_by_rows(what: str, message: str, ranks: list[dict[str, Any]]) -> None:
    for result in results_of("rows_refused", ranks):
        assert result[what].startswith(message)


def test_checkpoints_between_columns_and_rows(ranks: list[dict[str, Any]]) -> None:
    trained = results_of("training", ranks)[0]
    for result in results_of("resumed_by_rows", ranks):
        for name, tensor in trained["saved"].items():
            assert torch.equal(result["loaded"][name], tensor)
            assert torch.equal(result["again"][name], tensor)
        assert_states_close(result["end"], trained["end"])


def test_the_plan_takes_rows_where_tokens_share_them() -> None:
    few, many = torch.zeros(100, 8, dtype=torch.int64), torch.arange(800).view(100, 8)
    assert plan_memory(few, 900, 64, 4, 1).style is MemoryRowwise
    assert plan_memory(many, 900, 64, 4, 1).style is MemoryColwise
    assert plan_memory(many, 900, 4, 64, 1).style is MemoryRowwise
    with pytest.raises(ValueError, match="rank"):
        plan_memory(few, 900, 64, 4, 4)


def test_frozen_table(ranks: list[dict[str, Any]]) -> None:
    for group in groups_of("frozen_table", "pair", ranks):
        assert_lookup_close({"d_weights": torch.cat([rank["d_weights"] for rank in group])}, make_problem("pair"))
        assert not any(rank["requires_grad"] for rank in group)


def test_constant_weights(ranks: list[dict[str, Any]]) -> None:
    for result in results_of("constant_weights", ranks):
        assert_lookup_close(result, make_problem("pair"))


def test_problems_are_what_their_names_say() -> None:
    def widths(problem: Problem) -> list[int]:
        return [chunk.numel() for chunk in torch.arange(problem.width).chunk(len(problem.token_counts))]

    assert len(set(PROBLEMS["pair_uneven_width"].token_counts)) == 1
    for name in ("pair_unequal_tokens", "group_unequal_tokens"):
        assert len(set(PROBLEMS[name].token_counts)) > 1
    for name in ("pair_uneven_width", "group_uneven_width", "replicas", "training"):
        assert len(set(widths(PROBLEMS[name]))) > 1
    for name in ("group_empty_shard", "group_wider_than_the_table"):
        assert len(widths(PROBLEMS[name])) < len(PROBLEMS[name].token_counts)


# --- 2 x 2: replicas of a sharded table -------------------------------------------------------------------------------


def lookup_twice(lookup: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Result and gradients of the case ``replicas``, in one process."""
    values, weights = lookup.values.clone().requires_grad_(), lookup.weights.clone().requires_grad_()
    first = reference.memory_lookup(values, lookup.indices, weights)
    second = reference.memory_lookup(values, lookup.indices, first.sum(dim=1, keepdim=True) * weights)
    d_values, d_weights = torch.autograd.grad(second, (values, weights), lookup.grad_out)
    return second.detach(), d_values, d_weights, values.detach()


def test_replicas(ranks: list[dict[str, Any]]) -> None:
    """With FSDP2 over the replicas the table's gradient is the sum over all ranks, by the number of replicas."""
    results = results_of("replicas", ranks)
    out, d_values, d_weights, values = lookup_twice(make_problem("replicas"))
    assert_close(torch.cat([rank["out"] for rank in results]), out)
    assert_close(torch.cat([rank["d_weights"] for rank in results]), d_weights)
    for rank in results:
        assert_close(rank["d_values"], d_values / 2)
        assert_close(rank["stepped"], values - LEARNING_RATE * d_values / 2)
        assert rank["placements"] == "(Shard(dim=0), Shard(dim=1))"
    assert [rank["local_shape"] for rank in results] == [(5, 4), (5, 3), (4, 4), (4, 3)]


def test_replicas_as_mean(ranks: list[dict[str, Any]]) -> None:
    """The documented line makes it the mean over all ranks."""
    lookup = make_problem("replicas")
    lookup.grad_out = lookup.grad_out / WORLD_SIZE
    for rank in results_of("replicas_as_mean", ranks):
        assert_lookup_close(rank, lookup)


def test_replicas_of_a_model(ranks: list[dict[str, Any]]) -> None:
    """Then all parameters of a model have the gradient of the mean over all ranks."""
    model = make_model()
    losses = [model(tokens_of("training", rank)[2]).square().sum(dim=1).mean() for rank in range(WORLD_SIZE)]
    torch.stack(losses).mean().backward()
    for result in results_of("replicas_of_a_model", ranks):
        for name, parameter in model.named_parameters():
            assert_close(result[name], parameter.grad)


# --- training and checkpoints -----------------------------------------------------------------------------------------


def train_alone(steps: range) -> tuple[Model, torch.optim.Optimizer]:
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, steps, make_problem("training").grad_out)
    return model, optimizer


def assert_states_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert_close(actual[name], tensor)


def test_training_equals_one_process(ranks: list[dict[str, Any]]) -> None:
    """A model of two layers that share the pool: all parameters and the state of AdamW, after two steps and three."""
    for steps, moment in ((range(2), "saved"), (range(3), "end")):
        expected = state_of(*train_alone(steps))
        for result in results_of("training", ranks):
            assert_states_close(result[moment], expected)


def test_checkpoint_of_four_resumed_by_two(ranks: list[dict[str, Any]]) -> None:
    trained = results_of("training", ranks)[0]
    for result in results_of("resumed_by_two", ranks):
        for name, tensor in trained["saved"].items():
            assert torch.equal(result["loaded"][name], tensor)
        assert_states_close(result["end"], trained["end"])


def test_checkpoint_of_four_resumed_by_two_replicas_of_two_and_back(ranks: list[dict[str, Any]]) -> None:
    saved = results_of("training", ranks)[0]["saved"]
    for result in results_of("resumed_by_replicas", ranks):
        for name, tensor in saved.items():
            assert torch.equal(result["loaded"][name], tensor)
            assert torch.equal(result["again"][name], tensor)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("checkpoint", ["of_four", "of_replicas"])
def test_checkpoint_resumed_by_one(checkpoint: str, folder: Path, ranks: list[dict[str, Any]]) -> None:
    """A process without a group, and a pool that is not sharded."""
    trained = results_of("training", ranks)[0]
    model = make_model(seed=5)
    optimizer = make_optimizer(model)
    load(folder / checkpoint, model, optimizer)
    for name, tensor in state_of(model, optimizer).items():
        assert torch.equal(tensor, trained["saved"][name])
    train(model, optimizer, range(2, 3), make_problem("training").grad_out)
    assert_states_close(state_of(model, optimizer), trained["end"])


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_meta_device(ranks: list[dict[str, Any]]) -> None:
    results = results_of("meta_device", ranks)
    assert [rank["local_shape"] for rank in results] == [(16, 2), (16, 2), (16, 2), (16, 0)]
    for rank in results:
        assert torch.equal(rank["out"], rank["row"])
        assert rank["row"].abs().min() > 0
        assert rank["row"].unique().numel() == 6


def test_compiled(ranks: list[dict[str, Any]]) -> None:
    for rank in results_of("compiled", ranks):
        assert_close(rank["out"], rank["expected"])


def test_autocast(ranks: list[dict[str, Any]]) -> None:
    """As without a group: the table keeps its dtype."""
    lookup = make_problem("pair_float32")
    lookup.weights = lookup.weights.bfloat16()
    for group in groups_of("autocast", "pair_float32", ranks):
        assert_lookup_close({key: torch.cat([rank[key] for rank in group]) for key in ("out", "d_weights")}, lookup)


@pytest.mark.parametrize(
    ("what", "message"),
    {
        "not a pool": "TypeError: MemoryColwise shards a topgather.nn.MemoryPool or a layer with one as its pool",
        "square mesh": "ValueError: device_mesh must have one dimension",
        "other mesh": "ValueError: the pool's values are sharded already",
        "after fully_shard": "ValueError: the pool's values are sharded already",
        "derived class": "TypeError: the pool must be a MemoryPool itself, not of a derived class, got Derived",
        "sparse gradient": "ValueError: the pool must have sparse_grad=False",
        "means": "ValueError: the pool must have mode='sum', padding_idx=None",
        "padding": "ValueError: the pool must have mode='sum', padding_idx=None",
        "flag": "TypeError: equal_token_counts must be a bool, got 1",
        "no DTensor": "TypeError: values of a ShardedMemoryPool must be a DTensor, got Parameter",
        "rows not gathered": "ValueError: values must be sharded by columns alone",
        "same mesh again": "nothing",
    }.items(),
)
def test_refusals(what: str, message: str, ranks: list[dict[str, Any]]) -> None:
    for result in results_of("refusals", ranks):
        assert result[what].startswith(message)


@pytest.mark.parametrize(
    ("what", "message"),
    {
        "entries": "ValueError: all ranks of the group must have the same entries per token, got [1, 1, 2, 1] by rank",
        "gradient": "ValueError: all ranks of the group must have the same need of a gradient for weights",
        "too large": "IndexError: indices must be between 0 and 8",
        "negative": "IndexError: indices must be between 0 and 8",
        "beyond 32 bits": "IndexError: indices must be between 0 and 8",
        "nothing wrong": "nothing",
        "weights": "TypeError: weights must have the dtype of values",
        "double backward": "RuntimeError: trying to differentiate twice",
    }.items(),
)
def test_what_one_rank_does_wrong_raises_on_all(what: str, message: str, ranks: list[dict[str, Any]]) -> None:
    for result in results_of("calls_that_differ", ranks):
        assert result[what].startswith(message)


def test_example() -> None:
    """Two processes train as one does; the example says so with its exit status."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, EXAMPLE, "--steps", "4"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DIFFERENT" not in done.stdout
