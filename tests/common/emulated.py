"""The CUDA kernels on the CPU: while a context is open, ops on CPU tensors run the emulated CUDA kernels.

The emulated module is the project's CUDA sources and bindings, compiled by the host compiler against the emulator in
``tests/emulation``. ``TOPGATHER_EMULATION`` names the folder it was built in; ``make emulation`` builds it.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from topgather._common import cuda as _cuda
from topgather._common.direct import through_dispatcher
from topgather._common.library import reads_tensors, use_exchange

FOLDER = os.environ.get("TOPGATHER_EMULATION") or None


def is_built() -> bool:
    """Whether this run was told where the emulated module lies."""
    return FOLDER is not None


def native(checked: bool = True) -> Any:
    """The emulated module; ``checked`` watches every access of every kernel."""
    assert FOLDER is not None, "TOPGATHER_EMULATION must name the folder that `make emulation` built in"
    if FOLDER not in sys.path:
        sys.path.insert(0, FOLDER)
    module = importlib.import_module("_native_emulated_checked" if checked else "_native_emulated")
    assert use_exchange(module) == reads_tensors
    return module


@contextmanager
def emulated_cuda(checked: bool = True, **options: Any) -> Iterator[Any]:
    """Run ops on CPU tensors by the emulated CUDA kernels; yields the emulated module.

    ``options`` are those of its ``set_options``: order of threads, landing of asynchronous copies, seed, and so on.
    """
    module = native(checked)
    before = module.set_options(**options)
    replaced = {"native_module": _cuda.native_module, "place": _cuda.place, "gets": _cuda.gets}
    _cuda.native_module = lambda: module
    _cuda.place = lambda device: (0, 0, nullcontext())
    _cuda.gets = lambda tensor: True
    overrides = torch.library.Library("topgather", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # replacing a kernel is the point
            for name, kernel in _cuda.KERNELS.items():
                overrides.impl(name, kernel, "CPU", allow_override=True)
        with through_dispatcher():
            yield module
    finally:
        overrides._destroy()
        for name, value in replaced.items():
            setattr(_cuda, name, value)
        module.set_options(**before)
