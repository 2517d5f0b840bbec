"""`make model`: what the hot kernels' machine code costs, counted and predicted. Writes a part of docs/kernels.md.

    python -m model               # counts, predicts, writes
    python -m model --check       # counts alone; fails where docs/kernels.md says otherwise
    python -m model --compile     # nvcc compiles the few files for sm_90, where no build has left their objects

The objects of the normal build are read where there is one. cuobjdump and nvdisasm come with a CUDA toolkit or as
NVIDIA's packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, which the extra `dev` installs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import find_cuda_packages
import kernel_table

from model import block_attention, decode, grid, indexer, key_conv, memory
from model.paths import Passes, Sources, Walker, WalkError
from model.problems import PROBLEMS, PROFILED, Case, KernelModel, Launch, Problem
from model.processor import (
    CLOCK,
    COPY_BYTES_PER_SECOND,
    DEVICE_BYTES_PER_SECOND,
    LAUNCH_SECONDS,
    PROCESSORS,
    SCHEDULERS,
    SHARED_BYTES_RESERVED,
    resident_thread_blocks,
    simulate,
)
from model.sass import Instruction, Kernel, parse

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "model"
CLASSES = {
    "tensor": ("HMMA",),
    "matrix loads": ("LDSM",),
    "copies": ("LDGSTS",),
    "shared": ("LDS", "STS", "LD", "ST"),
    "global": ("LDG", "STG", "RED", "REDG", "ATOMG"),
    "special": ("MUFU", "I2F", "F2I", "F2F", "POPC", "FLO"),
    "float": ("FMUL", "FADD", "FFMA", "FMNMX", "FSEL", "FSETP", "F2FP", "FCHK", "HADD2", "HMUL2", "HFMA2"),
    "warp": ("SHFL", "VOTE", "VOTEU", "MATCH", "REDUX"),
    "control": (
        "BRA",
        "BSSY",
        "BSYNC",
        "BREAK",
        "WARPSYNC",
        "BAR",
        "EXIT",
        "CALL",
        "RET",
        "NOP",
        "LDGDEPBAR",
        "DEPBAR",
    ),
}
"""Opcodes by what they take; whatever is not here is counted as integer: addresses, indices, predicates, moves."""
OPS = (block_attention, memory, grid, key_conv, decode, indexer)
KERNELS: tuple[KernelModel, ...] = tuple(kernel for op in OPS for kernel in op.KERNELS)
CASES: tuple[Case, ...] = (
    *block_attention.CASES,
    *memory.CASES,
    *grid.CASES,
    *key_conv.CASES,
    *decode.CASES,
    *indexer.CASES,
)
HEADING = kernel_table.MODEL_HEADING
COUNTS_END = "<!-- what follows is predicted, not counted -->"


# --- Machine code -------------------------------------------------------------------------------------------------


def find_tool(name: str) -> str:
    """The path of cuobjdump or nvdisasm: of the packages, then of the machine."""
    folder = find_cuda_packages.find_toolkit([*filter(None, sys.path)], name)
    if folder is not None:
        tool = folder / "bin" / name
        if not os.access(tool, os.X_OK):  # pip keeps the mode, other installers need not
            tool.chmod(0o755)
        return str(tool)
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} not found: pip install nvidia-cuda-{name}, or put a CUDA toolkit on PATH")
    return found


@dataclass(frozen=True)
class Code:
    """The kernels of one source file for sm_90, with the registers and static shared memory of each."""

    kernels: dict[str, Kernel]
    registers: dict[str, int]
    static_shared: dict[str, int]


def read_cubin(cubin: Path) -> Code:
    """Disassembles; what was disassembled once is kept beside the cubin."""
    listing, usage = cubin.with_suffix(".sass"), cubin.with_suffix(".usage")
    if not listing.exists() or listing.stat().st_mtime < cubin.stat().st_mtime:
        commands = {
            listing: [find_tool("nvdisasm"), "-c", "-hex", "-gi", str(cubin)],
            usage: [find_tool("cuobjdump"), "--dump-resource-usage", str(cubin)],
        }
        for path, command in commands.items():
            path.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found = re.findall(r"Function (\S+):\s+REG:(\d+).*?SHARED:(\d+)", usage.read_text())
    return Code(
        parse(listing.read_text()),
        {name: int(registers) for name, registers, _ in found},
        # What the system reserves is in the number where a kernel uses shared memory at all.
        {name: max(int(shared) - SHARED_BYTES_RESERVED, 0) for name, _, shared in found},
    )


def is_part(stem: str, compiled: Path) -> bool:
    """Whether a source file is among those that an object was compiled from: ``compile_together`` in CMakeLists.txt."""
    build = next(folder.parent for folder in compiled.parents if folder.name == "CMakeFiles")
    together = build / "together" / compiled.name.removesuffix(".o")
    return together.exists() and f'/{stem}.cu"' in together.read_text()


def extract(objects: Iterable[Path], stem: str) -> Path:
    """The sm_90 code of the object that a source file was compiled to, as a cubin of its own."""
    for compiled in objects:
        if is_part(stem, compiled):
            cubin = FOLDER / f"{compiled.name.partition('.')[0]}.sm_90.cubin"
            if not cubin.exists() or cubin.stat().st_mtime < compiled.stat().st_mtime:
                FOLDER.mkdir(parents=True, exist_ok=True)
                command = [find_tool("cuobjdump"), "-arch", "sm_90", "-xelf", "all", str(compiled.resolve())]
                subprocess.run(command, cwd=FOLDER, capture_output=True, check=True)
                cubin.touch()
            return cubin
    raise FileNotFoundError(f"no object of {stem} in the build: build first, or use --compile")


def compile_file(stem: str) -> Path:
    """Compiles one source file as the build does, for sm_90 alone, unless the same was compiled before."""
    name = re.fullmatch(r"moba_(forward|backward|route)_(bfloat16)_cuda", stem)
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        digest.update(path.read_bytes())
    cubin = FOLDER / f"{stem}.{digest.hexdigest()[:16]}.cubin"
    if cubin.exists():
        return cubin
    FOLDER.mkdir(parents=True, exist_ok=True)
    if name is None:
        source = next((ROOT / "csrc").rglob(f"{stem}.cu"))
    else:
        source = FOLDER / f"{stem}.cu"
        stage = name[1].capitalize()
        kernels = "BackwardKernels" if stage == "Backward" else f"const {stage}Kernels&"  # tools/cuda_instances.cmake
        source.write_text(
            f'#include "moba/moba_{name[1]}_cuda.cuh"\nnamespace topgather {{\n'
            f"{kernels} {name[1]}_kernels(BFloat16) {{ return k{stage}Kernels<BFloat16>; }}\n}}\n"
        )
    is_read_for_hopper = "moba_backward" in stem  # READ_FOR_HOPPER in CMakeLists.txt
    command = ["nvcc", "-O3", "-DNDEBUG", "-std=c++20", "-lineinfo", f"-I{ROOT / 'csrc'}"]
    command += [] if is_read_for_hopper else ["-DTOPGATHER_READ_ONCE"]
    command += [f"--generate-code=arch=compute_{90 if is_read_for_hopper else 80},code=sm_90"]
    command += ["-cubin", "-o", str(cubin), str(source)]
    subprocess.run(command, check=True)
    return cubin


# --- Counting and predicting --------------------------------------------------------------------------------------


def classify(instructions: Iterable[Instruction]) -> Counter[str]:
    """Instructions by class."""
    class_of = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes}
    return Counter(class_of.get(instruction.opcode, "integer") for instruction in instructions)


@dataclass
class Subject:
    """A described kernel and its code for one head_dim."""

    model: KernelModel
    head_dim: int
    kernel: Kernel
    registers: int
    shared_bytes: int
    threads: int
    sources: Sources
    _cycles: dict[object, tuple[float, float]] = field(default_factory=dict)

    @property
    def resident(self) -> int:
        return resident_thread_blocks(self.registers, self.shared_bytes, self.threads)

    def walker(self, launch: Launch, passes: Sequence[Passes] | None = None) -> Walker:
        passes = launch.passes if passes is None else passes
        return Walker(self.kernel, self.sources, passes, (*self.model.rare, *launch.rare))

    def tile(self) -> list[Instruction]:
        """One pass of the hot loop, or the whole kernel where it has none."""
        launch = self.model.launches(self.model.counted(self.head_dim), self.model.directions[0])[0]
        walker = self.walker(launch)
        return walker.one_pass(self.model.tile) if self.model.tile else walker.whole()

    def cycles(self, launch: Launch, together: int) -> tuple[float, float]:
        """What thread blocks side by side on a multiprocessor take: all of it, and each pass of the hot loop."""
        ways = [launch, *([launch.other] if launch.other else [])]
        key = (*((tuple(way.passes), tuple(way.rare)) for way in ways), together)
        if key not in self._cycles:
            self._cycles[key] = self._simulate(launch, together)
        return self._cycles[key]

    def _simulate(self, launch: Launch, together: int) -> tuple[float, float]:
        tile = next((entry for entry in launch.passes if entry.line == self.model.tile), None)
        warps = self.threads // 32
        if tile is None:
            total = float(simulate([[self.walker(launch).whole()] * warps] * together).cycles)
            return total, total
        found = []
        turns = [launch, *([launch.other] if launch.other else [])]
        for count in (1, 3):
            ways = []
            for turn in turns:
                passes = [replace(p, passes=count) if p.line == self.model.tile else p for p in turn.passes]
                ways.append(self.walker(turn, passes).whole())
            # Side by side, each starts at another turn.
            turned = [ways[i % len(ways) :] + ways[: i % len(ways)] for i in range(together)]
            streams = [[instruction for way in stream for instruction in way] for stream in turned]
            found.append(simulate([[stream] * warps for stream in streams]).cycles / len(turns))
        of_pass = (found[1] - found[0]) / 2
        return max(found[0] + of_pass * (tile.passes - 1), 0.0), of_pass

    def issue_seconds(self, launch: Launch) -> float:
        """What a launch's instructions take, with the latencies of what they load."""
        together = max(1, min(self.resident, -(-int(launch.thread_blocks) // PROCESSORS)))
        cycles, _ = self.cycles(launch, together)
        rounds = max(1.0, launch.thread_blocks / (PROCESSORS * together))
        return launch.launches * rounds * cycles / CLOCK

    def seconds(self, problem: Problem, direction: str) -> tuple[float, float]:
        """The predicted time of a problem's launches, and the bytes they move."""
        total, moved = 0.0, 0.0
        for launch in self.model.launches(problem, direction):
            issue = self.issue_seconds(launch)
            total += max(issue, launch.bytes / DEVICE_BYTES_PER_SECOND) + launch.launches * LAUNCH_SECONDS
            moved += launch.bytes
        return total, moved


def dynamic_shared(document: str, name: str, head_dim: int) -> tuple[int, int] | None:
    """Threads and dynamic shared memory of a bfloat16 kernel, out of the table of docs/kernels.md."""
    row = re.search(rf"^\| `{name}` \| bfloat16 \| {head_dim} \| (\d+) \| (\d+) B \|$", document, re.MULTILINE)
    return (int(row[1]), int(row[2])) if row is not None else None


def find_subjects(models: Iterable[KernelModel], code_of: dict[str, Code], sources: Sources) -> list[Subject]:
    document = kernel_table.DOCUMENT.read_text()
    subjects = []
    for model in models:
        code = code_of[model.source]
        for head_dim in model.head_dims:
            name = next((name for name in code.kernels if model.symbol(head_dim) in name), None)
            if name is None:
                raise WalkError(f"{model.source} has no kernel {model.symbol(head_dim)}")
            threads, dynamic = dynamic_shared(document, model.name + model.variant, head_dim) or (
                model.threads,
                model.shared_bytes,
            )
            shared = code.static_shared.get(name, 0) + dynamic
            subjects.append(
                Subject(model, head_dim, code.kernels[name], code.registers[name], shared, threads, sources)
            )
    return subjects


# --- Writing ------------------------------------------------------------------------------------------------------


def format_counts(subjects: Sequence[Subject]) -> str:
    """The table that CI compares: instructions of a pass of every hot loop, by class, and what a kernel takes."""
    names = [*CLASSES, "integer"]
    lines = [
        f"| kernel | head_dim | one pass is | instructions | {' | '.join(names)} | registers | shared memory | "
        "thread blocks a multiprocessor |",
        "|---" * (len(names) + 7) + "|",
    ]
    for subject in subjects:
        counted = classify(subject.tile())
        head_dim = str(subject.head_dim) if len(subject.model.head_dims) > 1 else "-"
        cells = [
            *(f"`{subject.model.name}`", head_dim, subject.model.unit, str(sum(counted.values()))),
            *(str(counted[name]) for name in names),
            *(str(subject.registers), f"{subject.shared_bytes} B", str(subject.resident)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def format_cycles(subjects: Sequence[Subject]) -> str:
    """Cycles of a pass at full residency."""
    lines = ["| kernel | head_dim | cycles a pass | cycles a pass and scheduler |", "|---|---|---|---|"]
    for subject in subjects:
        launch = subject.model.launches(subject.model.counted(subject.head_dim), subject.model.directions[0])[-1]
        _, of_pass = subject.cycles(launch, subject.resident)
        shared = of_pass * SCHEDULERS / (subject.resident * subject.threads / 32)
        head_dim = str(subject.head_dim) if len(subject.model.head_dims) > 1 else "-"
        lines.append(f"| `{subject.model.name}` | {head_dim} | {of_pass:.0f} | {shared:.0f} |")
    return "\n".join(lines) + "\n"


def format_times(subjects: Sequence[Subject], direction: str) -> str:
    """Predicted milliseconds of the named problems, and the bytes moved."""
    taking_part = [subject for subject in subjects if direction in subject.model.directions]
    names = list(dict.fromkeys(subject.model.name for subject in taking_part))
    lines = [f"| {direction}, ms | {' | '.join(f'`{n}`' for n in names)} | sum | GB |", "|---" * (len(names) + 3) + "|"]
    for problem in (*PROBLEMS, PROFILED):
        times, moved = [], 0.0
        for name in names:
            of_name = [s for s in taking_part if s.model.name == name and s.model.takes(problem)]
            subject = next((s for s in of_name if s.head_dim == problem.head_dim), of_name[0])
            seconds, bytes_moved = subject.seconds(problem, direction)
            times.append(seconds * 1e3)
            moved += bytes_moved
        cells = [problem.name, *(f"{time:.2f}" for time in times), f"{sum(times):.2f}", f"{moved / 1e9:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def format_cases(subjects: Sequence[Subject]) -> str:
    """Predicted milliseconds of the other ops' problems, a line a kernel."""
    lines = [
        "| problem | kernel | launches | thread blocks | by instructions, ms | by bytes, ms | predicted, ms "
        "| share of a copy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    of_model = {id(subject.model): subject for subject in subjects}
    for case in CASES:
        if any(id(model) not in of_model for model, _ in case.launches):
            continue  # of other kernels than those asked for
        total, launches = 0.0, 0.0
        rows = []
        for model, launch in case.launches:
            issue = of_model[id(model)].issue_seconds(launch) * 1e3
            by_bytes = launch.bytes / COPY_BYTES_PER_SECOND * 1e3
            predicted = max(issue, by_bytes) + launch.launches * LAUNCH_SECONDS * 1e3
            rows.append(
                f"| | `{model.name}` | {launch.launches:.0f} | {launch.thread_blocks:.0f} | {issue:.3f} "
                f"| {by_bytes:.3f} | {predicted:.3f} | |"
            )
            total, launches = total + predicted, launches + launch.launches
        share = f"{case.copied / COPY_BYTES_PER_SECOND * 1e5 / total:.0f} %" if case.copied else "-"
        lines += [f"| {case.name} | | {launches:.0f} | | | | {total:.3f} | {share} |", *rows]
    return "\n".join(lines) + "\n"


INTRODUCTION = f"""{HEADING}

Written by `make model` from the sm_90 code of the build; CI fails where a count is out of date, so that no change makes
a hot loop longer unnoticed. Instructions of one pass of a kernel's hot loop, as a warp executes it, by what they take.
bfloat16; block attention causal, block 128, 64K tokens (`moba_route`: 8K; longer ones take `moba_route_filter`); the
router's count holds the insertions that random scores cause. `tools/model` has the trip counts and what is called rare.

"""
GAPS = """
These are predictions, of no measurement. An issue model of one multiprocessor (`tools/model/processor.py`) runs the
code with its control codes; a kernel takes that long or as long as its bytes take at 3.35 TB/s, whichever is more.
132 multiprocessors at 1.755 GHz, 2 batches of 16 heads, top_k 8, causal; "profiled" is what `make gpu` measures (32K
tokens of 4 heads, D 128, block 128) and prints the prediction beside. Known gaps: no instruction cache, no register
banks, no contention in L2 or of device memory, latencies out of tables; thread blocks start together and all take the
average trip counts; choices are random; masks of the diagonal and centroids are left out. The error is guessed at 30 %.

"""
OTHERS = """
First a problem of the tables above with numbers that are not finite everywhere: what finite ones take, and on top of
it what only they do. A step that a gradient scaler throws away is such a problem. Then the other ops, bfloat16, at the
sizes of their benchmarks. "By bytes" is at 3.0 TB/s, what a copy was measured to reach on an H100; a kernel takes the
longer of the two, and 3 us. "Share of a copy": of a copy of what has to be read and written. Reads that the
second-level cache answers take no bytes here: rows of `grad_out` in the memory layers' backward, keys and values of a
group that several thread blocks read, the keys of `product_key_topk`.

"""


def format_part(subjects: Sequence[Subject]) -> str:
    """The part of docs/kernels.md that is this tool's."""
    return (
        f"{INTRODUCTION}{format_counts(subjects)}\n{COUNTS_END}\n{GAPS}"
        f"{format_cycles(subjects)}\n{format_times(subjects, 'forward')}\n{format_times(subjects, 'backward')}"
        f"{OTHERS}{format_cases(subjects)}"
    )


def check_counts(subjects: Sequence[Subject], document: str) -> list[str]:
    """What is wrong with the committed counts, a line a row."""
    written = document.partition(HEADING)[2].partition(COUNTS_END)[0].splitlines()
    faults = []
    for line in format_counts(subjects).splitlines():
        if line not in written:
            start = "|".join(line.split("|")[:3])
            before = next((old for old in written if old.startswith(start + "|")), "nothing")
            faults.append(f"docs/kernels.md is out of date, run `make model`:\n  it says {before}\n  but now {line}")
    return faults


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, predict, and write or check; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the counts instead of predicting and writing")
    parser.add_argument("--build", type=Path, help="build folder (default: as of tools/kernel_table.py)")
    parser.add_argument("--compile", action="store_true", help="compile the files instead of reading a build")
    parser.add_argument("--kernel", action="append", help="of these alone; prints, and writes nothing")
    options = parser.parse_args(arguments)
    models = [model for model in KERNELS if not options.kernel or model.name in options.kernel]
    stems = list(dict.fromkeys(model.source for model in models))
    try:
        if options.compile:
            cubins = {stem: compile_file(stem) for stem in stems}
        else:
            build = options.build or kernel_table.find_build()
            toolkit, _, *objects = (build / kernel_table.BUILD_FACTS).read_text().splitlines()
            written = re.search(r"^Toolkit (\S+),", kernel_table.DOCUMENT.read_text(), re.MULTILINE)
            if options.check and written is not None and written[1] != toolkit:
                print(f"kernels.md was made with toolkit {written[1]}, this build with {toolkit}: not compared")
                return 0
            cubins = {stem: extract(map(Path, filter(None, objects)), stem) for stem in stems}
        code_of = {stem: read_cubin(cubin) for stem, cubin in cubins.items()}
        subjects = find_subjects(models, code_of, Sources.of(ROOT / "csrc"))
        print(format_counts(subjects), end="")
        if options.check:
            faults = check_counts(subjects, kernel_table.DOCUMENT.read_text())
            for fault in faults:
                print(f"model: {fault}", file=sys.stderr)
            return 1 if faults else 0
        part = format_part(subjects)
    except (FileNotFoundError, WalkError, subprocess.CalledProcessError) as error:
        print(f"model: {error}", file=sys.stderr)
        return 1
    print(part.partition(COUNTS_END)[2], end="")
    if not options.kernel:
        resources = kernel_table.DOCUMENT.read_text().partition(HEADING)[0]
        kernel_table.DOCUMENT.write_text(f"{resources.rstrip()}\n\n{part}")
    return 0
