"""Compiler launcher: runs nvcc and keeps what ptxas says of each kernel in ``<object>.ptxas``, beside the object.

    python tools/ptxas_report.py nvcc <arguments> -Xptxas=-v -o module.o -c kernels.cu

CMake puts it in front of every nvcc call. Registers, shared memory and stack of every kernel and architecture are
thereby at hand after any build (:mod:`kernel_table` reads them), and the build's output holds warnings and errors only.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# Lines of ptxas -v: facts about a kernel, not messages to the person who builds.
FACTS = ("ptxas info    :", "    ")


def main(command: list[str]) -> int:
    """Run the command; returns its exit status."""
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    lines = done.stderr.splitlines(keepends=True)
    facts = [line for line in lines if line.startswith(FACTS)]
    # A failed compilation shows everything: the facts say which kernel spilled, and by how much.
    shown = lines if done.returncode != 0 else [line for line in lines if not line.startswith(FACTS)]
    sys.stderr.writelines(shown)
    if done.returncode == 0 and "-o" in command:
        Path(command[command.index("-o") + 1] + ".ptxas").write_text("".join(facts))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
