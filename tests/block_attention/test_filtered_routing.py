"""Routing over so many blocks that scores are first bounded (csrc/moba/moba_route_filter_cuda.cuh, _cpu.h).

Bounds must neither lose a block nor decide between blocks that they cannot tell apart, whatever the scores.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.block_attention.helpers import AttentionCase, assert_routing_contract, make_inputs
from tests.block_attention.test_varlen import Packed
from tests.common.tensors import assert_bitwise_equal
from topgather import reference

pytestmark = pytest.mark.sanitize

NUM_BLOCKS = 400  # enough for the filters of CUDA and of AVX-512
KEYS_OF_BLOCK = 4
HALF_TYPES = [torch.bfloat16, torch.float16]

CASES = [
    AttentionCase(num_heads=1, query_len=70, key_len=600, head_dim=64, block_size=2, top_k=8),
    AttentionCase(batch=2, num_heads=4, num_kv_heads=2, query_len=3, key_len=513, head_dim=64, block_size=2, top_k=10),
    AttentionCase(num_heads=1, query_len=300, head_dim=128, block_size=1, top_k=4),
    AttentionCase(num_heads=1, query_len=130, key_len=280, head_dim=128, block_size=1, top_k=9),
    AttentionCase(num_heads=1, query_len=20, key_len=300, head_dim=64, block_size=1, top_k=1),
]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract_on_random_scores(
    case: AttentionCase, dtype: torch.dtype, is_causal: bool, device: torch.device
) -> None:
    query, key = (tensor.detach() for tensor in make_inputs(case, dtype, device)[:2])
    chosen = tg.moba_route(query, key, case.block_size, case.top_k, is_causal).block_indices
    assert_routing_contract(chosen, query, key, case.block_size, case.top_k, is_causal)


def steps(dtype: torch.dtype) -> Tensor:
    """Scores a quarter of the element type's step apart, which only the mean of several keys tells apart."""
    return 1 + torch.arange(NUM_BLOCKS) * torch.finfo(dtype).eps / KEYS_OF_BLOCK


def shuffled(scores: Tensor) -> Tensor:
    return scores[torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))]


SCORES: dict[str, Callable[[torch.dtype], Tensor]] = {
    "ascending": steps,
    "descending": lambda dtype: steps(dtype).flip(0),
    "in any order": lambda dtype: shuffled(steps(dtype)),
    "negative": lambda dtype: -shuffled(steps(dtype)),
    "equal": lambda dtype: torch.ones(NUM_BLOCKS),
    "equal by pairs": lambda dtype: shuffled(steps(dtype)[torch.arange(NUM_BLOCKS) // 2 * 2]),
    "two kinds": lambda dtype: steps(dtype)[torch.arange(NUM_BLOCKS) % 2],
    "zeros": lambda dtype: torch.zeros(NUM_BLOCKS),
    "a great one among small ones": lambda dtype: torch.where(torch.arange(NUM_BLOCKS) == 7, 900.0, steps(dtype)),
    "a low great one": lambda dtype: torch.where(torch.arange(NUM_BLOCKS) == 7, -900.0, shuffled(steps(dtype))),
    "infinite ones": lambda dtype: torch.where(torch.arange(NUM_BLOCKS) % 50 == 3, torch.inf, shuffled(steps(dtype))),
    "a low infinite one": lambda dtype: torch.where(torch.arange(NUM_BLOCKS) == 40, -torch.inf, steps(dtype)),
    "NaN": lambda dtype: torch.where(torch.arange(NUM_BLOCKS) % 90 == 5, torch.nan, shuffled(steps(dtype))),
    "infinite": lambda dtype: torch.full((NUM_BLOCKS,), -torch.inf),
}
SCALES = {torch.bfloat16: (1.0, 2.0**-62, 2.0**-124, 2.0**62, 2.0**120), torch.float16: (1.0, 2.0**-14)}


def keys_of(scores: Tensor, dtype: torch.dtype, head_dim: int) -> Tensor:
    """[1, 1, N, D]: means of KEYS_OF_BLOCK keys that are the scores in column 5, exactly; 0 beside it."""
    if (scores[scores.isfinite()].abs() > 2).any():
        assert dtype is torch.bfloat16 or (scores[scores.isfinite()].abs() < 1000).all()
    rounded = scores.to(dtype).to(torch.float32)
    step = torch.finfo(dtype).eps * torch.where(scores.abs() >= 2, 2, 1)
    rest = torch.where(scores.isfinite(), (scores - rounded) / step * KEYS_OF_BLOCK, 0).round()
    keys = torch.zeros(NUM_BLOCKS, KEYS_OF_BLOCK, head_dim)
    for i in range(KEYS_OF_BLOCK):
        keys[:, i, 5] = rounded + torch.where(i < rest.abs(), rest.sign() * step, 0)
    return keys.flatten(0, 1)[None, None]


def check_exact_scores(
    name: str, dtype: torch.dtype, device: torch.device, scale: float, top_k: int, is_causal: bool
) -> None:
    """One column alone counts, so that every score is exact: the choice is the reference's to the last tie."""
    key = (keys_of(SCORES[name](dtype), dtype, 64) * scale).to(dtype)
    query = torch.zeros(1, 1, 12, 64, dtype=dtype)
    query[..., 5] = torch.tensor(
        [1.0, -1.0, 0.5, -2.0, 0.0, 1.0, 3.0, -(2.0**-10), 2.0**-10, torch.inf, torch.nan, 1.0]
    )
    chosen = tg.moba_route(query.to(device), key.to(device), KEYS_OF_BLOCK, top_k, is_causal).block_indices
    expected = reference.moba_route(query, key, KEYS_OF_BLOCK, top_k, is_causal)
    assert torch.equal(chosen.cpu(), expected), f"block_indices: {name}, times {scale}, top_k {top_k}"


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("name", SCORES)
def test_exact_scores(name: str, dtype: torch.dtype, device: torch.device) -> None:
    for top_k, is_causal in ((2, False), (2, True), (8, True)):
        check_exact_scores(name, dtype, device, 1.0, top_k, is_causal)
    for scale in SCALES[dtype]:
        check_exact_scores(name, dtype, device, scale, 8, False)


def check_roundings_that_mislead(dtype: torch.dtype, device: torch.device) -> None:
    """Every column of the best blocks is rounded down and of the next ones up, so that these look better by far.

    In units in the last place: the best score 16 above 96 and look like 96; the next ones, 8 above, look like 24 above.
    """
    unit = torch.finfo(dtype).eps
    signs = torch.where(torch.arange(64) % 3 == 0, -1.0, 1.0)
    columns = torch.ones(NUM_BLOCKS, KEYS_OF_BLOCK, 64)
    best, looks_best = torch.arange(9, NUM_BLOCKS, 37)[:8], torch.arange(4, NUM_BLOCKS, 37)[:8]
    columns[best] = columns[looks_best] = 1.5
    columns[best, 0] += unit
    columns[looks_best, :, :24] += unit
    columns[looks_best, 0] -= unit
    key = (columns * signs).flatten(0, 1)[None, None].to(dtype)
    query = signs.expand(1, 1, 5, 64).to(dtype)
    chosen = tg.moba_route(query.to(device), key.to(device), KEYS_OF_BLOCK, 8, False).block_indices
    assert (chosen.cpu() == best).all(), "block_indices: misled by roundings"


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_roundings_that_mislead(dtype: torch.dtype, device: torch.device) -> None:
    check_roundings_that_mislead(dtype, device)


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_scores_closer_than_the_bounds(dtype: torch.dtype, device: torch.device) -> None:
    """Blocks that differ from one by less than the element type tells apart, in many columns at once."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 1, 1, 128, generator=generator)
    key = (base + torch.randn(1, 1, NUM_BLOCKS * 8, 128, generator=generator) / 64).to(dtype).to(device)
    query = (base + torch.randn(1, 1, 40, 128, generator=generator)).to(dtype).to(device)
    for is_causal in (True, False):
        chosen = tg.moba_route(query, key, 8, 8, is_causal).block_indices
        assert_routing_contract(chosen, query, key, 8, 8, is_causal)


def test_a_row_depends_on_itself_alone(device: torch.device) -> None:
    """Rows whose bounds do not tell, beside others: each keeps its choice when the others change."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 1, NUM_BLOCKS, 64, generator=generator).bfloat16()
    key[:, :, 20:60] = key[:, :, 20:21]
    query = torch.randn(1, 1, 64, 64, generator=generator).bfloat16()
    query[:, :, ::3] = key[:, :, 20:21]
    query[:, :, 7] = torch.inf
    chosen = tg.moba_route(query.to(device), key.to(device), 1, 8, False).block_indices
    for kept in (slice(0, None, 3), slice(1, None, 3)):
        others = torch.zeros_like(query)
        others[:, :, kept] = query[:, :, kept]
        again = tg.moba_route(others.to(device), key.to(device), 1, 8, False).block_indices
        assert_bitwise_equal("block_indices", again[:, :, kept], chosen[:, :, kept])


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_packed_sequences(dtype: torch.dtype, device: torch.device) -> None:
    packed = Packed(([150, 0, 20], [700, 1, 420]), dtype, device, head_dim=64)
    block_indices = tg.moba_route_varlen(packed.query, packed.key, *packed.cu_seqlens, 1, 8).block_indices
    for seq_idx in range(3):
        query, key = packed.tokens(packed.query, seq_idx), packed.tokens(packed.key, seq_idx, of_key=True)
        assert_routing_contract(packed.columns(block_indices, seq_idx), query, key, 1, 8, is_causal=True)
