"""Bugs to plant in the CUDA sources, one in force at a time, and the ordinary test case that catches each.

A bug is an edit of one file of ``csrc``. ``make`` compiles what the edits of a build touch, as the emulated module was
compiled, and links it with the rest of that module's objects. ``CaseRunner`` runs cases on such builds, each in a
process of its own: a module can be imported once, and a kernel with a bug may crash.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.block_attention.planted_bugs import BLOCK_ATTENTION_BUGS, BLOCK_ATTENTION_CASES, BLOCK_ATTENTION_UNITS
from tests.common import emulated
from tests.cuda.planted_bug import PlantedBug
from tests.cuda.planted_groups import HEADER, NUMBER, Build, builds_of
from tests.decoding.planted_bugs import DECODE_BUGS, DECODE_CASES, DECODE_UNITS
from tests.grid.planted_bugs import GRID_BUGS, GRID_CASES, GRID_UNITS
from tests.indexer.planted_bugs import INDEXER_BUGS, INDEXER_CASES, INDEXER_UNITS
from tests.key_conv.planted_bugs import KEY_CONV_BUGS, KEY_CONV_CASES, KEY_CONV_UNITS
from tests.memory.planted_bugs import MEMORY_BUGS, MEMORY_CASES, MEMORY_UNITS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
MODULE = "_native_emulated_checked.so"

# Early reads and sums in the wrong order show best where nothing arrives in order.
SCHEDULE = {"order": "random", "cp_async": "mixed", "seed": 1, "shared_limit": 99 * 1024}

CASES: dict[str, Callable[[], Any]] = {
    **BLOCK_ATTENTION_CASES,
    **MEMORY_CASES,
    **GRID_CASES,
    **KEY_CONV_CASES,
    **DECODE_CASES,
    **INDEXER_CASES,
}
# What is compiled for an edit of a file, if not the file alone: enough for the case to meet the bug.
UNITS = {**BLOCK_ATTENTION_UNITS, **MEMORY_UNITS, **GRID_UNITS, **KEY_CONV_UNITS, **DECODE_UNITS, **INDEXER_UNITS}
BUGS = [*BLOCK_ATTENTION_BUGS, *MEMORY_BUGS, *GRID_BUGS, *KEY_CONV_BUGS, *DECODE_BUGS, *INDEXER_BUGS]


# --- building ---------------------------------------------------------------------------------------------------------


def units_of(bug: PlantedBug) -> list[str]:
    """The files to compile, of ``csrc`` or written by the build."""
    return bug.units or UNITS.get(bug.file, [Path(bug.file).name])


def commands_of(emulation: Path) -> dict[str, str]:
    """The command behind every output of the folder the emulated module was built in."""
    cache = (emulation / "CMakeCache.txt").read_text()
    ninja = re.search(r"^CMAKE_MAKE_PROGRAM:\w+=(.*)$", cache, re.MULTILINE)
    assert ninja is not None, f"{emulation} is not a folder that CMake built in"
    listed = subprocess.run([ninja[1], "-t", "compdb"], cwd=emulation, capture_output=True, text=True, check=True)
    return {entry["output"]: entry["command"] for entry in json.loads(listed.stdout)}


def all_builds() -> list[Build]:
    """Every bug is of one. Where the text of a bug is gone there is none, and an error that says so."""
    return builds_of(BUGS, units_of, SOURCES)


def make(build: Build, emulation: Path, folder: Path) -> None:
    """Leave the checked module with the bugs in ``folder``, which is new; ``emulation`` has the objects without."""
    with tempfile.TemporaryDirectory() as name:
        built = Path(name)
        sources, header = built / "csrc", built / "planted_bug.h"
        shutil.copytree(SOURCES, sources)
        header.write_text(HEADER)
        for file in {bug.file for bug in build.bugs}:
            (sources / file).write_text(build.edited(file, (sources / file).read_text()))
        for path in sources.glob("*/*_cuda.cu*"):
            # No case has a head dimension over 64: the kernels for 128 and 256 would be compiled in vain.
            path.write_text(re.sub(r"(_kernel<\w+, )(?:128|256)>", r"\g<1>64>", path.read_text()))
        commands = commands_of(emulation)
        link = commands[MODULE].replace(f"-o {MODULE}", f"-s -o {shlex.quote(str(built / MODULE))}")
        for unit in build.units:
            output = next(name for name in commands if "kernels_checked" in name and name.endswith(f"/{unit}.o"))
            words = [word.replace(str(SOURCES), str(sources)) for word in shlex.split(commands[output])]
            assert any(str(sources) in word for word in words), f"{emulation} was built from another checkout"
            words[words.index("-o") + 1] = str(built / f"{unit}.o")
            words[words.index("-MF") + 1] = os.devnull
            words[words.index("-c") : words.index("-c")] = ["-include", str(header)]
            run_command(build, shlex.join(words), emulation)
            assert link.count(f" {output} ") == 1, f"{MODULE} is not linked of {output}"
            link = link.replace(output, shlex.quote(str(built / f"{unit}.o")))
        run_command(build, link, emulation)
        folder.mkdir()
        shutil.move(built / MODULE, folder)


def run_command(build: Build, command: str, folder: Path) -> None:
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{build} does not build:\n{command}\n{done.stderr[-2000:]}"


# --- running ----------------------------------------------------------------------------------------------------------

MOST_SECONDS = 300


def finding_of(case: str) -> str:
    """What the case finds: the first line of its error; empty if it passes."""
    with emulated.emulated_cuda(checked=True, **SCHEDULE):
        try:
            CASES[case]()
        except (AssertionError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def serve() -> None:
    """For every line of a folder, a case and a bug's number: forks, and the child prints what the case finds there."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        folder, case, os.environ[NUMBER] = line.rstrip("\n").split("\t")
        child = os.fork()
        if child == 0:
            signal.alarm(MOST_SECONDS)
            emulated.FOLDER = folder
            print(finding_of(case), flush=True)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status != 0:
            print(f"exit code {os.waitstatus_to_exitcode(status)}", flush=True)


class CaseRunner:
    """A process that has imported everything and forks for every case."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.cuda.planted_bugs"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def find(self, case: str, folder: Path, number: int = 0) -> str:
        """What the case finds on the module in ``folder`` with the bug of this number; empty if nothing."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{folder}\t{case}\t{number}\n")
        answer = self.process.stdout.readline()
        assert answer.endswith("\n"), "the process that runs the cases is gone"
        return answer.strip()

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


if __name__ == "__main__":
    serve()
