"""A bug to plant in the CUDA sources, and what the emulator reports of such."""

import re
from dataclasses import dataclass

# The emulator's reports that a case may find.
RACE = "RuntimeError: RACE"
UNINITIALIZED = "RuntimeError: UNINITIALIZED read"
# Past a tensor's end lies what the allocator put there: nothing declared, or an output that nobody has written yet.
READ_OUT_OF_BOUNDS = "RuntimeError: (OUT OF BOUNDS global access, a read|UNINITIALIZED read of global memory)"
OUT_OF_BOUNDS = "RuntimeError: OUT OF BOUNDS"
BEFORE_WAIT = "RuntimeError: (READ|WRITE).* before its wait"
DIVERGENT = "RuntimeError: (DIVERGENT|DEADLOCK)"
# What a barrier fails to publish is, to another thread, unordered, not there yet, or still on its way; what it fails to
# protect is overwritten by a store or by a copy on its way.
UNPUBLISHED = f"{RACE}: read after write|{UNINITIALIZED}|{BEFORE_WAIT}"
OVERWRITTEN = f"{RACE}|{BEFORE_WAIT}"


@dataclass(frozen=True)
class PlantedBug:
    """``text`` of ``file`` becomes ``replacement``, and ``case`` must find what the pattern ``finding`` describes.

    ``text`` must occur once. Where its lines break does not matter, nor what is comment: ``// Note. call();`` is found
    where the note stands above the call. ``alone``: both versions cannot be compiled together
    (``planted_groups.py``).
    """

    name: str
    file: str
    text: str
    replacement: str
    case: str
    finding: str
    units: list[str] | None = None
    alone: bool = False

    def __str__(self) -> str:
        """Test id."""
        return self.name


def planted(bug: PlantedBug, source: str) -> str:
    """``source`` with the bug."""
    words = [re.escape(word) for word in bug.text.split() if word != "//"]
    pattern = re.compile(r"(?:\s|//)+".join(words))
    count = len(pattern.findall(source))
    assert count == 1, f"{bug.name}: {bug.text!r} must occur once in csrc/{bug.file}, not {count} times"
    return pattern.sub(lambda _: bug.replacement, source)
