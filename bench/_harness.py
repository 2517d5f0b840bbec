"""What every benchmark shares: who ran it, interleaved timing, peak memory, kernel times, JSON out.

Timing interleaves the peers: each round times every candidate once, so noise from other processes falls on
all of them alike. On the CPU, a candidate's time is its minimum over the rounds, the run that was disturbed
the least. The JSON keeps minimum, median, quartiles and the number of samples, but no single samples.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import topgather as tg

RESULTS = Path(__file__).parent / "results"


# --- Who ran it ---------------------------------------------------------------------------------------------


def describe_run(device: torch.device) -> dict[str, Any]:
    """Machine, software and commit of this run, as they go into the JSON."""
    cuda = _describe_cuda(device) if device.type == "cuda" else {}
    return {
        "device": device_name(device),
        **cuda,
        "architecture": platform.machine(),
        "threads": torch.get_num_threads(),
        # Waiting threads of torch's pool spin by default, and hold the cores that ours are started for.
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "cpu_target": tg._native.cpu_target(),
        "torch": torch.__version__,
        "topgather": tg.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def _describe_cuda(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index or 0}"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        driver = "unknown"
    return {
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": driver,
        "torch_cuda": torch.version.cuda,
        "toolkit": tg._native.cuda_toolkit(),
        "cuda_architectures": tg._native.cuda_architectures(),
    }


def device_name(device: torch.device) -> str:
    """The device's name as its maker gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine()


def results_folder(device: torch.device) -> Path:
    """Where this device's results are kept: ``bench/results/<device>-<threads>-threads[-passive]/``."""
    name = re.sub(r"\((r|tm)\)", "", device_name(device).lower())
    if device.type == "cpu":
        name = f"{name} {tg._native.cpu_target()} {torch.get_num_threads()} threads"
        if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive":
            name += " passive"
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def _commit() -> str:
    """Hash of the checked-out commit, marked where the tree but for results differs; ``COMMIT`` names it elsewhere."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    except OSError:
        return os.environ.get("COMMIT", "unknown")
    if head.returncode != 0:
        return os.environ.get("COMMIT", "unknown")
    status = [*git, "status", "--porcelain", "--", ":(top)", ":(top,exclude)bench/results"]
    changed = subprocess.run(status, capture_output=True, text=True).stdout.strip()
    return head.stdout.strip() + ("+changes" if changed else "")


# --- Time ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Times of one candidate in seconds, one per round."""

    samples: tuple[float, ...]

    @property
    def min_seconds(self) -> float:
        """Minimum of all rounds."""
        return min(self.samples)

    @property
    def median_seconds(self) -> float:
        """Median of all rounds."""
        return statistics.median(self.samples)

    def per_call(self, num_calls: int) -> Timing:
        """Times of one call, where each sample timed ``num_calls`` of them."""
        return Timing(tuple(sample / num_calls for sample in self.samples))

    def to_json(self) -> dict[str, Any]:
        """Minimum, median, first and third quartile in seconds, and the number of samples."""
        several = self.samples if len(self.samples) > 1 else 2 * self.samples
        first_quartile, _, third_quartile = statistics.quantiles(several, n=4, method="inclusive")
        return {
            "min_seconds": self.min_seconds,
            "median_seconds": self.median_seconds,
            "quartile_seconds": [first_quartile, third_quartile],
            "num_samples": len(self.samples),
        }


def synchronize(device: torch.device) -> None:
    """Wait until everything queued on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_interleaved(
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    min_rounds: int = 2,
    max_rounds: int = 8,
    budget_seconds: float = 5.0,
    prepare: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time every candidate once a round.

    A candidate is in every round up to ``min_rounds``, and then up to ``max_rounds`` as long as its own runs
    together stay within ``budget_seconds``. ``prepare`` is called before every run and not timed.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for round_idx in range(max_rounds):
        for name, run in candidates.items():
            spent = sum(samples[name])
            if round_idx >= min_rounds and spent * (1 + 1 / round_idx) > budget_seconds:
                continue
            if prepare is not None:
                prepare()
            synchronize(device)
            began = time.perf_counter()
            result = run()
            synchronize(device)
            samples[name].append(time.perf_counter() - began)
            del result
    return {name: Timing(tuple(times)) for name, times in samples.items()}


def time_in_rounds(
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    budget_seconds: float,
    sample_seconds: float = 2e-3,
    max_rounds: int = 50,
) -> dict[str, list[float]]:
    """Seconds of one call of every candidate, once a round, on the device's own clock; at least one round.

    For candidates that have been warmed up. Calls shorter than ``sample_seconds`` are timed several in a row, so
    that what the host needs to start one hides behind the one before. A candidate leaves when the next sample would
    take it past ``budget_seconds``.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    calls = dict.fromkeys(candidates, 1)
    spent = dict.fromkeys(candidates, 0.0)
    for round_idx in range(max_rounds):
        for name, run in candidates.items():
            taken = samples[name]
            if round_idx > 0 and spent[name] + taken[-1] * calls[name] > budget_seconds:
                continue
            seconds = _time_calls(run, device, calls[name])
            spent[name] += seconds * calls[name]
            taken.append(seconds)
            if round_idx == 0 and seconds < sample_seconds:
                # The first sample only says how many calls make one.
                calls[name] = max(2, math.ceil(sample_seconds / max(seconds, 1e-6)))
                taken[0] = _time_calls(run, device, calls[name])
    return samples


def _time_calls(run: Callable[[], object], device: torch.device, calls: int) -> float:
    """Seconds a call, by CUDA events where the device has them."""
    synchronize(device)
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - began) / calls
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def time_kernels(run: Callable[[], object], device: torch.device, calls: int = 5) -> list[dict[str, Any]]:
    """Each kernel that a call launches: its name, launches and seconds a call, longest first. torch's profiler."""
    activity = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    run()
    synchronize(device)
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(calls):
            run()
        synchronize(device)
    kernels = []
    for entry in profile.key_averages():
        microseconds = entry.self_device_time_total if device.type == "cuda" else entry.self_cpu_time_total
        if microseconds > 0:
            name = short_kernel_name(entry.key)
            kernels.append({"kernel": name, "launches": entry.count / calls, "seconds": microseconds / calls / 1e6})
    return sorted(kernels, key=lambda kernel: -kernel["seconds"])


def short_kernel_name(full_name: str) -> str:
    """``moba_x<BFloat16>`` for ``void topgather::moba_x<topgather::BFloat16>(topgather::XArguments)``."""
    short = re.sub(r"\(anonymous namespace\)::|\btopgather::|^void |\((?:int|bool|unsigned int)\)", "", full_name)
    depth = 0
    for i, character in enumerate(short):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return short[:i]
    return short


def measure_gemm_rate(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of torch's matrix product of two square matrices, best of several."""
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    timing = time_interleaved({"gemm": lambda: left @ right}, device, max_rounds=50, budget_seconds=2.0)
    return 2 * size**3 / timing["gemm"].min_seconds


# --- Memory -------------------------------------------------------------------------------------------------


def measure_peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes by which ``run`` raises this process's resident memory at its peak, results included.

    Call it in a process made for it (:func:`in_fresh_process`), after a small warm-up of the same code:
    memory freed by earlier work would be reused unseen.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    before = _reset_peak()
    result = run()
    peak = _peak_resident()
    del result
    return max(0, peak - before)


def _reset_peak() -> int:
    """Set the process's peak to what it holds now, where the system allows it; returns the peak in bytes."""
    # Where it fails, the peak so far stands in, which can only understate what the run adds.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak_resident()


def _peak_resident() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return int(re.findall(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)[0]) * 1024


def in_fresh_process(script: str, option: str, argument: Mapping[str, Any]) -> Any:
    """Run ``script option <argument as JSON>`` in a new interpreter and return the JSON of its last line."""
    command = [sys.executable, script, option, json.dumps(argument)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed with exit status {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# --- Results ------------------------------------------------------------------------------------------------


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content``, making the folder where needed: floats of five digits, a table's row on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_format_json(content) + "\n")


def _format_json(value: Any, indent: int = 0) -> str:
    """JSON with a line for every object or array that holds plain values alone, and for plain values side by side."""
    if isinstance(value, float):
        return json.dumps(float(f"{value:.5g}"))
    if not isinstance(value, Mapping | list | tuple):
        return json.dumps(value)
    is_object = isinstance(value, Mapping)
    opening, closing = "{}" if is_object else "[]"
    lines: list[str] = []
    was_plain = False
    for name, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        text = _format_json(item, indent + 1)
        text = f"{json.dumps(name)}: {text}" if is_object else text
        is_plain = not isinstance(item, Mapping) and "\n" not in text
        if is_plain and was_plain:
            lines[-1] += f", {text}"
        else:
            lines.append(text)
        was_plain = is_plain
    if len(lines) <= 1 and (was_plain or not lines):
        return f"{opening}{''.join(lines)}{closing}"
    line_break = "\n" + " " * (indent + 1)
    return f"{opening}{line_break}{f',{line_break}'.join(lines)}\n{' ' * indent}{closing}"


def format_seconds(seconds: float) -> str:
    """Three digits with a unit."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def format_bytes(size: float) -> str:
    """Three digits, in MiB."""
    return f"{size / 2**20:.3g} MiB" if size < 1000 * 2**20 else f"{size / 2**30:.3g} GiB"


def parse_options(doc: str | None, name: str, measures_memory: bool = False) -> argparse.Namespace:
    """The options that benchmarks of this folder share; ``name`` is that of their results."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes only, a few seconds")
    parser.add_argument("--device", default="cpu", help="device to measure on (default: cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--output", type=Path, help=f"folder for {name}.json and {name}.png")
    if measures_memory:
        parser.add_argument("--measure-memory", help=argparse.SUPPRESS)
    return parser.parse_args()


def begin(options: argparse.Namespace) -> tuple[torch.device, dict[str, Any]]:
    """The device to measure on, and this run's description, printed."""
    device = torch.device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    _settle_allocator()
    run = describe_run(device)
    print(run)
    return device, run


def _settle_allocator() -> None:
    """Free one large tensor, as any longer process has.

    glibc decides by the largest piece freed so far what it returns to the system at once. Before that, whether a
    candidate's result of some MiB is new memory, at a microsecond a page, is chance, and stays so for a whole run.
    """
    torch.zeros(31 << 20, dtype=torch.uint8)  # it learns from pieces of up to 32 MiB


def save_figure(figure: Figure, run: dict[str, Any], path: Path) -> None:
    """Write a picture with the run's machine above it."""
    figure.suptitle(f"{run['device']}, {run['threads']} threads, {run['cpu_target']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def finish(
    name: str, options: argparse.Namespace, device: torch.device, results: dict[str, Any], draw: Callable[[Path], None]
) -> None:
    """Say how many targets were met, and write results and picture; those of a quick run only where asked to."""
    judged = [row for row in results["rows"] if "target_met" in row]
    print(f"Targets: {sum(row['target_met'] for row in judged)} of {len(judged)} met.")
    folder = options.output or (None if options.quick else results_folder(device))
    if folder is None:
        return
    write_json(folder / f"{name}.json", results)
    draw(folder / f"{name}.png")
    print(f"Written: {folder / f'{name}.json'}, {folder / f'{name}.png'}")
