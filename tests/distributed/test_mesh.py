"""DTensors, caches and whole models over four processes (gloo, CPU), against one that has everything.

All processes are started once, by ``mesh_worker.py``; each test looks at what one of its checks left.
"""

import subprocess
import sys
from typing import Any

import pytest

from tests.distributed.mesh_worker import CHECKS, WORLD_SIZE
from tests.distributed.ranks import ROOT, results_in, run_once

pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank says of each check; pytest's workers, if there are several, share one run."""
    folder = run_once(tmp_path_factory, "mesh_distributed", ["-m", "tests.distributed.mesh_worker"])
    return results_in(folder, WORLD_SIZE)


@pytest.mark.parametrize("name", CHECKS)
def test_ranks(name: str, ranks: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(ranks):
        assert result.get(name) == "fine", f"rank {rank}: {result.get(name)}"


def test_example() -> None:
    """Two processes train as one does; the example says so with its exit status."""
    command = [sys.executable, ROOT / "examples" / "long_context.py", "--processes", "2", "--context", "256"]
    done = subprocess.run([*command, "--steps", "2"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "losses differ by at most" in done.stdout and "exchange" in done.stdout
