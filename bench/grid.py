"""Grid attention against what is written today: permute tokens into groups, dense attention, permute back.

    python bench/grid.py                  # under a minute on two cores
    python bench/grid.py --quick          # a smoke run; its results are kept only where --output names a folder
    python bench/grid.py --device cuda    # bfloat16, larger sizes

Prints times, ratios against the targets, memory added at the peak and the multiply-adds of a SparseViT's attention;
writes grid.json and grid.png to bench/results/<device>/. The peers run in one process, interleaved, on the same random
inputs; memory is measured in a fresh process for each.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
    format_bytes,
    format_seconds,
    in_fresh_process,
    measure_peak_memory,
    parse_options,
    save_figure,
    time_interleaved,
)

FORWARD, BOTH = "forward", "forward+backward"
OURS, TORCH = "topgather", "permute + SDPA + permute"
COLORS = {TORCH: "#8a8f98", OURS: "#d1495b"}


@dataclass(frozen=True)
class Problem:
    """Sizes of an image's attention, and the minimum ratios to reach."""

    batch_size: int
    num_heads: int
    side: int
    head_dim: int
    grid_size: int
    dtype: str
    target_forward: float | None = None
    target_both: float | None = None

    def __str__(self) -> str:
        shape = f"B={self.batch_size}, {self.num_heads} heads, {self.side} x {self.side}, D={self.head_dim}"
        return f"{self.dtype}, {shape}, grid {self.grid_size}"


def plan(device: torch.device, is_quick: bool) -> list[Problem]:
    """What is measured."""
    if is_quick:
        return [Problem(1, 2, 32, 32, 8, "float32")]
    if device.type == "cuda":
        return [Problem(32, 5, 128, 64, size, "bfloat16", 3.0, 2.0) for size in (8, 16)]
    targets = {4: (5.0, 2.0), 8: (2.0, 2.0), 16: (1.0, 1.2)}
    problems = [Problem(2, 5, 64, 64, size, "float32", *targets[size]) for size in targets]
    problems += [Problem(2, 5, 64, 64, size, "bfloat16") for size in targets]
    return [*problems, Problem(8, 5, 64, 64, 8, "float32")]


# --- Candidates ---------------------------------------------------------------------------------------------


def permuted_attention(query: Tensor, key: Tensor, value: Tensor, grid_size: int) -> Tensor:
    """Grid attention out of torch's ops, for sides that ``grid_size`` divides."""
    batch, heads, rows, columns, dim = query.shape
    strides = rows // grid_size, columns // grid_size

    def to_groups(tensor: Tensor) -> Tensor:
        cut = tensor.view(batch, heads, grid_size, strides[0], grid_size, strides[1], dim)
        return cut.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, heads * strides[0] * strides[1], grid_size**2, dim)

    out = F.scaled_dot_product_attention(to_groups(query), to_groups(key), to_groups(value))
    cut = out.view(batch, heads, *strides, grid_size, grid_size, dim)
    return cut.permute(0, 1, 4, 2, 5, 3, 6).reshape(query.shape)


ATTENTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    TORCH: permuted_attention,
    OURS: tg.grid_attention,
}


def make_inputs(problem: Problem, device: torch.device) -> list[Tensor]:
    """query, key, value, leaves of the graph, and grad_out."""
    generator = torch.Generator().manual_seed(0)
    shape = (problem.batch_size, problem.num_heads, problem.side, problem.side, problem.head_dim)
    dtype = getattr(torch, problem.dtype)
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]
    return [*(tensor.requires_grad_() for tensor in tensors[:3]), tensors[3]]


def make_run(name: str, direction: str, problem: Problem, device: torch.device) -> Callable[[], object]:
    """One call of one peer."""
    *leaves, grad_out = make_inputs(problem, device)
    attention = ATTENTIONS[name]
    if direction == FORWARD:
        return torch.no_grad()(lambda: attention(*leaves, problem.grid_size))
    return lambda: torch.autograd.grad(attention(*leaves, problem.grid_size), leaves, grad_out)


# --- Measuring ----------------------------------------------------------------------------------------------


def measure(problem: Problem, device: torch.device) -> list[dict[str, Any]]:
    query, key, value, _ = make_inputs(problem, device)
    with torch.no_grad():
        ours, theirs = (ATTENTIONS[name](query, key, value, problem.grid_size) for name in (OURS, TORCH))
    tolerance = 2e-2 if problem.dtype == "bfloat16" else 1e-4
    torch.testing.assert_close(ours.float(), theirs.float(), atol=tolerance, rtol=1e-2)
    rows = []
    for direction, target in ((FORWARD, problem.target_forward), (BOTH, problem.target_both)):
        candidates = {name: make_run(name, direction, problem, device) for name in ATTENTIONS}
        for run in candidates.values():
            run()
        timings = time_interleaved(candidates, device, min_rounds=10, max_rounds=40, budget_seconds=3.0)
        ratio = timings[TORCH].min_seconds / timings[OURS].min_seconds
        row: dict[str, Any] = {"problem": str(problem), "direction": direction, **asdict(problem), "ratio": ratio}
        row["times"] = {name: timing.to_json() for name, timing in timings.items()}
        if target is not None:
            row |= {"target_ratio": target, "target_met": ratio >= target}
        rows.append(row)
    return rows


def measure_memory(argument: dict[str, Any]) -> dict[str, Any]:
    """Bytes that one call adds at the peak, beyond its inputs."""
    torch.set_num_threads(argument["threads"])
    device = torch.device(argument["device"])
    small = Problem(1, 1, 16, 8, 4, "float32")
    make_run(argument["candidate"], argument["direction"], small, device)()
    run = make_run(argument["candidate"], argument["direction"], Problem(**argument["problem"]), device)
    return {"peak_bytes": measure_peak_memory(run, device)}


def memory_rows(problem: Problem, device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for direction in (FORWARD, BOTH):
        for name in ATTENTIONS:
            argument = {"candidate": name, "direction": direction, "problem": asdict(problem)}
            argument |= {"threads": torch.get_num_threads(), "device": str(device)}
            rows.append({**argument, **in_fresh_process(__file__, "--measure-memory", argument)})
    return rows


def attention_macs() -> list[dict[str, Any]]:
    """Multiply-adds of all attention products of a SparseViT at its released sizes, sparse and global."""
    with torch.device("meta"):
        model = tg.models.SparseViT()
    return [
        {"image": side, "sparse": model.attention_macs(side), "global": model.attention_macs(side, is_global=True)}
        for side in (512, 1024)
    ]


# --- Showing ------------------------------------------------------------------------------------------------


def show(row: dict[str, Any]) -> str:
    """One line a measured problem."""
    times = "  ".join(f"{name} {format_seconds(entry['min_seconds'])}" for name, entry in row["times"].items())
    target = ""
    if "target_met" in row:
        target = f"  target {row['target_ratio']:.1f}x: {'met' if row['target_met'] else 'MISSED'}"
    return f"    {row['direction']:17} {times}  {row['ratio']:.2f}x{target}"


def draw(rows: list[dict[str, Any]], memory: list[dict[str, Any]], run: dict[str, Any], path: Path) -> None:
    """Ratios of every problem, and memory."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    bars, bytes_axes = figure.subplots(1, 2, width_ratios=[2, 1])
    labels = [f"{row['problem']}\n{row['direction']}" for row in rows]
    bars.barh(labels[::-1], [row["ratio"] for row in rows][::-1], color=COLORS[OURS])
    bars.axvline(1.0, color=COLORS[TORCH], linewidth=1)
    bars.tick_params(axis="y", labelsize=6)
    bars.set(title=f"times faster than {TORCH}", xlabel="ratio")
    names = [f"{entry['candidate'].split()[0]}\n{entry['direction']}" for entry in memory]
    colors = [COLORS[entry["candidate"]] for entry in memory]
    bytes_axes.bar(names, [entry["peak_bytes"] / 2**20 for entry in memory], color=colors)
    bytes_axes.tick_params(axis="x", labelsize=6)
    bytes_axes.set(title="memory added at the peak", ylabel="MiB, results included")
    save_figure(figure, run, path)


def main() -> None:
    options = parse_options(__doc__, "grid", measures_memory=True)
    if options.measure_memory is not None:
        print(json.dumps(measure_memory(json.loads(options.measure_memory))))
        return
    device, run = begin(options)
    rows: list[dict[str, Any]] = []
    problems = plan(device, options.quick)
    for problem in problems:
        print(problem, flush=True)
        for row in measure(problem, device):
            rows.append(row)
            print(show(row), flush=True)
    memory = memory_rows(problems[-1], device)
    for entry in memory:
        print(f"memory, {entry['direction']}: {entry['candidate']} {format_bytes(entry['peak_bytes'])}")
    macs = attention_macs()
    for entry in macs:
        counts = f"{entry['sparse'] / 1e9:.1f} GMACs, global {entry['global'] / 1e9:.1f}"
        print(f"SparseViT's attention at {entry['image']} x {entry['image']}: {counts}")
    results = {"run": run, "rows": rows, "memory": memory, "attention_macs": macs}
    finish("grid", options, device, results, lambda path: draw(rows, memory, run, path))


if __name__ == "__main__":
    main()
