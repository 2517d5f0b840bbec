"""How to call the ops of tables in 8 bits and of row optimizers: their part of the table in ``common/ops.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import topgather as tg
from tests.common.op_case import Inputs, OpCase, gives
from tests.common.tensors import random_tensor
from tests.common.tolerances import accumulation_dtype
from tests.memory.quantized_helpers import QuantizedCase, make_quantized

ops = torch.ops.topgather

QUANTIZED_CASE = QuantizedCase(num_rows=20, width=6, num_tokens=5, bag_size=4, group_size=3)
RAGGED_CASE = QuantizedCase(num_rows=20, width=6, num_tokens=5, bag_size=4, sizes=(3, 0, 8, 7, 2))


def _inputs(case: QuantizedCase, takes_x: bool = False, **options: Any) -> Callable[..., Inputs]:
    """Numbers are of 8 bits whatever ``dtype`` says; weights are of it but where it is float64."""

    def draw(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        dtype = torch.float32 if dtype == torch.float64 else dtype
        inputs = make_quantized(case, torch.int8, device, seed)
        inputs["weights"] = inputs["weights"].detach().to(dtype)
        if takes_x:
            del inputs["weights"]
            inputs["x"] = random_tensor((case.num_tokens, case.width), dtype, device, seed + 4)
        return inputs | options

    return draw


def quantized_cases(name: str, case: QuantizedCase) -> list[OpCase]:
    """The public function on one problem."""
    suffix = f"({name})" if name else ""
    return [OpCase(f"quantized_lookup{suffix}", tg.quantized_lookup, _inputs(case), **gives(("weights",)))]


RAGGED_OPTIONS = {"mode": "sum", "padding_idx": -1, "include_last_offset": True, "dtype": torch.float32}


QUANTIZED = [
    *quantized_cases("", QUANTIZED_CASE),
    OpCase(
        "quantized_lookup(ragged)",
        tg.quantized_lookup,
        _inputs(RAGGED_CASE, **RAGGED_OPTIONS),
        **gives(("weights",)),
    ),
    *(
        case
        for problem, suffix in ((QUANTIZED_CASE, ""), (RAGGED_CASE, "(ragged)"))
        for case in (
            OpCase(
                f"ops.memory_lookup_quantized{suffix}",
                ops.memory_lookup_quantized.default,
                _inputs(problem),
                **gives(("weights",)),
            ),
            OpCase(
                f"ops.memory_dot_quantized{suffix}",
                ops.memory_dot_quantized.default,
                _inputs(problem, takes_x=True),
                **gives(("x",), ("dots",)),
            ),
        )
    ),
]


# --- row optimizers -------------------------------------------------------------------------------------------------

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
