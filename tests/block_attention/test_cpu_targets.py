"""Every instruction set this machine has runs the same compact set of cases."""

from dataclasses import replace

import pytest
import torch

import topgather as tg
from tests.block_attention.helpers import AttentionCase, check_attention, make_gradients, make_inputs, run_attention
from tests.common.tensors import DTYPES, integer_tensor
from topgather import reference

pytestmark = [pytest.mark.sanitize, pytest.mark.usefixtures("cpu_target")]
CPU = torch.device("cpu")

CASES = [
    AttentionCase(batch=2, num_heads=6, num_kv_heads=2, query_len=200, head_dim=64, block_size=32, top_k=4),
    AttentionCase(num_heads=4, num_kv_heads=1, query_len=150, head_dim=128, block_size=64, top_k=2),
    AttentionCase(query_len=130, head_dim=80, value_dim=33, block_size=13, top_k=5),
    AttentionCase(query_len=100, head_dim=1, value_dim=3, block_size=1, top_k=9),
    AttentionCase(query_len=100, head_dim=3, value_dim=1, block_size=7, top_k=3),
    AttentionCase(query_len=70, head_dim=17, block_size=16, top_k=2),
    AttentionCase(query_len=260, head_dim=256, block_size=128, top_k=2),
    AttentionCase(query_len=33, key_len=190, head_dim=96, block_size=48, top_k=3),
    AttentionCase(query_len=190, key_len=33, head_dim=31, block_size=8, top_k=2),
    AttentionCase(query_len=1, key_len=65, head_dim=15, block_size=16, top_k=2),
    AttentionCase(query_len=150, head_dim=64, block_size=32, top_k=3, scale=-3.0),
    # Two sums of grad_query.
    AttentionCase(num_kv_heads=1, query_len=520, head_dim=16, block_size=64, top_k=8),
]


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(case: AttentionCase, dtype: torch.dtype, is_causal: bool) -> None:
    check_attention(replace(case, is_causal=is_causal), dtype, CPU)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_multiplies_bfloat16_is_all_that_differs_from_avx512(cpu_target: str, dtype: torch.dtype) -> None:
    """Its weights are rounded, those of the plain build are not; every other dtype runs the plain build."""
    if cpu_target not in ("avx512_bf16", "amx"):
        pytest.skip("this target has code of its own for every dtype")
    case = AttentionCase(query_len=200, head_dim=64, block_size=32, top_k=4)
    inputs = make_inputs(case, dtype, CPU)
    gradients = make_gradients(case, dtype, CPU, 0)
    ours = run_attention(*inputs, *gradients, case)
    tg._native.set_cpu_target("avx512")
    plain = run_attention(*inputs, *gradients, case)
    assert torch.equal(ours.out, plain.out) == (dtype != torch.bfloat16)
    if dtype != torch.bfloat16 or cpu_target == "avx512_bf16":
        assert torch.equal(ours.d_value, plain.d_value) == (dtype != torch.bfloat16)


@pytest.mark.parametrize("layout", ["offset", "padded_rows"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_views(dtype: torch.dtype, layout: str) -> None:
    check_attention(AttentionCase(batch=2, query_len=90, head_dim=37, top_k=3), dtype, CPU, layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_and_nonfinite_scores(dtype: torch.dtype) -> None:
    query = integer_tensor((1, 2, 150, 20), dtype, CPU, 0)
    key = integer_tensor((1, 2, 152, 20), dtype, CPU, 1)
    for planted in (False, True):
        if planted:
            key[0, 0, 9], key[0, 0, 33], key[0, 1, 50] = float("nan"), float("inf"), float("-inf")
        for top_k in (1, 2, 5, 30):
            for is_causal in (True, False):
                chosen = tg.moba_route(query, key, 4, top_k, is_causal).block_indices
                assert torch.equal(chosen, reference.moba_route(query, key, 4, top_k, is_causal))
