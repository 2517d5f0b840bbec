"""Weights that a backward recomputes are the forward's, however large scores are: they add up to what the row has.

Values are ones, so that a row of out is the sum of its weights, and the gradient of out is the identity, so that the
gradient of value is the matrix of weights itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.common.tensors import DTYPES, random_tensor
from tests.common.tolerances import TOLERANCES, accumulation_dtype

CPU = torch.device("cpu")
SCALES = [1.0, 1e3, 8e4, 1e6, 1e8, 1e9]
NUM_TOKENS = 64
Results = tuple[Tensor, Tensor | None]  # out and lse


@dataclass(frozen=True)
class WeightCase:
    """An attention function on one problem.

    ``attend(query, key, value, scale, extra)`` takes ``[1, heads, NUM_TOKENS, D]``; ``extra(dtype, device)`` is drawn
    once more for sinks and biases, of the size of scores at a scale of 1.
    """

    name: str
    attend: Callable[..., Results]
    num_heads: int = 2
    num_kv_heads: int = 1
    has_lse: bool = True

    def __str__(self) -> str:
        return self.name


def blocks(query: Tensor, key: Tensor, value: Tensor, scale: float, **options: Any) -> Results:
    out, lse = tg.moba_attention(query, key, value, 16, 2, scale=scale, return_lse=True, **options)
    return out, lse


def packed(query: Tensor, key: Tensor, value: Tensor, scale: float, **options: Any) -> Results:
    """Two sequences, one after the other."""
    bounds = torch.tensor([0, 23, NUM_TOKENS], dtype=torch.int32, device=query.device)
    tokens = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    out, lse = tg.moba_attention_varlen(*tokens, bounds, bounds, 41, 41, 16, 2, scale=scale, return_lse=True, **options)
    return out.transpose(0, 1)[None], lse[None]


def sinks(query: Tensor, scale: float) -> dict[str, Tensor]:
    """About as large as the largest scores, so that some rows keep a share and others do not."""
    return {"sinks": scale * 12 * torch.ones(query.size(1), dtype=accumulation_dtype(query.dtype), device=query.device)}


def image(function: Callable[..., Tensor], bias_tokens: int = 0, **sides: Any) -> Callable[..., Results]:
    """On an image of 8 x 8 tokens; with a bias where groups are said to have so many."""

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Results:
        images = [tensor.unflatten(2, (8, 8)) for tensor in (query, key, value)]
        options = dict(sides)
        if bias_tokens > 0:
            shape = (query.size(1), bias_tokens, bias_tokens)
            options["bias"] = scale * random_tensor(shape, accumulation_dtype(query.dtype), query.device, 3)
        return function(*images, scale=scale, **options).flatten(2, 3), None

    return attend


CASES = [
    WeightCase("blocks", blocks),
    WeightCase("blocks, full", lambda *tensors: blocks(*tensors, is_causal=False)),
    WeightCase("blocks, capped", lambda *tensors: blocks(*tensors, softcap=6 * tensors[3]), has_lse=False),
    WeightCase("blocks, sinks", lambda *tensors: blocks(*tensors, **sinks(tensors[0], tensors[3])), has_lse=False),
    WeightCase("packed", packed),
    WeightCase(
        "packed, capped, sinks",
        lambda *tensors: packed(*tensors, softcap=15 * tensors[3], **sinks(tensors[0], tensors[3])),
        has_lse=False,
    ),
    *(
        WeightCase(name, attend, num_kv_heads=2, has_lse=False)
        for name, attend in (
            ("grid", image(tg.grid_attention, stride=1)),
            ("grid, small groups", image(tg.grid_attention, stride=4)),
            ("grid, bias", image(tg.grid_attention, bias_tokens=16, stride=2)),
            ("window", image(tg.window_attention, window_size=4)),
            ("window, small, bias", image(tg.window_attention, bias_tokens=4, window_size=2)),
        )
    ),
]


def draw(case: WeightCase, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Every key stands there twice, so that the largest score of a row has an equal; query and key begin with ones."""
    query = random_tensor((1, case.num_heads, NUM_TOKENS, NUM_TOKENS), dtype, device, 0)
    key = random_tensor((1, case.num_kv_heads, NUM_TOKENS, NUM_TOKENS), dtype, device, 1)
    key[:, :, 1::2] = key[:, :, ::2]
    query[..., 0] = key[..., 0] = 1
    return query.requires_grad_(), key.requires_grad_(), torch.ones_like(key).requires_grad_()


def check_weights(case: WeightCase, scale: float, dtype: torch.dtype, device: torch.device) -> None:
    query, key, value = draw(case, dtype, device)
    out, lse = case.attend(query, key, value, scale)
    tolerance = TOLERANCES["attention", "weights"]
    bound, underflow = tolerance.relative(dtype, 1), NUM_TOKENS * tolerance.absolute(dtype)
    expected = out.detach().double().mean(-1)
    assert expected.isfinite().all() and expected.max() <= 1 + bound
    for head in range(case.num_heads):
        identity = torch.zeros_like(out)
        identity[:, head] = torch.eye(NUM_TOKENS)
        (grad_value,) = torch.autograd.grad(out, value, identity, retain_graph=True)
        weights = grad_value[0, head * case.num_kv_heads // case.num_heads].double()  # [key, query]
        assert weights.min() >= 0 and weights.max() <= 1 + bound
        error = (weights.sum(0) - expected[0, head]).abs()
        assert (error <= bound * expected[0, head] + underflow).all(), f"off by {error.max():.3g} of {bound:.3g}"
    # The gradient of lse is as large as the scale.
    if case.has_lse and scale < torch.finfo(dtype).max / 4:
        (grad_query,) = torch.autograd.grad(lse, query, torch.ones_like(lse))
        error = (grad_query[..., 0].double() / scale - 1).abs().max()
        assert error <= bound, f"gradient of lse: off by {error:.3g} of {bound:.3g}"


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_add_up(case: WeightCase, dtype: torch.dtype, scale: float, device: torch.device) -> None:
    check_weights(case, scale, dtype, device)


@pytest.mark.usefixtures("cpu_target")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_add_up_on_every_instruction_set(case: WeightCase, dtype: torch.dtype) -> None:
    for scale in SCALES:
        check_weights(case, scale, dtype, CPU)
