"""What two processes of ``test_sparse_and_clipping.py`` run; rank r leaves ``FOLDER/rank{r}.pt``.

python sparse_worker.py FOLDER
"""

import copy
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import topgather as tg
from topgather.distributed import MemoryColwise, MemoryRowwise, clip_grad_norm_

WORLD_SIZE, DIM = 2, 8
NORMS = {"2": (2.0, 0.05), "inf": (float("inf"), 0.01), "1.5": (1.5, 1e6)}


class Pool(nn.Module):
    """A pool alone, beside a dense layer."""

    def __init__(self, sparse_grad: bool) -> None:
        super().__init__()
        self.pool = tg.nn.MemoryPool(4, DIM, sparse_grad=sparse_grad)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        indices = (x[:, :3] * 100).long().abs() % 16
        return self.proj(self.pool(indices, x[:, 3:6]))


MODELS = {
    "pool": Pool,
    "memory": lambda sparse_grad: tg.nn.ProductKeyMemory(DIM, tg.nn.MemoryPool(4, 8, sparse_grad), 2, 4, 8),
    "peer": lambda sparse_grad: nn.Sequential(tg.nn.PeerMemory(DIM, 4, 2, 4, 8, sparse_grad=sparse_grad)),
    "shared": lambda sparse_grad: shared(sparse_grad),
}


def shared(sparse_grad: bool) -> nn.Module:
    pool = tg.nn.MemoryPool(4, 8, sparse_grad)
    return nn.Sequential(*(tg.nn.ProductKeyMemory(DIM, pool, 2, 4, 8) for _ in range(2)))


def make(name: str, sparse_grad: bool) -> nn.Module:
    """The same in every process."""
    torch.manual_seed(0)
    return MODELS[name](sparse_grad).double()


def tokens(rank: int) -> Tensor:
    return torch.randn(6, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(10 + rank))


def backward(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).square().sum(dim=1).mean().backward()


def full(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().to_dense().clone()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(parameter.grad) for name, parameter in model.named_parameters()}


def data_parallel(name: str, sparse_grad: bool, rank: int) -> dict[str, Any]:
    model = make(name, sparse_grad)
    wrapped = DistributedDataParallel(model)
    results: dict[str, Any] = {}
    for step in range(2):
        backward(wrapped, tokens(rank) + step)
        results[f"grad{step}"] = gradients(model)
    results["sparse"] = [n for n, parameter in model.named_parameters() if parameter.grad.is_sparse]
    norm = clip_grad_norm_(model.parameters(), 0.05)
    return {**results, "norm": norm, "clipped": gradients(model)}


def sharded(name: str, mesh: Any) -> dict[str, Any]:
    """A sharded table beside parameters that every rank has whole, whose gradients are summed as data parallelism."""
    norm_type, max_norm = NORMS[name]
    model = make("shared", False)
    parallelize_module(model, mesh, {"*": MemoryColwise()})
    backward(model, tokens(mesh.get_local_rank()))
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            dist.all_reduce(parameter.grad)
    results = {"grad": gradients(model), "norm": clip_grad_norm_(model.parameters(), max_norm, norm_type)}
    groups = tg.nn.memory_parameter_groups(model, lr=0.1)
    torch.optim.AdamW(groups, foreach=True).step()
    # What the documentation says that torch cannot.
    for what, call in {
        "torch_clips": lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        "foreach_mixed": lambda: torch.optim.AdamW(model.parameters(), foreach=True).step(),
    }.items():
        try:
            call()
            results[what] = "works"
        except RuntimeError as error:
            results[what] = str(error)
    return {**results, "clipped": gradients(model)}


OPTIMIZERS: dict[str, Any] = {
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "SGD foreach": (torch.optim.SGD, {"lr": 0.1, "foreach": True}),
}


def all_dtensors(name: str, mesh: Any) -> dict[str, Any]:
    """``fully_shard`` over the table's own mesh makes every parameter a DTensor of it: torch's own utilities work."""
    norm_type, max_norm = NORMS[name]
    results: dict[str, Any] = {}
    for kind, (optimizer, options) in OPTIMIZERS.items():
        model = make("shared", False)
        parallelize_module(model, mesh, {"*": MemoryColwise()})
        table = model[0].pool.values
        fully_shard(model, mesh=mesh, ignored_params={table})
        made = optimizer(model.parameters(), **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        scaler.scale(model(tokens(mesh.get_local_rank())).square().sum(dim=1).mean()).backward()
        scaler.unscale_(made)
        table.grad.div_(WORLD_SIZE)
        results[kind] = {"grad": gradients(model)}
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm, norm_type)
        results[kind] |= {"norm": full(norm), "clipped": gradients(model)}
        scaler.step(made)
        scaler.update()
        results[kind]["after"] = {name: full(parameter) for name, parameter in model.named_parameters()}
    return results


def train_rows(model: nn.Module, table: nn.Parameter, scale: float, ranks: list[int]) -> tuple[dict[str, Any], Any]:
    """Two steps of a row optimizer on the mean over all ranks' tokens, clipped, and what is left."""
    optimizer = tg.optim.RowAdam([table], lr=0.1, weight_decay=0.1)
    norms = []
    for step in range(2):
        model.zero_grad()
        for rank in ranks:
            (model(tokens(rank) + step).square().sum(dim=1).mean() / len(ranks)).backward()
        optimizer.scale_grad_(scale)
        norms.append(tg.optim.clip_grad_norm_(model.parameters(), 0.05, optimizer))
        optimizer.step()
    assert table.grad is None
    state = {name: value for name, value in optimizer.state[table].items() if isinstance(value, Tensor)}
    optimizer.settle()
    results = {"norms": norms, "table": full(table), **{name: full(value) for name, value in state.items()}}
    return results, optimizer


def row_optimizer(mesh: Any) -> dict[str, Any]:
    """A row optimizer on a table sharded by columns, beside parameters that ``fully_shard`` cut."""
    model = make("shared", False)
    parallelize_module(model, mesh, {"*": MemoryColwise()})
    table = model[0].pool.values
    fully_shard(model, mesh=mesh, ignored_params={table})
    results, optimizer = train_rows(model, table, 1 / WORLD_SIZE, [mesh.get_local_rank()])
    optimizer.detach()
    loaded = tg.optim.RowAdam([table], lr=0.2, weight_decay=0.1)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    set_optimizer_state_dict(model, loaded, saved)
    before, after = optimizer.state[table], loaded.state[table]
    results["loaded"] = before.keys() == after.keys() and all(
        torch.equal(full(value), full(after[name])) if isinstance(value, Tensor) else value == after[name]
        for name, value in before.items()
    )
    assert isinstance(after["first"], DTensor)
    refused = make("pool", False)
    fully_shard(refused, mesh=mesh)
    try:
        tg.optim.RowAdam([refused.pool.values])
    except TypeError as error:
        results["refused"] = str(error)
    return results


class Checkpointed(nn.Module):
    """A model that is computed anew in its backward."""

    def __init__(self, model: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.model, self.use_reentrant = model, use_reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.model, x, use_reentrant=self.use_reentrant)


ROW_MODELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "checkpointed": lambda model: Checkpointed(model, False),
    "checkpointed reentrantly": lambda model: Checkpointed(model, True),
}


def data_parallel_rows(kind: str, rank: int) -> dict[str, Any]:
    """A row optimizer on a table of DistributedDataParallel, whose gradients of two micro-batches are averaged."""
    model = make("shared", True)
    table = model[0].pool.values
    wrapped = DistributedDataParallel(ROW_MODELS[kind](model))
    optimizer = tg.optim.RowSGD([table], lr=1.0)
    for step in range(2):
        with wrapped.no_sync() if step == 0 else nullcontext():
            wrapped((tokens(rank) + step).requires_grad_()).square().sum(dim=1).mean().backward()
    optimizer.step()
    results: dict[str, Any] = {"table": full(table)}
    dense = make("pool", False)
    optimizer = tg.optim.RowSGD([dense.pool.values], lr=1.0)
    backward(DistributedDataParallel(dense), tokens(rank))
    results["refused"] = refusal(optimizer.step)
    return results


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing is refused"


def refused_of_sharded(folder: Path, mesh: Any) -> dict[str, Any]:
    """What a table that is spread over ranks cannot be made into, and how its layer cannot be called."""
    results = {}
    for style in (MemoryColwise(), MemoryRowwise()):
        layer = make("memory", False)
        published = published_names(make("memory", False))
        parallelize_module(layer, mesh, {"pool": style})
        x = tokens(mesh.get_local_rank())
        calls: dict[str, Callable[[], Any]] = {
            "file": lambda layer=layer: layer.pool.to_file(folder / "table"),
            "quantised": lambda layer=layer: layer.pool.quantize(),
            "host": lambda layer=layer: tg.nn.OffloadedMemoryPool.from_pool(layer.pool, "cpu"),
            "published": lambda layer=layer, published=published: layer.load_reference_state_dict(published),
            "vmap": lambda layer=layer, x=x: torch.vmap(layer)(x[None]),
            "grad": lambda layer=layer, x=x: torch.func.grad(lambda x: layer(x).sum())(x),
        }
        results |= {f"{style} {name}": refusal(call) for name, call in calls.items()}
        pool = make("pool", False).pool
        optimizer = tg.optim.RowSGD([pool.values])
        results[f"{style} attached"] = refusal(lambda pool=pool, style=style: parallelize_module(pool, mesh, style))
        optimizer.detach()
    return results


def published_names(layer: nn.Module) -> dict[str, Tensor]:
    names = {"query_proj": "query_proj.query_mlps.0", "pool.values": "values.weight"}
    found = {}
    for name, value in layer.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        found[name] = value
    return found


def fsdp_on_meta(rank: int) -> dict[str, Any]:
    """FSDP1 gives a model on the meta device its memory, and has every module draw what it holds."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

    deviations = []
    for wrap_policy in (None, size_based_auto_wrap_policy):
        with torch.device("meta"):
            model = tg.nn.ProductKeyMemory(256, tg.nn.MemoryPool(32, 256), 2, 4, 256, query_norm="batch")
        torch.manual_seed(rank)
        wrapped = FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), use_orig_params=True, auto_wrap_policy=wrap_policy
        )
        with FullyShardedDataParallel.summon_full_params(wrapped):
            deviations.append(
                {n.replace("_fsdp_wrapped_module.", ""): float(p.std()) for n, p in wrapped.named_parameters()}
            )
    return {"deviations": deviations}


def run(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous", timedelta(seconds=60), rank=rank, world_size=WORLD_SIZE
    )
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    results: dict[str, Any] = {}
    cases = {
        **{f"ddp_{n}_{s}": lambda n=n, s=s: data_parallel(n, s, rank) for n in MODELS for s in (False, True)},
        **{f"sharded_{n}": lambda n=n: sharded(n, mesh) for n in NORMS},
        **{f"all_dtensors_{n}": lambda n=n: all_dtensors(n, mesh) for n in NORMS},
        "row_optimizer": lambda: row_optimizer(mesh),
        **{f"ddp_rows_{kind}": lambda kind=kind: data_parallel_rows(kind, rank) for kind in ROW_MODELS},
        "refused_of_sharded": lambda: refused_of_sharded(folder, mesh),
        "fsdp_on_meta": lambda: fsdp_on_meta(rank),
    }
    for name, case in cases.items():
        try:
            results[name] = case()
        except Exception:
            results[name] = traceback.format_exc()
            break  # ranks may have lost step
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank, Path(sys.argv[1]))) for rank in range(WORLD_SIZE)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
