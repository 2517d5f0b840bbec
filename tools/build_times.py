"""What each step of a build costs, longest first.

    python tools/build_times.py             # wall time in the last build, out of ninja's log
    python tools/build_times.py --again     # every step once more, one after the other: processor time
    python tools/build_times.py --build build/dev

Wall time of a step counts whatever ran beside it: the sum of all steps over the length of the build is how many ran at
once. Processor time depends little on what else the machine does.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Step:
    """One compilation or link; wall times in seconds from the start of its build."""

    output: str
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.began


def read_last_build(log: str) -> list[Step]:
    """The steps of the last build in a ``.ninja_log``. Within one build they are in the order they ended."""
    steps: list[Step] = []
    for line in log.splitlines():
        if line.startswith("#"):
            continue
        began, ended, _, output, _ = line.split("\t")
        step = Step(output, int(began) / 1000, int(ended) / 1000)
        if steps and step.ended < steps[-1].ended:
            steps = []
        steps.append(step)
    return steps


def name_of(output: str) -> str:
    """``cpu_avx2: moba_cpu.cpp`` for ``CMakeFiles/cpu_avx2.dir/csrc/moba/moba_cpu.cpp.o``."""
    compiled = re.fullmatch(r"CMakeFiles/(.+?)\.dir/(?:.*/)?([^/]+)\.o", output)
    return f"{compiled[1]}: {compiled[2]}" if compiled else output


def run_again(folder: Path) -> dict[str, float]:
    """Every step's processor seconds, user and system, those of its children included."""
    listed = subprocess.run(["ninja", "-C", folder, "-t", "commands"], capture_output=True, text=True, check=True)
    seconds = {}
    for command in listed.stdout.splitlines():
        output = re.search(r" -o (\S+)", command)
        if output is None:
            continue
        before = os.times()
        subprocess.run(command, shell=True, cwd=folder, check=True)
        after = os.times()
        seconds[output[1]] = after.children_user - before.children_user + after.children_system - before.children_system
    return seconds


def format_table(seconds: dict[str, float], totals: dict[str, float]) -> str:
    """Markdown, a row a step, the totals last."""
    lines = ["| step | seconds |", "|---|---|"]
    for output, taken in sorted(seconds.items(), key=lambda item: -item[1]):
        lines.append(f"| `{name_of(output)}` | {taken:.1f} |")
    lines += [f"| {name} | {taken:.1f} |" for name, taken in totals.items()]
    return "\n".join(lines)


def main() -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, help="build folder (default: the one under build/ that was built last)")
    parser.add_argument("--again", action="store_true", help="run every step alone and print processor time")
    options = parser.parse_args()
    logs = sorted((ROOT / "build").glob("*/.ninja_log"), key=lambda path: path.stat().st_mtime)
    log = options.build / ".ninja_log" if options.build else next(reversed(logs), None)
    if log is None or not log.exists():
        print("build_times: no build by ninja found; name its folder", file=sys.stderr)
        return 1
    if options.again:
        seconds = run_again(log.parent)
        print(format_table(seconds, {"all steps, on one core": sum(seconds.values())}))
        return 0
    steps = read_last_build(log.read_text())
    length = max(step.ended for step in steps) - min(step.began for step in steps)
    seconds = {step.output: step.seconds for step in steps}
    print(format_table(seconds, {"all steps": sum(seconds.values()), "the whole build": length}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
