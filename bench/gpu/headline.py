"""One line of speed an op, at its headline size against torch in the same run, and which kernels take longest.

    python bench/gpu/headline.py --output build/gpu/results      # a minute on a GPU
    python bench/gpu/headline.py --device cpu --quick            # a smoke run

The problems and peers are those of ``bench/``, the first of each that matters; an op that fails or comes too late says
so and does not stop the others. Writes headline.json: ``rows``, and of each call of ``profile_cases.py`` the
``kernels`` by torch's profiler, longest first.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import moba_cuda
import profile_cases

import decode
import grid
import key_conv
import memory
from _harness import Timing, describe_run, format_seconds, time_in_rounds, time_kernels, write_json

QUICK_MOBA = [
    moba_cuda.Problem(direction, 256, 32, 1, num_heads=2, top_k=2) for direction in (moba_cuda.FORWARD, moba_cuda.BOTH)
]
MOBA_SIZES = (65536, 8192)
Rows = list[dict[str, Any]]


def measure_moba(problem: moba_cuda.Problem, device: torch.device) -> Rows:
    """Block attention beside torch's flash attention, which on a CPU has a backend of its own."""
    inputs = moba_cuda.make_inputs(problem, device)
    attentions = {
        memory.TORCH: moba_cuda.sdpa(moba_cuda.SDPBackend.FLASH_ATTENTION),
        memory.OURS: moba_cuda.topgather_attention(32 if problem.num_tokens < 1024 else 128),
    }
    runs = {name: moba_cuda.runner(attention, problem.direction, inputs) for name, attention in attentions.items()}
    samples = time_in_rounds(runs, device, budget_seconds=1.0)
    times = {name: Timing(tuple(seconds)) for name, seconds in samples.items()}
    sizes = f"B={problem.batch_size}, {problem.num_heads} heads, N={problem.num_tokens}, D={problem.head_dim}"
    ratio = times[memory.TORCH].min_seconds / times[memory.OURS].min_seconds
    row = {"problem": f"bfloat16, {sizes}, top_k {problem.top_k}", "direction": problem.direction, "ratio": ratio}
    return [{**row, "times": {name: timing.to_json() for name, timing in times.items()}}]


def measurements(device: torch.device, is_quick: bool) -> Iterator[tuple[str, Callable[[], Rows]]]:
    """What is measured, the most important first."""
    moba_problems = QUICK_MOBA
    if not is_quick:
        moba_problems = [
            problem
            for size in MOBA_SIZES
            for problem in moba_cuda.plan(is_quick=False)
            if (problem.num_tokens, problem.head_dim) == (size, 128)
        ]
    searches, lookups = memory.plan(device, is_quick)
    search = next((problem for problem in searches if problem.target is not None), searches[0])
    for problem in moba_problems:
        yield "moba_attention", partial(measure_moba, problem, device)
    yield "memory_lookup", lambda: memory.measure_lookup(lookups[0], device)
    yield "product_key_topk", lambda: [memory.measure_topk(search, device)]
    yield "grid_attention", lambda: grid.measure(grid.plan(device, is_quick)[0], device)
    yield "moba_decode", lambda: [decode.measure(decode.plan(device, is_quick)[-1], device)]
    yield "key_conv", lambda: key_conv.measure(key_conv.plan(device, is_quick)[0], device)


def describe(op: str, row: dict[str, Any]) -> str:
    """The line."""
    times = "  ".join(
        f"{name} {format_seconds(entry['min_seconds']) if 'min_seconds' in entry else entry['error'][:60]}"
        for name, entry in row["times"].items()
    )
    ratio = f"  {row['ratio']:.2f}x" if "ratio" in row else ""
    return f"{op} {row.get('direction', '')} [{row['problem']}]  {times}{ratio}"


def measure_kernels(device: torch.device, is_quick: bool) -> Rows:
    """Kernels of ours, longest first, each with the case of ``profile_cases.py`` that launches it."""
    sizes = {"num_tokens": 256, "num_keys": 16, "side": 16} if is_quick else {}
    kernels: Rows = []
    for case, call in profile_cases.make_calls(device, **sizes).items():
        kernels += [{"case": case, **kernel} for kernel in time_kernels(call, device, calls=2)]
    if device.type == "cuda":
        kernels = [kernel for kernel in kernels if "at::" not in kernel["kernel"] and "Mem" not in kernel["kernel"]]
    return sorted(kernels, key=lambda kernel: -kernel["seconds"])


def main() -> int:
    """Measure everything that there is time for; returns 0 if none of it failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="device to measure on (default: cuda)")
    parser.add_argument("--seconds", type=float, default=60.0, help="begin nothing after so long (default: 60)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--output", type=Path, help="folder for headline.json")
    options = parser.parse_args()
    device, began = torch.device(options.device), time.monotonic()
    content: dict[str, Any] = {"run": describe_run(device), "rows": [], "kernels": []}
    num_failed = 0

    def save() -> None:
        if options.output is not None:
            write_json(options.output / "headline.json", content)

    for op, measure in measurements(device, options.quick):
        if time.monotonic() - began > options.seconds:
            print(f"{op}: not measured, out of time", flush=True)
            content["rows"].append({"op": op, "skipped": "out of time"})
            continue
        try:
            rows = measure()
        except Exception as error:
            num_failed += 1
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(f"{op}: FAILED, {reason}", flush=True)
            content["rows"].append({"op": op, "failed": reason})
        else:
            content["rows"] += [{"op": op, **row} for row in rows]
            print("\n".join(describe(op, row) for row in rows), flush=True)
        save()
    content["kernels"] = measure_kernels(device, options.quick)
    save()
    for kernel in content["kernels"][:12]:
        print(f"    {kernel['case']}: {kernel['kernel']} {format_seconds(kernel['seconds'])}")
    print(f"{len(content['rows'])} lines, {num_failed} failed")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
