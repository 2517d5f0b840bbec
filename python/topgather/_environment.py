"""Settings read from the environment when the package is imported."""

from __future__ import annotations

import os

from . import _native

CPU_TARGET_VARIABLE = "TOPGATHER_CPU_TARGET"


def apply_environment() -> None:
    """Use the instruction set that ``TOPGATHER_CPU_TARGET`` names, if it is set.

    Raises:
        ValueError: it names one that does not exist, was not built or that this machine lacks.
    """
    name = os.environ.get(CPU_TARGET_VARIABLE)
    if name:
        try:
            _native.set_cpu_target(name)
        except ValueError as error:
            raise ValueError(f"{CPU_TARGET_VARIABLE}: {error}") from None
