"""Times and peaks of memory of several candidates, in turn."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

Run = Callable[[], object]

# A sample is made of as many calls as take this long, so that the clock and a call's start do not count.
SAMPLE_SECONDS = 2e-3
MAX_ROUNDS = 12


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """What is measured has gradients whatever the caller's mode is, and leaves the caller's random numbers alone."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
        yield


def device_name(device: torch.device) -> str:
    """The device's name as its maker gives it, and how many threads run there."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models: list[str] = []
    with contextlib.suppress(OSError):
        models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time(run: Run, device: torch.device, num_calls: int = 1) -> float:
    _synchronize(device)
    began = time.perf_counter()
    for _ in range(num_calls):
        run()
    _synchronize(device)
    return (time.perf_counter() - began) / num_calls


def time_in_turn(
    candidates: Mapping[str, Run],
    device: torch.device,
    seconds: float,
    min_rounds: int = 2,
    on_run: Callable[[str], None] = lambda name: None,
) -> dict[str, float]:
    """The least seconds of a call of each candidate.

    A round times every candidate once, so that what else the machine does falls on all alike. There are at least
    ``min_rounds``, and then as many as fit into ``seconds``. The first run of each warms up: it says how many calls
    make a sample, and counts as a sample only where it is long.
    """
    began = time.perf_counter()
    least: dict[str, float] = {}
    num_calls: dict[str, int] = {}
    for name, run in candidates.items():
        on_run(name)
        least[name] = _time(run, device)
        num_calls[name] = 1
        if least[name] < SAMPLE_SECONDS:
            num_calls[name] = max(2, math.ceil(SAMPLE_SECONDS / max(least[name], 1e-6)))
    for round_idx in range(1, MAX_ROUNDS):
        started = time.perf_counter()
        for name, run in candidates.items():
            on_run(name)
            least[name] = min(least[name], _time(run, device, num_calls[name]))
        now = time.perf_counter()
        if round_idx + 1 >= min_rounds and now - began + (now - started) > seconds:
            break
    return least


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """Bytes by which ``run`` raises what is held, at its peak and with its results; None where nobody can tell.

    On CUDA the allocator says so. On Linux it is the resident memory of the process, once memory that earlier calls
    freed has been given back to the system. Elsewhere None.
    """
    gc.collect()
    if device.type == "cuda":
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        _synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux"):
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
        before_bytes = _resident_peak()
        result = run()
        peak = _resident_peak()
    except (OSError, AttributeError, IndexError):
        return None
    del result
    return max(0, peak - before_bytes)


def _resident_peak() -> int:
    return int(re.findall(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)[0]) * 1024


def show_seconds(seconds: float) -> str:
    """Three digits with a unit."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def show_bytes(size: float | None) -> str:
    """Three digits with a unit; a dash for None."""
    if size is None:
        return "-"
    if size < 1000 * 2**10:
        return f"{size / 2**10:.3g} KiB"
    return f"{size / 2**20:.3g} MiB" if size < 1000 * 2**20 else f"{size / 2**30:.3g} GiB"
