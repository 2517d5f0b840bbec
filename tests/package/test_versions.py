"""What `make versions` reads of a run and writes of it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def versions() -> ModuleType:
    spec = importlib.util.spec_from_file_location("versions_tool", ROOT / "tools" / "versions.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["versions_tool"] = module
    spec.loader.exec_module(module)
    return module


def test_counts_of_a_run(versions: ModuleType) -> None:
    text = """
tests/a.py:3: 8 failed in 2.0s are not these
FAILED tests/a.py::test_one[grid, relative] - Assertion...
ERROR tests/b.py - ImportError
1 failed, 9760 passed, 25 skipped, 30 warnings, 1 error in 172.35s (0:02:52)
"""
    outcome = versions.read_outcome(text)
    assert (outcome.passed, outcome.failed, outcome.skipped, outcome.seconds) == (9760, 2, 25, 172.35)
    assert outcome.failures == ("tests/a.py::test_one[grid, relative]", "tests/b.py")
    assert versions.read_outcome("=== 3 passed in 0.10s ===").failed == 0


@pytest.mark.parametrize("text", ["", "Killed\n", "5 skipped in 0.10s\n", "no tests ran in 0.01s\n"])
def test_a_run_without_tests_is_none(versions: ModuleType, text: str) -> None:
    with pytest.raises(ValueError, match=r"closing line|no test ran"):
        versions.read_outcome(text)


def test_rows_replace_their_own_line(versions: ModuleType) -> None:
    table = "| torch | Python |\n|---|---|\n| 1.0 | 3.1 | numpy | old | 1 |"
    page = f"above\n{versions.BEGIN}\n\n{table}\n\n{versions.END}\nbelow\n"
    first, second = versions.MATRIX[0], versions.MATRIX[1]
    page = versions.replace_row(page, second, versions.Outcome(20, 0, 1, 9.6, ()), "2030-01-02")
    page = versions.replace_row(page, first, versions.Outcome(1234, 1, 0, 5.0, ("x",)), "2030-01-03")
    page = versions.replace_row(page, second, versions.Outcome(21, 0, 1, 9.6, ()), "2030-01-04")
    lines = page.splitlines()
    assert lines[0] == "above" and lines[-1] == "below" and "| 1.0 |" not in page
    rows = [line for line in lines if line.startswith(f"| {first.torch} ")]
    assert rows == [
        f"| {first.torch} | {first.python} | {first.beside} | {first.tests} | 1,234 | 1 | 0 | 5 s | 2030-01-03 |",
        f"| {second.torch} | {second.python} | {second.beside} | {second.tests} | 21 | 0 | 1 | 10 s | 2030-01-04 |",
    ]
    with pytest.raises(ValueError, match="needs the lines"):
        versions.replace_row("no table", first, versions.Outcome(1, 0, 0, 1.0, ()), "2030-01-02")


def test_which_rows_run(versions: ModuleType) -> None:
    pythons = dict.fromkeys(["3.9", "3.10", "3.11", "3.12", "3.13", "3.14", "3.15"], "python")
    del pythons["3.9"]
    assert versions.select([], False, pythons) == versions.MATRIX
    assert versions.select([versions.MATRIX[2].name], False, pythons) == [versions.MATRIX[2]]
    assert versions.select([], True, pythons) == [versions.CORNER]
    assert versions.select([], True, {"3.12": "python", "3.11": "python"})[0].python == "3.11"
    with pytest.raises(ValueError, match=r"no row 1\.0; there are"):
        versions.select(["1.0"], False, pythons)
    with pytest.raises(ValueError, match=r"no Python 3\.10; --python"):
        versions.select([], False, {"3.11": "python"})


def test_the_promised_versions_have_rows(versions: ModuleType) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dependencies = ["torch>=2.6"]' in project and 'requires-python = ">=3.10"' in project
    assert versions.CORNER.torch.startswith("2.6.") and versions.CORNER.python == "3.10"
    assert any(row.torch == versions.CORNER.torch and row.python == "3.10" for row in versions.MATRIX)
    assert any(not row.numpy for row in versions.MATRIX)
    oldest = project.split('transformers = ["transformers>=')[1].split('"')[0]
    assert any(row.transformers.startswith(oldest) for row in versions.MATRIX)
    assert len({row.name for row in versions.MATRIX}) == len(versions.MATRIX)


def test_named_tests_exist(versions: ModuleType) -> None:
    for names in versions.SUBSETS.values():
        for name in names:
            assert (ROOT / name.removeprefix("--ignore=")).exists(), name


def test_the_page_has_the_table(versions: ModuleType) -> None:
    page = versions.TABLE.read_text()
    assert versions.BEGIN in page and versions.END in page
