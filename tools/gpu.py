"""Everything to be learnt from a machine with a GPU, in one call of under six minutes: `make gpu`.

    make gpu PYTHON=python3 OUT=build/gpu/results        # COMMIT=<hash> where there is no checkout to ask
    make gpu GPU="--only headline --only ncu"            # some steps again; what is built already is used
    make gpu GPU="--seconds 900"                         # time for the long benchmarks too

Builds for the GPU at hand; then what is worth most comes first: the suite on it, one line of speed an op against torch,
ncu of the three kernels that take longest, compute-sanitizer over the small cases, the benchmarks, and in the time that
is left the emulated tests. Nothing is installed or fetched: the interpreter that runs this script must have torch,
pybind11, cmake, ninja, numpy, pytest, pytest-xdist, hypothesis and matplotlib. Every step has a time limit and goes on
whatever became of the others; without a GPU those that need one say so.

Leaves in the output folder: summary.md and summary.json, log.txt (everything the steps printed), headline.json, a .json
and a .png of each benchmark, kernels.json (ncu), and all of it as one results.tar.gz.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import ncu_summary

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
PACKAGE = BUILD / "package"
PREDICTIONS = ROOT / "docs" / "kernels.md"
EMULATION = BUILD / "emulation"
TOTAL_SECONDS = 330.0
EMULATION_SECONDS = 150.0
"""With less left, a machine with a GPU does not begin with the emulation."""
SHORT_BENCHMARKS = {"memory": 50.0, "grid": 40.0, "decode": 40.0, "key_conv": 30.0}
"""Scripts of bench/ beside moba.py, and what each may take."""
BENCHMARKS = ("moba", *SHORT_BENCHMARKS)
ARCHIVE = "results.tar.gz"
RESULTS = (
    *("summary.md", "summary.json", "log.txt", "headline.json", "kernels.json"),
    *(f"{name}.{suffix}" for name in BENCHMARKS for suffix in ("json", "png")),
)
NUM_PROFILED = 3
"""Kernels that ncu looks at: it runs each some twenty times over."""
PROFILED = ("forward", "backward", "memory", "grid", "decode", "key_conv")
"""What bench/gpu/profile_cases.py can be asked for."""
MODULES = ("torch", "pybind11", "numpy", "pytest", "xdist", "hypothesis", "matplotlib")

PASSED, FAILED, TIMED_OUT, NO_GPU, NOT_RUN = "passed", "failed", "timed out", "no GPU", "not run"


@dataclass
class Step:
    """What became of one step."""

    name: str
    status: str
    seconds: float = 0.0
    detail: str = ""


@dataclass
class Outcome:
    """How a command ended."""

    status: str
    output: str
    seconds: float


@dataclass
class Machine:
    """What there is to work with."""

    gpu: str | None
    compute_capability: str | None
    python: str = sys.executable
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    def tool(self, name: str) -> str | None:
        """Path of a program, beside the interpreter, on PATH or in the toolkit's folders."""
        return shutil.which(name, path=self.environment["PATH"])


# --- Running things -----------------------------------------------------------------------------------------


def run_command(command: list[str], environment: Mapping[str, str], seconds: float) -> Outcome:
    """Run a command for at most so long; whatever it started ends with it."""
    began = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return Outcome(FAILED, f"{command[0]}: {error}", time.monotonic() - began)
    try:
        output, _ = process.communicate(timeout=max(seconds, 1.0))
        status = PASSED if process.returncode == 0 else FAILED
        if process.returncode < 0:
            output += f"\nended by {signal.Signals(-process.returncode).name}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            output, _ = process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        status = TIMED_OUT
    return Outcome(status, output, time.monotonic() - began)


def last_line(output: str, pattern: str = r"\S") -> str:
    """The last line that the pattern is found in, or the last that says anything at all."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    matching = [line for line in lines if re.search(pattern, line)]
    return ((matching or lines or [""])[-1])[:300]


Judge = Callable[[Outcome], tuple[str, str]]
"""What a command's end means for its step: the status and the detail."""


def judge_by(pattern: str) -> Judge:
    """As the exit status says, summed up by the last line with the pattern."""
    return lambda outcome: (outcome.status, last_line(outcome.output, pattern))


def look_at_machine() -> Machine:
    """The GPU, if there is one that torch can use, and an environment in which every program is found."""
    environment = dict(os.environ)
    toolkits = [environment.get("CUDA_HOME", ""), "/usr/local/cuda"]
    folders = [str(Path(sys.executable).parent), *environment.get("PATH", "").split(os.pathsep)]
    cmake = importlib.util.find_spec("cmake")
    if cmake is not None and cmake.origin is not None:
        folders.append(str(Path(cmake.origin).parent / "data" / "bin"))
    for toolkit in filter(None, toolkits):
        folders += [f"{toolkit}/bin", f"{toolkit}/compute-sanitizer"]
    folders += [str(folder) for folder in sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)]
    environment["PATH"] = os.pathsep.join(dict.fromkeys(filter(None, folders)))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE), environment.get("PYTHONPATH")]))
    environment["PYTHONUNBUFFERED"] = "1"
    machine = Machine(None, None, environment=environment)
    question = (
        "import torch\n"
        "if torch.cuda.is_available():\n"
        "    print(torch.cuda.get_device_name(0))\n"
        "    print('%d%d' % torch.cuda.get_device_capability(0))"
    )
    answer = run_command([machine.python, "-c", question], environment, 60)
    lines = answer.output.strip().splitlines()
    if answer.status == PASSED and len(lines) >= 2:
        machine.gpu, machine.compute_capability = lines[-2], lines[-1]
    return machine


class Session:
    """The steps so far, the time left, and the output folder, which is up to date after every step."""

    def __init__(self, machine: Machine, output: Path, seconds: float) -> None:
        self.machine, self.output, self.seconds = machine, output, seconds
        self.began = time.monotonic()
        self.steps: list[Step] = []
        output.mkdir(parents=True, exist_ok=True)
        for name in (*RESULTS, ARCHIVE):
            (output / name).unlink(missing_ok=True)

    @property
    def seconds_left(self) -> float:
        """Time until everything must have ended."""
        return self.seconds - (time.monotonic() - self.began)

    def run(
        self,
        name: str,
        command: list[str],
        limit: float,
        judge: Judge,
        environment: Mapping[str, str] | None = None,
    ) -> Outcome:
        """Run a step's command and report it."""
        limit = min(limit, self.seconds_left)
        if limit < 5:
            self.report(Step(name, NOT_RUN, detail="no time left"))
            return Outcome(NOT_RUN, "", 0.0)
        print(f"{name}: running, at most {limit:.0f} s", flush=True)
        outcome = run_command(command, {**self.machine.environment, **(environment or {})}, limit)
        self.log(name, command, outcome)
        outcome.status, detail = judge(outcome)
        self.report(Step(name, outcome.status, round(outcome.seconds, 1), detail))
        return outcome

    def log(self, name: str, command: list[str], outcome: Outcome) -> None:
        """Append what a command printed to log.txt."""
        with (self.output / "log.txt").open("a") as log:
            log.write(f"===== {name}: {outcome.status} in {outcome.seconds:.1f} s: {' '.join(command)}\n")
            log.write(outcome.output.rstrip() + "\n\n")

    def report(self, step: Step) -> None:
        """Print a step's line and bring the summary up to date."""
        self.steps.append(step)
        print(f"{step.name}: {step.status.upper()} in {step.seconds:.1f} s. {step.detail}", flush=True)
        self.write_summary()

    def write_summary(self) -> None:
        """summary.json and summary.md."""
        content = {
            "gpu": self.machine.gpu,
            "compute_capability": self.machine.compute_capability,
            "python": sys.version.split()[0],
            "seconds": round(time.monotonic() - self.began, 1),
            "steps": [asdict(step) for step in self.steps],
        }
        (self.output / "summary.json").write_text(json.dumps(content, indent=1) + "\n")
        lines = [
            f"# make gpu: {self.machine.gpu or 'no GPU on this machine'}",
            "",
            f"{content['seconds']} s in all.",
            "",
            "| step | outcome | seconds | |",
            "|---|---|---|---|",
        ]
        for step in self.steps:
            lines.append(f"| {step.name} | {step.status} | {step.seconds} | {step.detail.replace('|', '/')} |")
        kernels = self.output / "kernels.json"
        if kernels.exists():
            lines += ["", ncu_summary.format_table(json.loads(kernels.read_text()), PREDICTIONS.read_text())]
        (self.output / "summary.md").write_text("\n".join(lines) + "\n")
        with tarfile.open(self.output / ARCHIVE, "w:gz") as archive:
            for name in RESULTS:
                if (self.output / name).exists():
                    archive.add(self.output / name, arcname=name)


# --- The steps ----------------------------------------------------------------------------------------------


def architecture_of(compute_capability: str | None) -> str:
    """What to compile for: the GPU at hand, or a Hopper one where there is none."""
    capability = compute_capability or "90"
    return f"{capability}a-real" if capability == "90" else f"{capability}-real"


def configure_and_build(
    session: Session, name: str, source: Path, folder: Path, options: list[str], limit: float
) -> bool:
    """Configure and build one CMake project; whether it was built."""
    machine = session.machine
    cmake, ninja = machine.tool("cmake"), machine.tool("ninja")
    if cmake is None or ninja is None:
        session.report(Step(name, FAILED, detail="cmake and ninja must be installed with the interpreter or on PATH"))
        return False
    # The emulated modules include it.
    pybind11 = run_command([machine.python, "-m", "pybind11", "--cmakedir"], machine.environment, 30)
    if pybind11.status != PASSED:
        session.report(Step(name, FAILED, detail=f"pybind11: {last_line(pybind11.output)}"))
        return False
    script = 'set -e; cmake="$1"; source="$2"; folder="$3"; shift 3; "$cmake" -S "$source" -B "$folder" "$@"; '
    script += '"$cmake" --build "$folder"'
    fixed = [
        "-GNinja",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={machine.python}",
        f"-Dpybind11_DIR={pybind11.output.strip().splitlines()[-1]}",
    ]
    command = ["sh", "-c", script, "sh", cmake, str(source), str(folder), *fixed, *options]
    return session.run(name, command, limit, judge_by(r"error|Error|\[\d+/\d+\] Linking")).status == PASSED


def build(session: Session) -> bool:
    """The module, into a package folder of its own; whether it can be imported from there."""
    architecture = architecture_of(session.machine.compute_capability)
    options = ["-DTOPGATHER_CUDA=ON", f"-DTOPGATHER_CUDA_ARCHITECTURES={architecture}", "-DTOPGATHER_LINE_INFO=ON"]
    limit = 140.0 if session.machine.gpu else 300.0
    if not configure_and_build(session, f"build for {architecture}", ROOT, BUILD, options, limit):
        return False
    shutil.rmtree(PACKAGE, ignore_errors=True)
    shutil.copytree(
        ROOT / "python" / "topgather", PACKAGE / "topgather", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    for module in BUILD.glob("_native*.so"):
        shutil.copy2(module, PACKAGE / "topgather")
    check = session.run("self-check", [session.machine.python, "-m", "topgather"], 60, judge_by(r"self-check +\w+ in"))
    return check.status == PASSED


def pytest_command(session: Session, *options: str) -> list[str]:
    """Pytest over the suite."""
    workers = max(2, min(8, (os.cpu_count() or 2) // 2))
    return [
        session.machine.python,
        "-m",
        "pytest",
        "tests",
        "-q",
        "-n",
        str(workers),
        "-p",
        "no:cacheprovider",
        *options,
    ]


def test_on_gpu(session: Session) -> None:
    """Every test that has a CUDA device among its parameters, and what runs on a GPU alone."""
    session.run("tests on the GPU", pytest_command(session, "-m", "gpu"), 120, judge_by(r"\d+ (passed|failed|error)"))


def measure_headlines(session: Session) -> None:
    """One line an op, and which kernels take longest: headline.json."""
    limit = max(20.0, min(90.0, session.seconds_left - 60.0))
    command = [session.machine.python, "bench/gpu/headline.py", "--output", str(session.output)]
    session.run(
        "headline speeds",
        [*command, "--seconds", f"{limit - 15.0:.0f}"],
        limit,
        judge_by(r"\d+ lines, \d+ failed|Error"),
    )


def sanitize(session: Session) -> None:
    """The sanitizers' three tools over the small cases, side by side: none of them is about time."""
    names = ("memcheck", "racecheck", "synccheck")
    sanitizer = session.machine.tool("compute-sanitizer")
    limit = min(60.0, session.seconds_left)
    if sanitizer is None or limit < 5:
        for name in names:
            session.report(Step(name, NOT_RUN, detail="no time left" if sanitizer else "compute-sanitizer not found"))
        return
    # Without torch's pool every tensor is an allocation of its own, and an access past its end is seen.
    environment = {**session.machine.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    script = [session.machine.python, str(ROOT / "bench" / "gpu" / "sanitizer_cases.py")]

    def watch(name: str) -> tuple[list[str], Outcome]:
        command = [sanitizer, "--tool", name, "--error-exitcode", "9", "--kernel-name", "kns=topgather", *script]
        outcome = run_command(command, environment, limit)
        if outcome.status == FAILED and re.search(r"kernel-name|unrecogni[sz]ed option|Invalid", outcome.output):
            command = [sanitizer, "--tool", name, "--error-exitcode", "9", *script]
            outcome = run_command(command, environment, limit - outcome.seconds)
        return command, outcome

    print(f"{', '.join(names)}: running side by side, at most {limit:.0f} s", flush=True)
    with ThreadPoolExecutor(len(names)) as pool:
        for name, (command, outcome) in zip(names, pool.map(watch, names), strict=True):
            session.log(name, command, outcome)
            ends = [line.strip() for line in outcome.output.splitlines() if re.search("SUMMARY|cases agree", line)]
            detail = "; ".join(ends) or last_line(outcome.output)
            session.report(Step(name, outcome.status, round(outcome.seconds, 1), detail))


def benchmark(session: Session) -> None:
    """bench/moba.py and the others, each with its JSON and its picture. What it may take leaves them time."""
    seconds = max(20.0, min(110.0, session.seconds_left - sum(SHORT_BENCHMARKS.values())))
    options = ["--device", "cuda", "--output", str(session.output)]
    command = [session.machine.python, "bench/moba.py", *options, "--seconds", f"{seconds:.0f}"]
    session.run("benchmark", command, seconds + 30.0, judge_by(r"N=65536 .*topgather 128|FAILED|Error"))
    for name, limit in SHORT_BENCHMARKS.items():
        command = [session.machine.python, f"bench/{name}.py", *options]
        session.run(f"{name} benchmark", command, limit, judge_by(r"Targets:|Error"))


def judge_profile(outcome: Outcome) -> tuple[str, str]:
    """Ncu exits with 0 even where it was not allowed to read a counter."""
    found = ncu_summary.summarize(outcome.output)
    if found:
        return outcome.status, f"{len(found)} kernels"
    return outcome.status if outcome.status != PASSED else FAILED, last_line(outcome.output, "==ERROR==|==WARNING==")


def longest_kernels(session: Session) -> dict[str, list[str]]:
    """What to profile, by the call that launches it: the longest kernels, or all where nothing was measured."""
    path = session.output / "headline.json"
    kernels = json.loads(path.read_text())["kernels"] if path.exists() else []
    chosen: dict[str, list[str]] = {}
    names: set[str] = set()
    for kernel in kernels:
        name = kernel["kernel"].split("<")[0]
        if name not in names and len(names) < NUM_PROFILED:
            names.add(name)
            chosen.setdefault(kernel["case"], []).append(name)
    return chosen or {case: [] for case in PROFILED}


def profile(session: Session) -> None:
    """Ncu over the calls that launch the longest kernels: kernels.json."""
    ncu = session.machine.tool("ncu")
    kernels: list[dict[str, object]] = []
    for case, names in longest_kernels(session).items():
        name = f"ncu {case}"
        if ncu is None:
            session.report(Step(name, NOT_RUN, detail="ncu not found"))
            continue
        script = [session.machine.python, str(ROOT / "bench" / "gpu" / "profile_cases.py"), case]
        outcome = session.run(name, [ncu, *ncu_summary.options_for(names), *script], 60, judge_profile)
        kernels += [{"direction": case, **kernel} for kernel in ncu_summary.summarize(outcome.output)]
        (session.output / "kernels.json").write_text(json.dumps(kernels, indent=1) + "\n")
        session.write_summary()


def test_emulated(session: Session) -> None:
    """The CUDA kernels on the CPU: what a machine without a GPU can still say, on one with a GPU if time is left."""
    if session.seconds_left < EMULATION_SECONDS and session.machine.gpu is not None:
        session.report(Step("emulated tests", NOT_RUN, detail="no time left"))
        return
    options = ["-DCMAKE_BUILD_TYPE=Release"]
    if not configure_and_build(
        session, "build of the emulation", ROOT / "tests" / "emulation", EMULATION, options, session.seconds_left
    ):
        return
    session.run(
        "emulated tests",
        pytest_command(session, "-k", "emulat or ptx"),
        session.seconds_left,
        judge_by(r"\d+ (passed|failed|error)"),
        environment={"TOPGATHER_EMULATION": str(EMULATION)},
    )


GPU_STEPS: dict[str, tuple[str, Callable[[Session], None]]] = {
    "tests": ("tests on the GPU", test_on_gpu),
    "headline": ("headline speeds", measure_headlines),
    "ncu": ("ncu", profile),
    "sanitizer": ("memcheck, racecheck, synccheck", sanitize),
    "benchmarks": ("benchmark", benchmark),
}
"""The steps that need a GPU, by what ``--only`` calls them, the most valuable first."""
EMULATION_STEP = "emulation"


def main() -> int:
    """Run every step; returns 0 if everything that could run passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=BUILD / "results", help="folder (default: build/gpu/results)")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help=f"in all (default: {TOTAL_SECONDS:.0f})")
    names = (*GPU_STEPS, EMULATION_STEP)
    parser.add_argument("--only", action="append", choices=names, help="this step, after the build; may be repeated")
    options = parser.parse_args()
    wanted = options.only or names
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"{sys.executable} lacks {', '.join(missing)}; name another interpreter: make gpu PYTHON=...",
            file=sys.stderr,
        )
        return 2
    machine = look_at_machine()
    session = Session(machine, options.output.resolve(), options.seconds)
    print(f"GPU: {machine.gpu or 'none seen by torch'}; results in {session.output}", flush=True)
    is_built = build(session)
    for name, (title, step) in GPU_STEPS.items():
        if name not in wanted:
            continue
        if machine.gpu is None:
            session.report(Step(title, NO_GPU, detail="no GPU is there: torch sees no CUDA device"))
        elif not is_built:
            session.report(Step(title, NOT_RUN, detail="there is no working build"))
        else:
            step(session)
    if is_built and EMULATION_STEP in wanted:
        test_emulated(session)
    bad = [step.name for step in session.steps if step.status in (FAILED, TIMED_OUT)]
    print(f"\n{session.output / 'summary.md'}:\n{(session.output / 'summary.md').read_text()}")
    print(f"Not passed: {', '.join(bad)}" if bad else "Everything that could run here passed.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
