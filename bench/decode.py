"""Decoding with a cache against torch's dense attention over the same cache: the time of one token.

    python bench/decode.py                  # two minutes on two cores
    python bench/decode.py --quick          # a smoke run; its results are kept only where --output names a folder
    python bench/decode.py --device cuda    # bfloat16, batch 8, up to 128K tokens

Prints times of a token by the tokens before it, ratios against the targets, the choice of blocks alone, and what
appending costs; writes decode.json and decode.png to bench/results/<device>/. Peers run in one process, interleaved;
queries change from call to call, so that the chosen blocks are not those that are still in the processor's cache, and
dense attention evicts centroids before each round. The longest problem needs 9 GiB of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import topgather as tg
from _harness import (
    Timing,
    begin,
    finish,
    format_seconds,
    parse_options,
    save_figure,
    time_in_rounds,
    time_interleaved,
)

OURS, PAGED, GRAPH, TORCH = "topgather", "topgather, paged", "topgather, CUDA graph", "SDPA, dense"
ROUTE = "topgather, choice alone"
COLORS = {TORCH: "#8a8f98", OURS: "#d1495b", PAGED: "#edae49", GRAPH: "#00798c", ROUTE: "#2e4057"}
NUM_QUERIES = 64
NUM_APPENDS = 256


@dataclass(frozen=True)
class Problem:
    """A cache of ``num_tokens`` tokens of every sequence, and the minimum ratio to reach."""

    num_tokens: int
    dtype: str
    batch_size: int = 1
    num_heads: int = 8
    head_dim: int = 64
    block_size: int = 128
    top_k: int = 8
    target: float | None = None
    choice_target: float | None = None
    """Maximum seconds of the choice of blocks alone."""

    def __str__(self) -> str:
        shape = f"B={self.batch_size}, {self.num_heads} heads, D={self.head_dim}"
        return f"{self.dtype}, N={self.num_tokens}, {shape}, block {self.block_size}, top_k {self.top_k}"


def plan(device: torch.device, is_quick: bool) -> list[Problem]:
    """What is measured."""
    if is_quick:
        return [Problem(length, dtype, block_size=32) for dtype in ("float32", "bfloat16") for length in (1024, 2048)]
    if device.type == "cuda":
        lengths = (8192, 32768, 131072)
        targets = {131072: 10.0}
        return [Problem(length, "bfloat16", 8, 8, 128, target=targets.get(length)) for length in lengths]
    targets = {65536: 20.0}
    problems = [Problem(n, "float32", target=targets.get(n)) for n in (4096, 16384, 65536, 262144)]
    problems += [Problem(n, "bfloat16") for n in (4096, 16384, 65536)]
    return [*problems, *(Problem(2**20, "float32", block_size=size, choice_target=1e-3) for size in (256, 128, 64))]


# --- Candidates ---------------------------------------------------------------------------------------------


class Session:
    """Both caches with the same content, and queries to ask them."""

    def __init__(self, problem: Problem, device: torch.device, dtype: torch.dtype) -> None:
        self.problem = problem
        options: dict[str, Any] = {"block_size": problem.block_size, "dtype": dtype, "device": device}
        options["max_seq_len"] = problem.num_tokens + 2 * NUM_APPENDS
        sizes = (problem.batch_size, problem.num_heads, problem.head_dim)
        self.cache = tg.MobaCache(*sizes, **options)
        self.paged = tg.PagedMobaCache(*sizes, **options)
        generator = torch.Generator(device).manual_seed(0)

        def draw(length: int) -> Tensor:
            shape = (problem.batch_size, problem.num_heads, length, problem.head_dim)
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        for first in range(0, problem.num_tokens, 8192):
            length = min(8192, problem.num_tokens - first)
            key, value = draw(length), draw(length)
            self.cache.append(key, value)
            self.paged.append(key, value)
        self.queries = [draw(1) for _ in range(NUM_QUERIES)]
        self.new = (draw(1), draw(1))
        # Views of the contiguous cache: dense attention reads the same memory.
        self.key, self.value = self.cache.key, self.cache.value

    def candidates(self) -> dict[str, Callable[[], Tensor]]:
        """One token each."""
        queries = {name: cycle(self.queries) for name in (OURS, PAGED, TORCH, ROUTE)}
        top_k = self.problem.top_k
        calls: dict[str, Callable[[], Tensor]] = {
            TORCH: lambda: F.scaled_dot_product_attention(next(queries[TORCH]), self.key, self.value),
            OURS: lambda: tg.moba_decode(next(queries[OURS]), self.cache, top_k),
            PAGED: lambda: tg.moba_decode(next(queries[PAGED]), self.paged, top_k),
            ROUTE: lambda: self.choose(next(queries[ROUTE])),
        }
        if self.key.is_cuda:
            calls[GRAPH] = self.captured()
        return calls

    def choose(self, query: Tensor) -> Tensor:
        """What moba_decode does before it attends."""
        cache = self.cache
        slots = min(self.problem.top_k, -(-self.problem.num_tokens // cache.block_size))
        route = torch.ops.topgather.moba_decode_route.default
        places = (cache.centroids, cache.seq_lens, cache.page_table, None, cache.block_size, cache.page_size)
        chosen: Tensor = route(query, *places, slots, 0, 1)
        return chosen

    def captured(self) -> Callable[[], Tensor]:
        """The same in a CUDA graph; each call brings in another query."""
        query = self.queries[0].clone()
        queries = cycle(self.queries)
        graph = torch.cuda.CUDAGraph()
        tg.moba_decode(query, self.cache, self.problem.top_k)
        with torch.cuda.graph(graph):
            out = tg.moba_decode(query, self.cache, self.problem.top_k)

        def replay() -> Tensor:
            query.copy_(next(queries))
            graph.replay()
            return out

        return replay

    def check(self, dtype: torch.dtype) -> None:
        """All blocks chosen, it is dense attention; and pages do not matter."""
        query = self.queries[0]
        dense = F.scaled_dot_product_attention(query.float(), self.key.float(), self.value.float())
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        out = tg.moba_decode(query, self.cache, top_k=None)
        torch.testing.assert_close(out.float(), dense, rtol=tolerance, atol=tolerance)
        paged = tg.moba_decode(query, self.paged, self.problem.top_k)
        assert torch.equal(paged, tg.moba_decode(query, self.cache, self.problem.top_k))


# --- Measuring ----------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(problem: Problem, device: torch.device) -> dict[str, Any]:
    dtype = getattr(torch, problem.dtype)
    session = Session(problem, device, dtype)
    session.check(dtype)
    candidates = session.candidates()
    for run in candidates.values():
        for _ in range(5):
            run()
    timings: dict[str, Timing]
    if device.type == "cuda":
        samples = time_in_rounds(candidates, device, budget_seconds=1.0)
        timings = {name: Timing(tuple(times)) for name, times in samples.items()}
    else:
        timings = time_interleaved(candidates, device, min_rounds=10, max_rounds=200, budget_seconds=3.0)
    key, value = session.new
    appends = {"append": lambda: session.cache.append(key, value)}
    appended = time_interleaved(appends, device, min_rounds=NUM_APPENDS, max_rounds=NUM_APPENDS)["append"]
    ratio = timings[TORCH].min_seconds / min(timings[name].min_seconds for name in (OURS, GRAPH) if name in timings)
    row: dict[str, Any] = {"problem": str(problem), **asdict(problem), "ratio": ratio, "append": appended.to_json()}
    row["times"] = {name: timing.to_json() for name, timing in timings.items()}
    if problem.choice_target is not None:
        row |= {"target_met": timings[ROUTE].min_seconds <= problem.choice_target}
    if problem.target is not None:
        row |= {"target_ratio": problem.target, "target_met": ratio >= problem.target}
    return row


# --- Showing ------------------------------------------------------------------------------------------------


def show(row: dict[str, Any]) -> str:
    """One line a measured problem."""
    times = "  ".join(f"{name} {format_seconds(entry['min_seconds'])}" for name, entry in row["times"].items())
    target = ""
    if "target_met" in row:
        if "target_ratio" in row:
            wanted = f"{row['target_ratio']:.0f}x"
        else:
            wanted = f"choice {format_seconds(row['choice_target'])}"
        target = f"  target {wanted}: {'met' if row['target_met'] else 'MISSED'}"
    return f"    {times}  append {format_seconds(row['append']['min_seconds'])}  {row['ratio']:.1f}x{target}"


def draw(rows: list[dict[str, Any]], run: dict[str, Any], path: Path) -> None:
    """Time of a token by the tokens before it, a panel a dtype."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure = Figure(figsize=(5.5 * len(dtypes), 4.2), layout="constrained")
    for axes, dtype in zip(figure.subplots(1, len(dtypes), squeeze=False)[0], dtypes, strict=True):
        chosen = [row for row in rows if (row["dtype"], row["block_size"]) == (dtype, rows[0]["block_size"])]
        lengths = [row["num_tokens"] for row in chosen]
        for name in chosen[0]["times"]:
            times = [row["times"][name]["min_seconds"] * 1e3 for row in chosen]
            axes.loglog(lengths, times, "o-", label=name, color=COLORS[name])
        appends = [row["append"]["min_seconds"] * 1e3 for row in chosen]
        axes.loglog(lengths, appends, "o:", label="topgather, appending", color=COLORS[OURS])
        axes.set(title=f"{dtype}, batch {chosen[0]['batch_size']}", xlabel="tokens in the cache", ylabel="ms a token")
        axes.set_xticks(lengths, [f"{length // 1024}K" for length in lengths])
        axes.legend(fontsize=8)
    save_figure(figure, run, path)


def main() -> None:
    options = parse_options(__doc__, "decode")
    device, run = begin(options)
    rows: list[dict[str, Any]] = []
    for problem in plan(device, options.quick):
        print(problem, flush=True)
        rows.append(measure(problem, device))
        print(show(rows[-1]), flush=True)
    results = {"run": run, "rows": rows}
    finish("decode", options, device, results, lambda path: draw(rows, run, path))


if __name__ == "__main__":
    main()
