"""SASS of one kernel: its instructions with their control codes and source lines, its basic blocks and its loops.

Reads what ``nvdisasm -c -hex -gi`` prints. Of the 128 bits of an instruction, the upper word holds what the hardware's
scheduler goes by: how long to stall, which of six scoreboards the instruction sets when its result is there or its
operands have been read, and which it waits for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

NO_SCOREBOARD = 7


@dataclass(frozen=True)
class Place:
    """A source line, ``moba_route_cuda.cuh:190``; the folders are left out."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Instruction:
    """One instruction. ``places``: its source line, then the lines that one was inlined at, innermost first."""

    address: int
    operation: str
    operands: str
    predicate: str
    stall: int
    write_scoreboard: int
    read_scoreboard: int
    waits_for: int
    places: tuple[Place, ...] = ()
    target: int | None = None

    @property
    def opcode(self) -> str:
        """The operation without its modifiers: ``LDG`` for ``LDG.E.128``."""
        return self.operation.split(".")[0]

    @property
    def is_branch(self) -> bool:
        """Whether control may go to ``target``. BRA.DIV goes there where a warp has diverged: here it never has."""
        return self.opcode == "BRA" and not self.operation.startswith("BRA.DIV")

    @property
    def is_conditional(self) -> bool:
        """Whether a branch or an exit may also not be taken."""
        return bool(self.predicate) or re.match(r"!?U?P\d", self.operands) is not None


@dataclass
class Block:
    """A basic block: instructions with one way in and, after the last, up to two ways out."""

    instructions: list[Instruction]
    following: int | None = None
    target: int | None = None

    @property
    def start(self) -> int:
        return self.instructions[0].address

    @property
    def last(self) -> Instruction:
        return self.instructions[-1]

    @property
    def successors(self) -> tuple[int, ...]:
        return tuple(start for start in dict.fromkeys((self.target, self.following)) if start is not None)


@dataclass
class Loop:
    """A natural loop: the block it is entered by, and the starts of all its blocks."""

    header: int
    body: set[int]
    latches: list[int] = field(default_factory=list)


@dataclass
class Kernel:
    """A kernel's code."""

    name: str
    instructions: list[Instruction]

    @cached_property
    def blocks(self) -> dict[int, Block]:
        """Basic blocks by the address of their first instruction, in the code's order."""
        targets = {i.target for i in self.instructions if i.is_branch}
        blocks: list[Block] = []
        starts_block = True
        for instruction in self.instructions:
            if starts_block or instruction.address in targets:
                blocks.append(Block([]))
            blocks[-1].instructions.append(instruction)
            starts_block = instruction.is_branch or instruction.opcode in ("EXIT", "RET", "BRX")
        for block, after in zip(blocks, [*blocks[1:], None], strict=True):
            last = block.last
            block.target = last.target if last.is_branch else None
            leaves = (last.is_branch or last.opcode in ("EXIT", "RET", "BRX")) and not last.is_conditional
            block.following = after.start if after is not None and not leaves else None
        return {block.start: block for block in blocks}

    @cached_property
    def predecessors(self) -> dict[int, list[int]]:
        before: dict[int, list[int]] = {start: [] for start in self.blocks}
        for start, block in self.blocks.items():
            for successor in block.successors:
                before[successor].append(start)
        return before

    @cached_property
    def dominators(self) -> dict[int, set[int]]:
        """The blocks that every way from the kernel's start to a block passes, itself included."""
        return _dominators(
            next(iter(self.blocks)), {s: b.successors for s, b in self.blocks.items()}, self.predecessors
        )

    @cached_property
    def loops(self) -> list[Loop]:
        """Natural loops, those of one header as one, outer loops first."""
        loops: dict[int, Loop] = {}
        for start, dominators in self.dominators.items():
            for header in self.blocks[start].successors:
                if header in dominators:
                    loop = loops.setdefault(header, Loop(header, {header}))
                    loop.latches.append(start)
                    pending = [start]
                    while pending:
                        block = pending.pop()
                        if block not in loop.body:
                            loop.body.add(block)
                            pending += [b for b in self.predecessors[block] if b in self.dominators]
        return sorted(loops.values(), key=lambda loop: (-len(loop.body), loop.header))

    @cached_property
    def post_dominator(self) -> dict[int, int | None]:
        """The first block that every way from a block to the kernel's end passes."""
        end = -1
        after = {s: list(b.successors) or [end] for s, b in self.blocks.items()}
        before: dict[int, list[int]] = {s: [] for s in [*self.blocks, end]}
        for start, successors in after.items():
            for successor in successors:
                before[successor].append(start)
            if self.blocks[start].last.opcode == "EXIT" and end not in successors:
                before[end].append(start)
                after[start] = [*successors, end]
        sets = _dominators(end, before, after)
        nearest: dict[int, int | None] = {}
        for start in self.blocks:
            candidates = sets.get(start, set()) - {start}
            nearest[start] = max(candidates - {end}, key=lambda c: len(sets[c]), default=None)
        return nearest


def _dominators(
    first: int, after: dict[int, list[int]] | dict[int, tuple[int, ...]], before: dict[int, list[int]]
) -> dict[int, set[int]]:
    order: list[int] = []
    seen = {first}
    stack: list[tuple[int, Iterator[int]]] = [(first, iter(after[first]))]
    while stack:
        node, successors = stack[-1]
        for successor in successors:
            if successor not in seen:
                seen.add(successor)
                stack.append((successor, iter(after[successor])))
                break
        else:
            order.append(node)
            stack.pop()
    order.reverse()
    found = {first: {first}}
    changed = True
    while changed:
        changed = False
        for node in order[1:]:
            known = [found[b] for b in before[node] if b in found]
            new = set.intersection(*known) | {node}
            if found.get(node) != new:
                found[node], changed = new, True
    return found


_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;\s+/\* (0x[0-9a-f]{16}) \*/")
_CONTROL = re.compile(r"\s+/\* (0x[0-9a-f]{16}) \*/")
_LINE = re.compile(r'\s*//## File "([^"]+)", line (\d+)(?: inlined at "([^"]+)", line (\d+))?')
_LABEL = re.compile(r"(\.L_x_\d+):")


def parse(text: str) -> dict[str, Kernel]:
    """Every kernel of a disassembly, by its mangled name."""
    kernels: dict[str, Kernel] = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]:
        name = section[: section.index(",")]
        kernels[name] = Kernel(name, _parse_section(section.splitlines()))
    return kernels


def _parse_section(lines: list[str]) -> list[Instruction]:
    labels: dict[str, int] = {}
    waiting: list[str] = []
    found: list[tuple[int, str, int, tuple[Place, ...]]] = []
    places: tuple[Place, ...] = ()
    expects_line_of_caller = False
    for i, line in enumerate(lines):
        if (at := _LINE.match(line)) is not None:
            place = Place(Path(at[1]).name, int(at[2]))
            places = (*places, place) if expects_line_of_caller else (place,)
            expects_line_of_caller = at[3] is not None
        elif (label := _LABEL.match(line)) is not None:
            waiting.append(label[1])
        elif (code := _INSTRUCTION.match(line)) is not None:
            control = _CONTROL.match(lines[i + 1])
            if control is None:
                raise ValueError(f"no control word behind {line.strip()!r}: nvdisasm ran without -hex?")
            address = int(code[1], 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting, expects_line_of_caller = [], False
            found.append((address, code[2], int(control[1], 16), places))
    return [_instruction(*entry, labels) for entry in found]


def _instruction(
    address: int, text: str, control: int, places: tuple[Place, ...], labels: dict[str, int]
) -> Instruction:
    words = text.split()
    predicate = words.pop(0) if words[0].startswith("@") else ""
    operands = " ".join(words[1:])
    label = re.search(r"`\((\.L_x_\d+)\)", operands)
    return Instruction(
        address, words[0], operands, predicate,
        stall=control >> 41 & 15, write_scoreboard=control >> 46 & 7, read_scoreboard=control >> 49 & 7,
        waits_for=control >> 52 & 63, places=places,
        target=labels.get(label[1]) if label is not None and words[0].startswith("BRA") else None,
    )  # fmt: skip
