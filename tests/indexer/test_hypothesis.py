"""Problems of any shape: the indexer's choice keeps its contract."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.common.tensors import DTYPES
from tests.indexer.helpers import IndexCase, check_route

pytestmark = pytest.mark.sanitize


@st.composite
def cases(draw: st.DrawFn) -> IndexCase:
    key_heads, group, choices = draw(st.sampled_from([(1, 1, 1), (1, 3, 1), (2, 2, 2), (3, 1, 3)]))
    reduction = draw(st.sampled_from(["max", "mean", "relu_sum"]))
    forced = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    is_causal = draw(st.booleans())
    return IndexCase(
        batch=draw(st.integers(1, 2)),
        num_index_heads=key_heads * group,
        num_key_heads=key_heads,
        query_len=draw(st.integers(1, 70)),
        key_len=draw(st.integers(1, 70)),
        dim=draw(st.integers(1, 20)),
        block_size=draw(st.sampled_from([1, 2, 3, 5, 8, 16, 100])),
        top_k=sum(forced) + draw(st.integers(int(sum(forced) == 0), 5)),
        reduction=reduction,
        is_causal=is_causal,
        force_first=forced[0],
        force_last=forced[1] if is_causal else min(forced[1], 1),
        num_choices=choices if reduction == "relu_sum" else None,
        has_weights=reduction == "relu_sum" and draw(st.booleans()),
    )


@settings(max_examples=60)
@given(case=cases(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 100))
def test_any_problem_keeps_the_contract(case: IndexCase, dtype: torch.dtype, seed: int) -> None:
    check_route(case, dtype, torch.device("cpu"), seed)
