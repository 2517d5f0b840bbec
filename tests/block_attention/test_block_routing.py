"""A choice of blocks as an object: compared, copied, and taken and returned by transformed functions."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import topgather as tg
from tests.common.torch_versions import needs_torch


def tokens(count: int = 16) -> Tensor:
    return torch.randn(1, 2, count, 8, generator=torch.Generator().manual_seed(count))


class Route(nn.Module):
    """Returns a choice, and takes one."""

    def forward(self, query: Tensor, given: tg.BlockRouting | None = None) -> tuple[tg.BlockRouting, Tensor]:
        routing = tg.moba_route(query, query, 4, 2) if given is None else given
        return routing, tg.moba_attention(query, query, query, 4, 2, routing=routing)


def assert_same(left: tuple[tg.BlockRouting, Tensor], right: tuple[tg.BlockRouting, Tensor]) -> None:
    assert isinstance(left[0], tg.BlockRouting) and left[0].block_size == right[0].block_size
    assert torch.equal(left[0].block_indices, right[0].block_indices) and torch.equal(left[1], right[1])


def test_equality_is_identity() -> None:
    routing = tg.moba_route(tokens(), tokens(), 4, 2)
    other = copy.deepcopy(routing)
    assert routing == routing and routing != other and len({routing, routing, other}) == 2
    assert routing in [other, routing] and routing not in [other]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda routing: pickle.loads(pickle.dumps(routing))])
def test_copies(copied: object) -> None:
    routing = tg.moba_route(tokens(), tokens(), 4, 2)
    other = copied(routing)  # type: ignore[operator]
    assert other.block_size == 4 and torch.equal(other.block_indices, routing.block_indices)


def test_it_is_a_pytree() -> None:
    routing = tg.moba_route(tokens(), tokens(), 4, 2)
    leaves, spec = pytree.tree_flatten(routing)
    assert leaves == [routing.block_indices]
    assert pytree.tree_unflatten([None], spec).block_indices is None  # as transforms do on their way
    (path, _), *_ = pytree.tree_flatten_with_path(routing)[0]
    assert pytree.keystr(path) == ".block_indices"
    moved = pytree.tree_map(lambda tensor: tensor.clone(), routing)
    assert isinstance(moved, tg.BlockRouting) and torch.equal(moved.block_indices, routing.block_indices)


def test_vmap_takes_and_returns_it() -> None:
    query = torch.stack([tokens(), tokens().flip(2)])
    routing, out = torch.vmap(Route())(query)
    assert isinstance(routing, tg.BlockRouting) is True
    again = torch.vmap(Route())(query, routing)
    assert torch.equal(again[1], out)
    for one, choice, result in zip(query, routing.block_indices, out, strict=True):
        assert_same(Route()(one), (tg.BlockRouting(choice, 4), result))


def test_a_compiled_function_takes_and_returns_it() -> None:
    compiled = torch.compile(Route(), backend="aot_eager", fullgraph=True)
    expected = Route()(tokens())
    assert_same(compiled(tokens()), expected)
    assert_same(compiled(tokens(), expected[0]), expected)


@pytest.mark.parametrize(
    "strict", [False, pytest.param(True, marks=needs_torch(2, 10, "returns no frozen dataclasses from strict exports"))]
)
def test_an_exported_program_takes_and_returns_it(strict: bool, tmp_path: Path) -> None:
    expected = Route()(tokens())
    for inputs in ((tokens(),), (tokens(), expected[0])):
        program = torch.export.export(Route(), inputs, strict=strict)
        assert_same(program.module()(*inputs), expected)
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        assert_same(torch.export.load(buffer).module()(*inputs), expected)
