"""How public functions call their ops: past autograd where there is no gradient, but not past anything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import topgather as tg


def _heads(tokens: int = 12) -> Tensor:
    return torch.randn(1, 2, tokens, 8)


def _image() -> Tensor:
    return torch.randn(1, 2, 4, 4, 8)


INDICES = torch.arange(15).view(5, 3)

# What a call computes with, and the op that it must reach.
CALLS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "block_centroids": (lambda key: tg.block_centroids(key, 4), (_heads(),)),
    "moba_route": (lambda query, key: tg.moba_route(query, key, 4, 2).block_indices, (_heads(), _heads())),
    "moba_attention": (
        lambda query, key, value: tg.moba_attention(query, key, value, block_size=4, top_k=2),
        (_heads(), _heads(), _heads()),
    ),
    "key_conv": (tg.key_conv, (_heads(), torch.randn(2, 8, 3))),
    "product_key_topk": (
        lambda query, keys: tg.product_key_topk(query, keys, 3)[0],
        (torch.randn(5, 2, 16), torch.randn(2, 2, 4, 8)),
    ),
    "memory_lookup": (
        lambda values, weights: tg.memory_lookup(values, INDICES, weights),
        (torch.randn(16, 8), torch.randn(5, 3)),
    ),
    "grid_attention": (
        lambda query, key, value: tg.grid_attention(query, key, value, grid_size=2),
        (_image(), _image(), _image()),
    ),
}


class _Seen(TorchDispatchMode):
    """The names of topgather's ops that come by."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "topgather":
            self.names.append(func._schema.name.removeprefix("topgather::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_dispatch_modes_see_the_op(name: str, requires_grad: bool) -> None:
    function, tensors = CALLS[name]
    with _Seen() as seen:
        function(*(tensor.clone().requires_grad_(requires_grad) for tensor in tensors))
    assert seen.names.count(name) == 1


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_with_and_without_gradient(name: str) -> None:
    function, tensors = CALLS[name]
    expected = function(*(tensor.clone().requires_grad_() for tensor in tensors))
    assert expected.requires_grad == (name != "moba_route")
    for needs_grad in (False, True):
        with torch.no_grad():
            result = function(*(tensor.clone().requires_grad_(needs_grad) for tensor in tensors))
        assert not result.requires_grad
        assert torch.equal(result, expected)


@pytest.mark.parametrize("name", ["moba_attention", "key_conv", "grid_attention"])
@pytest.mark.parametrize("grad_enabled", [False, True])
def test_autocast_casts_with_and_without_gradient(name: str, grad_enabled: bool) -> None:
    function, tensors = CALLS[name]
    with torch.set_grad_enabled(grad_enabled), torch.autocast("cpu", torch.bfloat16):
        result = function(*(tensor.clone().requires_grad_() for tensor in tensors))
    assert result.dtype == torch.bfloat16
    assert result.requires_grad == grad_enabled


@pytest.mark.parametrize("name", CALLS)
def test_inference_mode(name: str) -> None:
    function, tensors = CALLS[name]
    expected = function(*tensors)
    with torch.inference_mode():
        assert torch.equal(function(*tensors), expected)


@pytest.mark.parametrize("name", CALLS)
def test_compile_without_gradient(name: str) -> None:
    function, tensors = CALLS[name]
    expected = function(*tensors)
    with torch.no_grad():
        result = torch.compile(function, backend="aot_eager", fullgraph=True)(*tensors)
    assert torch.equal(result, expected)
