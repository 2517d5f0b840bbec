"""Registers, shared memory, stack and spills of every CUDA kernel on every architecture, as a table.

    python tools/kernel_table.py            # prints the table and writes docs/kernels.md
    python tools/kernel_table.py --check    # prints it and fails where docs/kernels.md says otherwise

Reads what the build left behind (:mod:`ptxas_report`), so it compiles nothing; dynamic shared memory, which ptxas does
not know, the built module tells. Fails where a kernel spills registers or keeps an array in local memory: the build
fails on both already, this is the second line.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "kernels.md"
BUILD_FACTS = "cuda_kernels.txt"
"""Written by CMake into the build folder: the toolkit's version, the architectures, then one object a line."""
MODEL_HEADING = "# What the machine code costs"
"""From here on the document is written by ``make model`` (tools/model)."""
DTYPES = {0: "float32", 2: "bfloat16", 3: "float16"}


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture: registers a thread, the rest in bytes."""

    kernel: str
    architecture: str
    registers: int
    static_shared: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def uses_local_memory(self) -> bool:
        """Whether anything of the kernel lives in local memory: spilled registers, arrays, a call's frame."""
        return self.stack + self.spill_stores + self.spill_loads > 0


@dataclass(frozen=True)
class Build:
    """The kernels of one build, in the order of their sources, and what built them."""

    toolkit: str
    architectures: str
    kernels: list[Resources]
    launches: list[tuple[str, int, int, int, int]]
    """Kernel, dtype code, largest head_dim, threads, bytes of dynamic shared memory: what ptxas does not know."""


# --- Reading ------------------------------------------------------------------------------------------------


def parse_report(text: str) -> Iterator[Resources]:
    """Every kernel of one report of ``ptxas -v``."""
    parts = re.split(r"^.*Compiling entry function '(\S+)' for '(\S+)'.*$", text, flags=re.MULTILINE)
    # The text before the first kernel, then three parts a kernel: its name, the architecture, what is said of it.
    for kernel, architecture, facts in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        # Device functions that were not inlined come with stacks of their own; theirs count as the kernel's.
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", facts)
        registers = re.search(r"Used (\d+) registers", facts)
        if registers is None or not frames:
            raise ValueError(f"ptxas says nothing of registers or stack for {kernel} on {architecture}")
        shared = re.search(r"(\d+) bytes smem", facts)
        stack, stores, loads = (sum(map(int, column)) for column in zip(*frames, strict=True))
        yield Resources(kernel, architecture, int(registers[1]), int(shared[1]) if shared else 0, stack, stores, loads)


def find_build() -> Path:
    """The build under ``build/`` for the most architectures, of several the one configured last; none for a wheel."""
    found_facts = (ROOT / "build").glob(f"*/{BUILD_FACTS}")
    builds = (path for path in found_facts if not path.parent.name.startswith("wheel-"))
    found = max(builds, key=lambda path: (len(path.read_text().splitlines()[1]), path.stat().st_mtime), default=None)
    if found is None:
        raise FileNotFoundError("no build with CUDA under build/: `make install` makes one where a toolkit is found")
    return found.parent


def read_build(folder: Path) -> Build:
    """Every kernel's resources, by demangled name."""
    toolkit, architectures, *objects = (folder / BUILD_FACTS).read_text().splitlines()
    kernels: list[Resources] = []
    for compiled in filter(None, objects):
        report = Path(compiled + ".ptxas")
        if not report.exists():
            raise FileNotFoundError(f"{report} is missing: build first")
        # nvcc compiles architectures side by side, and they are reported as they finish.
        kernels += sorted(parse_report(report.read_text()), key=lambda entry: (entry.kernel, order_of(entry)))
    names = demangle({entry.kernel for entry in kernels})
    renamed = [Resources(**{**vars(entry), "kernel": names[entry.kernel]}) for entry in kernels]
    return Build(toolkit, architectures, renamed, read_launches(folder))


def read_launches(folder: Path) -> list[tuple[str, int, int, int, int]]:
    """What the built module says of its launches; nothing where there is none, or none for this interpreter."""
    for path in sorted(folder.glob("_native*.so")):
        spec = importlib.util.spec_from_file_location("_native", path)
        if spec is not None and spec.loader is not None:
            with contextlib.suppress(ImportError):
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                facts = [getattr(module, name) for name in sorted(dir(module)) if name.endswith("_cuda_kernel_facts")]
                return [row for of_op in facts for row in of_op()]
    return []


def order_of(entry: Resources) -> tuple[int, str]:
    """Architectures by their number."""
    number = re.search(r"\d+", entry.architecture)
    return (int(number[0]) if number else 0, entry.architecture)


def demangle(names: Iterable[str]) -> dict[str, str]:
    """Readable names: without return type, arguments and the project's own namespaces."""
    names = sorted(names)
    filter_program = shutil.which("c++filt")
    if filter_program is None:
        return {name: name for name in names}
    done = subprocess.run([filter_program], input="\n".join(names), capture_output=True, text=True, check=True)
    return {name: shorten(full) for name, full in zip(names, done.stdout.splitlines(), strict=True)}


def shorten(full_name: str) -> str:
    """``moba_x<BFloat16>`` for ``void topgather::moba_x<topgather::BFloat16>(topgather::XArguments)``."""
    short = re.sub(r"\(anonymous namespace\)::|\btopgather::|^void |\((?:int|bool|unsigned int)\)", "", full_name)
    depth = 0
    for i, character in enumerate(short):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return short[:i]
    return short


# --- Writing ------------------------------------------------------------------------------------------------


def format_table(build: Build) -> str:
    """The table in Markdown: a row a kernel, its registers by architecture."""
    architectures = list(dict.fromkeys(entry.architecture for entry in sorted(build.kernels, key=order_of)))
    lines = [
        f"| kernel | {' | '.join(architectures)} | static shared memory | stack | spills |",
        "|---" * (len(architectures) + 1) + "|---|---|---|",
    ]
    by_kernel: dict[str, dict[str, Resources]] = {}
    for entry in build.kernels:
        by_kernel.setdefault(entry.kernel, {})[entry.architecture] = entry
    for kernel, by_architecture in by_kernel.items():
        entries = list(by_architecture.values())
        registers = [str(by_architecture[name].registers) if name in by_architecture else "-" for name in architectures]
        cells = [
            f"`{kernel}`",
            *registers,
            _bytes(entry.static_shared for entry in entries),
            _bytes(entry.stack for entry in entries),
            _bytes(entry.spill_stores + entry.spill_loads for entry in entries),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _bytes(sizes: Iterable[int]) -> str:
    return f"{max(sizes)} B"


def format_launches(build: Build) -> str:
    """Threads and dynamic shared memory of the large kernels' thread blocks."""
    lines = ["| kernel | dtype | head_dim up to | threads | dynamic shared memory |", "|---|---|---|---|---|"]
    for name, dtype, head_dim, threads, shared in build.launches:
        lines.append(f"| `{name}` | {DTYPES[dtype]} | {head_dim or '-'} | {threads} | {shared} B |")
    return "\n".join(lines) + "\n"


def format_document(build: Build) -> str:
    """docs/kernels.md."""
    return (
        "# CUDA kernels: what each takes\n\n"
        "Written by `make kernels` from what ptxas says while building; CI fails where it is out of date. Registers a\n"
        "thread, by architecture; the largest static shared memory, stack and spills of any architecture.\n\n"
        f"Toolkit {build.toolkit}, architectures {build.architectures}.\n\n"
        f"{format_table(build)}\n"
        "Thread blocks of the kernels that ask for shared memory at launch. On every architecture at most 101376 B,\n"
        "what sm_86, sm_89 and sm_120 give, but for kernels of large blocks, which have others in their place there;\n"
        "the router's with its lists for top_k = 8:\n\n"
        f"{format_launches(build)}"
    )


def faults_of(build: Build) -> list[str]:
    """One line a kernel and architecture that uses local memory."""
    return [
        f"{entry.kernel} on {entry.architecture}: stack {entry.stack} B, spill stores {entry.spill_stores} B, "
        f"spill loads {entry.spill_loads} B"
        for entry in build.kernels
        if entry.uses_local_memory
    ]


def part_of(document: str) -> str:
    """What of the document is written here; the rest is ``make model``'s."""
    before, heading, _ = document.partition(MODEL_HEADING)
    return before.rstrip("\n") + "\n" if heading else document


def check_document(build: Build, document: Path) -> str | None:
    """What is wrong with the document, or None. Another toolkit allocates otherwise, so it is not compared then."""
    written = document.read_text() if document.exists() else ""
    toolkit = re.search(r"^Toolkit (\S+),", written, re.MULTILINE)
    if toolkit is not None and toolkit[1] != build.toolkit:
        print(f"{document.name} was made with toolkit {toolkit[1]}, this build with {build.toolkit}: not compared")
        return None
    return None if part_of(written) == format_document(build) else f"{document.name} is out of date: run `make kernels`"


def main() -> int:
    """Print the table, write or check the document; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--build", type=Path, help="build folder (default: the one under build/ for the most architectures)"
    )
    parser.add_argument("--output", type=Path, default=DOCUMENT, help="the document (default: docs/kernels.md)")
    parser.add_argument("--check", action="store_true", help="compare the document instead of writing it")
    options = parser.parse_args()
    try:
        build = read_build(options.build or find_build())
    except (FileNotFoundError, ValueError) as error:
        print(f"kernel_table: {error}", file=sys.stderr)
        return 1
    print(format_table(build), end="")
    faults = faults_of(build)
    if options.check:
        stale = check_document(build, options.output)
        faults += [stale] if stale else []
    else:
        written = options.output.read_text() if options.output.exists() else ""
        _, heading, rest = written.partition(MODEL_HEADING)
        options.output.write_text(format_document(build) + (f"\n{heading}{rest}" if heading else ""))
    for fault in faults:
        print(f"kernel_table: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
