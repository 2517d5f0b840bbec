"""CONTRIBUTING.md shows code that is there: every name and path in it exists."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("csrc", "python", "tests", "tools", "CMakeLists.txt", "Makefile", "pyproject.toml")
# What a snippet may say besides names: words of C++, Python, the shell and of shapes.
WORDS = {"num_x", "x_idx", "pip", "cmake", "python", "export", "install", "build", "dev", "and", "for", "each", "Hkv"}


def code_of(text: str) -> list[str]:
    """Fenced blocks without their comments, and inline code."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [re.sub(r"(//|#).*", "", block) for block in blocks] + re.findall(r"`([^`]+)`", rest)


def tracked(*paths: str) -> list[Path]:
    """Files under version control, or all files where there is none."""
    listed = subprocess.run(["git", "ls-files", *paths], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return [ROOT / line for line in listed.stdout.splitlines()]
    return [path for folder in paths for path in [ROOT / folder, *(ROOT / folder).rglob("*")] if path.is_file()]


def missing(text: str, known: str) -> list[str]:
    """Names and paths in the code of ``text`` that ``known`` does not have."""
    found = []
    for code in code_of(text):
        for path in re.findall(r"\b(?:csrc|python|tests|tools|docs)/[\w./-]+\w", code):
            if "<" not in path and not (ROOT / path).exists() and path != "tests/emulation":
                found.append(path)
        names = re.findall(r"\b[A-Za-z_][A-Za-z0-9_]{2,}\b", re.sub(r"[\w.-]*/[\w./<>-]*|-[\w-]+|<\w+>", " ", code))
        found += [name for name in names if name not in WORDS and not re.search(rf"\b{name}\b", known)]
    return sorted(set(found))


@pytest.fixture(scope="module")
def known() -> str:
    """Everything that may define or use a name."""
    texts = []
    for path in tracked(*FOLDERS):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".py", ".toml", ".txt", ".cmake", "") and path.is_file():
            texts.append(path.read_text(errors="ignore"))
    return "\n".join(texts)


def test_every_name_and_path_exists(known: str) -> None:
    assert missing((ROOT / "CONTRIBUTING.md").read_text(), known) == []


def test_what_does_not_exist_is_found(known: str) -> None:
    text = "`problem(p)` and `csrc/moba/moba_" + "nothing.h`\n```cpp\n_centroid" + "_call(key);\n```\n"
    assert missing(text, known) == ["_centroid" + "_call", "csrc/moba/moba_" + "nothing.h"]
