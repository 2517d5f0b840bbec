"""One line a kernel out of what ncu prints: time, DRAM, tensor pipe, occupancy, top stalls.

Metric names differ between architectures and versions of ncu, so the sections are asked for, whose names do not, and
the metrics are found by pattern in the raw page.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping
from typing import Any

from kernel_table import shorten

SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "WarpStateStats",
    "LaunchStats",
    "Occupancy",
)
OURS = "moba|memory|product_key|grid|key_conv"
# The clocks are left as they are, and so is the cache: kernels of a wave read what the one before left in it.
OPTIONS = [
    *("--profile-from-start", "off", "--clock-control", "none", "--cache-control", "none"),
    *("--launch-count", "40", "--csv", "--page", "raw"),
    *(option for section in SECTIONS for option in ("--section", section)),
]


def options_for(kernels: Iterable[str] = ()) -> list[str]:
    """Ncu's options for kernels of these names, or for all of this project's."""
    pattern = "|".join(f"^{name}$" for name in kernels) or OURS
    return [*OPTIONS, "--kernel-name", f"regex:{pattern}"]


PATTERNS = {
    "dram_percent": r"^(gpu__)?dram__?throughput\.avg\.pct_of_peak_sustained_elapsed$",
    "tensor_percent": r"pipe_tensor.*pct_of_peak_sustained_active$",
    "occupancy_percent": r"^sm__warps_active\.avg\.pct_of_peak_sustained_active$",
    "l2_hit_percent": r"^lts__t_sector_hit_rate\.pct$",
    "registers": r"^launch__registers_per_thread$",
}
STALL = r"issue_stalled_(\w+?)_per_\w+\.ratio$"
DURATION = r"^gpu__time_duration\.sum$"
SECONDS = {
    "nsecond": 1e-9,
    "ns": 1e-9,
    "usecond": 1e-6,
    "us": 1e-6,
    "msecond": 1e-3,
    "ms": 1e-3,
    "second": 1.0,
    "s": 1.0,
}


def read_launches(output: str) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Every profiled launch as a row of ncu's CSV, and the unit of each column; empty where there is no CSV."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return [], {}
    table = [line for line in lines[start:] if line.startswith('"')]
    units, *launches = csv.DictReader(io.StringIO("\n".join(table))) if len(table) > 1 else ({},)
    return launches, units


def summarize(output: str) -> list[dict[str, Any]]:
    """A dictionary a kernel: its launches' means, weighted by how long each took, longest in all first."""
    launches, units = read_launches(output)
    by_kernel: dict[str, list[dict[str, str]]] = {}
    for launch in launches:
        by_kernel.setdefault(launch.get("Kernel Name", "?"), []).append(launch)
    summaries = [_summarize_kernel(name, rows, units) for name, rows in by_kernel.items()]
    return sorted(summaries, key=lambda summary: -summary["seconds"])


def _summarize_kernel(name: str, rows: list[dict[str, str]], units: Mapping[str, str]) -> dict[str, Any]:
    durations = [_seconds(row, units) for row in rows]
    total = sum(durations)
    weights = [duration / total for duration in durations] if total else [1 / len(rows)] * len(rows)
    summary: dict[str, Any] = {"kernel": shorten(name), "launches": len(rows), "seconds": total}
    for key, pattern in PATTERNS.items():
        columns = [column for column in rows[0] if column and re.search(pattern, column)]
        values = [_mean((_number(row[column]) for row in rows), weights) for column in columns]
        present = [value for value in values if value is not None]
        if present:
            summary[key] = round(max(present)) if key == "registers" else round(max(present), 1)
    stalls: dict[str, float] = {}
    for column in rows[0]:
        found = re.search(STALL, column or "")
        value = _mean((_number(row[column]) for row in rows), weights) if found else None
        if found and value is not None and found[1] != "selected":  # which is no stall
            stalls[found[1]] = max(value, stalls.get(found[1], 0.0))
    top = sorted(stalls.items(), key=lambda stall: -stall[1])[:3]
    summary["stalls"] = {reason: round(cycles, 2) for reason, cycles in top}
    return summary


def _seconds(row: Mapping[str, str], units: Mapping[str, str]) -> float:
    column = next((column for column in row if column and re.search(DURATION, column)), None)
    value = None if column is None else _number(row[column])
    return 0.0 if column is None or value is None else value * SECONDS.get(units.get(column, "ns"), 1e-9)


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def _mean(values: Iterable[float | None], weights: list[float]) -> float | None:
    pairs = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs) if pairs else None


def read_predictions(document: str) -> dict[tuple[str, str], float]:
    """Microseconds that docs/kernels.md predicts for the profiled problem, by direction and kernel."""
    predicted: dict[tuple[str, str], float] = {}
    for table in re.split(r"^(?=\| (?:forward|backward), ms \|)", document, flags=re.MULTILINE)[1:]:
        header, *rows = (line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| "))
        profiled = next((row for row in rows if row[0] == "profiled"), [])
        for name, milliseconds in zip(header, profiled, strict=False):
            if name.startswith("`"):
                predicted[header[0].split(",")[0], name.strip("`")] = float(milliseconds) * 1e3
    return predicted


def format_table(kernels: list[dict[str, Any]], document: str = "") -> str:
    """Markdown, a row a kernel; with what docs/kernels.md predicts beside what was measured."""
    predicted = read_predictions(document)
    lines = [
        "| kernel | launches | microseconds | predicted | DRAM % | tensor % | occupancy % | L2 hits % | registers | "
        "top stalls |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kernel in kernels:
        stalls = ", ".join(f"{reason} {cycles}" for reason, cycles in kernel["stalls"].items())
        numbers = [str(kernel.get(key, "-")) for key in PATTERNS]
        name = f"{kernel.get('direction', '')} {kernel['kernel']}".strip()
        expected = predicted.get((kernel.get("direction", ""), kernel["kernel"].split("<")[0]))
        times = f"{kernel['seconds'] * 1e6:.1f} | {'-' if expected is None else f'{expected:.0f}'}"
        lines.append(f"| {name} | {kernel['launches']} | {times} | {' | '.join(numbers)} | {stalls} |")
    return "\n".join(lines)
