"""The indexer's choice of blocks against the dense definition of transformers' MiniMax-M3, and its share of a layer.

    python bench/indexer.py            # a few minutes on two cores
    python bench/indexer.py --quick    # a smoke run; its results are kept only where --output names a folder

The peer is what ``MiniMaxM3VLIndexer`` of transformers 5.24 does behind its projections, written out in torch: all
products of queries and keys, a causal mask, a maximum by block, the newest blocks forced, ``topk``. Prints times and
ratios; the share that the choice has of a whole layer's forward (``nn.IndexedAttention``), and the share that the peer
would have in its place; what the loss of the indexer takes, forward and backward. Writes indexer.json and indexer.png
to bench/results/<device>/. All run in one process, interleaved, on the same random inputs; memory is measured in a
fresh process for each.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
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

OURS, DENSE, MEANS = "topgather", "dense definition", "moba_route"
COLORS = {OURS: "#d1495b", DENSE: "#8a8f98", MEANS: "#30638e"}
TARGET = 5.0


@dataclass(frozen=True)
class Problem:
    """Sizes of a MiniMax-M3 indexer: four index heads, one index key head, blocks of 128, the best 16."""

    num_tokens: int
    dtype: str = "float32"
    num_heads: int = 4
    dim: int = 128
    block_size: int = 128
    top_k: int = 16
    force_last: int = 1
    target: float | None = None

    def __str__(self) -> str:
        return f"{self.dtype}, N={self.num_tokens}, {self.num_heads} index heads of {self.dim}, top {self.top_k}"


def plan(device: torch.device, is_quick: bool) -> list[Problem]:
    """What is measured."""
    if is_quick:
        return [Problem(512, dim=32, block_size=32, top_k=4)]
    if device.type == "cuda":
        return [Problem(num_tokens, "bfloat16") for num_tokens in (8192, 32768)]
    sizes = [Problem(2048), Problem(4096), Problem(8192, target=TARGET)]
    return [*sizes, Problem(8192, "bfloat16", target=TARGET)]


# --- Candidates ---------------------------------------------------------------------------------------------


def dense_choice(query: Tensor, key: Tensor, problem: Problem) -> Tensor:
    """Of ``query [B, H, N, D]`` and ``key [B, 1, N, D]``, in float32 as transformers has it."""
    num_tokens = query.shape[2]
    num_blocks = -(-num_tokens // problem.block_size)
    positions = torch.arange(num_tokens, device=query.device)
    scores = torch.matmul(query.float(), key.float().transpose(-1, -2))
    scores = scores.masked_fill(positions[None, :] > positions[:, None], float("-inf"))
    scores = torch.nn.functional.pad(scores, (0, num_blocks * problem.block_size - num_tokens), value=float("-inf"))
    blocks = scores.view(*scores.shape[:3], num_blocks, problem.block_size).amax(dim=-1)
    newest = (positions[:, None] // problem.block_size - torch.arange(problem.force_last, device=query.device)).clamp(0)
    blocks.scatter_(-1, newest.expand(*blocks.shape[:2], -1, -1), float("inf"))
    best, chosen = blocks.topk(min(problem.top_k, num_blocks), dim=-1)
    return chosen.masked_fill(best == float("-inf"), -1)


def make_inputs(problem: Problem, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, problem.dtype)
    shapes = [(1, heads, problem.num_tokens, problem.dim) for heads in (problem.num_heads, 1)]
    query, key = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return query, key


def make_run(name: str, problem: Problem, device: torch.device) -> Callable[[], Tensor]:
    """One call of one candidate."""
    query, key = make_inputs(problem, device)
    if name == DENSE:
        return lambda: dense_choice(query, key, problem)
    if name == MEANS:
        return lambda: tg.moba_route(query, key, problem.block_size, problem.top_k).block_indices
    options = {"block_size": problem.block_size, "top_k": problem.top_k, "force_last": problem.force_last}
    return lambda: tg.index_route(query, key, **options).block_indices


# --- Measuring ----------------------------------------------------------------------------------------------


def check(problem: Problem, device: torch.device) -> None:
    """Both choose the same, but for scores that are equal up to rounding."""
    ours, theirs = (make_run(name, problem, device)().sort(-1).values for name in (OURS, DENSE))
    same = (ours[..., -theirs.shape[-1] :] == theirs).all(-1).float().mean()
    assert same > 0.99, f"the choices agree in {same:.1%} of all queries"


def measure(problem: Problem, device: torch.device) -> dict[str, Any]:
    check(problem, device)
    candidates = {name: make_run(name, problem, device) for name in (OURS, DENSE, MEANS)}
    timings = time_interleaved(candidates, device, min_rounds=3, max_rounds=20, budget_seconds=8.0)
    row: dict[str, Any] = {"problem": str(problem), **asdict(problem)}
    row["ratio"] = timings[DENSE].min_seconds / timings[OURS].min_seconds
    row["times"] = {name: timing.to_json() for name, timing in timings.items()}
    if problem.target is not None:
        row["target_met"] = row["ratio"] >= problem.target
    return row


def measure_layer(problem: Problem, device: torch.device) -> dict[str, Any]:
    """A layer of 16 query heads on 4, 2048 channels: its forward, and the choice alone on the layer's shapes."""
    torch.manual_seed(0)
    dim, heads = 16 * problem.dim, 16
    dtype = getattr(torch, problem.dtype)
    options = {"num_kv_heads": problem.num_heads, "block_size": problem.block_size, "top_k": problem.top_k}
    layer = tg.nn.IndexedAttention(dim, heads, **options, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(1, problem.num_tokens, dim, device=device, dtype=dtype)
    names = {"layer": lambda: layer(x), "choice": make_run(OURS, problem, device)}
    names["dense choice"] = make_run(DENSE, problem, device)
    timings = time_interleaved(names, device, min_rounds=2, max_rounds=5, budget_seconds=10.0)
    whole, choice, dense = (timings[name].min_seconds for name in names)
    return {
        "problem": f"layer of {heads} query heads, {dim} channels; {problem}",
        "times": {name: timing.to_json() for name, timing in timings.items()},
        "share": choice / whole,
        "dense_share": dense / (whole - choice + dense),
    }


def measure_loss(problem: Problem, device: torch.device) -> dict[str, Any]:
    """Forward and backward of the loss, of 16 query heads on 4; for scale, those of the attention itself."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, heads, problem.num_tokens, problem.dim) for heads in (16, problem.num_heads, problem.num_heads)]
    leaves = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    query, key, value = leaves
    index = [tensor.float().requires_grad_() for tensor in make_inputs(problem, device)]
    size, top_k = problem.block_size, problem.top_k
    routing = tg.index_route(*index, size, top_k)
    with torch.no_grad():
        sparse_lse, dense_lse = (
            tg.moba_attention(query, key, value, size, routing=each, return_lse=True)[1] for each in (routing, None)
        )

    def loss(lse: Tensor, of: tg.BlockRouting | None) -> object:
        return torch.autograd.grad(tg.index_loss(*index, query.detach(), key.detach(), lse, of, size), index)

    def attention() -> object:
        return torch.autograd.grad(tg.moba_attention(query, key, value, size, routing=routing).sum(), leaves)

    candidates = {
        "loss, sparse stage": lambda: loss(sparse_lse, routing),
        "loss, dense warm-up": lambda: loss(dense_lse, None),
        "moba_attention": attention,
    }
    timings = time_interleaved(candidates, device, min_rounds=2, max_rounds=4, budget_seconds=10.0)
    return {
        "problem": f"forward and backward, 16 query heads; {problem}",
        "times": {name: timing.to_json() for name, timing in timings.items()},
    }


def measure_memory(argument: dict[str, Any]) -> dict[str, Any]:
    """Bytes that one call adds at the peak, beyond its inputs."""
    torch.set_num_threads(argument["threads"])
    device = torch.device(argument["device"])
    make_run(argument["candidate"], Problem(64, block_size=8, dim=8), device)()
    return {
        "peak_bytes": measure_peak_memory(
            make_run(argument["candidate"], Problem(**argument["problem"]), device), device
        )
    }


def memory_rows(problem: Problem, device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for name in (OURS, DENSE):
        argument = {"candidate": name, "problem": asdict(problem)}
        argument |= {"threads": torch.get_num_threads(), "device": str(device)}
        rows.append({**argument, **in_fresh_process(__file__, "--measure-memory", argument)})
    return rows


# --- Showing ------------------------------------------------------------------------------------------------


def show(row: dict[str, Any]) -> str:
    """One line a measured problem."""
    times = "  ".join(f"{name} {format_seconds(entry['min_seconds'])}" for name, entry in row["times"].items())
    rest = f"  {row['ratio']:.1f}x" if "ratio" in row else ""
    if "share" in row:
        rest += f"  share of the layer {row['share']:.0%}; dense in its place {row['dense_share']:.0%}"
    if "target_met" in row:
        rest += f"  target {row['target']:.0f}x: {'met' if row['target_met'] else 'MISSED'}"
    return f"{row['problem']}\n    {times}{rest}"


def draw(rows: list[dict[str, Any]], run: dict[str, Any], path: Path) -> None:
    """Times by problem."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate((DENSE, OURS, MEANS)):
        seconds = [row["times"][name]["min_seconds"] for row in rows]
        places = [index + 0.27 * (place - 1) for index in range(len(rows))]
        axes.bar(places, seconds, width=0.27, color=COLORS[name], label=name)
    axes.set_xticks(range(len(rows)), [f"{row['dtype']}\nN={row['num_tokens']}" for row in rows])
    axes.set(yscale="log", ylabel="seconds", title="the choice of blocks")
    axes.legend()
    save_figure(figure, run, path)


def main() -> None:
    options = parse_options(__doc__, "indexer", measures_memory=True)
    if options.measure_memory is not None:
        print(json.dumps(measure_memory(json.loads(options.measure_memory))))
        return
    device, run = begin(options)
    rows = []
    problems = plan(device, options.quick)
    for problem in problems:
        rows.append(measure(problem, device))
        print(show(rows[-1]), flush=True)
    layer = measure_layer(problems[0] if options.quick else problems[-2], device)
    print(show(layer), flush=True)
    loss = measure_loss(problems[0] if options.quick else problems[1], device)
    print(show(loss), flush=True)
    memory = memory_rows(problems[0] if options.quick else problems[1], device)
    for entry in memory:
        print(f"memory: {entry['candidate']} {format_bytes(entry['peak_bytes'])}")
    results = {"run": run, "rows": rows, "layer": layer, "loss": loss, "memory": memory}
    finish("indexer", options, device, results, lambda path: draw(rows, run, path))


if __name__ == "__main__":
    main()
