"""Memory layers over random shapes, layouts and indices: what no list of cases thinks of."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import topgather as tg
from tests.common.devices import widest_dtype
from tests.common.tensors import DTYPES, LAYOUTS
from tests.memory.helpers import (
    PATTERNS,
    LookupCase,
    TopkCase,
    assert_topk_contract,
    check_experts,
    check_lookup,
    check_topk,
)
from topgather import reference

BOUNDED = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPE = st.sampled_from(DTYPES)
LAYOUT = st.sampled_from(LAYOUTS)
SEED = st.integers(0, 2**20)


def supported(dtype: torch.dtype, device_kind: str) -> torch.dtype:
    """``dtype`` itself, or what the device has in its place."""
    return widest_dtype(device_kind) if dtype == torch.float64 else dtype


@st.composite
def topk_cases(draw: st.DrawFn) -> TopkCase:
    num_keys = draw(st.integers(1, 60))
    return TopkCase(
        num_tokens=draw(st.integers(0, 40)),
        num_heads=draw(st.integers(0, 4)),
        num_keys=num_keys,
        head_dim=2 * draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 128, 300]))),
        top_k=draw(st.integers(1, min(num_keys**2, 150))),
    )


@BOUNDED
@given(case=topk_cases(), dtype=DTYPE, layout=LAYOUT, seed=SEED)
def test_search_keeps_its_contract(
    case: TopkCase, dtype: torch.dtype, layout: str, seed: int, device: torch.device, device_kind: str
) -> None:
    check_topk(case, supported(dtype, device_kind), device, layout, seed)


SCORE = st.sampled_from([0.0, 1.0, -1.0, 2.0, 3.5, -0.0])


@BOUNDED
@given(
    halves=st.integers(1, 40).flatmap(lambda n: st.tuples(*[st.lists(SCORE, min_size=n, max_size=n)] * 2)),
    top_k=st.integers(1, 1600),
)
def test_search_among_any_scores_is_exact(
    halves: tuple[list[float], list[float]], top_k: int, device: torch.device
) -> None:
    """Half keys of one number, which is their score: ties in every arrangement."""
    keys = torch.tensor(halves, device=device)[None, ..., None]
    query = torch.ones(1, 1, 2, device=device)
    top_k = min(top_k, len(halves[0]) ** 2)
    scores, indices = tg.product_key_topk(query, keys, top_k)
    expected, expected_indices = reference.product_key_topk(query, keys, top_k)
    assert torch.equal(indices, expected_indices) and torch.equal(scores.double(), expected)


ANY_SCORE = st.sampled_from([0.0, 1.0, -1.0, 2.0, torch.nan, torch.inf, -torch.inf])


@BOUNDED
@given(
    halves=st.integers(1, 20).flatmap(lambda n: st.tuples(*[st.lists(ANY_SCORE, min_size=n, max_size=n)] * 2)),
    top_k=st.integers(1, 400),
)
def test_search_among_scores_that_are_not_finite(
    halves: tuple[list[float], list[float]], top_k: int, device: torch.device
) -> None:
    keys = torch.tensor(halves, device=device)[None, ..., None]
    query = torch.ones(1, 1, 2, device=device)
    top_k = min(top_k, len(halves[0]) ** 2)
    assert_topk_contract(*tg.product_key_topk(query, keys, top_k), query, keys, top_k)


@st.composite
def lookup_cases(draw: st.DrawFn) -> LookupCase:
    return LookupCase(
        num_rows=draw(st.integers(1, 100)),
        width=draw(st.one_of(st.integers(1, 80), st.sampled_from([128, 256, 300]))),
        num_tokens=draw(st.integers(0, 60)),
        bag_size=draw(st.integers(0, 40)),
        pattern=draw(st.sampled_from(PATTERNS)),
        width_in=draw(st.integers(1, 80)),
    )


@BOUNDED
@given(
    case=lookup_cases(),
    dtype=DTYPE,
    layout=LAYOUT,
    seed=SEED,
    sparse_grad=st.booleans(),
    wide_weights=st.booleans(),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_lookups_equal_the_oracle(
    case: LookupCase,
    dtype: torch.dtype,
    layout: str,
    seed: int,
    sparse_grad: bool,
    wide_weights: bool,
    index_dtype: torch.dtype,
    device: torch.device,
    device_kind: str,
) -> None:
    dtype = supported(dtype, device_kind)
    weights_dtype = torch.float32 if wide_weights and dtype != torch.float64 else None
    check_lookup(case, dtype, device, layout, seed, sparse_grad, weights_dtype, index_dtype)
    activation = "silu" if seed % 2 else "gelu"
    check_experts(case, dtype, device, layout, seed, activation, sparse_grad, weights_dtype)
