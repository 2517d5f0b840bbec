"""Many bugs in one build: each stands under a condition, and the number of the one in force is told when a case runs.

Compiling takes most of a planted bug's time. Where an edit changes an expression or whole statements, both versions can
be compiled: ``is_planted(7) ? (i <= n) : (i < n)``. What is put under the condition is found among the file's tokens:
the shortest range around the edit that is a whole expression, or whole statements, in both versions. Of several
expressions in a row, each that differs stands under a condition of its own. Within what is put under one condition may
stand others. Edits of declarations have no such range and are built alone; so are those that say they must be
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

    def text(self, original: str, number: int) -> str:
        if self.is_expression:
            return f"(is_planted({number}) ? ({self.planted}\n) : ({original}\n))"
        return f"{{ if (is_planted({number})) {{ {self.planted}\n }} else {{ {original}\n }} }}"

    def has_room_beside(self, other: "Edit") -> bool:
        """Whether the two are apart from each other, or one within the other."""
        first, second = sorted((self, other), key=_outer_first)
        return first.end < second.start or second.end <= first.end


def _outer_first(edit: Edit) -> tuple[int, int]:
    return edit.start, -edit.end


def applied(source: str, edits: Sequence[tuple[Edit, int]]) -> str:
    """``source`` with all of these, each of the bug of that number; they are apart or within each other."""
    return _applied(source, 0, len(source), sorted(edits, key=lambda pair: _outer_first(pair[0])))


def _applied(source: str, start: int, end: int, edits: Sequence[tuple[Edit, int]]) -> str:
    text, rest = "", list(edits)
    while rest:
        (edit, number), *rest = rest
        inner = [pair for pair in rest if pair[0].end <= edit.end]
        rest = [pair for pair in rest if pair[0].end > edit.end]
        original = _applied(source, edit.start, edit.end, inner)
        text, start = text + source[start : edit.start] + edit.text(original, number), edit.end
    return text + source[start:end]


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

    def statements(self) -> Edit:
        before = self.old[self.first - 1].end
        return self._edit(*self._tokens(), is_expression=False, where_nothing_is=before)

    def expressions(self) -> list[Edit]:
        """One for each that differs, of several with commas between."""
        parts = [_parts(version) for version in self._tokens()]
        pairs = [_without_name(removed, added) for removed, added in zip(*parts, strict=True)]
        different = [pair for pair in pairs if _texts(pair[0]) != _texts(pair[1])]
        return [self._edit(removed, added, is_expression=True) for removed, added in different]

    def _tokens(self) -> tuple[list[Token], list[Token]]:
        return self.old[self.first : self.last], self.new[self.first : self.last + self.growth]

    def _edit(self, removed: list[Token], added: list[Token], is_expression: bool, where_nothing_is: int = 0) -> Edit:
        start, end = (removed[0].start, removed[-1].end) if removed else (where_nothing_is,) * 2
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


def edits_of(source: str, planted: str) -> list[Edit]:
    """The edits that make one of the other, as something that can stand under a condition; none if it is no such."""
    try:
        difference = _Difference(source, planted)
        return _as_expressions(copy(difference)) or _as_statements(difference)
    except (IndexError, ValueError):
        return []


def _as_expressions(difference: _Difference) -> list[Edit]:
    texts = difference.texts
    while True:
        while texts[difference.first - 1] not in _BEFORE_EXPRESSION:
            difference.first = _opened(texts, difference.first - 1)
        while texts[difference.last] not in _AFTER_EXPRESSION:
            difference.last = _closed(texts, difference.last)
        versions = difference.versions()
        if any(";" in version for version in versions):
            return []
        if all(_is_balanced(version) for version in versions):
            break
        difference.first -= any(_closes_too_often(version) for version in versions)
        difference.last += any(_opens_too_often(version) for version in versions)
    before, after = texts[difference.first - 1], texts[difference.last]
    is_of_loop = ";" in (before, after) and _is_in_parentheses(texts, difference.first)
    is_of_list = before == "{" and texts[difference.first - 2] == "="
    if before in _BEFORE_STATEMENT and after in _BEFORE_STATEMENT and not is_of_loop and not is_of_list:
        return []
    if not all(versions):
        return []
    return difference.expressions()


def _as_statements(difference: _Difference) -> list[Edit]:
    if not difference.to_statements() or not all(_is_whole(version) for version in difference.versions() if version):
        texts = difference.texts
        while texts[difference.first - 1] not in _BEFORE_STATEMENT:
            is_open = texts[difference.first - 1] in _CLOSED_BY
            difference.first = difference.first - 1 if is_open else _opened(texts, difference.first - 1)
        while not _is_whole(texts[difference.first : difference.last]):
            is_closed = texts[difference.last] in _CLOSING
            difference.last = difference.last + 1 if is_closed else _closed(texts, difference.last)
        if texts[difference.last] == "else" or _is_in_parentheses(texts, difference.first):
            return []
    for version in difference.versions():
        if version and (not _is_whole(version) or _declares(version)):
            return []
    return [difference.statements()]


def _is_whole(texts: Sequence[str]) -> bool:
    """Whether statements end with the last of these."""
    return bool(texts) and texts[-1] in (";", "}") and _is_balanced(texts)


def _texts(tokens: Sequence[Token]) -> list[str]:
    return [token.text for token in tokens]


def _parts(tokens: Sequence[Token]) -> list[list[Token]]:
    """What stands between commas that no bracket is around."""
    parts: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        depth += (token.text in _CLOSED_BY) - (token.text in _CLOSING)
        if token.text == "," and depth == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    if not all(parts):
        raise ValueError("an expression between commas")
    return parts


def _without_name(removed: list[Token], added: list[Token]) -> tuple[list[Token], list[Token]]:
    """Values alone, of the second variable of a declaration and further ones."""
    if _texts(removed[:2]) == _texts(added[:2]) and _texts(removed[1:2]) == ["="]:
        return removed[2:], added[2:]
    return removed, added


def _depths(texts: Sequence[str]) -> list[int]:
    """How many more brackets are open than before, after each of these."""
    return list(accumulate((text in _CLOSED_BY) - (text in _CLOSING) for text in texts))


def _closes_too_often(texts: Sequence[str]) -> bool:
    return min(_depths(texts), default=0) < 0


def _opens_too_often(texts: Sequence[str]) -> bool:
    depths = _depths(texts)
    return bool(depths) and depths[-1] > min(0, *depths)


def _is_balanced(texts: Sequence[str]) -> bool:
    return not _closes_too_often(texts) and not _opens_too_often(texts)


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

    def has_room_for(self, file: str, edits: Sequence[Edit]) -> bool:
        others = [other for other, _ in self.edits.get(file, [])]
        return all(edit.has_room_beside(other) for edit in edits for other in others)

    def add(self, bug: PlantedBug, edits: Sequence[Edit]) -> None:
        self.bugs.append(bug)
        self.edits.setdefault(bug.file, []).extend((edit, len(self.bugs)) for edit in edits)

    def number_of(self, bug: PlantedBug) -> int:
        """What the case is told. 0 is no bug."""
        return self.bugs.index(bug) + 1

    def edited(self, file: str, source: str) -> str:
        """The file with every bug of it under its condition, or with the only one."""
        if not self.edits:
            return planted(self.bugs[0], source)
        return applied(source, self.edits[file])


def builds_of(bugs: Sequence[PlantedBug], units_of: Callable[[PlantedBug], list[str]], sources: Path) -> list[Build]:
    """Few builds for all of these."""
    together: list[Build] = []
    alone: list[Build] = []
    for bug in bugs:
        source, units = (sources / bug.file).read_text(), units_of(bug)
        edits = [] if bug.alone else edits_of(source, planted(bug, source))
        if not edits:
            alone.append(Build(units, [bug]))
            continue
        candidates = (build for build in together if build.units == units and build.has_room_for(bug.file, edits))
        build = next(candidates, None)
        if build is None:
            build = Build(units)
            together.append(build)
        build.add(bug, edits)
    return [*together, *alone]
