"""Bags as ``torch.nn.functional.embedding_bag`` takes them: random ones, and checks against the oracle."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import topgather as tg
from tests.common.tensors import Case, random_tensor
from tests.memory.helpers import LookupCase, make_indices
from topgather import reference

SIZES = (3, 0, 0, 7, 1, 33, 0, 12, 2)


@dataclass(frozen=True)
class BagCase(Case):
    """``sizes`` of ragged bags, or None for bags of ``bag_size``; ``rest``: entries behind the last of them."""

    sizes: tuple[int, ...] | None = SIZES
    bag_size: int = 5
    rest: int = 0
    is_weighted: bool = True
    mode: str = "sum"
    padding_idx: int | None = None
    num_rows: int = 11
    width: int = 6
    num_tokens: int = 9

    @property
    def options(self) -> dict[str, Any]:
        return {"mode": self.mode, "padding_idx": self.padding_idx, "include_last_offset": self.rest > 0}


def make_bags(case: BagCase, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Any]:
    """Arguments of ``memory_lookup``, leaves that require grad."""
    values = random_tensor((case.num_rows, case.width), dtype, device, 4 * seed).requires_grad_()
    shape: tuple[int, ...] = (case.num_tokens, case.bag_size)
    offsets = None
    if case.sizes is not None:
        bounds = torch.tensor([0, *case.sizes]).cumsum(0)
        shape = (int(bounds[-1]) + case.rest,)
        offsets = (bounds if case.rest else bounds[:-1]).to(device)
    entries = LookupCase(num_rows=case.num_rows, num_tokens=1, bag_size=torch.Size(shape).numel())
    indices = make_indices(entries, device, seed).view(shape)
    weights = random_tensor(shape, dtype, device, 4 * seed + 1).requires_grad_() if case.is_weighted else None
    return {"values": values, "indices": indices, "weights": weights, "offsets": offsets, **case.options}


def leaves_of(bags: dict[str, Any]) -> dict[str, Tensor]:
    return {name: bags[name] for name in ("values", "weights") if bags[name] is not None}


def differentiate(out: Tensor, bags: dict[str, Any], grad_out: Tensor) -> dict[str, Tensor]:
    leaves = leaves_of(bags)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad_out.to(out.dtype), allow_unused=True)
    named = {
        f"d_{name}": torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }
    return {"out": out.detach(), **named}


def run_bags(bags: dict[str, Any], sparse_grad: bool | str = False) -> dict[str, Tensor]:
    out = tg.memory_lookup(**bags, sparse_grad=sparse_grad)
    return differentiate(out, bags, random_tensor(tuple(out.shape), out.dtype, out.device, 99))


def run_reference(bags: dict[str, Any]) -> dict[str, Tensor]:
    out = reference.memory_lookup(**bags)
    return differentiate(out, bags, random_tensor(tuple(out.shape), bags["values"].dtype, out.device, 99))


def assert_bags_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    """To the rounding of sums of a few numbers of size 1."""
    for name, tensor in actual.items():
        dense = tensor.to_dense()
        assert dense.shape == expected[name].shape, name
        torch.testing.assert_close(
            dense.double(),
            expected[name].to_dense().double(),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )
