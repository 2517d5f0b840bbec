"""What a failed import of transformers means."""

from __future__ import annotations

import importlib.util
import sys
from importlib import metadata
from typing import NoReturn

OLDEST = (4, 56)


def raise_unless_too_old(error: ImportError) -> NoReturn:
    """Say that transformers is missing or too old where it is; else raise ``error``, which is of something else."""
    found = _version()
    if found is not None and found >= OLDEST:
        raise error
    has = "it is not installed" if found is None else f"{found[0]}.{found[1]} is installed"
    raise ImportError(
        f"topgather.integrations.transformers needs transformers {OLDEST[0]}.{OLDEST[1]} or newer, and {has}: "
        f"pip install 'transformers>={OLDEST[0]}.{OLDEST[1]}' ({error})"
    ) from error


def _version() -> tuple[int, int] | None:
    """Of transformers, without importing it; None where there is none."""
    loaded = getattr(sys.modules.get("transformers"), "__version__", None)
    try:
        version = loaded if loaded is not None else metadata.version("transformers")
        if loaded is None and importlib.util.find_spec("transformers") is None:
            return None
    except (ImportError, ValueError):  # PackageNotFoundError is one; and what find_spec raises
        return None
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
