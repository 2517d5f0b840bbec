"""Block attention against dense attention and against the masked attention a torch user would write.

    python bench/moba.py              # a few minutes
    python bench/moba.py --quick      # a smoke run; its results are kept only where --output names a folder
    python bench/moba.py --long       # 65536 to 1048576 tokens, without peers: growth, routing's share, memory
    python bench/moba.py --device cuda --seconds 240    # other peers and sizes: bench/gpu/moba_cuda.py

Prints times, ratios against the targets, shares of the machine's matrix-product rate, the share of routing
and the memory added at the peak; writes moba.json and moba.png (--long: moba_long.json and moba_long.png) to
bench/results/<device>/. All peers run in one process, interleaved, on the same random inputs; memory is
measured in a fresh process for each candidate. The longest problem, with gradients, needs 10 GiB of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import topgather as tg
from _harness import (
    Timing,
    describe_run,
    format_bytes,
    format_seconds,
    in_fresh_process,
    measure_gemm_rate,
    measure_peak_memory,
    results_folder,
    time_interleaved,
    write_json,
)

with contextlib.suppress(ImportError):  # the CPU's tables need it; on a GPU lines are plain
    from rich.console import Console
    from rich.table import Table

BATCH_SIZE, NUM_HEADS, HEAD_DIM, TOP_K = 1, 4, 64, 8
FORWARD, BOTH = "forward", "forward+backward"
MASKED_LIMIT = 8192
"""Maximum number of tokens at which the masks, several [H, N, N] tensors, are still reasonable."""

TARGETS = {
    ("float32", FORWARD, 128, 8192): 3.5,
    ("float32", FORWARD, 128, 16384): 6.0,
    ("float32", FORWARD, 128, 32768): 12.0,
    ("float32", FORWARD, 128, 65536): 24.0,
    ("float32", BOTH, 128, 16384): 6.0,
    ("float32", FORWARD, 64, 16384): 9.0,
    ("bfloat16", FORWARD, 128, 16384): 5.0,
}
"""Minimum ratio of dense time to topgather time, by dtype, direction, block_size and tokens."""
ROUTING_SHARE_TARGET = 0.25

LONG_SIZES = (65536, 262144, 1048576)
ROUTING_TARGETS = {(128, 262144): 0.2, (128, 1048576): 0.4, (64, 262144): 0.4, (64, 1048576): 0.8}
"""Maximum ratio of routing's time to that of attending to what was chosen, float32, by block_size and tokens."""
LONG_MEMORY_LIMIT = 3 * 2**30
"""Bytes of working memory that no problem of ``--long`` may exceed."""

COLORS = {"dense": "#8a8f98", "masked 128": "#e0a458", "topgather 128": "#d1495b", "topgather 64": "#2e4057"}


@dataclass(frozen=True)
class Problem:
    """One size to measure at."""

    dtype: str
    direction: str
    num_tokens: int


@dataclass(frozen=True)
class Measured:
    """A problem, the times of its candidates, and whether dense attention was among them."""

    problem: Problem
    times: dict[str, Timing]


# --- Candidates ---------------------------------------------------------------------------------------------

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, block_size: int) -> Tensor:
    """Causal block attention out of torch's own ops: a mask from the block choice, then dense attention."""
    num_tokens = query.shape[2]
    with torch.no_grad():
        centroids = torch.stack([block.mean(dim=2) for block in key.split(block_size, dim=2)], dim=2)
        scores = query @ centroids.transpose(-2, -1)
        block_idx = torch.arange(centroids.shape[2], device=query.device)
        own_block = torch.arange(num_tokens, device=query.device)[:, None] // block_size
        scores.masked_fill_(block_idx > own_block, -torch.inf).masked_fill_(block_idx == own_block, torch.inf)
        chosen = scores.topk(min(TOP_K, len(block_idx))).indices
        is_chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)
        # The causal mask also drops the later blocks that fill up the choice of early queries.
        mask = is_chosen.repeat_interleave(block_size, dim=-1)[..., :num_tokens].tril_()
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def attention_of(candidate: str) -> Attention:
    """The function behind a name such as ``dense``, ``masked 128`` or ``topgather 64``."""
    kind, *sizes = candidate.split()
    if kind == "dense":
        return dense_attention
    block_size = int(sizes[0])
    if kind == "masked":
        return lambda query, key, value: masked_attention(query, key, value, block_size)
    return lambda query, key, value: tg.moba_attention(query, key, value, block_size=block_size, top_k=TOP_K)


def make_inputs(problem: Problem, device: torch.device) -> list[Tensor]:
    """query, key, value and grad_out, standard normal, the same in every run."""
    torch.manual_seed(0)
    shape = (BATCH_SIZE, NUM_HEADS, problem.num_tokens, HEAD_DIM)
    dtype = getattr(torch, problem.dtype)
    return [torch.randn(shape).to(device, dtype) for _ in range(4)]


def runner(candidate: str, problem: Problem, inputs: list[Tensor]) -> Callable[[], object]:
    """What is timed: the forward, or the forward and the gradients of query, key and value."""
    attention = attention_of(candidate)
    *qkv, grad_out = inputs
    if problem.direction == FORWARD:
        return torch.no_grad()(lambda: attention(*qkv))
    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    return lambda: torch.autograd.grad(attention(*leaves), leaves, grad_out)


def attend_runner(block_size: int, inputs: list[Tensor]) -> Callable[[], object]:
    """The attention alone, to blocks chosen before."""
    query, key, value, _ = inputs
    routing = tg.moba_route(query, key, block_size=block_size, top_k=TOP_K)
    return torch.no_grad()(lambda: tg.moba_attention(query, key, value, block_size=block_size, routing=routing))


def route_runner(block_size: int, inputs: list[Tensor]) -> Callable[[], object]:
    """The choice of blocks alone."""
    return lambda: tg.moba_route(inputs[0], inputs[1], block_size=block_size, top_k=TOP_K)


def check_peers_agree(device: torch.device, num_tokens: int = 2048, block_size: int = 64) -> None:
    """Raise unless topgather and the masked peer agree, save rows whose choice hangs on rounding."""
    problem = Problem("float32", FORWARD, num_tokens)
    inputs = make_inputs(problem, device)
    ours, theirs = (runner(f"{kind} {block_size}", problem, inputs)() for kind in ("topgather", "masked"))
    assert isinstance(ours, Tensor)
    assert isinstance(theirs, Tensor)
    differs = ((ours - theirs).abs() > 1e-4).any(dim=-1)
    if differs.float().mean() > 1e-3:
        raise RuntimeError(f"topgather and the masked peer differ in {int(differs.sum())} of {differs.numel()} rows")


# --- Measuring ----------------------------------------------------------------------------------------------


def measure_times(
    problem: Problem, block_sizes: tuple[int, ...], has_dense: bool, device: torch.device, min_rounds: int = 2
) -> Measured:
    """Time every candidate that fits the problem, interleaved."""
    inputs = make_inputs(problem, device)
    names = ["dense"] if has_dense else []
    for block_size in block_sizes:
        if has_dense and problem.num_tokens <= MASKED_LIMIT:
            names.append(f"masked {block_size}")
        names.append(f"topgather {block_size}")
    candidates = {name: runner(name, problem, inputs) for name in names}
    if problem.direction == FORWARD:
        candidates |= {f"route {block_size}": route_runner(block_size, inputs) for block_size in block_sizes}
        if not has_dense:
            candidates |= {f"attend {block_size}": attend_runner(block_size, inputs) for block_size in block_sizes}
    return Measured(problem, time_interleaved(candidates, device, min_rounds))


def measure_memory(candidate: str, problem: Problem, device: torch.device) -> dict[str, Any]:
    """Bytes added at the peak beyond the inputs, and how many of them are results.

    Results are out, its lse where gradients are wanted, and the gradients.
    """
    small = Problem(problem.dtype, problem.direction, 512)
    runner(candidate, small, make_inputs(small, device))()
    inputs = make_inputs(problem, device)
    peak = measure_peak_memory(runner(candidate, problem, inputs), device)
    out_bytes = inputs[0].nbytes
    lse_bytes = BATCH_SIZE * NUM_HEADS * problem.num_tokens * 4
    results = out_bytes + lse_bytes + (3 * out_bytes if problem.direction == BOTH else 0)
    return {"candidate": candidate, **asdict(problem), "peak_bytes": peak, "result_bytes": results}


def visible_pairs(num_tokens: int, block_size: int | None) -> int:
    """Pairs of a query and a key it sees, per head: dense where ``block_size`` is None."""
    if block_size is None:
        return num_tokens * (num_tokens + 1) // 2
    pairs = 0
    for own_block, start in enumerate(range(0, num_tokens, block_size)):
        in_block = min(block_size, num_tokens - start)
        pairs += in_block * (in_block + 1) // 2 + in_block * min(TOP_K - 1, own_block) * block_size
    return pairs


def attention_flops(problem: Problem, block_size: int | None) -> int:
    """FLOPs of the products over visible pairs: 2 of them forward, 5 backward (scores are recomputed)."""
    products = 2 if problem.direction == FORWARD else 7
    return products * 2 * HEAD_DIM * BATCH_SIZE * NUM_HEADS * visible_pairs(problem.num_tokens, block_size)


def rows_of(measured: Measured, gemm_rates: dict[str, float]) -> Iterator[dict[str, Any]]:
    """One row a block size: what the table shows and the JSON keeps."""
    problem, times = measured.problem, measured.times
    rate = gemm_rates[problem.dtype]
    for name in times:
        kind, *sizes = name.split()
        if kind != "topgather":
            continue
        block_size = int(sizes[0])
        seconds = times[name].min_seconds
        row: dict[str, Any] = {**asdict(problem), "block_size": block_size, "top_k": TOP_K}
        row["topgather_seconds"] = seconds
        row["topgather_gemm_share"] = attention_flops(problem, block_size) / seconds / rate
        if "dense" in times:
            dense = times["dense"].min_seconds
            row["dense_seconds"] = dense
            row["dense_gemm_share"] = attention_flops(problem, None) / dense / rate
            row["ratio_to_dense"] = dense / seconds
        if f"masked {block_size}" in times:
            row["masked_seconds"] = times[f"masked {block_size}"].min_seconds
            row["ratio_to_masked"] = row["masked_seconds"] / seconds
        if f"route {block_size}" in times:
            row["routing_share"] = times[f"route {block_size}"].min_seconds / seconds
        if f"attend {block_size}" in times:
            row["routing_to_attending"] = (
                times[f"route {block_size}"].min_seconds / times[f"attend {block_size}"].min_seconds
            )
            limit = ROUTING_TARGETS.get((block_size, problem.num_tokens))
            if problem.dtype == "float32" and limit is not None:
                row["routing_target"] = limit
                row["routing_target_met"] = row["routing_to_attending"] <= limit
        target = TARGETS.get((problem.dtype, problem.direction, block_size, problem.num_tokens))
        if target is not None and "dense" in times:
            row["target_ratio"] = target
            row["target_met"] = row["ratio_to_dense"] >= target
        yield row


# --- Showing ------------------------------------------------------------------------------------------------


def times_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Time (minimum of the rounds); shares are of the measured matrix-product rate of the dtype")
    for heading in ("dtype", "direction"):
        table.add_column(heading)
    for heading in ("N", "block", "dense", "masked", "topgather", "dense / ours", "target", "met"):
        table.add_column(heading, justify="right")
    for heading in ("ours, gemm share", "dense, gemm share", "routing share", "route / attend"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["dtype"],
            row["direction"],
            str(row["num_tokens"]),
            str(row["block_size"]),
            *(_show(row, f"{peer}_seconds", format_seconds) for peer in ("dense", "masked", "topgather")),
            _show(row, "ratio_to_dense", "{:.2f}x".format),
            _show(row, "target_ratio", "{:.1f}x".format),
            _show(row, "target_met", lambda met: "yes" if met else "NO"),
            _show(row, "topgather_gemm_share", "{:.0%}".format),
            _show(row, "dense_gemm_share", "{:.0%}".format),
            _show(row, "routing_share", "{:.0%}".format),
            _show(row, "routing_to_attending", "{:.0%}".format),
        )
    return table


def growth_table(rows: list[dict[str, Any]]) -> Table:
    """Time per token: flat where time grows linearly."""
    table = Table(title="Growth: topgather float32, microseconds per token")
    table.add_column("direction")
    table.add_column("block", justify="right")
    selected = [row for row in rows if row["dtype"] == "float32"]
    sizes = sorted({row["num_tokens"] for row in selected})
    for size in sizes:
        table.add_column(f"N={size}", justify="right")
    for direction, block_size in sorted({(row["direction"], row["block_size"]) for row in selected}):
        seconds = {
            row["num_tokens"]: row["topgather_seconds"]
            for row in selected
            if (row["direction"], row["block_size"]) == (direction, block_size)
        }
        cells = [f"{seconds[size] / size * 1e6:.2f}" if size in seconds else "" for size in sizes]
        table.add_row(direction, str(block_size), *cells)
    return table


def memory_table(memory: list[dict[str, Any]]) -> Table:
    table = Table(title="Memory added at the peak, beyond the inputs (float32)")
    table.add_column("candidate")
    table.add_column("direction")
    for heading in ("N", "at the peak", "of it results", "working memory", "bytes per token, head and slot"):
        table.add_column(heading, justify="right")
    for entry in memory:
        working = entry["peak_bytes"] - entry["result_bytes"]
        table.add_row(
            entry["candidate"],
            entry["direction"],
            str(entry["num_tokens"]),
            format_bytes(entry["peak_bytes"]),
            format_bytes(entry["result_bytes"]),
            format_bytes(working),
            f"{working / (entry['num_tokens'] * BATCH_SIZE * NUM_HEADS * TOP_K):.1f}",
        )
    return table


def _show(row: dict[str, Any], name: str, form: Callable[[Any], str]) -> str:
    return form(row[name]) if name in row else ""


def draw(measured: list[Measured], memory: list[dict[str, Any]], run: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    forward, both, bytes_axes = figure.subplots(1, 3)
    for axes, direction in ((forward, FORWARD), (both, BOTH)):
        for name in COLORS:
            points = [
                (m.problem.num_tokens, m.times[name].min_seconds)
                for m in measured
                if m.problem.dtype == "float32" and m.problem.direction == direction and name in m.times
            ]
            _plot(axes, name, points)
        axes.set(title=f"{direction}, float32", ylabel="seconds")
    for name in COLORS:
        points = [
            (entry["num_tokens"], entry["peak_bytes"] / 2**20)
            for entry in memory
            if entry["candidate"] == name and entry["direction"] == FORWARD
        ]
        _plot(bytes_axes, name, points)
    bytes_axes.set(title="memory added at the peak, forward", ylabel="MiB, results included")
    figure.suptitle(
        f"H={NUM_HEADS}, D={HEAD_DIM}, top_k={TOP_K}; {run['device']}, {run['threads']} threads, {run['cpu_target']}",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _plot(axes: Axes, name: str, points: list[tuple[int, float]]) -> None:
    if points:
        axes.loglog(*zip(*points, strict=True), "o-", color=COLORS[name], label=name, markersize=4)
        axes.legend(frameon=False)
    axes.set_xlabel("tokens")
    axes.grid(True, which="major", alpha=0.3)


# --- Running ------------------------------------------------------------------------------------------------


def plan(is_quick: bool, is_long: bool) -> list[tuple[Problem, tuple[int, ...], bool]]:
    """Problems with the block sizes to take and whether the peers run."""
    if is_long:
        sizes = LONG_SIZES[:1] if is_quick else LONG_SIZES
        return [(Problem("float32", d, n), (128, 64), False) for d in (FORWARD, BOTH) for n in sizes]
    if is_quick:
        sizes = {FORWARD: (2048, 4096), BOTH: (2048,)}
        return [(Problem("float32", d, n), (128,), True) for d in sizes for n in sizes[d]]
    compared = {FORWARD: (8192, 16384, 32768, 65536), BOTH: (8192, 16384, 32768)}
    alone = {FORWARD: (131072, 262144), BOTH: (65536, 131072)}
    problems = [
        (Problem(dtype, direction, num_tokens), (128, 64), True)
        for dtype in ("float32", "bfloat16")
        for direction in (FORWARD, BOTH)
        for num_tokens in compared[direction]
    ]
    problems += [(Problem("float32", d, n), (128, 64), False) for d in (FORWARD, BOTH) for n in alone[d]]
    return problems


def memory_plan(is_quick: bool, is_long: bool) -> list[tuple[str, Problem]]:
    """Candidates and problems to measure memory of."""
    if is_long:
        sizes = LONG_SIZES[:1] if is_quick else LONG_SIZES
        names = ("topgather 128", "topgather 64")
        return [(name, Problem("float32", d, n)) for name in names for d in (FORWARD, BOTH) for n in sizes]
    if is_quick:
        return [(name, Problem("float32", FORWARD, 4096)) for name in ("dense", "topgather 128")]
    entries = [("masked 128", FORWARD, 8192), ("masked 128", BOTH, 8192)]
    for name in ("topgather 128", "topgather 64"):
        entries += [(name, FORWARD, n) for n in (8192, 32768, 65536, 262144)]
        entries += [(name, BOTH, n) for n in (8192, 65536)]
    entries += [("dense", FORWARD, n) for n in (8192, 32768)] + [("dense", BOTH, 8192)]
    return [(name, Problem("float32", direction, n)) for name, direction, n in entries]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes only, under 20 seconds")
    parser.add_argument("--long", action="store_true", help="up to 1048576 tokens, without peers, on a CPU")
    parser.add_argument("--device", default="cpu", help="device to measure on (default: cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=240.0, help="on a GPU: begin nothing after (default: 240)")
    parser.add_argument("--call-limit", type=float, default=5.0, help="on a GPU: maximum seconds of a peer's call")
    parser.add_argument("--output", type=Path, help="folder for results")
    parser.add_argument("--measure-memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and options.measure_memory is None:
        from gpu.moba_cuda import main_on_cuda

        raise SystemExit(main_on_cuda(device, options))
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.measure_memory is not None:
        argument = json.loads(options.measure_memory)
        torch.set_num_threads(argument.pop("threads"))
        candidate, device = argument.pop("candidate"), torch.device(argument.pop("device"))
        print(json.dumps(measure_memory(candidate, Problem(**argument), device)))
        return

    console = Console(width=170)
    run = describe_run(device)
    console.print(run)
    check_peers_agree(device)
    problems = plan(options.quick, options.long)
    gemm_rates = {
        dtype: measure_gemm_rate(device, getattr(torch, dtype)) for dtype in {p.dtype: None for p, _, _ in problems}
    }
    console.print({f"{dtype} matrix product, GFLOP/s": round(rate / 1e9) for dtype, rate in gemm_rates.items()})

    measured = []
    for problem, block_sizes, has_dense in problems:
        measured.append(measure_times(problem, block_sizes, has_dense, device, min_rounds=1 if options.long else 2))
        console.print(f"measured {problem.dtype} {problem.direction} at N={problem.num_tokens}", style="dim")
    memory = [
        in_fresh_process(
            __file__,
            "--measure-memory",
            {"candidate": name, "threads": torch.get_num_threads(), "device": str(device), **asdict(problem)},
        )
        for name, problem in memory_plan(options.quick, options.long)
    ]

    rows = [row for entry in measured for row in rows_of(entry, gemm_rates)]
    console.print(times_table(rows), growth_table(rows), memory_table(memory))
    report_targets(rows, memory if options.long else [], console)

    folder = options.output or (None if options.quick else results_folder(device))
    if folder is None:
        return
    content = {
        "run": run,
        "shape": {"batch_size": BATCH_SIZE, "num_heads": NUM_HEADS, "head_dim": HEAD_DIM, "top_k": TOP_K},
        "gemm_flops_per_second": gemm_rates,
        "rows": rows,
        "memory": memory,
        "times": [
            {**asdict(m.problem), "times": {name: timing.to_json() for name, timing in m.times.items()}}
            for m in measured
        ],
    }
    name = "moba_long" if options.long else "moba"
    write_json(folder / f"{name}.json", content)
    draw(measured, memory, run, folder / f"{name}.png")
    console.print(f"Written: {folder / f'{name}.json'}, {folder / f'{name}.png'}", soft_wrap=True)


def report_targets(rows: list[dict[str, Any]], memory: list[dict[str, Any]], console: Console) -> None:
    """Say which targets were met, which missed, and which this run did not measure."""
    judged = [row for row in rows if "target_met" in row]
    met = sum(row["target_met"] for row in judged)
    console.print(f"Targets: {met} of {len(judged)} measured met; {len(TARGETS) - len(judged)} not measured.")
    for row in rows:
        if (row["dtype"], row["direction"], row["num_tokens"]) == ("float32", FORWARD, 65536):
            share = row.get("routing_share", math.nan)
            verdict = "met" if share <= ROUTING_SHARE_TARGET else "MISSED"
            console.print(
                f"Routing at N=65536, block {row['block_size']}: {share:.0%} of the forward, "
                f"target at most {ROUTING_SHARE_TARGET:.0%}: {verdict}."
            )
        if "routing_target" in row:
            console.print(
                f"Routing at N={row['num_tokens']}, block {row['block_size']}: {row['routing_to_attending']:.0%} of "
                f"attending, target at most {row['routing_target']:.0%}: "
                f"{'met' if row['routing_target_met'] else 'MISSED'}."
            )
    if memory:
        most = max(memory, key=lambda entry: entry["peak_bytes"] - entry["result_bytes"])
        working = most["peak_bytes"] - most["result_bytes"]
        console.print(
            f"Working memory: at most {format_bytes(working)}, {most['direction']} at N={most['num_tokens']}, target "
            f"below {format_bytes(LONG_MEMORY_LIMIT)}: {'met' if working < LONG_MEMORY_LIMIT else 'MISSED'}."
        )


if __name__ == "__main__":
    main()
