"""Ranks that are started once, whose results the tests of a module look at."""

import fcntl
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run_once(factory: pytest.TempPathFactory, name: str, command: Sequence[Any]) -> Path:
    """The folder that ``python <command> FOLDER`` left results in; pytest's workers, if there are several, share it."""
    base = factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / name
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "log").exists():
            done = subprocess.run(
                [sys.executable, *command, folder], cwd=ROOT, capture_output=True, text=True, timeout=240
            )
            (folder / "log").write_text(done.stdout + done.stderr)
    return folder


def results_in(folder: Path, num_ranks: int) -> list[dict[str, Any]]:
    """Each rank's results, by case."""
    paths = [folder / f"rank{rank}.pt" for rank in range(num_ranks)]
    assert all(path.exists() for path in paths), (folder / "log").read_text()
    return [torch.load(path, weights_only=False) for path in paths]
