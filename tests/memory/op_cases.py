"""How to call the ops of row optimizers: their part of the table in ``common/ops.py``."""

from __future__ import annotations

import torch

from tests.common.op_case import Inputs, OpCase
from tests.common.tensors import random_tensor
from tests.common.tolerances import accumulation_dtype

ops = torch.ops.topgather

ROWS, WIDTH, TOKENS, ENTRIES = 12, 6, 5, 16
WRITTEN = ("values", "steps", "first", "second", "decayed")


def draw_entries(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Entries of some rows, one of them nobody's, and the table."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, TOKENS, (ENTRIES,), generator=generator).to(torch.int32)
    tokens[3] = -1
    return {
        "grad_out": random_tensor((TOKENS, WIDTH), dtype, device, 5 * seed),
        "indices": torch.randint(0, ROWS - 2, (ENTRIES,), generator=generator).to(device),
        "weights": random_tensor((ENTRIES,), accumulation_dtype(dtype), device, 5 * seed + 1),
        "tokens": tokens.to(device),
        "values": random_tensor((ROWS, WIDTH), dtype, device, 5 * seed + 2),
    }


def _draw_update(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Adam, which has all there is."""
    generator = torch.Generator().manual_seed(seed)
    shape, sums = (ROWS, WIDTH), accumulation_dtype(dtype)
    return {
        **draw_entries(dtype, device, seed),
        "steps": torch.randint(0, 4, (ROWS,), generator=generator).to(torch.int32).to(device),
        "first": random_tensor(shape, sums, device, 5 * seed + 3),
        "second": random_tensor(shape, sums, device, 5 * seed + 4).abs(),
        "decayed": -torch.rand(ROWS, generator=generator, dtype=torch.float64).to(device),
        "algorithm": "adam",
        "learning_rate": 0.1,
        "first_rate": 0.9,
        "second_rate": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "total_decay": -1.5,
        "grad_scale": 0.5,
        "nesterov": False,
        "seed": 3,
        "step": 7,
        "stochastic_rounding": True,
    }


ROW_STEPS = [
    OpCase("ops.memory_grad_square", ops.memory_grad_square.default, draw_entries, ("squares",)),
    OpCase("ops.memory_update", ops.memory_update.default, _draw_update, WRITTEN, written=WRITTEN),
]
