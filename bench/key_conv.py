"""The key convolution against torch's depthwise F.conv1d, SiLU and an addition, and against copying the keys.

    python bench/key_conv.py                  # a minute on two cores
    python bench/key_conv.py --quick          # a smoke run; its results are kept only where --output names a folder
    python bench/key_conv.py --device cuda    # bfloat16, larger sizes

Prints times, ratios, and the share of copy bandwidth: the time that ``copy_`` takes to copy the keys into memory that
is there, over the time that the op takes. The op reads and writes what a copy does, so 1 is the maximum. It
also allocates its result; where the allocator returns large memory to the system, every call pays for new pages, and
so does ``clone``, which is listed beside it. On the CPU the kernel is also timed without the call around it: into
memory that is there, as ``copy_`` is. Writes key_conv.json and key_conv.png to bench/results/<device>/. All run in one
process, interleaved, on the same random inputs, each after the same pass over memory larger than the caches, so that
all begin alike; memory is measured in a fresh process for each.
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
from topgather import _native
from topgather._common.library import describe, reads_tensors

FORWARD, BOTH = "forward", "forward+backward"
OURS, TORCH, COPY, CLONE = "topgather", "conv1d + SiLU + add", "copy_", "clone"
KERNEL = "its kernel alone"
COLORS = {TORCH: "#8a8f98", OURS: "#d1495b", COPY: "#30638e", CLONE: "#7fa3c7"}
MIN_COPY_SHARE = 0.8
SWEPT_BYTES = 128 << 20


@dataclass(frozen=True)
class Problem:
    """Sizes of the keys, and the minimum share of a copy's bandwidth in the forward.

    The copy is ``copy_``, and ``clone`` where results are so large that every one is new memory from the system.
    """

    batch_size: int
    num_heads: int
    num_tokens: int
    head_dim: int
    width: int
    dtype: str
    layout: str = "heads first"  # or "tokens first": the transposed view of a projection
    target_share: float | None = None
    target_peer: str = COPY

    def __str__(self) -> str:
        shape = f"B={self.batch_size}, {self.num_heads} heads, N={self.num_tokens}, D={self.head_dim}"
        return f"{self.dtype}, {shape}, W={self.width}, {self.layout}"

    def key_bytes(self) -> int:
        itemsize = getattr(torch, self.dtype).itemsize
        return self.batch_size * self.num_heads * self.num_tokens * self.head_dim * itemsize


def plan(device: torch.device, is_quick: bool) -> list[Problem]:
    """What is measured."""
    if is_quick:
        return [Problem(1, 2, 512, 32, 3, dtype) for dtype in ("float32", "bfloat16")]
    if device.type == "cuda":
        sizes = [(width, layout) for width in (3, 5) for layout in ("heads first", "tokens first")]
        return [Problem(1, 8, 2**18, 128, width, "bfloat16", layout, MIN_COPY_SHARE) for width, layout in sizes]
    sizes = [(8192, COPY), (65536, CLONE)]  # 16 and 128 MiB of float32
    return [
        Problem(1, 8, num_tokens, 64, width, dtype, layout, MIN_COPY_SHARE, peer)
        for dtype in ("float32", "bfloat16")
        for num_tokens, peer in sizes
        for width in (3, 5)
        for layout in ("heads first", "tokens first")
    ]


# --- Candidates ---------------------------------------------------------------------------------------------


def convolution_of_torch(key: Tensor, weight: Tensor) -> Tensor:
    """The same out of torch's ops: channels first for conv1d, and back."""
    batch, heads, tokens, dim = key.shape
    width = weight.size(-1)
    channels = key.transpose(2, 3).reshape(batch, heads * dim, tokens)
    taps = weight.reshape(heads * dim, 1, width)
    sums = F.conv1d(channels, taps, padding=width - 1, groups=heads * dim)[..., :tokens]
    return key + F.silu(sums).view(batch, heads, dim, tokens).transpose(2, 3)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {TORCH: convolution_of_torch, OURS: tg.key_conv}


def make_inputs(problem: Problem, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and weight, leaves of the graph, and grad_out."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, problem.dtype)

    def keys() -> Tensor:
        shape = [problem.batch_size, problem.num_heads, problem.num_tokens, problem.head_dim]
        if problem.layout == "tokens first":
            shape[1], shape[2] = shape[2], shape[1]
        tensor = torch.randn(shape, generator=generator).to(device, dtype)
        return tensor.transpose(1, 2) if problem.layout == "tokens first" else tensor

    weight = torch.randn(problem.num_heads, problem.head_dim, problem.width, generator=generator).to(device, dtype)
    return keys().requires_grad_(), weight.requires_grad_(), keys()


def make_run(name: str, direction: str, problem: Problem, device: torch.device) -> Callable[[], object]:
    """One call of one candidate."""
    key, weight, grad_out = make_inputs(problem, device)
    source = key.detach()
    if name == COPY:
        return lambda: grad_out.copy_(source)
    if name == CLONE:
        return lambda: source.clone()
    if name == KERNEL:
        taps = weight.detach()

        entry = _native.key_conv_cpu
        fields = {"cu_seqlens": None, "num_threads": torch.get_num_threads(), "state": None, "bias": None}
        fields["has_silu"] = True
        for field, tensor in (("key", source), ("weight", taps), ("out", grad_out)):
            fields[field] = tensor if reads_tensors else describe(tensor)
        passed = [fields[name] for name in _native.argument_names["key_conv_cpu"]]

        def run_kernel() -> None:
            entry(*passed)

        return run_kernel
    function = FUNCTIONS[name]
    if direction == FORWARD:
        weight = weight.detach()
        return lambda: function(source, weight)
    return lambda: torch.autograd.grad(function(key, weight), (key, weight), grad_out)


# --- Measuring ----------------------------------------------------------------------------------------------


def measure(problem: Problem, device: torch.device) -> list[dict[str, Any]]:
    key, weight, _ = make_inputs(problem, device)
    with torch.no_grad():
        ours, theirs = (FUNCTIONS[name](key, weight) for name in (OURS, TORCH))
    torch.testing.assert_close(
        ours.float(), theirs.float(), atol=0.1 if problem.dtype == "bfloat16" else 1e-4, rtol=0.02
    )
    rows = []
    swept = torch.zeros(SWEPT_BYTES // 4, dtype=torch.int32, device=device)
    for direction in (FORWARD, BOTH):
        names = [*FUNCTIONS, COPY, CLONE] if direction == FORWARD else [*FUNCTIONS]
        if direction == FORWARD and device.type == "cpu":
            names.append(KERNEL)
        candidates = {name: make_run(name, direction, problem, device) for name in names}
        for run in candidates.values():
            run()
        timings = time_interleaved(
            candidates, device, min_rounds=10, max_rounds=60, budget_seconds=2.0, prepare=lambda: swept.add_(1)
        )
        ours_seconds = timings[OURS].min_seconds
        row: dict[str, Any] = {"problem": str(problem), "direction": direction, **asdict(problem)}
        row["ratio"] = timings[TORCH].min_seconds / ours_seconds
        row["times"] = {name: timing.to_json() for name, timing in timings.items()}
        if direction == FORWARD:
            row["bytes_per_second"] = 2 * problem.key_bytes() / ours_seconds
            row["copy_share"] = timings[COPY].min_seconds / ours_seconds
            row["clone_share"] = timings[CLONE].min_seconds / ours_seconds
            if KERNEL in timings:
                row["kernel_copy_share"] = timings[COPY].min_seconds / timings[KERNEL].min_seconds
            if problem.target_share is not None:
                share = row["copy_share" if problem.target_peer == COPY else "clone_share"]
                row["target_met"] = share >= problem.target_share
        rows.append(row)
    return rows


def measure_memory(argument: dict[str, Any]) -> dict[str, Any]:
    """Bytes that one call adds at the peak, beyond its inputs."""
    torch.set_num_threads(argument["threads"])
    device = torch.device(argument["device"])
    make_run(argument["candidate"], argument["direction"], Problem(1, 1, 16, 8, 3, "float32"), device)()
    run = make_run(argument["candidate"], argument["direction"], Problem(**argument["problem"]), device)
    return {"peak_bytes": measure_peak_memory(run, device)}


def memory_rows(problem: Problem, device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for direction in (FORWARD, BOTH):
        for name in FUNCTIONS:
            argument = {"candidate": name, "direction": direction, "problem": asdict(problem)}
            argument |= {"threads": torch.get_num_threads(), "device": str(device)}
            rows.append({**argument, **in_fresh_process(__file__, "--measure-memory", argument)})
    return rows


# --- Showing ------------------------------------------------------------------------------------------------


def show(row: dict[str, Any]) -> str:
    """One line a measured problem."""
    times = "  ".join(f"{name} {format_seconds(entry['min_seconds'])}" for name, entry in row["times"].items())
    share = ""
    if "copy_share" in row:
        share = f"  {row['copy_share']:.0%} of copy_, {row['clone_share']:.0%} of clone"
        if "kernel_copy_share" in row:
            share += f"; kernel {row['kernel_copy_share']:.0%} of copy_"
    target = ""
    if "target_met" in row:
        met = "met" if row["target_met"] else "MISSED"
        target = f"  target {row['target_share']:.0%} of {row['target_peer']}: {met}"
    return f"    {row['direction']:17} {times}  {row['ratio']:.2f}x{share}{target}"


def draw(rows: list[dict[str, Any]], run: dict[str, Any], path: Path) -> None:
    """Shares of copy bandwidth, and ratios to torch."""
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    shares, ratios = figure.subplots(1, 2)
    forward = [row for row in rows if row["direction"] == FORWARD][::-1]
    labels = [row["problem"] for row in forward]
    for offset, key, name in ((0.2, "copy_share", COPY), (-0.2, "clone_share", CLONE)):
        places = [place + offset for place in range(len(forward))]
        shares.barh(places, [row[key] for row in forward], height=0.4, color=COLORS[name], label=name)
    shares.set_yticks(range(len(labels)), labels)
    shares.axvline(MIN_COPY_SHARE, color=COLORS[OURS], linewidth=1)
    shares.legend(loc="lower right", fontsize=7)
    shares.set(title="share of a copy's bandwidth, forward", xlabel="time of the copy / time of key_conv")
    for offset, direction, color in ((0.2, FORWARD, COLORS[OURS]), (-0.2, BOTH, COLORS[TORCH])):
        of_direction = [row["ratio"] for row in rows if row["direction"] == direction][::-1]
        places = [place + offset for place in range(len(of_direction))]
        ratios.barh(places, of_direction, height=0.4, color=color, label=direction)
    ratios.set_yticks(range(len(labels)), labels)
    ratios.axvline(1.0, color="black", linewidth=1)
    ratios.legend(loc="lower right", fontsize=7)
    ratios.set(title=f"times faster than {TORCH}", xlabel="ratio")
    for axes in (shares, ratios):
        axes.tick_params(axis="y", labelsize=6)
    save_figure(figure, run, path)


def main() -> None:
    options = parse_options(__doc__, "key_conv", measures_memory=True)
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
    memory = memory_rows(problems[0], device)
    for entry in memory:
        print(f"memory, {entry['direction']}: {entry['candidate']} {format_bytes(entry['peak_bytes'])}")
    results = {"run": run, "rows": rows, "memory": memory}
    finish("key_conv", options, device, results, lambda path: draw(rows, run, path))


if __name__ == "__main__":
    main()
