"""Problems of tables in 8 bits, and checks against the reference on the rows that the bytes stand for."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import topgather as tg
from tests.common.tensors import Case, assert_close, random_tensor
from tests.common.tolerances import TOLERANCES
from tests.memory.helpers import LookupCase, make_indices, root_sum_square
from topgather import reference

FLOAT8 = torch.float8_e4m3fn
DTYPES = [torch.int8, FLOAT8]


@dataclass(frozen=True)
class QuantizedCase(Case):
    """``padding`` columns lie between the rows of the table."""

    num_rows: int = 40
    width: int = 48
    num_tokens: int = 12
    bag_size: int = 11
    group_size: int | None = None
    padding: int = 0
    sizes: tuple[int, ...] | None = None
    """Of ragged bags; what is left of the entries is nobody's."""


def make_quantized(case: QuantizedCase, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Any]:
    """Random arguments by name; weights require a gradient, and every byte but those of NaN occurs."""
    generator = torch.Generator().manual_seed(seed)
    num_groups = 1 if case.group_size is None else case.width // case.group_size
    values = torch.randint(-127, 128, (case.num_rows, case.width + case.padding), generator=generator).to(torch.int8)
    if dtype == FLOAT8:
        values = torch.where(values.bitwise_and(0x7F) == 0x7F, 5, values).view(FLOAT8)
    scales = torch.rand(case.num_rows, num_groups, generator=generator) + 0.1
    lookup = LookupCase(num_rows=case.num_rows, num_tokens=case.num_tokens, bag_size=case.bag_size)
    indices = make_indices(lookup, device, seed + 1)
    weights = random_tensor(tuple(indices.shape), torch.float32, device, seed + 2)
    inputs: dict[str, Any] = {"values": values.to(device)[:, : case.width], "scales": scales.to(device)}
    if case.sizes is not None:
        offsets = torch.tensor([0, *case.sizes], device=device).cumsum(0)
        indices, weights = indices.flatten(), weights.flatten()
        inputs["offsets"] = offsets
    return {**inputs, "indices": indices, "weights": weights.requires_grad_()}


def run_quantized(inputs: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """A lookup and the gradient of its weights."""
    is_ragged = "offsets" in inputs
    out = tg.quantized_lookup(**inputs, include_last_offset=is_ragged)
    grad_out = random_tensor(tuple(out.shape), torch.float32, out.device, seed + 3)
    (d_weights,) = torch.autograd.grad(out, inputs["weights"], grad_out)
    return {"out": out.detach(), "d_weights": d_weights, "grad_out": grad_out}


def check_quantized(case: QuantizedCase, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
    """Look rows up and differentiate; compare with the reference on the rows as float64."""
    inputs = make_quantized(case, dtype, device, seed)
    result = run_quantized(inputs, seed)
    rows = reference.quantized_rows(inputs["values"], inputs["scales"])
    weights = inputs["weights"].detach().double().requires_grad_()
    options: dict[str, Any] = (
        {"offsets": inputs["offsets"], "include_last_offset": True} if case.sizes is not None else {}
    )
    out = reference.memory_lookup(rows, inputs["indices"], weights, **options)
    (d_weights,) = torch.autograd.grad(out, weights, result["grad_out"].double())
    squares = reference.memory_lookup(rows.square(), inputs["indices"], weights.detach().square(), **options)
    grads = result["grad_out"].double()
    if case.sizes is None:
        products = rows[inputs["indices"]] * grads.unsqueeze(1)
    else:
        bags = torch.repeat_interleave(torch.arange(len(case.sizes)), torch.tensor(case.sizes)).to(device)
        products = torch.zeros(inputs["indices"].numel(), case.width, dtype=torch.float64, device=device)
        products[: len(bags)] = rows[inputs["indices"][: len(bags)]] * grads[bags]
    length = case.bag_size if case.sizes is None else max(case.sizes)
    for name, expected, magnitude, terms in (
        ("out", out.detach(), squares.sqrt(), length),
        ("d_weights", d_weights, root_sum_square(products, -1), case.width),
    ):
        tolerance = TOLERANCES["quantized_lookup", name]
        assert_close(name, result[name], expected, magnitude, tolerance, torch.float32, terms)
