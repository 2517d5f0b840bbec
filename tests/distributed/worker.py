"""What the ranks of ``test_memory.py`` run: every case on four processes, results left in a folder.

    python -m tests.distributed.worker FOLDER

One start serves all cases: torch is imported once and the ranks are forked from there. Rank r leaves
``FOLDER/rank{r}.pt``, a dict from the name of a case to what it returned, or to the traceback of what it raised; cases
after a failure are not run, since ranks may have lost step. What takes two processes runs on 0, 1 and on 2, 3 alike.
"""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from zlib import crc32

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from tests.memory.helpers import Lookup, LookupCase, make_lookup
from topgather.distributed import (
    MemoryColwise,
    MemoryRowwise,
    RowShardedMemoryPool,
    ShardedMemoryPool,
    count_bytes,
    plan_memory,
)
from topgather.nn import MemoryPool, ProductKeyMemory

WORLD_SIZE = 4
TIMEOUT = timedelta(seconds=60)
MOST_SECONDS = 180
LEARNING_RATE = 0.1


# --- problems, which the tests make again ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A table and the tokens of each rank."""

    token_counts: tuple[int, ...]
    num_keys: int = 3
    width: int = 8
    bag_size: int = 5
    dtype: torch.dtype = torch.float64
    weights_dtype: torch.dtype | None = None
    index_dtype: torch.dtype = torch.int64
    equal_token_counts: bool = False


PROBLEMS = {
    "alone": Problem((3,)),
    "pair": Problem((3, 3)),
    "group": Problem((3, 3, 3, 3)),
    "pair_unequal_tokens": Problem((5, 2)),
    "group_unequal_tokens": Problem((1, 4, 0, 7)),
    "pair_uneven_width": Problem((3, 3), width=7),
    "group_uneven_width": Problem((2, 0, 3, 1), width=10),
    "group_empty_shard": Problem((2, 3, 1, 2), width=5),
    "group_wider_than_the_table": Problem((2, 3, 1, 2), width=2),
    "group_one_row": Problem((3, 3, 3, 3), num_keys=1, bag_size=1),
    "pair_told_equal": Problem((3, 3), equal_token_counts=True),
    "group_told_equal": Problem((4, 4, 4, 4), width=6, equal_token_counts=True),
    "pair_no_tokens": Problem((0, 0)),
    "group_no_entries": Problem((3, 3, 3, 3), bag_size=0),
    "pair_int32_indices": Problem((3, 3), index_dtype=torch.int32),
    "pair_float32": Problem((9, 4), num_keys=8, width=33, bag_size=16, dtype=torch.float32),
    "group_bfloat16": Problem((9, 4, 1, 6), num_keys=8, width=24, bag_size=16, dtype=torch.bfloat16),
    "group_bfloat16_weights_float32": Problem(
        (9, 4, 1, 6), width=24, dtype=torch.bfloat16, weights_dtype=torch.float32
    ),
    "replicas": Problem((2, 3, 1, 4), width=7),
    "training": Problem((3, 2, 4, 1), width=7),
}


def make_problem(name: str) -> Lookup:
    """The tokens of all ranks, one rank's after the other's; the same in every process."""
    problem = PROBLEMS[name]
    size = LookupCase(
        num_rows=problem.num_keys**2,
        width=problem.width,
        num_tokens=sum(problem.token_counts),
        bag_size=problem.bag_size,
    )
    seed, cpu = crc32(name.encode()) % 2**20, torch.device("cpu")
    lookup = make_lookup(
        size, problem.dtype, cpu, seed, weights_dtype=problem.weights_dtype, index_dtype=problem.index_dtype
    )
    for tensor in (lookup.values, lookup.weights):
        tensor.requires_grad_(False)
    return lookup


def tokens_of(name: str, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, weights (a leaf that requires grad) and the result's gradient of one rank's tokens."""
    lookup, counts = make_problem(name), PROBLEMS[name].token_counts
    everything = (lookup.indices, lookup.weights, lookup.grad_out)
    indices, weights, grad_out = (tensor.split(list(counts))[rank].clone() for tensor in everything)
    return indices, weights.requires_grad_(), grad_out


def make_pool(name: str, sparse_grad: bool = False) -> MemoryPool:
    """A pool of a problem's table."""
    problem = PROBLEMS[name]
    pool = MemoryPool(problem.num_keys, problem.width, sparse_grad=sparse_grad, dtype=problem.dtype)
    with torch.no_grad():
        pool.values.copy_(make_problem(name).values)
    return pool


class Model(nn.Module):
    """Two memory layers that share a pool."""

    def __init__(self, pool: MemoryPool) -> None:
        super().__init__()
        self.pool = pool
        sizes = {"num_heads": 2, "top_k": 2, "key_dim": 6, "dtype": pool.values.dtype}
        self.layers = nn.ModuleList(ProductKeyMemory(pool.value_dim, pool, **sizes) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def make_model(seed: int = 1) -> Model:
    """The same in every process."""
    torch.manual_seed(seed)
    model = Model(make_pool("training"))
    nn.init.normal_(model.pool.values)
    return model


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """One that keeps a state of the table's shape, and that sees the scale of gradients in its first step."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=0.5, weight_decay=0.1)


# --- what a rank runs -----------------------------------------------------------------------------------------------

Results = dict[str, Any]
CASES: dict[str, Callable[["Ranks"], Results]] = {}


@dataclass(frozen=True)
class Ranks:
    """The meshes, and a folder that the ranks share."""

    group: DeviceMesh  # all four
    alone: DeviceMesh
    square: DeviceMesh  # replicas x memory
    folder: Path

    @property
    def pair(self) -> DeviceMesh:
        """Two of the four."""
        return self.square["memory"]

    def mesh(self, size: int) -> DeviceMesh:
        return {1: self.alone, 2: self.pair, WORLD_SIZE: self.group}[size]


def case(function: Callable[[Ranks], Results]) -> Callable[[Ranks], Results]:
    CASES[function.__name__] = function
    return function


def full(tensor: Tensor) -> Tensor:
    """A copy of the whole of a DTensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def raised(call: Callable[[], Any]) -> str:
    """The type and message of what a call raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def sum_gradients(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Of parameters that every rank has whole, as a data-parallel sum would."""
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor) and parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=group)


def lookup_case(name: str) -> Callable[[Ranks], Results]:
    """Output, gradients and one step of an optimizer."""

    def run(ranks: Ranks) -> Results:
        problem = PROBLEMS[name]
        mesh = ranks.mesh(len(problem.token_counts))
        pool = make_pool(name)
        style = MemoryColwise(equal_token_counts=problem.equal_token_counts)
        assert parallelize_module(pool, mesh, style) is pool
        indices, weights, grad_out = tokens_of(name, mesh.get_local_rank())
        out = pool(indices, weights)
        out.backward(grad_out)
        local_values = pool.values.to_local()
        results = {
            "out": out.detach(),
            "d_weights": weights.grad,
            "d_values": full(pool.values.grad),
            "local_shape": tuple(local_values.shape),
            "local_is_contiguous": local_values.is_contiguous(),
            "local_bytes": local_values.untyped_storage().nbytes(),
        }
        torch.optim.SGD(pool.parameters(), lr=LEARNING_RATE, momentum=0.5, foreach=True).step()
        results["stepped"] = full(pool.values)
        with torch.no_grad():
            results["out_after_step"] = pool(indices, weights)
        return results

    return run


for problem_name in PROBLEMS:
    CASES[f"lookup_{problem_name}"] = lookup_case(problem_name)


BY_ROWS = ("alone", "pair", "pair_unequal_tokens", "group_unequal_tokens", "group_one_row", "pair_no_tokens")
BY_ROWS += ("group_no_entries", "pair_int32_indices", "pair_float32", "group_bfloat16_weights_float32")


def rows_case(name: str) -> Callable[[Ranks], Results]:
    """Output, gradients and a step of a table sharded by rows, and what both ways send."""

    def run(ranks: Ranks) -> Results:
        problem = PROBLEMS[name]
        mesh = ranks.mesh(len(problem.token_counts))
        indices, weights, grad_out = tokens_of(name, mesh.get_local_rank())
        sent = {}
        for style in (MemoryColwise(), MemoryRowwise()):
            weights.grad = None
            pool = parallelize_module(make_pool(name), mesh, style)
            with count_bytes() as counts:
                out = pool(indices, weights)
                out.backward(grad_out)
            sent[type(style).__name__] = sum(counts.values())
        assert isinstance(pool, RowShardedMemoryPool)
        results = {
            "out": out.detach(),
            "d_weights": weights.grad,
            "d_values": full(pool.values.grad),
            "local_shape": tuple(pool.values.to_local().shape),
            "sent": sent,
        }
        torch.optim.SGD(pool.parameters(), lr=LEARNING_RATE).step()
        results["stepped"] = full(pool.values)
        place = (*pool.values.shape, mesh.size(), mesh.get_local_rank())
        results["plan"] = plan_memory(indices, *place, problem.dtype, weights.dtype)
        return results

    return run


for problem_name in BY_ROWS:
    CASES[f"rows_{problem_name}"] = rows_case(problem_name)


@case
def rows_refused(ranks: Ranks) -> Results:
    """What one rank does wrong raises on all; tables sharded the other way."""
    pool = parallelize_module(make_pool("pair"), ranks.pair, MemoryRowwise())
    is_first = ranks.pair.get_local_rank() == 0
    indices, ones = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.float64)

    def without_grad() -> None:
        with torch.set_grad_enabled(is_first):
            pool(indices, ones)

    colwise = parallelize_module(make_pool("pair"), ranks.pair, MemoryColwise())
    return {
        "too large": raised(lambda: pool(indices + 9 * is_first, ones)),
        "negative": raised(lambda: pool(indices - int(is_first), ones)),
        "gradient": raised(without_grad),
        "nothing wrong": raised(lambda: pool(indices, ones)),
        "other way": raised(lambda: parallelize_module(colwise, ranks.pair, MemoryRowwise())),
        "same again": raised(lambda: parallelize_module(pool, ranks.pair, MemoryRowwise())),
    }


@case
def frozen_table(ranks: Ranks) -> Results:
    """Gradients of weights alone."""
    pool = make_pool("pair").requires_grad_(False)
    parallelize_module(pool, ranks.pair, MemoryColwise())
    indices, weights, grad_out = tokens_of("pair", ranks.pair.get_local_rank())
    pool(indices, weights).backward(grad_out)
    return {"d_weights": weights.grad, "requires_grad": pool.values.requires_grad}


@case
def constant_weights(ranks: Ranks) -> Results:
    """Gradients of the table alone."""
    pool = make_pool("pair")
    parallelize_module(pool, ranks.pair, MemoryColwise())
    indices, weights, grad_out = tokens_of("pair", ranks.pair.get_local_rank())
    pool(indices, weights.detach()).backward(grad_out)
    return {"d_values": full(pool.values.grad)}


@case
def replicas(ranks: Ranks) -> Results:
    """2 x 2: the pool's rows over the replicas, its columns over the memory axis; looked up twice in a step."""
    pool = make_pool("replicas")
    parallelize_module(pool, ranks.pair, MemoryColwise())
    fully_shard(pool, mesh=ranks.square["replicas"])
    assert isinstance(pool, ShardedMemoryPool)
    optimizer = torch.optim.SGD(pool.parameters(), lr=LEARNING_RATE)
    indices, weights, grad_out = tokens_of("replicas", dist.get_rank())
    first = pool(indices, weights)
    second = pool(indices, first.sum(dim=1, keepdim=True) * weights)
    second.backward(grad_out)
    results = {
        "out": second.detach(),
        "d_weights": weights.grad,
        "d_values": full(pool.values.grad),
        "placements": str(pool.values.placements),
        "local_shape": tuple(pool.values.to_local().shape),
    }
    optimizer.step()
    results["stepped"] = full(pool.values)
    return results


@case
def replicas_as_mean(ranks: Ranks) -> Results:
    """The line that the documentation gives, for a table whose gradient is the mean over all ranks."""
    pool, group_size = make_pool("replicas"), ranks.pair.size()
    parallelize_module(pool, ranks.pair, MemoryColwise())
    fully_shard(pool, mesh=ranks.square["replicas"])
    indices, weights, grad_out = tokens_of("replicas", dist.get_rank())
    pool(indices, weights).backward(grad_out)
    pool.values.grad.div_(group_size)
    return {"d_values": full(pool.values.grad)}


@case
def replicas_of_a_model(ranks: Ranks) -> Results:
    """2 x 2: all else over all ranks, each of which has the mean of its own tokens as its loss."""
    model, group_size = make_model(), ranks.pair.size()
    parallelize_module(model, ranks.pair, PLAN)
    fully_shard(model.pool, mesh=ranks.square["replicas"])
    fully_shard(model, mesh=ranks.group, ignored_params={model.pool.values})
    _, _, x = tokens_of("training", dist.get_rank())
    model(x).square().sum(dim=1).mean().backward()
    model.pool.values.grad.div_(group_size)
    return {name: full(parameter.grad) for name, parameter in model.named_parameters()}


PLAN = {"layers.*": MemoryColwise()}


def train(model: Model, optimizer: torch.optim.Optimizer, steps: range, x: Tensor, group: Any = None) -> None:
    """Steps whose loss is a sum over all ranks' tokens."""
    for step in steps:
        optimizer.zero_grad()
        model(x + step).square().sum().backward()
        if group is not None:
            sum_gradients(model, group)
        optimizer.step()


def train_sharded(model: Model, optimizer: torch.optim.Optimizer, mesh: DeviceMesh, steps: range) -> None:
    """Ranks of four have the tokens of one each, and ranks of two those of two."""
    shares = [tokens_of("training", rank)[2] for rank in range(WORLD_SIZE)]
    share = WORLD_SIZE // mesh.size()
    first = mesh.get_local_rank() * share
    train(model, optimizer, steps, torch.cat(shares[first : first + share]), mesh.get_group())


def state_of(model: Model, optimizer: torch.optim.Optimizer) -> Results:
    parameters = {name: full(parameter) for name, parameter in model.named_parameters()}
    return {**parameters, "exp_avg": full(optimizer.state[model.pool.values]["exp_avg"])}


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, group: Any = None) -> None:
    """On the ranks of a group, or of all, or in a process alone."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    checkpoint.load(state, checkpoint_id=folder, process_group=group)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


@case
def training(ranks: Ranks) -> Results:
    """Three steps of a model on four ranks, with a checkpoint after two."""
    model = make_model()
    parallelize_module(model, ranks.group, PLAN)
    assert isinstance(model.pool, ShardedMemoryPool)
    assert all(layer.pool is model.pool for layer in model.layers)
    optimizer = make_optimizer(model)
    train_sharded(model, optimizer, ranks.group, range(2))
    save(ranks.folder / "of_four", model, optimizer)
    saved = state_of(model, optimizer)
    train_sharded(model, optimizer, ranks.group, range(2, 3))
    return {"saved": saved, "end": state_of(model, optimizer)}


@case
def resumed_by_two(ranks: Ranks) -> Results:
    """The checkpoint of four ranks, taken up by two."""
    model = make_model(seed=2)
    parallelize_module(model, ranks.pair, PLAN)
    optimizer = make_optimizer(model)
    load(ranks.folder / "of_four", model, optimizer, ranks.pair.get_group())
    loaded = state_of(model, optimizer)
    train_sharded(model, optimizer, ranks.pair, range(2, 3))
    return {"loaded": loaded, "end": state_of(model, optimizer)}


@case
def resumed_by_replicas(ranks: Ranks) -> Results:
    """The same, taken up by two replicas of two, whose own checkpoint four ranks take up."""
    model = make_model(seed=3)
    parallelize_module(model, ranks.pair, PLAN)
    fully_shard(model.pool, mesh=ranks.square["replicas"])
    optimizer = make_optimizer(model)
    load(ranks.folder / "of_four", model, optimizer)
    save(ranks.folder / "of_replicas", model, optimizer)
    again = make_model(seed=4)
    parallelize_module(again, ranks.group, PLAN)
    optimizer_again = make_optimizer(again)
    load(ranks.folder / "of_replicas", again, optimizer_again)
    return {"loaded": state_of(model, optimizer), "again": state_of(again, optimizer_again)}


@case
def resumed_by_rows(ranks: Ranks) -> Results:
    """The checkpoint of four ranks with columns, taken up by two with rows, whose own four with columns take up."""
    model = make_model(seed=6)
    parallelize_module(model, ranks.pair, {"layers.*": MemoryRowwise()})
    optimizer = make_optimizer(model)
    load(ranks.folder / "of_four", model, optimizer, ranks.pair.get_group())
    loaded = state_of(model, optimizer)
    # One group of the two writes.
    name = f"of_rows{ranks.square['replicas'].get_local_rank()}"
    model_state, optimizer_state = get_state_dict(model, optimizer)
    group = ranks.pair.get_group()
    state = {"model": model_state, "optimizer": optimizer_state}
    checkpoint.save(state, checkpoint_id=ranks.folder / name, process_group=group)
    train_sharded(model, optimizer, ranks.pair, range(2, 3))
    again = make_model(seed=7)
    parallelize_module(again, ranks.group, PLAN)
    optimizer_again = make_optimizer(again)
    dist.barrier()
    load(ranks.folder / "of_rows0", again, optimizer_again)
    return {"loaded": loaded, "end": state_of(model, optimizer), "again": state_of(again, optimizer_again)}


@case
def meta_device(ranks: Ranks) -> Results:
    """A table that never is in one place."""
    pool = MemoryPool(4, 6, device="meta")
    parallelize_module(pool, ranks.group, MemoryColwise())
    pool.to_empty(device="cpu")
    torch.manual_seed(dist.get_rank())
    pool.reset_parameters()
    out = pool(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    return {"local_shape": tuple(pool.values.to_local().shape), "out": out.detach(), "row": full(pool.values)[:1]}


@case
def compiled(ranks: Ranks) -> Results:
    """A compiled model runs the lookup eagerly."""
    eager = make_model()
    parallelize_module(eager, ranks.group, PLAN)
    _, _, x = tokens_of("training", dist.get_rank())
    expected = eager(x).detach()
    return {"expected": expected, "out": torch.compile(eager, backend="eager")(x).detach()}


@case
def autocast(ranks: Ranks) -> Results:
    """Weights of autocast's dtype, a table of its own."""
    pool = make_pool("pair_float32")
    parallelize_module(pool, ranks.pair, MemoryColwise())
    indices, weights, grad_out = tokens_of("pair_float32", ranks.pair.get_local_rank())
    weights = weights.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = pool(indices, weights)
    out.backward(grad_out)
    return {"out": out.detach(), "d_weights": weights.grad}


@case
def refusals(ranks: Ranks) -> Results:
    """Everything that ``parallelize_module`` must not take."""
    sharded = parallelize_module(make_pool("pair"), ranks.pair, MemoryColwise())
    replicated = fully_shard(make_pool("pair"), mesh=ranks.square["replicas"])
    both = parallelize_module(make_pool("pair"), ranks.pair, MemoryColwise())
    fully_shard(both, mesh=ranks.square["replicas"])
    unwrapped = make_pool("pair")
    unwrapped.__class__ = ShardedMemoryPool
    entries = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.float64)

    class Derived(MemoryPool):
        pass

    def shard(module: nn.Module, mesh: DeviceMesh = ranks.pair) -> str:
        return raised(lambda: parallelize_module(module, mesh, MemoryColwise()))

    return {
        "not a pool": shard(nn.Linear(2, 2)),
        "square mesh": shard(make_pool("pair"), ranks.square),
        "other mesh": shard(sharded, ranks.group),
        "after fully_shard": shard(replicated),
        "derived class": shard(Derived(2, 2)),
        "sparse gradient": shard(make_pool("pair", sparse_grad=True)),
        "means": shard(MemoryPool(4, 8, mode="mean")),
        "padding": shard(MemoryPool(4, 8, padding_idx=3)),
        "flag": raised(lambda: MemoryColwise(equal_token_counts=1)),
        "no DTensor": raised(lambda: unwrapped(*entries)),
        "rows not gathered": raised(lambda: ShardedMemoryPool.forward(both, *entries)),
        "same mesh again": shard(sharded),
    }


@case
def calls_that_differ(ranks: Ranks) -> Results:
    """What one rank does wrong raises on all of the group, and leaves it in step."""
    pool, rank = make_pool("group"), dist.get_rank()
    parallelize_module(pool, ranks.group, MemoryColwise())
    is_odd = rank == 2

    def look_up(index: int = 0, num_entries: int = 1, dtype: torch.dtype = torch.float64, grad: bool = False) -> None:
        weights = torch.ones(2, num_entries, dtype=dtype, requires_grad=grad)
        pool(torch.full((2, num_entries), index, dtype=torch.int64), weights)

    return {
        "entries": raised(lambda: look_up(num_entries=2 if is_odd else 1)),
        "gradient": raised(lambda: look_up(grad=is_odd)),
        "too large": raised(lambda: look_up(9 if is_odd else 0)),
        "negative": raised(lambda: look_up(-1 if is_odd else 0)),
        "beyond 32 bits": raised(lambda: look_up(2**32 if is_odd else 0)),
        "nothing wrong": raised(look_up),
        "weights": raised(lambda: look_up(dtype=torch.float32)),
        "double backward": raised(lambda: double_backward(pool)),
    }


def double_backward(pool: MemoryPool) -> None:
    weights = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    out = pool(torch.zeros(2, 1, dtype=torch.int64), weights).square().sum()
    (grad,) = torch.autograd.grad(out, weights, create_graph=True)
    grad.sum().backward()


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=TIMEOUT)
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "memory"))
    alone = init_device_mesh("cpu", (WORLD_SIZE, 1), mesh_dim_names=("others", "alone"))["alone"]
    ranks = Ranks(init_device_mesh("cpu", (WORLD_SIZE,)), alone, square, folder)
    results: dict[str, Any] = {}
    for name, function in CASES.items():
        torch.manual_seed(0)
        try:
            results[name] = function(ranks)
        except BaseException:
            results[name] = traceback.format_exc()
            break
    torch.save(results, folder / f"rank{rank}.pt")
    # A rank that failed leaves without the others, who may wait for it.
    os._exit(0)


def main(folder: Path) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run_rank, args=(rank, folder)) for rank in range(WORLD_SIZE)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + MOST_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        process.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
