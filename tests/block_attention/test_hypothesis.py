"""Properties over random shapes, strides and patterns: what no list of cases thinks of."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import topgather as tg
from tests.block_attention.helpers import (
    LAYOUTS,
    AttentionCase,
    assert_attention_close,
    assert_routing_contract,
    check_attention,
    make_gradients,
    make_inputs,
    reference_attention,
    run_attention,
    with_layout,
)
from tests.common.devices import widest_dtype
from tests.common.tensors import DTYPES, assert_same_nonfinite
from topgather import reference


def supported(dtype: torch.dtype, device_kind: str) -> torch.dtype:
    """``dtype`` itself, or what the device has in its place."""
    return widest_dtype(device_kind) if dtype == torch.float64 else dtype


BOUNDED = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPE = st.sampled_from(DTYPES)


@st.composite
def cases(draw: st.DrawFn, max_len: int = 140) -> AttentionCase:
    num_kv_heads = draw(st.integers(1, 3))
    block_size = draw(st.one_of(st.integers(1, 20), st.sampled_from([32, 64, 128, 512])))
    return AttentionCase(
        batch=draw(st.integers(0, 2)),
        num_heads=num_kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=num_kv_heads,
        query_len=draw(st.integers(0, max_len)),
        key_len=draw(st.integers(0, max_len)),
        head_dim=draw(st.integers(1, 70)),
        value_dim=draw(st.integers(1, 70)),
        block_size=block_size,
        top_k=draw(st.integers(1, 12)),
        is_causal=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.0, 0.5, -1.0])),
    )


@BOUNDED
@given(case=cases(), dtype=DTYPE, layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 2**20))
def test_attention_equals_the_oracle(
    case: AttentionCase, dtype: torch.dtype, layout: str, seed: int, device: torch.device, device_kind: str
) -> None:
    if layout == "fused_qkv" and (case.query_len != case.keys or case.head_dim != case.value_head_dim):
        layout = "transposed"
    check_attention(case, supported(dtype, device_kind), device, layout, seed)


@BOUNDED
@given(case=cases(max_len=300), dtype=DTYPE, seed=st.integers(0, 2**20))
def test_routing_keeps_its_contract(
    case: AttentionCase, dtype: torch.dtype, seed: int, device: torch.device, device_kind: str
) -> None:
    query, key, _ = (tensor.detach() for tensor in make_inputs(case, supported(dtype, device_kind), device, seed))
    block_indices = tg.moba_route(query, key, case.block_size, case.top_k, case.is_causal).block_indices
    assert_routing_contract(block_indices, query, key, case.block_size, case.top_k, case.is_causal)


SCORES = st.lists(
    st.sampled_from([0.0, 1.0, -1.0, 2.0, 3.0, float("nan"), float("inf"), float("-inf")]),
    min_size=1,
    max_size=70,
)


@BOUNDED
@given(scores=SCORES, top_k=st.integers(1, 20), is_causal=st.booleans())
def test_routing_of_any_scores_is_exact(scores: list[float], top_k: int, is_causal: bool, device: torch.device) -> None:
    """One block a token, so the scores are the keys: ties, NaN and inf in every arrangement."""
    key = torch.tensor(scores, device=device).reshape(1, 1, -1, 1)
    query = torch.ones_like(key)
    chosen = tg.moba_route(query, key, 1, top_k, is_causal).block_indices
    assert torch.equal(chosen, reference.moba_route(query, key, 1, top_k, is_causal).to(device))


@st.composite
def user_routings(draw: st.DrawFn) -> tuple[AttentionCase, Tensor]:
    case = draw(cases(max_len=40))
    slots = draw(st.integers(1, max(1, case.num_blocks)))
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    shape = (case.batch, case.num_heads, case.query_len)
    order = torch.rand(*shape, case.num_blocks, generator=generator).argsort(dim=-1)[..., :slots]
    if case.num_blocks == 0:
        order = torch.full((*shape, slots), -1)
    is_unused = torch.rand(order.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    return case, torch.where(is_unused, -1, order).to(torch.int32)


@BOUNDED
@given(problem=user_routings(), dtype=DTYPE)
def test_any_users_routing(
    problem: tuple[AttentionCase, Tensor], dtype: torch.dtype, device: torch.device, device_kind: str
) -> None:
    case, block_indices = problem
    dtype = supported(dtype, device_kind)
    routing = tg.BlockRouting(block_indices.to(device), case.block_size)
    inputs = make_inputs(case, dtype, device)
    gradients = make_gradients(case, dtype, device, 0)
    result = run_attention(*inputs, *gradients, case, routing)
    assert_attention_close(result, inputs, gradients, routing.block_indices, case)


@BOUNDED
@given(
    data=st.data(),
    lengths=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=5),
    block_size=st.integers(1, 16),
    top_k=st.integers(1, 5),
    is_causal=st.booleans(),
)
def test_varlen_equals_dense(
    data: st.DataObject,
    lengths: list[tuple[int, int]],
    block_size: int,
    top_k: int,
    is_causal: bool,
    device: torch.device,
    device_kind: str,
) -> None:
    """In float64, where each sequence alone must agree to 1e-12; on CUDA in float32, which sums in another order."""
    dtype = widest_dtype(device_kind)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    num_kv_heads, group, head_dim = (data.draw(st.integers(1, 3)) for _ in range(3))
    num_heads = num_kv_heads * group
    cu_seqlens = [torch.tensor([0, *(pair[side] for pair in lengths)]).cumsum(0).int().to(device) for side in (0, 1)]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))

    def random(total: Tensor, heads: int) -> Tensor:
        return torch.randn(int(total), heads, head_dim, generator=generator, dtype=torch.float64).to(dtype).to(device)

    query = random(cu_seqlens[0][-1], num_heads)
    key, value = random(cu_seqlens[1][-1], num_kv_heads), random(cu_seqlens[1][-1], num_kv_heads)
    maxima = (max((q for q, _ in lengths), default=0), max((k for _, k in lengths), default=0))
    arguments: tuple[Any, ...] = (*cu_seqlens, *maxima, block_size, top_k, is_causal)
    out, lse = tg.moba_attention_varlen(query, key, value, *arguments, return_lse=True)
    for (q0, q1), (k0, k1) in zip(
        *(list(zip(cu.tolist()[:-1], cu.tolist()[1:], strict=True)) for cu in cu_seqlens), strict=True
    ):
        parts = (query[q0:q1], key[k0:k1], value[k0:k1])
        dense = [part.transpose(0, 1)[None] for part in parts]
        expected, expected_lse = tg.moba_attention(*dense, block_size, top_k, is_causal, return_lse=True)
        torch.testing.assert_close(out[q0:q1], expected[0].transpose(0, 1), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse[:, q0:q1], expected_lse[0], rtol=tolerance, atol=tolerance)


NONFINITE = st.lists(
    st.tuples(
        st.sampled_from(["query", "key", "value"]),
        st.integers(0, 39),
        st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    ),
    min_size=1,
    max_size=4,
)


@BOUNDED
@given(planted=NONFINITE, block_size=st.integers(1, 12), top_k=st.integers(1, 4), is_causal=st.booleans())
def test_nonfinite_masks_equal_the_oracle(
    planted: list[tuple[str, int, float]], block_size: int, top_k: int, is_causal: bool, device: torch.device
) -> None:
    case = AttentionCase(query_len=40, head_dim=3, block_size=block_size, top_k=top_k, is_causal=is_causal)
    query, key, value = (tensor.detach() for tensor in make_inputs(case, torch.float32, device))
    named = {"query": query, "key": key, "value": value}
    for which, token, number in planted:
        named[which][0, 0, token, token % 3] = number
    inputs = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_())
    gradients = make_gradients(case, torch.float32, device, 0)
    block_indices = tg.moba_route(query, key, block_size, top_k, is_causal).block_indices
    result = run_attention(*inputs, *gradients, case)
    expected = reference_attention(*inputs, *gradients, block_indices, case)
    for name, tensor in result.tensors().items():
        assert_same_nonfinite(name, tensor, expected.tensors()[name])


@BOUNDED
@given(
    length=st.integers(0, 40),
    block_size=st.integers(1, 50),
    dtype=DTYPE,
    layout=st.sampled_from([layout for layout in LAYOUTS if layout != "fused_qkv"]),
)
def test_centroids(
    length: int, block_size: int, dtype: torch.dtype, layout: str, device: torch.device, device_kind: str
) -> None:
    dtype = supported(dtype, device_kind)
    generator = torch.Generator().manual_seed(0)
    # Integers sum exactly; only the division rounds.
    key = torch.randint(-8, 9, (2, 2, length, 5), generator=generator).to(dtype).to(device)
    centroids = tg.block_centroids(with_layout(key, layout), block_size)
    expected = reference.block_centroids(key[:1].expand_as(key) if layout == "expanded_batch" else key, block_size)
    torch.testing.assert_close(centroids, expected.to(centroids.dtype), rtol=2e-7, atol=0)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("batch_shift", [1, 3])
def test_batch_permutation_commutes(batch_shift: int, device: torch.device) -> None:
    """Each batch entry and head is computed on its own: permuting them permutes the bits."""
    case = AttentionCase(batch=4, num_heads=4, num_kv_heads=4, query_len=77, head_dim=20, top_k=3)
    inputs = make_inputs(case, torch.float32, device)
    gradients = make_gradients(case, torch.float32, device, 0)
    expected = run_attention(*inputs, *gradients, case)
    rolled = [tensor.detach().roll((batch_shift, 1), (0, 1)).requires_grad_() for tensor in inputs]
    grad_out, grad_lse = (tensor.roll((batch_shift, 1), (0, 1)) for tensor in gradients)
    actual = run_attention(rolled[0], rolled[1], rolled[2], grad_out, grad_lse, case)
    for name, tensor in actual.tensors().items():
        assert torch.equal(tensor, expected.tensors()[name].roll((batch_shift, 1), (0, 1))), name
