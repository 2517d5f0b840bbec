"""Many bugs in one build: each stands under a condition, and the number of the one in force is told when a case runs.

Compiling takes most of a planted bug's time. Where an edit changes an expression or whole statements, both versions can
be compiled: ``is_planted(7) ? (i <= n) : (i < n)``. What is put under the condition is found among the file's tokens:
the shortest range around the edit that is a whole expression, or whole statements, in both versions. Edits of
declarations and of parts of statements have no such range and are built alone; so are those that say they must be
(``PlantedBug.alone``).
"""

import re
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path

from tests.cuda.planted_bug import PlantedBug, planted

NUMBER = "TOPGATHER_PLANTED_BUG"

# Included before each file of such a build. Not instrumented: the emulator would report the access.
HEADER = f"""\
#pragma once
#include <cstdlib>
inline int planted_bug_number() {{
  const char* text = std::getenv("{NUMBER}");
  return text == nullptr ? 0 : std::atoi(text);
}}
static const int kPlantedBug = planted_bug_number();
[[gnu::noinline, gnu::const, gnu::no_sanitize("thread", "alignment")]] static bool is_planted(int number) {{
  return number == kPlantedBug;
}}
"""

_TOKEN = re.compile(
    r"(?P<skip>\s+|//[^\n]*|/\*.*?\*/|#[^\n]*)"
    r'|"(?:\\.|[^"\\])*"'
    r"|'(?:\\.|[^'\\])*'"
    r"|[A-Za-z_]\w*|\d[\w.']*(?:[eE][+-]\w+)?"
    r"|<<=|>>=|->\*|\.\.\.|::|->|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|.",
    re.DOTALL,
)
_CLOSED_BY = {"(": ")", "[": "]", "{": "}"}
_CLOSING = set(_CLOSED_BY.values())
_ASSIGNMENTS = {"=", "+=", "-=", "*=", "/=", "|=", "&=", "^=", "<<=", ">>="}
# What stands before a whole expression, and after one.
_BEFORE_EXPRESSION = {"(", "[", "{", ",", ";", "return", *_ASSIGNMENTS}
_AFTER_EXPRESSION = {")", "]", "}", ",", ";"}
_BEFORE_STATEMENT = {";", "{", "}"}
# First tokens of what a condition cannot be put around.
_NO_STATEMENT = {"const", "constexpr", "auto", "using", "template", "static", "typename", "struct", "else", "case"}
_CONTROLS = {"return", "if", "for", "while", "break", "continue"}


@dataclass(frozen=True)
class Token:
    text: str
    start: int
    end: int


@cache  # of a file, for each of its bugs
def tokens_of_file(source: str) -> list[Token]:
    return tokens_of(source)


def tokens_of(source: str) -> list[Token]:
    """Without comments and what the preprocessor reads."""
    return [Token(m[0], m.start(), m.end()) for m in _TOKEN.finditer(source) if m["skip"] is None]


@dataclass(frozen=True)
class Edit:
    """``source[start:end]`` becomes both versions under a condition."""

    start: int
    end: int
    planted: str
    is_expression: bool

    def text(self, source: str, number: int) -> str:
        original = source[self.start : self.end]
        if self.is_expression:
            return f"(is_planted({number}) ? ({self.planted}\n) : ({original}\n))"
        return f"{{ if (is_planted({number})) {{ {self.planted}\n }} else {{ {original}\n }} }}"


class _Difference:
    """Tokens ``old[first:last]`` became ``new[first:last + growth]``; all others are the same."""

    def __init__(self, source: str, planted: str) -> None:
        self.source, self.planted = source, planted
        self.old, self.new = tokens_of_file(source), tokens_of(planted)
        self.growth = len(self.new) - len(self.old)
        self.texts = [token.text for token in self.old]
        new_texts = [token.text for token in self.new]
        pairs = zip(self.texts, new_texts, strict=False)
        shorter = min(len(self.old), len(self.new))
        self.first = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
        same = 0
        while same < shorter - self.first and self.texts[-1 - same] == new_texts[-1 - same]:
            same += 1
        self.last = len(self.old) - same

    def versions(self) -> tuple[list[str], list[str]]:
        added = self.new[self.first : self.last + self.growth]
        return self.texts[self.first : self.last], [token.text for token in added]

    def edit(self, is_expression: bool) -> Edit:
        before = self.old[self.first - 1].end
        removed, added = self.old[self.first : self.last], self.new[self.first : self.last + self.growth]
        start, end = (removed[0].start, removed[-1].end) if removed else (before, before)
        return Edit(start, end, self.planted[added[0].start : added[-1].end] if added else "", is_expression)

    def to_statements(self) -> bool:
        """Of statements that differ, the diff may begin and end within: `f(a); f(b);` without the first by `a); f(`."""
        longer = self.old if self.growth < 0 else self.new
        removed, added = self.versions()
        if removed and added:
            return False
        length = len(removed) or len(added)
        while self.texts[self.first - 1] not in _BEFORE_STATEMENT:
            if longer[self.first - 1].text != longer[self.first + length - 1].text:
                return False
            self.first, self.last = self.first - 1, self.last - 1
        return True


def edit_of(source: str, planted: str) -> Edit | None:
    """The edit that makes one of the other, as something that can stand under a condition; None if it is no such."""
    try:
        difference = _Difference(source, planted)
        return _as_expression(copy(difference)) or _as_statements(difference)
    except (IndexError, ValueError):
        return None


def _as_expression(difference: _Difference) -> Edit | None:
    texts = difference.texts
    while texts[difference.first - 1] not in _BEFORE_EXPRESSION:
        difference.first = _opened(texts, difference.first - 1)
    while texts[difference.last] not in _AFTER_EXPRESSION:
        difference.last = _closed(texts, difference.last)
    before, after = texts[difference.first - 1], texts[difference.last]
    is_of_loop = ";" in (before, after) and _is_in_parentheses(texts, difference.first)
    if before in _BEFORE_STATEMENT and after in _BEFORE_STATEMENT and not is_of_loop:
        return None
    for version in difference.versions():
        if not version or ";" in version or not _is_balanced(version) or _has_several(version):
            return None
    return difference.edit(is_expression=True)


def _as_statements(difference: _Difference) -> Edit | None:
    if not difference.to_statements():
        texts = difference.texts
        while texts[difference.first - 1] not in _BEFORE_STATEMENT:
            difference.first = _opened(texts, difference.first - 1)
        while difference.last == difference.first or texts[difference.last - 1] not in (";", "}"):
            difference.last = _closed(texts, difference.last)
        if texts[difference.last] == "else" or _is_in_parentheses(texts, difference.first):
            return None
    for version in difference.versions():
        if version and (version[-1] not in (";", "}") or not _is_balanced(version) or _declares(version)):
            return None
    return difference.edit(is_expression=False)


def _is_balanced(texts: Sequence[str]) -> bool:
    expected: list[str] = []
    for text in texts:
        if text in _CLOSED_BY:
            expected.append(_CLOSED_BY[text])
        elif text in _CLOSING and (not expected or expected.pop() != text):
            return False
    return not expected


def _has_several(texts: Sequence[str]) -> bool:
    """Whether these are several expressions in a row, with commas between."""
    depths = list(accumulate((text in _CLOSED_BY) - (text in _CLOSING) for text in texts))
    return any(text == "," and depth == 0 for text, depth in zip(texts, depths, strict=True))


def _opened(texts: Sequence[str], position: int) -> int:
    """Where what ends at ``position`` begins: a bracket with all that it closes, or a token."""
    depth = 0
    for i in range(position, -1, -1):
        depth += (texts[i] in _CLOSING) - (texts[i] in _CLOSED_BY)
        if depth == 0:
            return i
        if depth < 0:
            break
    raise ValueError("an opening bracket")


def _closed(texts: Sequence[str], position: int) -> int:
    """Behind what begins at ``position``: a bracket with all that it opens, or a token."""
    depth = 0
    for i in range(position, len(texts)):
        depth += (texts[i] in _CLOSED_BY) - (texts[i] in _CLOSING)
        if depth == 0:
            return i + 1
        if depth < 0:
            break
    raise ValueError("a closing bracket")


def _declares(texts: Sequence[str]) -> bool:
    """Whether a statement of these begins as a declaration does: with a word for it, or with two names in a row."""
    is_name = re.compile(r"[A-Za-z_]\w*$").match
    depth, begins = 0, True
    for this, following in zip(texts, [*texts[1:], ""], strict=True):
        if begins and depth == 0:
            if this in _NO_STATEMENT:
                return True
            if (
                this not in ("return", "if", "for", "while", "break", "continue")
                and is_name(this)
                and is_name(following)
            ):
                return True
        depth += (this in _CLOSED_BY) - (this in _CLOSING)
        begins = this in _BEFORE_STATEMENT
    return False


def _is_in_parentheses(texts: Sequence[str], position: int) -> bool:
    depth = 0
    for text in reversed(texts[:position]):
        depth += (text in _CLOSING) - (text in _CLOSED_BY)
        if depth < 0:
            return text == "("
    return False


@dataclass
class Build:
    """Bugs that are built together: of the same units, their edits apart from each other. Or a single one."""

    units: list[str]
    bugs: list[PlantedBug] = field(default_factory=list)
    edits: dict[str, list[tuple[Edit, int]]] = field(default_factory=dict)  # by file, with the bug's number

    def __str__(self) -> str:
        """The bugs by name."""
        return ", ".join(map(str, self.bugs))

    def has_room_for(self, file: str, edit: Edit) -> bool:
        return all(edit.end < other.start or other.end < edit.start for other, _ in self.edits.get(file, []))

    def add(self, bug: PlantedBug, edit: Edit) -> None:
        self.bugs.append(bug)
        self.edits.setdefault(bug.file, []).append((edit, len(self.bugs)))

    def number_of(self, bug: PlantedBug) -> int:
        """What the case is told. 0 is no bug."""
        return self.bugs.index(bug) + 1

    def edited(self, file: str, source: str) -> str:
        """The file with every bug of it under its condition, or with the only one."""
        if not self.edits:
            return planted(self.bugs[0], source)
        for edit, number in sorted(self.edits[file], key=lambda pair: pair[0].start, reverse=True):
            source = source[: edit.start] + edit.text(source, number) + source[edit.end :]
        return source


def builds_of(bugs: Sequence[PlantedBug], units_of: Callable[[PlantedBug], list[str]], sources: Path) -> list[Build]:
    """Few builds for all of these."""
    together: list[Build] = []
    alone: list[Build] = []
    for bug in bugs:
        source, units = (sources / bug.file).read_text(), units_of(bug)
        edit = None if bug.alone else edit_of(source, planted(bug, source))
        if edit is None:
            alone.append(Build(units, [bug]))
            continue
        candidates = (build for build in together if build.units == units and build.has_room_for(bug.file, edit))
        build = next(candidates, None)
        if build is None:
            build = Build(units)
            together.append(build)
        build.add(bug, edit)
    return [*together, *alone]
