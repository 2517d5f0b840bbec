"""The way a warp takes through a kernel, found by source lines and the trip counts of its description.

Every branch is decided by the first of these that applies:
1. a loop is left after its number of passes, and stayed in until then;
2. code that the description calls rare is not entered;
3. the body of an `if` that a number is given for is entered so often;
4. a guard of a loop (a branch of the loop's own source line outside it) leads to the loop if it is to run, and past
   what the compiler laid beside it for a remainder;
5. a body is entered rather than passed by; of two bodies, the one that stands first, or last where the `if` is given 0.
A loop that the way comes to and no trip count is given for is an error: no default could be right.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from model.sass import Block, Instruction, Kernel, Loop, Place

MAX_INSTRUCTIONS = 1_000_000


class WalkError(ValueError):
    """The description does not tell which way the kernel goes."""


@dataclass(frozen=True)
class Passes:
    """How often a loop, or the body of an ``if``, runs each time it is come to.

    ``line``: the beginning of its source line. ``passes``: of the source's loop; a fraction is spread over the times it
    is come to. ``unrolled``: how many of them the compiler made one. ``within``: for one of several loops of the same
    source line, the beginning of a line that it was inlined at.
    """

    line: str
    passes: float
    unrolled: int = 1
    within: str = ""

    @property
    def left_over(self) -> int:
        """Passes that the unrolled loop does not make."""
        return int(self.passes) % self.unrolled if self.unrolled > 1 else 0


@dataclass(frozen=True)
class Sources:
    """The text behind source lines."""

    lines: Mapping[str, list[str]]

    @staticmethod
    @lru_cache
    def of(folder: Path) -> Sources:
        """Every source file below the folder, by name."""
        files = [path for pattern in ("*.cu", "*.cuh", "*.h") for path in folder.rglob(pattern)]
        return Sources({path.name: path.read_text().splitlines() for path in sorted(files)})

    def text(self, place: Place) -> str:
        """The line, without what is left and right of it; empty for a file of somebody else's."""
        lines = self.lines.get(place.file, [])
        return lines[place.line - 1].strip() if 0 < place.line <= len(lines) else ""

    def statement_lines(self, place: Place) -> range:
        """The lines of the loop that begins at a line, its body included."""
        lines = self.lines[place.file]
        depth = 0
        for number in range(place.line, len(lines) + 1):
            code = lines[number - 1].split("//")[0].rstrip()
            depth += sum({"(": 1, "{": 1, ")": -1, "}": -1}.get(character, 0) for character in code)
            if depth <= 0 and code.endswith(("}", ";")):
                break
        return range(place.line, number + 1)

    def function_lines(self, name: str) -> set[Place]:
        """The lines of every function of that name, from its first line to the brace that ends it."""
        places: set[Place] = set()
        for file, lines in self.lines.items():
            for number, line in enumerate(lines):
                if f" {name}(" not in line or line.startswith((" ", "//", "}")) or line.rstrip().endswith(";"):
                    continue
                end = next(
                    i for i in range(number, len(lines)) if lines[i].startswith("}") or lines[number].endswith("}")
                )
                places |= {Place(file, i + 1) for i in range(number, end + 1)}
        return places


@dataclass
class Walker:
    """Finds ways through one kernel.

    ``rare``: functions, or beginnings of source lines, that are not entered.
    """

    kernel: Kernel
    sources: Sources
    passes: Iterable[Passes]
    rare: Iterable[str] = ()

    def __post_init__(self) -> None:
        self.passes = tuple(self.passes)
        self._loops = {loop.header: loop for loop in self.kernel.loops}
        self._rare_places: set[Place] = set()
        self._rare_lines = []
        for name in self.rare:
            places = self.sources.function_lines(name) if name.isidentifier() else set()
            self._rare_places |= places
            if not places:
                self._rare_lines.append(name)
        self._is_rare = {start: self._judge(block) for start, block in self.kernel.blocks.items()}
        self._of_loop = {header: self._find_passes(loop) for header, loop in self._loops.items()}
        self._is_main = {header: self._judge_main(loop) for header, loop in self._loops.items()}
        for header, entry in self._of_loop.items():
            if entry is not None and entry.left_over == 0 and entry.unrolled > 1 and self._is_main[header]:
                self._mark_remainder(self._loops[header])
        self._spread_rareness()
        self._owed: dict[int, float] = {}
        self._owed_ifs: dict[int, float] = {}
        self._left: dict[int, int] = {}

    def _judge(self, block: Block) -> bool:
        """Whether most of a block's instructions are of rare code."""
        rare = [any(self._is_rare_place(place) for place in i.places) for i in block.instructions if i.places]
        return 2 * sum(rare) > len(rare)

    def _spread_rareness(self) -> None:
        """Of two ways, one that leads to nothing but rare code is rare."""
        changed = True
        while changed:
            changed = False
            for start, block in self.kernel.blocks.items():
                before = self.kernel.predecessors[start]
                is_choice = len(before) == 1 and len(self.kernel.blocks[before[0]].successors) == 2
                if (
                    not self._is_rare[start]
                    and is_choice
                    and all(self._is_rare[s] for s in block.successors or (start,))
                ):
                    self._is_rare[start] = changed = True

    def _is_rare_place(self, place: Place) -> bool:
        if place in self._rare_places:
            return True
        return bool(self._rare_lines) and self.sources.text(place).startswith(tuple(self._rare_lines))

    def _latch(self, loop: Loop) -> Instruction:
        """The branch back. Of several, the last, which carries the line of the loop itself."""
        return self.kernel.blocks[max(loop.latches)].last

    def _find_passes(self, loop: Loop) -> Passes | None:
        return self._passes_of(self._latch(loop))

    def _passes_of(self, instruction: Instruction) -> Passes | None:
        """The trip count that is given for the loop of an instruction's source line."""
        if not instruction.places:
            return None
        texts = [self.sources.text(place) for place in instruction.places]
        for entry in self.passes:
            if texts[0].startswith(entry.line) and (
                not entry.within or any(text.startswith(entry.within) for text in texts[1:])
            ):
                return entry
        return None

    def _judge_main(self, loop: Loop) -> bool:
        """Of loops that the compiler made of one, the small ones are for what unrolling leaves over."""
        places = self._latch(loop).places
        alike = [other for other in self._loops.values() if self._latch(other).places == places and places]
        alike = [other for other in alike if not (other.body < loop.body or loop.body < other.body)] or [loop]
        return 1.5 * self._size(loop) >= max(map(self._size, alike))

    def _mark_remainder(self, loop: Loop) -> None:
        """Calls rare what was compiled from the loop's body but lies outside it: what unrolling may leave over."""
        place, *callers = self._latch(loop).places
        lines = self.sources.statement_lines(place)
        for start, block in self.kernel.blocks.items():
            if start not in loop.body and start not in self.kernel.dominators[loop.header]:
                of_body = [
                    any(
                        at.file == place.file and at.line in lines and list(i.places[depth + 1 :]) == callers
                        for depth, at in enumerate(i.places)
                    )
                    for i in block.instructions
                ]
                self._is_rare[start] |= 2 * sum(of_body) > len(of_body)

    def _size(self, loop: Loop) -> int:
        return sum(len(self.kernel.blocks[start].instructions) for start in loop.body)

    def loop_at(self, line: str) -> Loop:
        """The largest loop whose source line begins so."""
        found = [
            loop
            for loop in self._loops.values()
            if self._latch(loop).places and self.sources.text(self._latch(loop).places[0]).startswith(line)
        ]
        found = [loop for loop in found if not self._is_rare[loop.header]]
        if not found:
            raise WalkError(f"{self.kernel.name} has no loop at {line!r}")
        return max(found, key=self._size)

    def whole(self) -> list[Instruction]:
        """From the kernel's first instruction to its exit."""
        return self._walk(next(iter(self.kernel.blocks)), None)

    def one_pass(self, line: str) -> list[Instruction]:
        """One pass of the loop whose source line begins so."""
        loop = self.loop_at(line)
        return self._walk(loop.header, loop)

    def _walk(self, start: int, only: Loop | None) -> list[Instruction]:
        self._owed, self._owed_ifs, self._left = {}, {}, {}
        way: list[Instruction] = []
        current: int | None = start
        came_from: int | None = None
        while current is not None:
            if (loop := self._loops.get(current)) is not None and loop is not only and came_from not in loop.body:
                self._enter(loop)
            block = self.kernel.blocks[current]
            way += block.instructions
            if len(way) > MAX_INSTRUCTIONS:
                raise WalkError(f"{self.kernel.name}: no way out of the loops around {block.last.places}")
            came_from, current = current, self._choose(block, only)
            if only is not None and current == only.header:
                break
        return way

    def _enter(self, loop: Loop) -> None:
        self._left[loop.header] = max(1, self._passes_due(loop, True))

    def _passes_due(self, loop: Loop, is_taken: bool) -> int:
        """How often the loop is to run now. A fraction is carried over."""
        entry = self._of_loop[loop.header]
        if entry is None:
            latch = self._latch(loop)
            where = " at ".join(str(place) for place in latch.places)
            text = self.sources.text(latch.places[0]) if latch.places else ""
            raise WalkError(f"{self.kernel.name}: no trip count for the loop of {where}: {text!r}")
        if not self._is_main[loop.header]:
            return entry.left_over
        if entry.unrolled > 1:
            return int(entry.passes) // entry.unrolled
        owed = self._owed.get(loop.header, 0.0) + entry.passes
        due = math.floor(owed + 1e-9)
        if is_taken:
            self._owed[loop.header] = owed - due
        return due

    def _choose(self, block: Block, only: Loop | None) -> int | None:
        last = block.last
        if not last.is_branch or block.target is None:
            return block.following  # a conditional exit is not taken
        if not last.is_conditional:
            return block.target
        if block.following is None or block.target == block.following:
            return block.target
        return self._choose_of_two(block, (block.following, block.target), only)

    def _choose_of_two(self, block: Block, ways: tuple[int, int], only: Loop | None) -> int:
        for loop in reversed(self.kernel.loops):  # innermost first
            if block.start not in loop.body:
                continue
            inside = [way for way in ways if way in loop.body]
            if len(inside) == 1:
                stays, leaves = inside[0], next(way for way in ways if way not in loop.body)
                if loop is only:
                    return stays
                return self._stay_or_leave(loop, block, stays, leaves)
        entry = self._passes_of(block.last)
        meet = self.kernel.post_dominator[block.start]
        lead = self._leading(ways, meet, entry)
        if lead is not None:
            way, loops = lead
            runs = any(self._passes_due(loop, False) > 0 for loop in loops)
            # A guard of the loop and of what is left over together.
            guards_rest = entry is not None and entry.left_over > 0 and self._asks_again(block, way, meet)
            return way if runs or guards_rest else next(other for other in ways if other != way)
        warm = [way for way in ways if not self._is_rare[way]]
        if len(warm) == 1:
            return warm[0]
        idle = [way for way in ways if self._begins_idle_loop(way)]
        if len(idle) == 1:
            return next(way for way in ways if way not in idle)
        if meet not in ways:
            return max(ways) if entry is not None and entry.passes == 0 else min(ways)
        body = next(way for way in ways if way != meet)
        if not warm:
            return meet  # rare code that there was no way around
        if entry is None:
            return body
        if entry in self._of_loop.values():
            return body if self._guards_of(block).index(block.start) < entry.left_over else meet
        owed = self._owed_ifs.get(block.start, 0.0) + entry.passes
        self._owed_ifs[block.start] = owed - math.floor(owed + 1e-9)
        return meet if owed < 1 - 1e-9 else body

    def _stay_or_leave(self, loop: Loop, block: Block, stays: int, leaves: int) -> int:
        is_latch = stays == loop.header
        is_tested_at_top = not any(self.kernel.blocks[latch].last.is_conditional for latch in loop.latches)
        if is_latch or (is_tested_at_top and block.start == loop.header):
            self._left[loop.header] -= 1
            done = self._left[loop.header] <= 0 if is_latch else self._left[loop.header] < 0
            return leaves if done else stays
        return stays  # a way out of the middle

    def _begins_idle_loop(self, way: int) -> bool:
        """Whether nothing but a loop that is not to run lies at a way's start."""
        seen: set[int] = set()
        while way not in self._loops:
            seen.add(way)
            successors = self.kernel.blocks[way].successors
            if len(successors) != 1 or len(self.kernel.predecessors[successors[0]]) > 2:
                return False
            way = successors[0]
            if way in seen:
                return False
        return self._of_loop[way] is not None and self._passes_due(self._loops[way], False) == 0

    def _asks_again(self, block: Block, way: int, meet: int | None) -> bool:
        """Whether a way has a further branch, that is not a loop's, of the same source line."""
        between = self._between(way, meet)
        loops = [loop for loop in self._loops.values() if loop.header in between]
        return any(
            self.kernel.blocks[start].last.places == block.last.places
            and self.kernel.blocks[start].last.is_branch
            and not any(start in loop.body for loop in loops)
            for start in between
        )

    def _leading(self, ways: tuple[int, ...], meet: int | None, entry: Passes | None) -> tuple[int, list[Loop]] | None:
        """The one of two ways that a loop of this trip count lies on before they meet, and such loops."""
        if entry is None:
            return None
        found = {
            way: [self._loops[h] for h in self._between(way, meet) if h in self._loops and self._of_loop[h] is entry]
            for way in ways
        }
        lead = [way for way in ways if found[way]]
        return (lead[0], found[lead[0]]) if len(lead) == 1 else None

    def _guards_of(self, block: Block) -> list[int]:
        """The branches, in order, that ask whether a further pass is left over."""
        guards = []
        meet = self.kernel.post_dominator[block.start]
        for other in self.kernel.blocks.values():
            if meet in other.successors and len(other.successors) == 2 and other.last.is_branch:
                is_same = self.kernel.post_dominator[other.start] == meet
                if is_same and self._leading(other.successors, meet, self._passes_of(other.last)) is None:
                    guards.append(other.start)
        return guards

    def _between(self, start: int, meet: int | None) -> set[int]:
        seen: set[int] = set()
        pending = [start]
        while pending:
            block = pending.pop()
            if block not in seen and block != meet:
                seen.add(block)
                pending += self.kernel.blocks[block].successors
        return seen
