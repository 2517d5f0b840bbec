"""Run the tests with the versions of torch, Python and transformers that are promised: what ``make versions`` runs.

    python tools/versions.py --wheel build/wheels/cuda-off/topgather-*.whl
    python tools/versions.py --wheel ... --only torch2.6.0-python3.10      one row of the table, or several
    python tools/versions.py --wheel ... --corner                          the oldest torch with the oldest Python: CI

One wheel serves all rows. Each gets an environment of its own under build/versions, removed when its tests have passed:
the wheel, torch as an index has it, pytest, and a copy of the tests without the package's sources beside them. The
self-check must pass, then no test may fail. A row's outcome replaces that row of the table in docs/status.md.

Interpreters are looked for on the path (``python3.10``), then among pyenv's; ``--python 3.14=PATH`` names another. A
row whose interpreter is missing is an error, but for ``--corner``, which takes the oldest there is and says which.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / "build" / "versions"
TABLE = ROOT / "docs" / "status.md"
BEGIN, END = "<!-- made by tools/versions.py -->", "<!-- end -->"

# What each name of a row's tests means. None of them holds what reads the repository beside the package, builds, or
# needs the emulator or several processes.
REPOSITORY = ["cuda", "distributed", "emulation", "package", "transformers"]
SUBSETS: dict[str, list[str]] = {
    "ops and layers": ["tests", *(f"--ignore=tests/{folder}" for folder in REPOSITORY)],
    "a subset": [
        "tests/block_attention/test_attention.py",
        "tests/block_attention/test_block_routing.py",
        "tests/block_attention/test_nn.py",
        "tests/block_attention/test_record_replay.py",
        "tests/block_attention/test_top_k.py",
        "tests/decoding/test_cache.py",
        "tests/grid/test_attention.py",
        "tests/grid/test_nn.py",
        "tests/indexer/test_loss.py",
        "tests/indexer/test_nn.py",
        "tests/key_conv/test_torch_integration.py",
        "tests/memory/test_lookup.py",
        "tests/memory/test_nn.py",
        "tests/memory/test_topk.py",
        "tests/memory/test_usage.py",
        "tests/all_ops/test_autograd.py",
        "tests/all_ops/test_compile.py",
        "tests/all_ops/test_export.py",
        "tests/all_ops/test_onnx.py",
    ],
    "transformers": ["tests/transformers"],
}


@dataclass(frozen=True)
class Row:
    """What one environment holds, and what runs in it."""

    torch: str
    python: str
    tests: str
    transformers: str = ""
    numpy: bool = True

    @property
    def name(self) -> str:
        """What ``--only`` takes."""
        beside = f"-transformers{self.transformers}" if self.transformers else "" if self.numpy else "-without-numpy"
        return f"torch{self.torch}-python{self.python}{beside}"

    @property
    def beside(self) -> str:
        """The column of the table."""
        return f"transformers {self.transformers}" if self.transformers else "numpy" if self.numpy else "no numpy"

    def requirements(self) -> list[str]:
        """For pip."""
        wanted = [f"torch=={self.torch}", "pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100"]
        wanted += ["numpy", "safetensors"] if self.numpy else []  # the second imports the first
        return wanted + ([f"transformers=={self.transformers}"] if self.transformers else [])


OLDEST, NEWEST = "3.10", "3.15"
CORNER = Row("2.6.0", OLDEST, "a subset")
MATRIX = [
    CORNER,
    Row("2.6.0", "3.13", "a subset"),  # the newest that has this torch
    Row("2.8.0", OLDEST, "a subset"),
    Row("2.10.0", "3.12", "a subset"),
    Row("2.13.0", "3.11", "a subset", numpy=False),
    Row("2.14.1", OLDEST, "a subset"),
    Row("2.14.1", "3.13", "a subset"),
    Row("2.15.0", "3.14", "a subset"),
    Row("2.15.0", NEWEST, "a subset"),
    *(
        Row("2.13.0", "3.11", "transformers", transformers=version)
        for version in ("4.56.2", "4.57.6", "5.0.0", "5.8.1", "5.16.1", "5.24.0")
    ),
]


@dataclass(frozen=True)
class Outcome:
    """What pytest counted, and where it took that long."""

    passed: int
    failed: int
    skipped: int
    seconds: float
    failures: tuple[str, ...]


def read_outcome(text: str) -> Outcome:
    """Of what ``pytest -q -ra`` prints; a run without its closing line is none.

    Raises:
        ValueError: there is no such line, or no test ran.
    """
    closing = re.findall(r"^(?:=+ )?((?:\d+ \w+,? ?)+) in ([\d.]+)s", text, re.MULTILINE)
    if not closing:
        raise ValueError("pytest's closing line is missing")
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", closing[-1][0])}
    failed = sum(counts.get(word, 0) for word in ("failed", "error", "errors"))
    if counts.get("passed", 0) + failed == 0:
        raise ValueError("no test ran")
    failures = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.MULTILINE)
    return Outcome(counts.get("passed", 0), failed, counts.get("skipped", 0), float(closing[-1][1]), tuple(failures))


def replace_row(page: str, row: Row, outcome: Outcome, day: str) -> str:
    """``page`` with this row's line of the table, in the order of ``MATRIX``; lines of rows that are no more go.

    Raises:
        ValueError: the page has no such table.
    """
    if BEGIN not in page or END not in page[page.index(BEGIN) :]:
        raise ValueError(f"{TABLE.name} needs the lines {BEGIN} and {END}")
    before, rest = page.split(BEGIN, 1)
    table, after = rest.split(END, 1)
    lines = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if re.match(r"\d", cells[0]):
            lines[tuple(cells[:4])] = line
    keys = {each: (each.torch, each.python, each.beside, each.tests) for each in MATRIX}
    counts = f"{outcome.passed:,} | {outcome.failed} | {outcome.skipped}"
    lines[keys[row]] = f"| {' | '.join(keys[row])} | {counts} | {outcome.seconds:.0f} s | {day} |"
    head = "| torch | Python | beside | tests | passed | failed | skipped | time | day |\n" + "|---" * 9 + "|"
    kept = [lines[key] for key in keys.values() if key in lines]
    return f"{before}{BEGIN}\n\n" + "\n".join([head, *kept]) + f"\n\n{END}{after}"


def interpreters(named: list[str]) -> dict[str, str]:
    """Pythons from 3.10 on by version: those that were named, else of the path, else of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = {}
    for minor in range(10, 20):
        version = f"3.{minor}"
        candidates = [shutil.which(f"python{version}"), *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
        for path in candidates:
            # pyenv's own programs on the path stand for versions that may be switched off.
            if path and subprocess.run([path, "-c", "import venv, ssl"], capture_output=True).returncode == 0:
                found[version] = path
                break
    found.setdefault(f"3.{sys.version_info.minor}", sys.executable)
    return found | dict(pair.split("=", 1) for pair in named)


def make_environment(row: Row, python: str, wheel: Path) -> Path:
    """The environment's folder, made if it is not there, with this wheel."""
    place = ENVIRONMENTS / row.name
    pip = [place / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    if not (place / "complete").exists():
        shutil.rmtree(place, ignore_errors=True)
        subprocess.run([python, "-m", "venv", place], check=True)
        subprocess.run([*pip, *row.requirements()], check=True)
        (place / "complete").touch()
    subprocess.run([*pip, "--no-deps", "--force-reinstall", wheel], check=True)
    return place


def run_tests(row: Row, place: Path, workers: int) -> str:
    """The self-check and the tests; what pytest printed, which is kept beside the environment too."""
    python = place / "bin" / "python"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "topgather"], cwd=folder, check=True)
        shutil.copytree(ROOT / "tests", Path(folder) / "tests")
        shutil.copytree(ROOT / "docs", Path(folder) / "docs", ignore=shutil.ignore_patterns("assets"))  # its tables
        shutil.copy(ROOT / "pyproject.toml", folder)  # pytest's settings
        command = [python, "-m", "pytest", "-q", "--show-capture=no", "-p", "no:cacheprovider"]
        command += ["-o", "faulthandler_timeout=120"]  # what hangs says where
        command += ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else []
        done = subprocess.run([*command, *SUBSETS[row.tests]], cwd=folder, text=True, stdout=subprocess.PIPE)
    ENVIRONMENTS.joinpath(f"{row.name}.log").write_text(done.stdout)
    return done.stdout


def select(only: list[str], corner: bool, pythons: dict[str, str]) -> list[Row]:
    """The rows to run.

    Raises:
        ValueError: no such row, or no interpreter for one.
    """
    if corner:
        return [Row(CORNER.torch, min(pythons, key=lambda version: int(version.split(".")[1])), CORNER.tests)]
    rows = {row.name: row for row in MATRIX}
    unknown = [name for name in only if name not in rows]
    if unknown:
        raise ValueError(f"no row {unknown[0]}; there are {', '.join(rows)}")
    chosen = [rows[name] for name in only] or MATRIX
    missing = sorted({row.python for row in chosen} - set(pythons))
    if missing:
        raise ValueError(f"no Python {missing[0]}; --python {missing[0]}=PATH names one, --only leaves rows out")
    return chosen


def main() -> None:
    """Each row in turn; the exit status says whether a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True, help="what `make wheel` made")
    parser.add_argument("--only", action="append", default=[], metavar="ROW", help="this row; may be repeated")
    parser.add_argument("--corner", action="store_true", help=f"torch {CORNER.torch} with the oldest Python; no table")
    parser.add_argument("--python", action="append", default=[], metavar="VERSION=PATH", help="an interpreter")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of pytest")
    parser.add_argument("--install-only", action="store_true", help="make environments, which a later call uses")
    parser.add_argument("--list", action="store_true", help="print the rows' names")
    options = parser.parse_args()
    if options.list:
        print("\n".join(row.name for row in MATRIX))
        return
    pythons = interpreters(options.python)
    try:
        rows = select(options.only, options.corner, pythons)
    except ValueError as error:
        parser.error(str(error))
    failed = []
    for row in rows:
        print(f"versions: {row.name}, {row.tests}", flush=True)
        began = time.monotonic()
        place = make_environment(row, pythons[row.python], options.wheel.resolve())
        print(f"versions: installed in {time.monotonic() - began:.0f} s", flush=True)
        if options.install_only:
            continue
        text = run_tests(row, place, options.workers)
        outcome = read_outcome(text)
        print("\n".join(text.splitlines()[-12:]), flush=True)
        if not options.corner:
            day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
            TABLE.write_text(replace_row(TABLE.read_text(), row, outcome, day))
        if outcome.failed:
            failed.append(row.name)
        else:
            shutil.rmtree(place)
    if failed:
        sys.exit(f"versions: tests failed with {', '.join(failed)}; see {ENVIRONMENTS}/*.log")


if __name__ == "__main__":
    main()
