"""How to call the ops of the indexer: their part of the table in ``common/ops.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

import topgather as tg
from tests.common.op_case import Inputs, OpCase, gives
from tests.common.tensors import random_tensor
from tests.common.tolerances import accumulation_dtype
from tests.indexer.helpers import IndexCase, make_attention, make_index

ops = torch.ops.topgather

INDEX = IndexCase(query_len=11, key_len=14, dim=8, block_size=4, top_k=3, force_first=1)
INDEX_SUM = replace(INDEX, num_index_heads=4, num_key_heads=2, reduction="relu_sum", num_choices=2, has_weights=True)
INDEX_LEAVES = ("index_query", "index_key", "weights")


def _index_route(case: IndexCase, is_public: bool = True) -> Callable[..., Inputs]:
    def draw(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        options = case.route()
        if not is_public or case.num_choices is None:
            options["num_choices"] = case.num_choices or case.num_index_heads
        return {**make_index(case, dtype, device, seed), **options}

    return draw


def _index_loss(case: IndexCase, is_routed: bool, is_public: bool = True) -> Callable[..., Inputs]:
    def draw(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        index, attention = make_index(case, dtype, device, seed), make_attention(case, dtype, device, seed)
        routing = tg.index_route(**index, **case.route()) if is_routed else None
        options = {"block_size": case.block_size, "is_causal": case.is_causal, "scale": 0.3}
        # One column: a value would say nothing of lse.
        value = attention["key"][..., :1].contiguous()
        lse = tg.moba_attention(**attention, value=value, routing=routing, return_lse=True, **options)[1]
        options |= {"reduction": case.reduction, "index_scale": 0.4}
        options["num_choices"] = case.num_choices or case.num_index_heads
        if is_public:
            return {**index, **attention, "lse": lse, "routing": routing, **options}
        return {
            **index,
            **attention,
            "lse": lse,
            "block_indices": None if routing is None else routing.block_indices,
            **options,
        }

    return draw


def _index_loss_backward(case: IndexCase, is_routed: bool) -> Callable[..., Inputs]:
    def draw(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        forward = _index_loss(case, is_routed, is_public=False)(dtype, device, seed)
        shape = (case.batch, forward["num_choices"], case.query_len)
        return {"grad_losses": random_tensor(shape, accumulation_dtype(dtype), device, seed + 9), **forward}

    return draw


def _index_leaves(case: IndexCase) -> tuple[str, ...]:
    return INDEX_LEAVES if case.has_weights else INDEX_LEAVES[:2]


def index_cases(name: str, case: IndexCase, is_routed: bool) -> list[OpCase]:
    """The public functions on one problem."""
    suffix = f"({name})" if name else ""
    loss = _index_loss(case, is_routed)
    return [
        OpCase(f"index_route{suffix}", tg.index_route, _index_route(case), ("block_indices",)),
        OpCase(f"index_loss{suffix}", tg.index_loss, loss, **gives(_index_leaves(case), ("loss",))),
    ]


INDEXER = [
    *index_cases("", INDEX, True),
    *index_cases("sum", INDEX_SUM, False),
    *(
        case
        for problem, is_routed, suffix in ((INDEX, True, ""), (INDEX_SUM, False, "(sum)"))
        for case in (
            OpCase(
                f"ops.index_route{suffix}",
                ops.index_route.default,
                _index_route(problem, is_public=False),
                ("block_indices",),
            ),
            OpCase(
                f"ops.index_loss{suffix}",
                ops.index_loss.default,
                _index_loss(problem, is_routed, is_public=False),
                **gives(_index_leaves(problem), ("losses",)),
            ),
            OpCase(
                f"ops.index_loss_backward{suffix}",
                ops.index_loss_backward.default,
                _index_loss_backward(problem, is_routed),
                ("grad_index_query", "grad_index_key", "grad_weights"),
            ),
        )
    ),
]
