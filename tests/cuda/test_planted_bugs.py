"""The suite catches bugs in the CUDA sources: each of ``planted_bugs.py``, and finds nothing where none is planted.

Swapped operands in the assembly itself, which the emulator does not see, are planted in ``test_ptx.py``.
"""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.block_attention.planted_bugs import BACKWARD, FORWARD, FORWARD_FLOAT32, ROUTE
from tests.cuda.planted_bugs import BUGS, CASES, SOURCES, UNITS, CaseRunner, PlantedBug, build, planted

EMULATION = Path(os.environ.get("TOPGATHER_EMULATION", "")).absolute()
needs_emulation = pytest.mark.skipif(
    "TOPGATHER_EMULATION" not in os.environ,
    reason="TOPGATHER_EMULATION does not name the folder with the emulated modules; see tests/emulation/CMakeLists.txt",
)


@pytest.fixture(scope="session")
def runner() -> Iterator[CaseRunner]:
    """One for all tests of a worker."""
    case_runner = CaseRunner()
    yield case_runner
    case_runner.close()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where to build: megabytes, that no one looks at afterwards."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_bugs_can_be_planted() -> None:
    """Sources still have the text that each bug replaces: found in a second, without building anything."""
    for bug in BUGS:
        planted(bug, (SOURCES / bug.file).read_text())


@needs_emulation
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_found_where_no_bug_is_planted(case: str, runner: CaseRunner) -> None:
    assert runner.find(case, EMULATION) == ""


@needs_emulation
def test_nothing_is_found_after_building_alone(runner: CaseRunner, folder: Path) -> None:
    """An edit that changes nothing, of the files whose kernels are built for the smallest head dimension alone."""
    bug = next(bug for bug in BUGS if "//" not in bug.text and bug.replacement)
    units = [*UNITS[FORWARD], *FORWARD_FLOAT32, *UNITS[BACKWARD], *UNITS[ROUTE]]
    build(replace(bug, replacement=bug.text, units=units), EMULATION, folder)
    for case in ("small", "many queries float32", "varlen", "routing"):
        assert runner.find(case, folder) == ""


@needs_emulation
@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_planted_bug_is_caught(bug: PlantedBug, runner: CaseRunner, folder: Path) -> None:
    build(bug, EMULATION, folder)
    finding = runner.find(bug.case, folder)
    print(finding)
    assert finding != "", f"{bug.case!r} finds nothing"
    assert re.match(bug.finding, finding), f"{bug.case!r} finds something else"
