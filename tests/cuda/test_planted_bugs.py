"""The suite catches bugs in the CUDA sources: each of ``planted_bugs.py``, and finds nothing where none is planted.

Swapped operands in the assembly itself, which the emulator does not see, are planted in ``test_ptx.py``.
"""

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cuda.planted_bug import planted
from tests.cuda.planted_bugs import BUGS, CASES, SOURCES, CaseRunner, PlantedBug, all_builds, make
from tests.cuda.planted_groups import Build, applied, edits_of

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


@pytest.fixture(scope="session")
def build_of(runner: CaseRunner) -> Callable[[PlantedBug], tuple[Build, Path]]:
    """The build that a bug is of, and the folder of its module, which is made once for all of pytest's workers."""
    builds = all_builds()

    def made(bug: PlantedBug) -> tuple[Build, Path]:
        number, build = next((i, build) for i, build in enumerate(builds) if bug in build.bugs)
        folder = Path(os.environ["TOPGATHER_TEST_FOLDER"]) / f"planted-{number}"
        with open(f"{folder}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                make(build, EMULATION, folder)
                if len(build.bugs) > 1:
                    case = build.bugs[0].case
                    assert runner.find(case, folder) == "", f"{case!r} finds something where no bug is in force"
        return build, folder

    return made


def test_bugs_can_be_planted() -> None:
    """Sources still have the text that each bug replaces: found in a second, without building anything."""
    for bug in BUGS:
        planted(bug, (SOURCES / bug.file).read_text())


@pytest.mark.parametrize(
    ("source", "planted_source", "expected"),
    [
        ("{ return a < 3 + g(a); }", "{ return a <= 3 + g(a); }", "{ return (P ? (a <= 3 + g(a)) : (a < 3 + g(a))); }"),
        ("{ f(a)[1] += b; }", "{ f(a)[2] += b; }", "{ f(a)[(P ? (2) : (1))] += b; }"),
        (
            "{ for (; i < n; ++i) f(); }",
            "{ for (; i <= n; ++i) f(); }",
            "{ for (; (P ? (i <= n) : (i < n)); ++i) f(); }",
        ),
        ("{ f(a); f(b); }", "{ f(b); }", "{ { if (P) { } else { f(a); } } f(b); }"),
        ("{ x = a; }", "{ x = a; f(); }", "{ x = a; { if (P) { f(); } else { } } }"),
        ("{ f(a, b); }", "{ f(b, a); }", "{ f((P ? (b) : (a)), (P ? (a) : (b))); }"),
        ("{ if (c) return; f(); }", "{ return; f(); }", "{ { if (P) { return; } else { if (c) return; } } f(); }"),
        ("{ f(a); }", "{ if (c) f(a); }", "{ { if (P) { if (c) f(a); } else { f(a); } } }"),
        (
            "{ const float ones[2] = {1, 1}; }",
            "{ const float ones[2] = {0, 0}; }",
            "{ const float ones[2] = {(P ? (0) : (1)), (P ? (0) : (1))}; }",
        ),
        (
            "{ const bool a = x < y, b = !(x < z); }",
            "{ const bool a = x <= y, b = !(x <= z); }",
            "{ const bool a = (P ? (x <= y) : (x < y)), b = (P ? (!(x <= z)) : (!(x < z))); }",
        ),
        ("{ a = up(b, c) + 1; }", "{ a = up(c, b); }", "{ a = (P ? (up(c, b)) : (up(b, c) + 1)); }"),
        (
            "{ x[1] = a; x[2] = b; }",
            "{ x[2] = a; x[1] = b; }",
            "{ { if (P) { x[2] = a; x[1] = b; } else { x[1] = a; x[2] = b; } } }",
        ),
        ("{ float a; f(); }", "{ f(); }", None),
    ],
)
def test_both_versions_stand_under_a_condition(source: str, planted_source: str, expected: str | None) -> None:
    """None: the bug is built alone."""
    edits = [(edit, 7) for edit in edits_of(source, planted_source)]
    if expected is None:
        assert not edits
    else:
        assert "".join(applied(source, edits).split()) == "".join(expected.replace("P", "is_planted(7)").split())


def test_one_condition_stands_within_another() -> None:
    source = "{ if (a < 3) f(b); }"
    edits = [
        (edit, number)
        for number, other in enumerate(("{ if (a <= 3) f(b); }", "{ }", "{ if (a < 3) f(c); }"))
        for edit in edits_of(source, other)
    ]
    expected = "{ { if (is_planted(1)) { } else { if (%s) f(%s); } } }"
    expected %= "(is_planted(0) ? (a <= 3) : (a < 3))", "(is_planted(2) ? (c) : (b))"
    assert "".join(applied(source, edits).split()) == "".join(expected.split())


@needs_emulation
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_found_where_no_bug_is_planted(case: str, runner: CaseRunner) -> None:
    assert runner.find(case, EMULATION) == ""


@needs_emulation
@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_planted_bug_is_caught(
    bug: PlantedBug, runner: CaseRunner, build_of: Callable[[PlantedBug], tuple[Build, Path]]
) -> None:
    build, folder = build_of(bug)
    finding = runner.find(bug.case, folder, build.number_of(bug))
    print(finding)
    assert finding != "", f"{bug.case!r} finds nothing"
    assert re.match(bug.finding, finding), f"{bug.case!r} finds something else"
