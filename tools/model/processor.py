"""An issue model of one multiprocessor of Hopper, run on instruction sequences with their control codes.

Four schedulers issue an instruction a cycle at most, each from the warps it owns: the one it issued from last as long
as that one is ready, else the oldest that is. A warp is ready when the stall of its last instruction is over, the
scoreboards its next one waits for are free and the unit that takes it is. Latencies of what has no fixed one are those
of the tables below. Not in the model: the instruction cache, register banks, contention in L2 and of device memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from model.sass import NO_SCOREBOARD, Instruction

LATENCY = {
    **dict.fromkeys(("LDG", "ATOMG"), 600),
    **dict.fromkeys(("STG", "RED", "REDG", "LDGSTS", "STS", "ST", "SHFL", "S2R", "S2UR"), 24),
    **dict.fromkeys(("MUFU", "I2F", "F2I", "F2F", "POPC", "FLO"), 23),
    **dict.fromkeys(("LDSM", "HMMA"), 33),
    **dict.fromkeys(("R2UR", "VOTEU"), 12),
    "LDS": 29,
    "LD": 38,
    "LDC": 30,
    "LDGDEPBAR": 10,
    "CS2R": 8,
    "B2R": 20,
    "VOTE": 4,
}
"""Cycles until a result may be used. What is absent has a fixed latency, which the stall counts of its users cover."""
SPECIAL = frozenset(("MUFU", "I2F", "F2I", "F2F", "POPC", "FLO"))
"""Of the unit that takes a warp's instruction every SPECIAL_CYCLES; a scheduler has one."""
SPECIAL_CYCLES = 8.0
HMMA_CYCLES = 8.0
"""The tensor core of a scheduler takes one m16n8k16 of a 16-bit type in this time."""
MEMORY = {
    **dict.fromkeys(("LDSM", "LDGSTS", "RED", "REDG", "LDG", "ATOMG"), 4),
    **dict.fromkeys(("LDS", "STS", "SHFL"), 1),
    **dict.fromkeys(("STG", "LD", "ST"), 2),
}
"""Cycles of the memory pipe, which the four schedulers share."""
MEMORY_QUEUE = 24
"""So many cycles of work may wait in front of the memory pipe before a scheduler does."""
COPY_LATENCY = 800
"""Cycles from an asynchronous copy's issue to its data lying in shared memory."""
OPERANDS_READ = 14
"""Cycles after which an instruction's operands may be overwritten."""
BARRIER_CYCLES = 20

SCHEDULERS = 4
PROCESSORS = 132
CLOCK = 1.755e9
DEVICE_BYTES_PER_SECOND = 3.35e12
COPY_BYTES_PER_SECOND = 3.0e12
"""What a copy was measured to reach, the bound of what does little but move bytes."""
LAUNCH_SECONDS = 3e-6
"""From one kernel's end to the next one's first instruction."""
REGISTERS, SHARED_BYTES, WARPS, THREAD_BLOCKS = 65536, 227 * 1024, 64, 32
"""What a multiprocessor has."""
SHARED_BYTES_RESERVED = 1024
"""Of each thread block, for the system."""


def resident_thread_blocks(registers: int, shared_bytes: int, threads: int) -> int:
    """How many thread blocks share a multiprocessor. ``registers`` of a thread; ``shared_bytes`` static and dynamic."""
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // (of_warp * warps)
    by_shared = SHARED_BYTES // (shared_bytes + SHARED_BYTES_RESERVED)
    return min(by_registers, by_shared, WARPS // warps, THREAD_BLOCKS)


@dataclass(frozen=True)
class Outcome:
    """What a simulation came to."""

    cycles: int
    issued: int

    @property
    def issue_rate(self) -> float:
        """Instructions a scheduler and cycle."""
        return self.issued / (SCHEDULERS * self.cycles) if self.cycles else 0.0


@dataclass
class _Warp:
    group: int
    sequence: Sequence[_Decoded]
    next: int = 0
    ready: float = 0.0
    scoreboards: list[float] = field(default_factory=lambda: [0.0] * 6)
    copies: float = 0.0
    """When the copies since the last commit will have arrived."""
    groups: list[float] = field(default_factory=list)
    """The same of every committed group of copies and all before it."""
    arrived: float | None = None

    def groups_arrive(self, groups_left: int) -> float:
        """When all but the last few committed groups have arrived."""
        return self.groups[-1 - groups_left] if groups_left < len(self.groups) else 0.0


@dataclass(frozen=True)
class _Decoded:
    kind: str
    latency: float
    memory_cycles: int
    waits_for: tuple[int, ...]
    write: int
    read: int
    stall: int
    groups_left: int
    """Of DEPBAR: groups of copies that need not have arrived."""


def _decode(sequence: Sequence[Instruction], latency: Mapping[str, float]) -> list[_Decoded]:
    known: dict[int, _Decoded] = {}
    decoded: list[_Decoded] = []
    for instruction in sequence:
        entry = known.get(id(instruction))
        if entry is None:
            # What is predicated off for good takes an issue slot and nothing else.
            kind = "NOP" if instruction.predicate == "@!PT" else instruction.opcode
            entry = known[id(instruction)] = _Decoded(
                "SPECIAL" if kind in SPECIAL else kind,
                latency.get(kind, 0),
                MEMORY.get(kind, 0),
                tuple(q for q in range(6) if instruction.waits_for >> q & 1),
                instruction.write_scoreboard,
                instruction.read_scoreboard,
                max(1, instruction.stall),
                int(instruction.operands.split(",")[1], 16) if kind == "DEPBAR" and "," in instruction.operands else 0,
            )
        decoded.append(entry)
    return decoded


def simulate(
    thread_blocks: Sequence[Sequence[Sequence[Instruction]]], latency: Mapping[str, float] | None = None
) -> Outcome:
    """Runs thread blocks side by side, each a list of its warps' instructions, and says when the last one ends.

    Warps go to the schedulers in turn. Warps of one thread block meet at its barriers. ``latency`` overrides entries of
    :data:`LATENCY`.
    """
    latencies = {**LATENCY, **(latency or {})}
    decoded: dict[int, list[_Decoded]] = {}
    owners: list[list[_Warp]] = [[] for _ in range(SCHEDULERS)]
    groups: list[list[_Warp]] = []
    count = 0
    for number, block in enumerate(thread_blocks):
        groups.append([])
        for sequence in block:
            if id(sequence) not in decoded:
                decoded[id(sequence)] = _decode(sequence, latencies)
            if not sequence:
                continue
            warp = _Warp(number, decoded[id(sequence)])
            groups[-1].append(warp)
            owners[count % SCHEDULERS].append(warp)
            count += 1
    tensor_free, special_free = [0.0] * SCHEDULERS, [0.0] * SCHEDULERS
    last: list[_Warp | None] = [None] * SCHEDULERS
    memory_free, time, issued = 0.0, 0, 0
    while any(owners):
        soonest, progress = float("inf"), False
        for s, warps in enumerate(owners):
            chosen: _Warp | None = None
            for warp in warps:
                if warp.arrived is not None:
                    continue
                instruction = warp.sequence[warp.next]
                kind = instruction.kind
                ready = warp.ready
                for q in instruction.waits_for:
                    ready = max(ready, warp.scoreboards[q])
                if instruction.memory_cycles:
                    ready = max(ready, memory_free - MEMORY_QUEUE)
                elif kind == "HMMA":
                    ready = max(ready, tensor_free[s])
                elif kind == "SPECIAL":
                    ready = max(ready, special_free[s])
                elif kind == "DEPBAR":
                    ready = max(ready, warp.groups_arrive(instruction.groups_left))
                if ready > time:
                    soonest = min(soonest, ready)
                elif chosen is None or warp is last[s]:
                    chosen = warp
                    if warp is last[s]:
                        break
            if chosen is None:
                continue
            warp = last[s] = chosen
            instruction = warp.sequence[warp.next]
            kind, progress = instruction.kind, True
            issued += 1
            done = time + instruction.latency
            if instruction.memory_cycles:
                done = max(memory_free, time) + instruction.latency
                memory_free = max(memory_free, time) + instruction.memory_cycles
            elif kind == "HMMA":
                tensor_free[s] = max(tensor_free[s], time) + HMMA_CYCLES
            elif kind == "SPECIAL":
                special_free[s] = max(special_free[s], time) + SPECIAL_CYCLES
            if kind == "LDGSTS":
                warp.copies = max(warp.copies, time + COPY_LATENCY)
            elif kind == "LDGDEPBAR":
                warp.groups.append(max([warp.copies, *warp.groups[-1:]]))
            if instruction.write != NO_SCOREBOARD:
                warp.scoreboards[instruction.write] = max(warp.scoreboards[instruction.write], done)
            if instruction.read != NO_SCOREBOARD:
                read = (memory_free if instruction.memory_cycles else time) + OPERANDS_READ
                warp.scoreboards[instruction.read] = max(warp.scoreboards[instruction.read], read)
            warp.ready = time + instruction.stall
            warp.next += 1
            if kind == "BAR":
                warp.arrived = time
                _release(groups[warp.group])
            if warp.next == len(warp.sequence):
                warps.remove(warp)
                groups[warp.group].remove(warp)
                _release(groups[warp.group])
        time += 1
        if not progress and time < soonest < float("inf"):
            time = int(-(-soonest // 1))
    return Outcome(time, issued)


def _release(group: list[_Warp]) -> None:
    """Lets the warps of a thread block go on once all that still run have arrived at the barrier."""
    arrivals = [warp.arrived for warp in group]
    if group and all(arrived is not None for arrived in arrivals):
        release = max(arrived for arrived in arrivals if arrived is not None) + BARRIER_CYCLES
        for warp in group:
            warp.arrived, warp.ready = None, max(warp.ready, release)
