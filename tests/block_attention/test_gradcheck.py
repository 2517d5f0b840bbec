"""Numerical gradients in float64, of out and of lse, on the CPU; double backward is refused everywhere.

On CUDA, which has no float64, the gradients are compared with the oracle's (``test_attention.py``), whose own
gradients are torch's.
"""

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.block_attention.helpers import AttentionCase, make_inputs
from tests.common.devices import widest_dtype

pytestmark = pytest.mark.sanitize

CPU = torch.device("cpu")

CASES = [
    AttentionCase(query_len=9, head_dim=3, block_size=2, top_k=2),
    AttentionCase(num_heads=4, num_kv_heads=2, query_len=7, head_dim=2, value_dim=3, block_size=3, top_k=2),
    AttentionCase(num_heads=2, num_kv_heads=1, query_len=4, key_len=9, head_dim=2, block_size=4, top_k=2),
    AttentionCase(num_heads=1, query_len=9, key_len=4, head_dim=2, block_size=2, top_k=1),
    AttentionCase(num_heads=1, query_len=6, head_dim=2, block_size=2, top_k=2, is_causal=False, scale=-0.7),
    AttentionCase(num_heads=1, query_len=6, head_dim=2, block_size=2, top_k=2, scale=0.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: AttentionCase) -> None:
    inputs = make_inputs(case, torch.float64, CPU)
    routing = tg.moba_route(inputs[0], inputs[1], case.block_size, case.top_k, case.is_causal)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = tg.moba_attention(
            query,
            key,
            value,
            case.block_size,
            is_causal=case.is_causal,
            scale=case.scale,
            return_lse=True,
            routing=routing,
        )
        # Rows that see no key have lse -inf, whose numerical derivative is not a number.
        return out, torch.where(lse.isfinite(), lse, 0.0)

    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("result_idx", [0, 1], ids=["out_alone", "lse_alone"])
def test_one_result_alone(result_idx: int) -> None:
    """A loss on out alone or lse alone: the other gradient arrives undefined."""
    inputs = make_inputs(AttentionCase(query_len=9, head_dim=3, block_size=2), torch.float64, CPU)

    def attend(*inputs: Tensor) -> Tensor:
        return tg.moba_attention(*inputs, block_size=2, top_k=2, return_lse=True)[result_idx]

    # The choice has a margin far above gradcheck's step on this data, or this would fail.
    assert torch.autograd.gradcheck(attend, inputs)


def test_varlen() -> None:
    query = torch.randn(11, 2, 3, dtype=torch.float64, device=CPU, requires_grad=True)
    key = torch.randn(12, 1, 3, dtype=torch.float64, device=CPU, requires_grad=True)
    value = torch.randn(12, 1, 2, dtype=torch.float64, device=CPU, requires_grad=True)
    cu_seqlens = (
        torch.tensor([0, 4, 4, 11], dtype=torch.int32, device=CPU),
        torch.tensor([0, 5, 5, 12], dtype=torch.int32, device=CPU),
    )
    routing = tg.moba_route_varlen(query, key, *cu_seqlens, 7, 7, 2, 2)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            tg.moba_attention_varlen(
                query, key, value, *cu_seqlens, 7, 7, block_size=2, return_lse=True, routing=routing
            )
        )

    assert torch.autograd.gradcheck(attend, (query, key, value))


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_block_centroids(block_size: int) -> None:
    key = torch.randn(1, 2, 10, 3, dtype=torch.float64, device=CPU, requires_grad=True)
    assert torch.autograd.gradcheck(lambda key: tg.block_centroids(key, block_size), (key,))


def test_double_backward_is_refused(device: torch.device, device_kind: str) -> None:
    query, key, value = make_inputs(AttentionCase(query_len=20, block_size=4), widest_dtype(device_kind), device)
    out = tg.moba_attention(query, key, value, block_size=4, top_k=2)
    (d_query,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        d_query.sum().backward()
