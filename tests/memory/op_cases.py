"""How to call the ops of tables in 8 bits: their part of the table in ``common/ops.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import topgather as tg
from tests.common.op_case import Inputs, OpCase, gives
from tests.common.tensors import random_tensor
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
