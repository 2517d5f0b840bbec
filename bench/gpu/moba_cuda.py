"""Block attention on a GPU against torch's dense attention and the published packages: ``bench/moba.py --device cuda``.

Peers: torch's scaled_dot_product_attention with the flash and the cuDNN backend and, where they are installed,
flash_attn and flash_moba. All candidates of a problem run in one process, in turn, on the same random inputs; a time
is the median of the rounds, by CUDA events; memory is what a call adds at its peak, results included. A peer whose
time at the last smaller size says that one call here would take longer than ``--call-limit`` is left out, and the
results say so; nothing is extrapolated. ``--seconds`` bounds the whole: the problems that matter most come first.
"""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import topgather as tg
from _harness import (
    Timing,
    describe_run,
    format_bytes,
    format_seconds,
    measure_peak_memory,
    results_folder,
    time_in_rounds,
    time_kernels,
    write_json,
)

NUM_HEADS, TOP_K, DTYPE = 16, 8, torch.bfloat16
BLOCK_SIZES = (128, 64)
FORWARD, BOTH = "forward", "forward+backward"
SINGLE_BATCH_FROM = 262144
"""Tokens from which on the batch holds one sequence instead of two."""

SIZES = (65536, 8192, 524288, 131072, 32768, 262144, 16384)
"""Tokens with heads of 128, in the order they are measured in."""
SMALL_HEAD_SIZES = (65536, 16384)
"""Tokens with heads of 64."""

FLASH, CUDNN = "flash SDPA", "cuDNN SDPA"
COLORS = {
    FLASH: "#8a8f98",
    CUDNN: "#4c9f70",
    "flash_attn": "#bdbdbd",
    "flash_moba 128": "#e0a458",
    "flash_moba 64": "#c98b2b",
    "topgather 128": "#d1495b",
    "topgather 64": "#2e4057",
}


@dataclass(frozen=True)
class Problem:
    """One size to measure at."""

    direction: str
    num_tokens: int
    head_dim: int
    batch_size: int
    num_heads: int = NUM_HEADS
    top_k: int = TOP_K


@dataclass(frozen=True)
class Target:
    """What a candidate should reach at a problem: a maximum time, or a minimum ratio to a peer's time."""

    direction: str
    num_tokens: int
    peer: str | None
    limit: float


# All for topgather, block 128, heads of 128.
TARGETS = (
    Target(FORWARD, 65536, None, 5e-3),
    Target(FORWARD, 65536, FLASH, 20.0),
    Target(FORWARD, 65536, CUDNN, 10.0),
    Target(BOTH, 65536, FLASH, 20.0),
    Target(FORWARD, 524288, FLASH, 60.0),
)


@dataclass
class Settings:
    """How long to measure, and at what."""

    seconds: float = 240.0
    call_limit: float = 5.0
    round_seconds: float = 1.0
    problems: list[Problem] = field(default_factory=list)
    block_sizes: tuple[int, ...] = BLOCK_SIZES


def plan(is_quick: bool) -> list[Problem]:
    """Problems in the order they are measured in."""

    def problem(direction: str, num_tokens: int, head_dim: int) -> Problem:
        return Problem(direction, num_tokens, head_dim, 1 if num_tokens >= SINGLE_BATCH_FROM else 2)

    if is_quick:
        return [problem(direction, 8192, 128) for direction in (FORWARD, BOTH)]
    sized = [(num_tokens, 128) for num_tokens in SIZES] + [(num_tokens, 64) for num_tokens in SMALL_HEAD_SIZES]
    return [problem(direction, *size) for size in sized for direction in (FORWARD, BOTH)]


# --- Candidates ---------------------------------------------------------------------------------------------

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(backend: SDPBackend) -> Attention:
    """Torch's dense attention with one certain backend; raises where that one cannot run."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    return attention


def optional_module(name: str) -> Any:
    """The module, or None where it is not installed or does not load."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):
        return None


def flash_moba_attention(block_size: int, num_tokens: int, batch_size: int, device: torch.device) -> Attention:
    """FlashMoBA's function, which takes packed sequences: its inputs are laid out for it before it is timed."""
    function = optional_module("flash_moba").flash_moba_varlen_func
    bounds = torch.arange(0, (batch_size + 1) * num_tokens, num_tokens, dtype=torch.int32, device=device)
    return lambda query, key, value: function(
        query, key, value, bounds, bounds, num_tokens, num_tokens, block_size, TOP_K, causal=True
    )


def candidates_of(problem: Problem, block_sizes: tuple[int, ...], device: torch.device) -> dict[str, Attention]:
    """Every candidate at hand, by the name it has in the results."""
    found: dict[str, Attention] = {
        FLASH: sdpa(SDPBackend.FLASH_ATTENTION),
        CUDNN: sdpa(SDPBackend.CUDNN_ATTENTION),
    }
    flash_attn = optional_module("flash_attn")
    if flash_attn is not None:
        found["flash_attn"] = lambda query, key, value: flash_attn.flash_attn_func(query, key, value, causal=True)
    for block_size in block_sizes:
        if optional_module("flash_moba") is not None:
            found[f"flash_moba {block_size}"] = flash_moba_attention(
                block_size, problem.num_tokens, problem.batch_size, device
            )
        found[f"topgather {block_size}"] = topgather_attention(block_size)
    return found


def topgather_attention(block_size: int) -> Attention:
    """Ours: routing and attention."""
    return lambda query, key, value: tg.moba_attention(query, key, value, block_size=block_size, top_k=TOP_K)


def make_inputs(problem: Problem, device: torch.device) -> list[Tensor]:
    """query, key, value and grad_out ``[B, H, N, D]``, standard normal, the same in every run."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (problem.batch_size, problem.num_heads, problem.num_tokens, problem.head_dim)
    return [torch.randn(shape, generator=generator, device=device, dtype=DTYPE) for _ in range(4)]


def laid_out_for(candidate: str, tensors: list[Tensor]) -> list[Tensor]:
    """The inputs in the layout that the candidate takes."""
    if candidate.startswith("flash_moba"):
        return [tensor.transpose(1, 2).flatten(0, 1).contiguous() for tensor in tensors]
    if candidate.startswith("flash_attn"):
        return [tensor.transpose(1, 2).contiguous() for tensor in tensors]
    return tensors


def runner(attention: Attention, direction: str, inputs: list[Tensor]) -> Callable[[], object]:
    """What is timed: the forward, or the forward and the gradients of query, key and value."""
    *qkv, grad_out = inputs
    if direction == FORWARD:
        return torch.no_grad()(lambda: attention(*qkv))
    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    return lambda: torch.autograd.grad(attention(*leaves), leaves, grad_out)


def check_against_reference(device: torch.device) -> float:
    """Largest error of topgather's output relative to the largest entry; raises where it is no rounding error."""
    problem = Problem(FORWARD, 1024, 128, batch_size=1, num_heads=2)
    query, key, value, _ = make_inputs(problem, device)
    routing = tg.moba_route(query, key, block_size=128, top_k=4)
    out = tg.moba_attention(query, key, value, block_size=128, routing=routing)
    expected, _ = tg.reference.moba_attention(query, key, value, routing.block_indices, 128)
    error = ((out.double() - expected).abs().max() / expected.abs().max()).item()
    if not error <= 4 * 2.0**-8:
        raise RuntimeError(f"topgather is off by {error:.2e} of the largest entry: nothing worth timing")
    return error


# --- Measuring ----------------------------------------------------------------------------------------------


@dataclass
class Session:
    """What a run has measured so far, and how much time it has left."""

    device: torch.device
    settings: Settings
    began: float = field(default_factory=time.monotonic)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def seconds_left(self) -> float:
        """Time until nothing new is begun."""
        return self.settings.seconds - (time.monotonic() - self.began)

    def row_of(self, candidate: str, problem: Problem) -> dict[str, Any] | None:
        """What was measured, or None."""
        for row in self.rows:
            if row["candidate"] == candidate and all(row[name] == value for name, value in asdict(problem).items()):
                return row
        return None


def reason_to_skip(session: Session, candidate: str, problem: Problem) -> str | None:
    """Why a candidate is not run at a problem, judged by its time at the largest smaller one; None to run it."""
    if session.seconds_left <= 0:
        return f"out of time: the run was given {session.settings.seconds:.0f} s"
    smaller = [
        row
        for row in session.rows
        if row["candidate"] == candidate
        and row["direction"] == problem.direction
        and row["head_dim"] == problem.head_dim
        and row["num_tokens"] < problem.num_tokens
        and "median_seconds" in row
    ]
    if not smaller or candidate.startswith("topgather"):
        return None
    nearest = max(smaller, key=lambda row: row["num_tokens"])
    growth = (problem.num_tokens / nearest["num_tokens"]) ** 2 * problem.batch_size / nearest["batch_size"]
    expected = nearest["median_seconds"] * growth
    # At least two calls: one to warm up and one to time.
    if expected <= session.settings.call_limit and 2 * expected <= session.seconds_left:
        return None
    took = format_seconds(nearest["median_seconds"])
    return f"one call would take too long here, at N={nearest['num_tokens']} it took {took}"


def result_bytes(problem: Problem) -> int:
    """Bytes of out and its lse and, with the backward, of the three gradients."""
    rows = problem.batch_size * problem.num_heads * problem.num_tokens
    out = rows * problem.head_dim * DTYPE.itemsize
    return out + rows * 4 + (3 * out if problem.direction == BOTH else 0)


def short_reason(error: Exception) -> str:
    """An exception in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line}"[:200]


def measure(session: Session, problem: Problem) -> None:
    """Append a row for every candidate: its times and memory, or why there are none."""
    device = session.device
    inputs = make_inputs(problem, device)
    ready: dict[str, Callable[[], object]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, attention in candidates_of(problem, session.settings.block_sizes, device).items():
        row: dict[str, Any] = {"candidate": name, **asdict(problem)}
        session.rows.append(row)
        reason = reason_to_skip(session, name, problem)
        if reason is not None:
            row["skipped"] = reason
            continue
        try:
            run = runner(attention, problem.direction, laid_out_for(name, inputs))
            row["peak_bytes"] = measure_peak_memory(run, device)  # warms up too
            row["result_bytes"] = result_bytes(problem)
        except Exception as error:  # whatever a peer raises, the others are still worth measuring
            row.pop("peak_bytes", None)
            row["failed" if name.startswith("topgather") else "skipped"] = short_reason(error)
            continue
        ready[name], rows[name] = run, row
    for name, samples in time_in_rounds(ready, device, session.settings.round_seconds).items():
        rows[name] |= Timing(tuple(samples)).to_json()
    del inputs, ready
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_ops(problem: Problem, device: torch.device, round_seconds: float) -> dict[str, float]:
    """Median seconds of every op alone, at one problem, block 128."""
    query, key, value, grad_out = make_inputs(problem, device)
    routing = tg.moba_route(query, key, block_size=128, top_k=TOP_K)
    packed = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
    # Eight sequences of unequal length.
    cuts = [0, 1, 3, 6, 10, 15, 21, 28, 36]
    bounds = torch.tensor([cut * problem.num_tokens // 36 for cut in cuts], dtype=torch.int32, device=device)
    longest = int(bounds.diff().max())
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]

    def given_routing(*qkv: Tensor) -> Tensor:
        return tg.moba_attention(*qkv, block_size=128, routing=routing)

    def backward(mode: AbstractContextManager[None]) -> object:
        with mode:
            return torch.autograd.grad(given_routing(*leaves), leaves, grad_out)

    def varlen() -> object:
        return tg.moba_attention_varlen(
            *packed, bounds, bounds, longest, longest, block_size=128, top_k=TOP_K, is_causal=True
        )

    calls: dict[str, Callable[[], object]] = {
        "block_centroids": lambda: tg.block_centroids(key, block_size=128),
        "moba_route": lambda: tg.moba_route(query, key, block_size=128, top_k=TOP_K),
        "moba_attention, routing given": torch.no_grad()(lambda: given_routing(query, key, value)),
        "moba_attention, routing given, forward+backward": lambda: backward(nullcontext()),
        "the same, deterministic": lambda: backward(deterministic_algorithms()),
        "moba_attention_varlen, first sequence cut into 8": torch.no_grad()(varlen),
    }
    for call in calls.values():
        call()
    samples = time_in_rounds(calls, device, round_seconds)
    return {name: statistics.median(times) for name, times in samples.items()}


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """``torch.use_deterministic_algorithms(True)`` for the length of the block."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def measure_stages(problem: Problem, device: torch.device, block_size: int) -> list[dict[str, Any]]:
    """Time of each kernel of one topgather call."""
    run = runner(topgather_attention(block_size), problem.direction, make_inputs(problem, device))
    return time_kernels(run, device)


# --- Showing ------------------------------------------------------------------------------------------------


def judged_targets(session: Session) -> Iterator[dict[str, Any]]:
    """Every target with what was measured, where both sides of it were."""
    for target in TARGETS:
        problem = next(
            (p for p in plan(is_quick=False) if (p.direction, p.num_tokens) == (target.direction, target.num_tokens)),
            None,
        )
        assert problem is not None
        ours = session.row_of("topgather 128", problem)
        peer = session.row_of(target.peer, problem) if target.peer else None
        measured = None
        if ours is not None and "median_seconds" in ours:
            if target.peer is None:
                measured = ours["median_seconds"]
            elif peer is not None and "median_seconds" in peer:
                measured = peer["median_seconds"] / ours["median_seconds"]
        is_met = None
        if measured is not None:
            is_met = measured <= target.limit if target.peer is None else measured >= target.limit
        yield {**asdict(target), "measured": measured, "met": is_met}


def describe_target(target: Mapping[str, Any]) -> str:
    """One line: what was wanted, what there is."""
    if target["peer"] is None:
        wanted, form = f"at most {format_seconds(target['limit'])}", format_seconds
    else:
        wanted, form = f"at least {target['limit']:.0f}x {target['peer']}", "{:.1f}x".format
    verdict = {True: "met", False: "MISSED", None: "not measured"}[target["met"]]
    reached = "" if target["measured"] is None else f", {form(target['measured'])}"
    return f"target {target['direction']} N={target['num_tokens']}: {wanted}{reached}: {verdict}"


def describe_row(row: Mapping[str, Any]) -> str:
    """One line: a candidate at a problem."""
    head = f"{row['direction']:<16} D={row['head_dim']:<3} N={row['num_tokens']:<6} B={row['batch_size']}"
    if "median_seconds" not in row:
        return f"{head} {row['candidate']:<14} {row.get('skipped') or 'FAILED: ' + row.get('failed', 'not timed')}"
    working = max(0, row["peak_bytes"] - row["result_bytes"])
    return (
        f"{head} {row['candidate']:<14} {format_seconds(row['median_seconds']):>9} "
        f"(minimum {format_seconds(row['min_seconds'])} of {row['num_samples']}), "
        f"adds {format_bytes(row['peak_bytes'])}, {format_bytes(working)} beyond its results"
    )


def draw(rows: list[dict[str, Any]], run: Mapping[str, Any], path: Path) -> None:
    """Time forward, time with the backward, and memory, over tokens; heads of 128."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    forward, both, memory = figure.subplots(1, 3)
    for axes, direction in ((forward, FORWARD), (both, BOTH)):
        for name in COLORS:
            _plot(
                axes, name, _points(rows, name, direction, lambda row: row["median_seconds"] / row["batch_size"] * 1e3)
            )
        axes.set(title=direction, ylabel="milliseconds a sequence")
    for name in COLORS:
        points = _points(rows, name, BOTH, lambda row: row["peak_bytes"] / row["batch_size"] / 2**30)
        _plot(memory, name, points)
    memory.set(title=f"memory added at the peak, {BOTH}", ylabel="GiB a sequence, results included")
    figure.suptitle(
        f"bfloat16, H={NUM_HEADS}, D=128, top_k={TOP_K}, causal; {run['device']}, torch {run['torch']}, "
        f"commit {run['commit']}",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _points(
    rows: list[dict[str, Any]], name: str, direction: str, height: Callable[[dict[str, Any]], float]
) -> list[tuple[int, float]]:
    wanted = [
        row
        for row in rows
        if row["candidate"] == name
        and row["direction"] == direction
        and row["head_dim"] == 128
        and row.get("median_seconds", math.nan) > 0
    ]
    return sorted((row["num_tokens"], height(row)) for row in wanted)


def _plot(axes: Axes, name: str, points: list[tuple[int, float]]) -> None:
    if points:
        axes.loglog(*zip(*points, strict=True), "o-", color=COLORS[name], label=name, markersize=4)
        axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel("tokens")
    axes.grid(True, which="major", alpha=0.3)


# --- Running ------------------------------------------------------------------------------------------------


def run_benchmark(device: torch.device, settings: Settings, folder: Path | None) -> int:
    """Measure, print and write everything; returns the exit status: 0 unless topgather itself failed somewhere."""
    run = describe_run(device)
    print(run, flush=True)
    print(f"largest error against the reference: {check_against_reference(device):.1e} of the largest entry")
    peers = {}
    for name in ("flash_attn", "flash_moba"):
        module = optional_module(name)
        peers[name] = "not installed" if module is None else str(getattr(module, "__version__", "unknown version"))
    print(f"peers: torch {run['torch']}; " + "; ".join(f"{name} {found}" for name, found in peers.items()), flush=True)

    session = Session(device, settings)
    content: dict[str, Any] = {
        "run": run,
        "shape": {"num_heads": NUM_HEADS, "top_k": TOP_K, "dtype": str(DTYPE)[6:], "is_causal": True},
        "peers": peers,
        "rows": session.rows,
        "ops": {},
        "stages": [],
    }
    for problem in settings.problems:
        first_row = len(session.rows)
        measure(session, problem)
        measure_details(session, problem, content)
        for row in session.rows[first_row:]:
            print(describe_row(row), flush=True)
        content["targets"] = list(judged_targets(session))
        content["took_seconds"] = round(time.monotonic() - session.began, 1)
        if folder is not None:  # after every problem: a run that is cut short leaves what it has
            write_json(folder / "moba.json", content)

    print_details(content)
    if folder is not None:
        draw(session.rows, run, folder / "moba.png")
        print(f"Written: {folder / 'moba.json'}, {folder / 'moba.png'}")
    return 1 if not session.rows or any("failed" in row for row in session.rows) else 0


def measure_details(session: Session, problem: Problem, content: dict[str, Any]) -> None:
    """Kernel by kernel at the first and the largest size, and every op alone at the first."""
    problems, device = session.settings.problems, session.device
    is_first = (problem.num_tokens, problem.head_dim) == (problems[0].num_tokens, problems[0].head_dim)
    is_largest = problem.num_tokens == max(other.num_tokens for other in problems)
    if session.seconds_left <= 0 or not (is_first or is_largest):
        return
    try:
        for block_size in session.settings.block_sizes:
            kernels = measure_stages(problem, device, block_size)
            content["stages"].append({**asdict(problem), "block_size": block_size, "kernels": kernels})
        if is_first and problem.direction == BOTH:
            content["ops"] = measure_ops(problem, device, session.settings.round_seconds)
    except Exception as error:  # the times of the other sizes are still wanted
        session.rows.append({"candidate": "topgather alone", **asdict(problem), "failed": short_reason(error)})


def print_details(content: Mapping[str, Any], num_kernels: int = 14) -> None:
    """The kernels that take longest, the ops, the targets."""
    for stage in content["stages"]:
        print(f"\nkernels, {stage['direction']}, N={stage['num_tokens']}, block {stage['block_size']}:")
        for kernel in stage["kernels"][:num_kernels]:
            print(f"  {format_seconds(kernel['seconds']):>9}  {kernel['launches']:g} x {kernel['kernel']}")
    for name, seconds in content["ops"].items():
        print(f"op at the first size: {format_seconds(seconds):>9}  {name}")
    print("\n".join(map(describe_target, content["targets"])))


def main_on_cuda(device: torch.device, options: Any) -> int:
    """What ``bench/moba.py --device cuda`` does."""
    if not torch.cuda.is_available():
        print("no GPU: torch sees no CUDA device")
        return 2
    settings = Settings(options.seconds, options.call_limit, problems=plan(options.quick))
    folder = options.output or (None if options.quick else results_folder(device))
    return run_benchmark(device, settings, folder)
