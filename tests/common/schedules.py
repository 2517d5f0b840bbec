"""Emulated kernels under several schedules of their threads: what CUDA promises holds under all of them."""

from collections.abc import Iterator
from typing import Any

import torch

from topgather._common import cuda as _cuda

CUDA_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def over_schedules(cuda_kind: str, num_random: int = 2) -> Iterator[str]:
    """Sets one schedule after the other, ``num_random`` of them drawn; a GPU has its own."""
    native = _cuda.native_module()
    schedules: list[dict[str, Any]] = [
        {"order": "ascending", "cp_async": "at_wait"},
        {"order": "descending", "cp_async": "at_issue"},
        *({"order": "random", "cp_async": "mixed", "seed": seed + 1} for seed in range(num_random)),
    ]
    for schedule in schedules:
        if cuda_kind == "emulated_cuda":
            native.set_options(**schedule)
        yield str(schedule)
