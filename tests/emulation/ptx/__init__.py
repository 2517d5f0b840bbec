"""An interpreter of PTX, the assembly that nvcc makes of the CUDA sources.

The emulated build compiles the kernels with the host's compiler, so it never sees the inline assembly of
``csrc/cuda/primitives.cuh``. Here that assembly runs, instruction by instruction, on numpy arrays with one element per
thread. What an instruction does is taken from the PTX ISA, independently of the emulator.

    parser.py        text to functions, functions to one flat list of instructions
    scalar_types.py  PTX types and the rounding of exact values to them
    memory.py        regions, shared and local memory, copies in flight
    decoder.py       operands to readers and writers; the table of instructions
    arithmetic.py, conversions.py, loads_stores.py, warp.py   the instructions
    machine.py       threads that diverge, meet again, wait and finish
    toolchain.py     nvcc, with its results kept by content
    replay.py        launches the emulator recorded, run once more from their PTX
    instruction_cases.py, primitive_checks.py and primitives.cu   what tests/test_ptx.py holds it to
"""

from .machine import launch
from .parser import Kernel, Module, parse_module
from .scalar_types import PtxError

__all__ = ["Kernel", "Module", "PtxError", "launch", "parse_module"]
