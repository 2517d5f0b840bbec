"""Memory layers against what a torch user would write: product-key top-k, and lookups against ``F.embedding_bag``.

    python bench/memory.py                  # two or three minutes on two cores
    python bench/memory.py --quick          # a smoke run; its results are kept only where --output names a folder
    python bench/memory.py --device cuda    # bfloat16, larger sizes

Prints times, ratios against the targets and the share of the measured read or copy bandwidth that a lookup reaches;
writes memory.json and memory.png to bench/results/<device>/. All peers of a problem run in one process, interleaved, on
the same random inputs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import topgather as tg
from _harness import (
    begin,
    finish,
    format_seconds,
    parse_options,
    save_figure,
    synchronize,
    time_interleaved,
)

TOPK, FORWARD, DENSE, SPARSE = "top-k", "forward", "forward+backward, dense", "forward+backward, sparse"
OURS, TORCH = "topgather", "torch"
STEP = "forward+backward+step, Adam"
COLORS = {TORCH: "#8a8f98", OURS: "#d1495b"}


@dataclass(frozen=True)
class TopkProblem:
    """Sizes of a product-key top-k."""

    num_tokens: int
    num_heads: int
    num_keys: int
    head_dim: int
    top_k: int
    dtype: str
    target: float | None = None

    def __str__(self) -> str:
        return (
            f"{self.dtype}, T={self.num_tokens} H={self.num_heads} n={self.num_keys} D={self.head_dim} "
            f"top_k={self.top_k}"
        )


@dataclass(frozen=True)
class LookupProblem:
    """Sizes of a lookup, how its indices are drawn, and the targets by direction."""

    num_tokens: int
    bag_size: int
    num_rows: int
    row_dim: int
    dtype: str
    indices: str = "uniform"
    directions: tuple[str, ...] = (FORWARD, DENSE, SPARSE)
    targets: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = f"T={self.num_tokens} K={self.bag_size}, {self.num_rows} rows of {self.row_dim}"
        return f"{self.dtype}, {sizes}, {self.indices}"


def plan(device: torch.device, is_quick: bool) -> tuple[list[TopkProblem], list[LookupProblem]]:
    """What is measured."""
    if is_quick:
        directions = (FORWARD, DENSE, SPARSE, STEP)
        lookups = [LookupProblem(128, 32, 4096, 64, "float32", directions=directions)]
        return [TopkProblem(256, 2, 64, 64, 16, "float32")], lookups
    if device.type == "cuda":
        topk = [TopkProblem(16384, 4, n, 512, 32, "bfloat16", 5.0 if n == 1024 else None) for n in (512, 1024, 2048)]
        targets = {DENSE: 5.0, SPARSE: 5.0}
        lookups = [LookupProblem(16384, 128, 2**20, 1024, "bfloat16", targets=targets)]
        lookups += [LookupProblem(16384, 128, 2**20, 1024, "bfloat16", kind) for kind in ("power law", "one hot row")]
        lookups += [LookupProblem(16384, 128, 2**p, 1024, "bfloat16", directions=(SPARSE,)) for p in (16, 18, 22)]
        return topk, lookups
    topk = [
        TopkProblem(4096, 4, 512, 512, 32, "float32", 4.0),
        TopkProblem(4096, 4, 1024, 512, 32, "float32"),
        TopkProblem(4096, 4, 512, 512, 32, "bfloat16"),
    ]
    targets = {FORWARD: 1.2, DENSE: 3.0, SPARSE: 4.0}
    lookups = [LookupProblem(4096, 128, 2**18, 512, "float32", targets=targets)]
    lookups += [LookupProblem(4096, 128, 2**18, 512, "float32", kind) for kind in ("power law", "one hot row")]
    lookups += [LookupProblem(4096, 128, 2**18, 512, "bfloat16", directions=(FORWARD, DENSE))]
    lookups += [LookupProblem(4096, 128, 2**p, 512, "float32", directions=(SPARSE,)) for p in (16, 20, 22)]
    lookups += [
        LookupProblem(4096, 128, 2**p, 512, "float32", directions=(STEP,), targets={STEP: 6.0}) for p in (16, 18)
    ]
    return topk, lookups


# --- Candidates ---------------------------------------------------------------------------------------------


def composed_topk(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Product-key top-k out of torch's ops: the best of each half, all their sums, the best of those."""
    halves = query.unflatten(-1, (2, keys.shape[-1]))
    scores = torch.einsum("thsd,hsnd->thsn", halves, keys)
    length = min(top_k, keys.shape[2])
    best, kept = scores.topk(length, dim=-1)
    sums = (best[:, :, 0, :, None] + best[:, :, 1, None, :]).flatten(2)
    pairs = (kept[:, :, 0, :, None] * keys.shape[2] + kept[:, :, 1, None, :]).flatten(2)
    found, positions = sums.topk(top_k, dim=-1)
    return found, pairs.gather(-1, positions)


def draw_indices(problem: LookupProblem, device: torch.device) -> Tensor:
    """``[T, K]`` int64: each row as likely as any, as word frequencies are, or one row in every bag."""
    shape, generator = (problem.num_tokens, problem.bag_size), torch.Generator().manual_seed(1)
    if problem.indices == "power law":
        # The r-th most frequent row is drawn about as often as 1 / r.
        ranks = torch.exp(
            torch.rand(shape, generator=generator, dtype=torch.float64) * torch.tensor(problem.num_rows).log()
        )
        order = torch.randperm(problem.num_rows, generator=generator)
        return order[(ranks.long() - 1).clamp(0, problem.num_rows - 1)].to(device)
    indices = torch.randint(0, problem.num_rows, shape, generator=generator)
    if problem.indices == "one hot row":
        indices[:, 0] = 7
    return indices.to(device)


def lookup_candidates(
    problem: LookupProblem, direction: str, values: Tensor, indices: Tensor, weights: Tensor, grad_out: Tensor
) -> dict[str, Callable[[], object]]:
    """One call of each peer. Gradients of table and weights, as training takes them."""

    def bag(is_sparse: bool) -> Tensor:
        return F.embedding_bag(indices, values, mode="sum", per_sample_weights=weights, sparse=is_sparse)

    if direction == FORWARD:
        return {
            TORCH: torch.no_grad()(lambda: bag(False)),
            OURS: torch.no_grad()(lambda: tg.memory_lookup(values, indices, weights)),
        }
    is_sparse = direction == SPARSE

    def both(out: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(out(), [values, weights], grad_out)

    candidates: dict[str, Callable[[], object]] = {
        OURS: both(lambda: tg.memory_lookup(values, indices, weights, sparse_grad=is_sparse))
    }
    candidates[TORCH] = both(lambda: bag(is_sparse))
    return candidates


def step_candidates(
    values: Tensor, indices: Tensor, weights: Tensor, grad_out: Tensor
) -> dict[str, Callable[[], object]]:
    """One training step of each peer, on a table of its own: SparseAdam, fused AdamW on a dense gradient, RowAdam."""

    def stepping(
        make: Callable[[Tensor], torch.optim.Optimizer], out: Callable[[Tensor], Tensor]
    ) -> Callable[[], None]:
        table = values.detach().clone().requires_grad_()
        optimizer = make(table)

        def step() -> None:
            out(table).backward(grad_out)
            optimizer.step()
            optimizer.zero_grad()
            weights.grad = None

        return step

    def ours(table: Tensor) -> Tensor:
        return tg.memory_lookup(table, indices, weights)

    def bag(table: Tensor) -> Tensor:
        return F.embedding_bag(indices, table, mode="sum", per_sample_weights=weights, sparse=True)

    return {
        OURS: stepping(lambda table: tg.optim.RowAdam([table]), ours),
        "bfloat16 states": stepping(lambda table: tg.optim.RowAdam([table], state_dtype=torch.bfloat16), ours),
        TORCH: stepping(lambda table: torch.optim.SparseAdam([table]), bag),
        "dense, fused AdamW": stepping(lambda table: torch.optim.AdamW([table], weight_decay=0, fused=True), ours),
    }


# --- Measuring ----------------------------------------------------------------------------------------------


def time_candidates(candidates: dict[str, Callable[[], object]], device: torch.device) -> dict[str, Any]:
    """Summary of the times of each candidate that runs at all; an error's first line for one that does not."""
    times: dict[str, Any] = {}
    running = dict(candidates)
    for name, run in candidates.items():
        try:
            run()
        except (RuntimeError, NotImplementedError) as error:
            times[name] = {"error": str(error).splitlines()[0]}
            del running[name]
    timings = time_interleaved(running, device, min_rounds=3, max_rounds=12, budget_seconds=6.0)
    return times | {name: timing.to_json() for name, timing in timings.items()}


def measure_bandwidth(device: torch.device, values: Tensor) -> float:
    """Bytes a second: of reading the table once from end to end; on a GPU of copying it, both ways counted."""
    size = values.numel() * values.element_size()
    if device.type == "cuda":
        target = torch.empty_like(values)
        timing = time_interleaved({"copy": lambda: target.copy_(values)}, device, max_rounds=20)["copy"]
        return 2 * size / timing.min_seconds
    timing = time_interleaved({"read": lambda: values.sum()}, device, max_rounds=8)["read"]
    return size / timing.min_seconds


def measure_topk(problem: TopkProblem, device: torch.device) -> dict[str, Any]:
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, problem.dtype)
    query = torch.randn(problem.num_tokens, problem.num_heads, problem.head_dim, generator=generator).to(device, dtype)
    keys = torch.randn(problem.num_heads, 2, problem.num_keys, problem.head_dim // 2, generator=generator)
    keys = keys.to(device, dtype)
    scores, _ = tg.product_key_topk(query, keys, problem.top_k)
    expected, _ = composed_topk(query.float(), keys.float(), problem.top_k)
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-3)
    halves = query.unflatten(-1, (2, keys.shape[-1]))
    times = time_candidates(
        {
            TORCH: lambda: composed_topk(query, keys, problem.top_k),
            OURS: lambda: tg.product_key_topk(query, keys, problem.top_k),
            "torch, einsum alone": lambda: torch.einsum("thsd,hsnd->thsn", halves, keys),
        },
        device,
    )
    return row_of(str(problem), TOPK, problem, times, problem.target)


def measure_lookup(problem: LookupProblem, device: torch.device) -> list[dict[str, Any]]:
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, problem.dtype)
    values = torch.empty(problem.num_rows, problem.row_dim, device=device, dtype=dtype).uniform_(-1, 1).requires_grad_()
    indices = draw_indices(problem, device)
    weights = torch.rand(indices.shape, generator=generator).to(device, dtype).requires_grad_()
    grad_out = torch.randn(problem.num_tokens, problem.row_dim, generator=generator).to(device, dtype)
    bandwidth = measure_bandwidth(device, values.detach())
    rows = []
    for direction in problem.directions:
        if direction == STEP:
            candidates = step_candidates(values, indices, weights, grad_out)
        else:
            candidates = lookup_candidates(problem, direction, values, indices, weights, grad_out)
        times = time_candidates(candidates, device)
        row = row_of(str(problem), direction, problem, times, problem.targets.get(direction))
        row["bandwidth_bytes_per_second"] = bandwidth
        if direction == FORWARD:
            taken = indices.numel() * problem.row_dim * values.element_size()
            for name, entry in times.items():
                if "min_seconds" in entry:
                    row[f"{name}_bandwidth_share"] = taken / entry["min_seconds"] / bandwidth
        rows.append(row)
    del values, weights
    gc.collect()
    synchronize(device)
    return rows


def row_of(name: str, direction: str, problem: Any, times: dict[str, Any], target: float | None) -> dict[str, Any]:
    row = {"problem": name, "direction": direction, **asdict(problem), "times": times}
    row.pop("targets", None)
    row.pop("directions", None)
    row.pop("target", None)
    if "min_seconds" in times.get(TORCH, {}) and "min_seconds" in times[OURS]:
        row["ratio"] = times[TORCH]["min_seconds"] / times[OURS]["min_seconds"]
    if target is not None:
        row["target_ratio"] = target
        row["target_met"] = row.get("ratio", 0.0) >= target
    return row


# --- Showing ------------------------------------------------------------------------------------------------


def show(row: dict[str, Any]) -> str:
    """One line a measured problem."""
    cells = [f"{row['direction']:26}"]
    for name, entry in row["times"].items():
        cells.append(
            f"{name} {format_seconds(entry['min_seconds']) if 'min_seconds' in entry else entry['error'][:60]}"
        )
        if f"{name}_bandwidth_share" in row:
            cells[-1] += f" ({row[f'{name}_bandwidth_share']:.0%} of bandwidth)"
    if "ratio" in row:
        cells.append(f"{row['ratio']:.2f}x")
    if "target_ratio" in row:
        cells.append(f"target {row['target_ratio']:.1f}x: {'met' if row['target_met'] else 'MISSED'}")
    return "  ".join(cells)


def draw(rows: list[dict[str, Any]], run: dict[str, Any], path: Path) -> None:
    """Ratios of every problem, and the sparse step over the table's size."""
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    bars, growth = figure.subplots(1, 2, width_ratios=[2, 1])
    compared = [row for row in rows if "ratio" in row]
    labels = [f"{row['problem']}\n{row['direction']}" for row in compared]
    bars.barh(labels[::-1], [row["ratio"] for row in compared][::-1], color=COLORS[OURS])
    bars.axvline(1.0, color=COLORS[TORCH], linewidth=1)
    bars.tick_params(axis="y", labelsize=6)
    bars.set(title="times faster than torch", xlabel="ratio")
    for name in (TORCH, OURS):
        points = sorted(
            (row["num_rows"], row["times"][name]["min_seconds"] * 1e3)
            for row in rows
            if row["direction"] == SPARSE and row["indices"] == "uniform" and "min_seconds" in row["times"][name]
        )
        if points:
            growth.loglog(*zip(*points, strict=True), "o-", color=COLORS[name], label=name)
            growth.legend(frameon=False)
    growth.set(title="forward+backward, sparse gradient", xlabel="rows of the table", ylabel="ms")
    growth.grid(True, which="major", alpha=0.3)
    save_figure(figure, run, path)


def main() -> None:
    options = parse_options(__doc__, "memory")
    device, run = begin(options)
    rows: list[dict[str, Any]] = []
    topk, lookups = plan(device, options.quick)
    for topk_problem in topk:
        rows.append(measure_topk(topk_problem, device))
        print(f"{topk_problem}\n    {show(rows[-1])}", flush=True)
    for lookup_problem in lookups:
        print(lookup_problem, flush=True)
        for row in measure_lookup(lookup_problem, device):
            rows.append(row)
            print(f"    {show(row)}", flush=True)
    results = {"run": run, "rows": rows}
    finish("memory", options, device, results, lambda path: draw(rows, run, path))


if __name__ == "__main__":
    main()
