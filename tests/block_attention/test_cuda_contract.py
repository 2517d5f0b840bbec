"""What holds of the CUDA kernels alone: faults in data, limits, determinism, waves.

On the emulator schedules are chosen at will; on a GPU the same tests take whatever schedules come. What needs streams,
graphs or a second device is in ``cuda/test_runtime.py``; ``cuda/test_no_waits.py`` looks for waits in the sources.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.block_attention.helpers import (
    AttentionCase,
    AttentionResult,
    Packed,
    assert_attention_close,
    check_attention,
    make_gradients,
    make_inputs,
    run_attention,
)
from tests.common.runs import assert_all_equal
from tests.common.schedules import CUDA_DTYPES, over_schedules
from tests.common.tensors import assert_bitwise_equal, integer_tensor
from topgather import reference

WAYS = pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "atomic"])
CASE = AttentionCase(batch=2, num_heads=4, num_kv_heads=2, query_len=90, head_dim=24, block_size=8, top_k=4)


def attend(
    case: AttentionCase, dtype: torch.dtype, device: torch.device, deterministic: bool | None = None, seed: int = 0
) -> AttentionResult:
    inputs, gradients = make_inputs(case, dtype, device, seed), make_gradients(case, dtype, device, seed)
    return run_attention(*inputs, *gradients, case, deterministic=deterministic)


# --- every kernel -----------------------------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (40, 100), (128, 72), (130, 256), (256, 8), (200, 200)])
def test_every_tile_shape(
    head_dim: int, value_dim: int, dtype: torch.dtype, deterministic: bool, cuda_device: torch.device
) -> None:
    """Kernels are compiled for a few head dimensions: full ones, partly used ones, and the larger of the two rules."""
    case = AttentionCase(
        num_heads=4, num_kv_heads=2, query_len=75, head_dim=head_dim, value_dim=value_dim, block_size=20, top_k=3
    )
    check_attention(case, dtype, cuda_device, deterministic=deterministic)


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(num_heads=1, query_len=300, head_dim=8, block_size=150, top_k=2),
        AttentionCase(num_heads=1, query_len=200, key_len=900, head_dim=8, block_size=700, top_k=2, is_causal=False),
        AttentionCase(num_heads=2, num_kv_heads=1, query_len=700, head_dim=8, block_size=4, top_k=3),
    ],
    ids=str,
)
def test_large_blocks_and_long_lists_deterministically(
    case: AttentionCase, dtype: torch.dtype, cuda_device: torch.device
) -> None:
    """Blocks larger than a tile of keys are taken piece by piece; lists longer than a work item by one thread block."""
    check_attention(case, dtype, cuda_device, deterministic=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(num_heads=1, query_len=3, key_len=4000, head_dim=2, block_size=1, top_k=9),
        AttentionCase(num_heads=1, query_len=2500, key_len=5, head_dim=2, block_size=3, is_causal=False),
        AttentionCase(num_heads=1, query_len=5, key_len=4000, head_dim=4, block_size=3700),
        AttentionCase(query_len=40, key_len=230, head_dim=72, block_size=120, is_causal=False, scale=1.0),
        AttentionCase(batch=5, num_heads=33, num_kv_heads=11, query_len=9, head_dim=2, block_size=4),
        AttentionCase(num_heads=3, num_kv_heads=1, query_len=130, key_len=0, head_dim=1, block_size=1, top_k=12),
    ],
    ids=str,
)
def test_more_of_everything(case: AttentionCase, dtype: torch.dtype, cuda_device: torch.device) -> None:
    """More blocks, queries of one block, keys of one block, leaps of scores, heads, or slots over no key at all."""
    check_attention(case, dtype, cuda_device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_short_sequences_beside_a_long_one(dtype: torch.dtype, cuda_device: torch.device) -> None:
    lengths = [1] * 120 + [300] + [0] * 5 + [2] * 40
    packed = Packed((lengths, lengths), dtype, cuda_device, head_dim=4, value_dim=4)
    block_indices = tg.moba_route_varlen(packed.query, packed.key, *packed.cu_seqlens, 16, 4).block_indices
    packed.check(packed.run(16, 4, True), block_indices, 16, 4, True)


def random_case(draw: random.Random) -> AttentionCase:
    """The ranges of test_hypothesis.py."""
    num_kv_heads = draw.randint(1, 3)
    return AttentionCase(
        batch=draw.randint(1, 2),
        num_heads=num_kv_heads * draw.randint(1, 4),
        num_kv_heads=num_kv_heads,
        query_len=draw.randint(0, 140),
        key_len=draw.randint(0, 140),
        head_dim=draw.randint(1, 70),
        value_dim=draw.randint(1, 70),
        block_size=draw.choice([draw.randint(1, 20), 32, 64, 128, 512]),
        top_k=draw.randint(1, 12),
        is_causal=draw.random() < 0.5,
        scale=draw.choice([None, 0.0, 0.5, -1.0]),
    )


@pytest.mark.parametrize("seed", range(24))
def test_random_problems(seed: int, cuda_device: torch.device) -> None:
    """The router's choice, then blocks in any order, with unused slots anywhere."""
    draw = random.Random(seed)
    case, dtype, deterministic = random_case(draw), draw.choice(CUDA_DTYPES), draw.random() < 0.5
    print(case, dtype, deterministic)
    check_attention(case, dtype, cuda_device, deterministic=deterministic, seed=seed)
    if case.num_blocks == 0:
        return
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(case.batch, case.num_heads, case.query_len, case.num_blocks, generator=generator).argsort(dim=-1)
    order = torch.where(torch.rand(order.shape, generator=generator) < 0.3, -1, order)[..., : draw.randint(1, 12)]
    routing = tg.BlockRouting(order.to(torch.int32).to(cuda_device), case.block_size)
    inputs, gradients = make_inputs(case, dtype, cuda_device), make_gradients(case, dtype, cuda_device, 0)
    result = run_attention(*inputs, *gradients, case, routing, deterministic)
    assert_attention_close(result, inputs, gradients, routing.block_indices, case)


@pytest.mark.parametrize("seed", range(10))
def test_random_packed_problems(seed: int, cuda_device: torch.device) -> None:
    draw = random.Random(seed)
    lengths = [[draw.choice([0, draw.randint(0, 30)]) for _ in range(draw.randint(1, 5))]] * 2
    if draw.random() < 0.5:
        lengths = [lengths[0], [draw.randint(0, 30) for _ in lengths[0]]]
    block_size, top_k, is_causal = draw.randint(1, 16), draw.randint(1, 5), draw.random() < 0.5
    packed = Packed(
        (lengths[0], lengths[1]),
        draw.choice(CUDA_DTYPES),
        cuda_device,
        num_heads=6,
        num_kv_heads=draw.choice([1, 2, 3, 6]),
        head_dim=draw.randint(1, 40),
        value_dim=draw.randint(1, 40),
    )
    print(lengths, block_size, top_k, is_causal, packed.dims, packed.query.dtype)
    block_indices = tg.moba_route_varlen(
        packed.query, packed.key, *packed.cu_seqlens, block_size, top_k, is_causal
    ).block_indices
    result = packed.run(block_size, top_k, is_causal, deterministic=draw.random() < 0.5)
    packed.check(result, block_indices, block_size, top_k, is_causal)


# --- what data says, without waiting for it ---------------------------------------------------------------------------

FAULT_CASE = AttentionCase(batch=2, num_heads=4, num_kv_heads=2, query_len=45, head_dim=8, block_size=4, top_k=4)
LAST_BLOCK = 11  # of FAULT_CASE
FAULTS = {
    "past_the_last": (LAST_BLOCK + 1,),
    "far_past_the_last": (2**31 - 1,),
    "below_minus_one": (-2,),
    "far_below": (-(2**31),),
    "twice": (2, 2),
    "twice_what_is_not_seen": (LAST_BLOCK, LAST_BLOCK),
}


def faulty_routing(
    device: torch.device, numbers: tuple[int, ...], num_slots: int, first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """A routing with faults in a few rows, the same with those rows unused, and the mask of these rows [B, H, N]."""
    query, key, _ = make_inputs(FAULT_CASE, torch.float32, device)
    good = tg.moba_route(query, key, FAULT_CASE.block_size, FAULT_CASE.top_k).block_indices.detach()
    shape = (*good.shape[:-1], num_slots)
    routing = torch.full(shape, -1, dtype=torch.int32, device=device)
    routing[..., : FAULT_CASE.top_k] = good
    is_faulty = torch.zeros(shape[:-1], dtype=torch.bool, device=device)
    for place in ((0, 0, 0), (0, 3, 44), (1, 2, 20), (1, 2, 21), (1, 0, 17)):
        is_faulty[place] = True
        routing[place] = -1
        slots = [0, num_slots - 1] if first else [num_slots - 1, num_slots // 2]
        for slot, number in zip(slots, numbers, strict=False):
            routing[(*place, slot)] = number
    unused = torch.where(is_faulty[..., None], -1, routing)
    return routing, unused, is_faulty


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize(("num_slots", "first"), [(4, True), (4, False), (80, True), (80, False)])
@pytest.mark.parametrize("numbers", FAULTS.values(), ids=FAULTS.keys())
def test_faulty_rows_are_nan_and_their_neighbours_keep_their_bits(
    numbers: tuple[int, ...], num_slots: int, first: bool, dtype: torch.dtype, cuda_device: torch.device
) -> None:
    """As if the row saw no key, but NaN where it would get 0 and -inf."""
    routing, unused, is_faulty = faulty_routing(cuda_device, numbers, num_slots, first)
    inputs, gradients = make_inputs(FAULT_CASE, dtype, cuda_device), make_gradients(FAULT_CASE, dtype, cuda_device, 0)
    for is_causal in (True, False):
        case = replace(FAULT_CASE, is_causal=is_causal)
        expected = run_attention(*inputs, *gradients, case, tg.BlockRouting(unused, 4), True)
        for deterministic in (True, False):
            result = run_attention(*inputs, *gradients, case, tg.BlockRouting(routing, 4), deterministic)
            for name in ("out", "lse", "d_query"):
                actual, wanted = result.tensors()[name], expected.tensors()[name]
                assert actual[is_faulty].isnan().all(), f"{name}: a faulty row is not NaN"
                assert not wanted.isnan().any()
                if deterministic or name != "d_query":
                    assert_bitwise_equal(name, actual[~is_faulty], wanted[~is_faulty])
            if deterministic:
                assert_bitwise_equal("d_key", result.d_key, expected.d_key)
                assert_bitwise_equal("d_value", result.d_value, expected.d_value)
            part = replace(result, out=expected.out, lse=expected.lse, d_query=expected.d_query)
            assert_attention_close(part, inputs, gradients, unused, case)
            assert result.d_query[~is_faulty].isfinite().all()


@WAYS
def test_a_block_of_another_sequence_is_a_fault(deterministic: bool, cuda_device: torch.device) -> None:
    """Sequences of 30, 0 and 50 keys: their blocks are counted from each sequence's first key."""
    packed = Packed(([30, 10, 50], [30, 0, 50]), torch.float32, cuda_device)
    block_indices = torch.zeros(4, 90, 2, dtype=torch.int32, device=cuda_device)
    block_indices[..., 1] = -1
    block_indices[2, 7] = torch.tensor([0, 4])  # the first sequence has blocks 0 to 3
    block_indices[1, 60] = torch.tensor([7, 0])  # the last has 0 to 6
    is_faulty = torch.zeros(4, 90, dtype=torch.bool, device=cuda_device)
    is_faulty[2, 7] = is_faulty[1, 60] = True
    is_faulty[:, 30:40] = True  # a sequence of no keys has no block 0 either
    result = packed.run(8, None, True, tg.BlockRouting(block_indices, 8), deterministic)
    assert torch.equal(result.lse.isnan(), is_faulty)
    for tensor in (result.out, result.d_query):
        assert torch.equal(tensor.isnan(), is_faulty.T[..., None].expand(tensor.shape))
    unused = torch.where(is_faulty[..., None], -1, block_indices)
    expected = packed.run(8, None, True, tg.BlockRouting(unused, 8), True)
    packed.check(expected, unused, 8, 2, True)
    assert_bitwise_equal("lse", result.lse[~is_faulty], expected.lse[~is_faulty])
    assert_bitwise_equal("out", result.out[~is_faulty.T], expected.out[~is_faulty.T])
    torch.testing.assert_close(result.d_key, expected.d_key)
    torch.testing.assert_close(result.d_value, expected.d_value)


def effective_boundaries(boundaries: list[int], total: int) -> list[int]:
    """What CUDA takes boundaries for: clamped to the tokens there are, then each at least the one before."""
    effective: list[int] = []
    for boundary in boundaries:
        effective.append(max(min(max(boundary, 0), total), effective[-1] if effective else 0))
    return effective


BOUNDARIES = {
    "starts_late": ([7, 20, 50], [0, 20, 50]),
    "keys_start_late": ([0, 20, 50], [7, 20, 50]),
    "starts_below_0": ([-9, 20, 50], [-1, 20, 50]),
    "ends_early": ([0, 20, 41], [0, 20, 30]),
    "ends_late": ([0, 20, 51], [0, 20, 2**31 - 1]),
    "far_out": ([0, 2**40, 50], [0, -(2**40), 50]),
    "extreme": ([-(2**63), 20, 2**63 - 1], [2**63 - 1, -(2**63), 3]),
    "descends": ([0, 30, 10], [0, 10, 4]),
    "one_boundary": ([0], [0]),
    "all_past_the_end": ([90, 95, 99], [0, 20, 50]),
    "no_keys": ([0, 20, 50], [0, 0, 0]),
    "many": ([*range(0, 49, 2), 3, 47, -5, 400], [*range(0, 49, 2), 60, 1, 48, 49]),
}


@WAYS
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("boundaries", BOUNDARIES.values(), ids=BOUNDARIES.keys())
def test_boundaries_that_do_not_delimit_the_tokens(
    boundaries: tuple[list[int], list[int]],
    dtype: torch.dtype,
    is_causal: bool,
    deterministic: bool,
    cuda_device: torch.device,
) -> None:
    """Nothing is read or written out of bounds; rows of no sequence are NaN, the others as their sequences say."""
    packed = Packed(([50], [50]), dtype, cuda_device)
    starts = [effective_boundaries(given, 50) for given in boundaries]
    lengths = [[after - before for before, after in pairwise(s)] for s in starts]
    (packed.starts_q, packed.starts_k), (packed.lengths_q, packed.lengths_k) = starts, lengths
    given = [torch.tensor(numbers, dtype=torch.int64, device=cuda_device) for numbers in boundaries]
    packed.cu_seqlens = (given[0], given[1], 50, 50)
    routing = tg.moba_route_varlen(packed.query, packed.key, *packed.cu_seqlens, 8, 3, is_causal)
    result = packed.run(8, None, is_causal, routing, deterministic)
    packed.check(result, routing.block_indices, 8, 3, is_causal)

    is_outside = torch.ones(50, dtype=torch.bool, device=cuda_device)
    is_outside[starts[0][0] : starts[0][-1]] = False
    assert (routing.block_indices[:, is_outside] == -1).all()
    assert result.out[is_outside].isnan().all() and result.d_query[is_outside].isnan().all()
    assert result.lse[:, is_outside].isnan().all()
    is_outside[:] = True
    is_outside[starts[1][0] : starts[1][-1]] = False
    assert (result.d_key[is_outside] == 0).all() and (result.d_value[is_outside] == 0).all()


def test_maxima_are_not_needed(cuda_device: torch.device) -> None:
    """max_seqlen below what sequences have, which the CPU refuses, changes nothing."""
    packed = Packed(([20, 45], [33, 45]), torch.float32, cuda_device)
    expected = packed.run(8, 3, True, deterministic=True)
    packed.cu_seqlens = (*packed.cu_seqlens[:2], 1, 0)
    assert_all_equal(packed.run(8, 3, True, deterministic=True).tensors(), expected.tensors())


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
def test_dimensions_past_256_are_refused(dtype: torch.dtype, cuda_device: torch.device) -> None:
    narrow = torch.zeros(1, 2, 8, 256, dtype=dtype, device=cuda_device)
    wide = torch.zeros(1, 2, 8, 257, dtype=dtype, device=cuda_device)
    cu_seqlens = torch.tensor([0, 8], dtype=torch.int32, device=cuda_device)
    packing = (cu_seqlens, cu_seqlens, 8, 8, 4, 1)
    tg.moba_attention(narrow, narrow, narrow, 4, 1)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("head_dim", lambda: tg.moba_attention(wide, wide, narrow, 4, 1)),
        ("value_dim", lambda: tg.moba_attention(narrow, narrow, wide, 4, 1)),
        ("head_dim", lambda: tg.moba_route(wide, wide, 4, 1)),
        ("head_dim", lambda: tg.moba_attention_varlen(*(x[0].transpose(0, 1) for x in (wide, wide, narrow)), *packing)),
        (
            "value_dim",
            lambda: tg.moba_attention_varlen(*(x[0].transpose(0, 1) for x in (narrow, narrow, wide)), *packing),
        ),
        ("head_dim", lambda: tg.moba_route_varlen(*(x[0].transpose(0, 1) for x in (wide, wide)), *packing)),
    ]
    for named, call in calls:
        with pytest.raises(ValueError, match=rf"\b{named}\b.*256.*257"):
            call()
    assert tg.block_centroids(wide + 1, 4).eq(1).all(), "centroids have no such limit"


def test_float64_is_refused(cuda_device: torch.device) -> None:
    x = torch.zeros(1, 2, 8, 16, dtype=torch.float64, device=cuda_device, requires_grad=True)
    token_major = x[0].transpose(0, 1)
    cu_seqlens = torch.tensor([0, 8], dtype=torch.int32, device=cuda_device)
    packing = (cu_seqlens, cu_seqlens, 8, 8, 4, 1)
    calls: list[Callable[[], Any]] = [
        lambda: tg.block_centroids(x, 4),
        lambda: tg.moba_route(x, x, 4, 1),
        lambda: tg.moba_attention(x, x, x, 4, 1),
        lambda: tg.moba_route_varlen(token_major, token_major, *packing),
        lambda: tg.moba_attention_varlen(token_major, token_major, token_major, *packing),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="float64"):
            call()


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize(("num_blocks", "top_k"), [(130, 65), (300, 250), (540, 520)])
def test_more_slots_than_shared_memory_holds(
    num_blocks: int, top_k: int, dtype: torch.dtype, is_causal: bool, native: Any, cuda_device: torch.device
) -> None:
    """The router's lists move to global memory where 64 queries' worth of them do not fit on chip."""
    query = integer_tensor((1, 2, 6, 5), dtype, cuda_device, 0)
    key = integer_tensor((1, 1, num_blocks * 2, 5), dtype, cuda_device, 1)
    expected = reference.moba_route(query, key, 2, top_k, is_causal).to(cuda_device)
    for shared_limit in shared_limits(native):
        chosen = tg.moba_route(query, key, 2, top_k, is_causal).block_indices
        assert torch.equal(chosen, expected), f"with {shared_limit} bytes of shared memory"


def shared_limits(native: Any) -> Iterator[int | str]:
    """Shared memory of the smallest and of the largest supported processors; a GPU has what it has."""
    if not hasattr(native, "set_options"):
        yield "this device's"
        return
    for shared_limit in (99 * 1024, 227 * 1024):
        native.set_options(shared_limit=shared_limit)
        yield shared_limit


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
def test_attention_over_many_slots(dtype: torch.dtype, cuda_device: torch.device) -> None:
    case = AttentionCase(num_heads=2, num_kv_heads=1, query_len=30, key_len=200, head_dim=8, block_size=2, top_k=90)
    check_attention(case, dtype, cuda_device, deterministic=True)
    check_attention(case, dtype, cuda_device, deterministic=False)


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [24, 128, 256])
def test_shared_memory_does_not_change_results(
    head_dim: int, dtype: torch.dtype, native: Any, cuda_kind: str, cuda_device: torch.device
) -> None:
    results = []
    for _ in shared_limits(native):
        results.append(everything(replace(CASE, head_dim=head_dim, batch=1), dtype, cuda_device))
        assert_all_equal(results[-1], results[0])
    assert len(results) == 2 or cuda_kind == "cuda"


# --- determinism ------------------------------------------------------------------------------------------------------


def everything(
    case: AttentionCase, dtype: torch.dtype, device: torch.device, deterministic: bool | None = True
) -> dict[str, Tensor]:
    """Every result of every dense op on one problem."""
    query, key, _ = (tensor.detach() for tensor in make_inputs(case, dtype, device))
    return attend(case, dtype, device, deterministic).tensors() | {
        "block_indices": tg.moba_route(query, key, case.block_size, case.top_k, case.is_causal).block_indices,
        "centroids": tg.block_centroids(key, case.block_size),
    }


def everything_packed(dtype: torch.dtype, device: torch.device, deterministic: bool | None = True) -> dict[str, Tensor]:
    packed = Packed(([0, 45, 3, 60], [7, 45, 9, 60]), dtype, device)
    routing = tg.moba_route_varlen(packed.query, packed.key, *packed.cu_seqlens, 8, 3)
    return packed.run(8, 3, True, deterministic=deterministic).tensors() | {"block_indices": routing.block_indices}


@pytest.mark.parametrize("by_flag", [False, True], ids=["argument", "torch_flag"])
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["dense", "large_blocks", "packed"])
def test_deterministic_bits_do_not_depend_on_the_schedule(
    kind: str,
    dtype: torch.dtype,
    by_flag: bool,
    native: Any,
    cuda_kind: str,
    cuda_device: torch.device,
    request: pytest.FixtureRequest,
) -> None:
    if by_flag:
        request.getfixturevalue("deterministic")
    case = CASE if kind == "dense" else AttentionCase(num_heads=1, query_len=200, head_dim=8, block_size=150)
    expected: dict[str, Tensor] = {}
    for schedule in over_schedules(cuda_kind, num_random=3):
        if kind == "packed":
            results = everything_packed(dtype, cuda_device, None if by_flag else True)
        else:
            results = everything(case, dtype, cuda_device, None if by_flag else True)
        expected = expected or results
        assert_all_equal(results, expected, schedule)


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_forward_and_routing_are_always_deterministic(
    kind: str, dtype: torch.dtype, native: Any, cuda_kind: str, cuda_device: torch.device
) -> None:
    """And the schedules do differ: float32 gradients summed by atomic additions do not keep their bits."""
    expected: dict[str, Tensor] = {}
    gradients_differ = False
    for schedule in over_schedules(cuda_kind, num_random=3):
        if kind == "packed":
            results = everything_packed(dtype, cuda_device, False)
        else:
            results = everything(CASE, dtype, cuda_device, False)
        expected = expected or results
        gradients = [name for name in results if name.startswith("d_")]
        gradients_differ |= any(not torch.equal(results[name], expected[name]) for name in gradients)
        assert_all_equal({n: t for n, t in results.items() if n not in gradients}, expected, schedule)
    assert gradients_differ or dtype != torch.float32 or cuda_kind == "cuda"


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
def test_both_ways_agree(dtype: torch.dtype, cuda_device: torch.device) -> None:
    """Each with the oracle up to the table's tolerance, and in everything but gradients bit for bit."""
    inputs, gradients = make_inputs(CASE, dtype, cuda_device), make_gradients(CASE, dtype, cuda_device, 0)
    block_indices = tg.moba_route(inputs[0], inputs[1], CASE.block_size, CASE.top_k).block_indices
    results = [run_attention(*inputs, *gradients, CASE, deterministic=way) for way in (True, False)]
    for result in results:
        assert_attention_close(result, inputs, gradients, block_indices, CASE)
    assert_bitwise_equal("out", results[0].out, results[1].out)
    assert_bitwise_equal("lse", results[0].lse, results[1].lse)


def test_the_argument_overrules_the_flag(
    native: Any, cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None follows torch.use_deterministic_algorithms, True and False do not."""
    ways: list[bool] = []
    backward = native.moba_attention_backward_cuda
    position = native.argument_names["moba_attention_backward_cuda"].index("deterministic")

    def spy(*arguments: Any) -> None:
        ways.append(arguments[position])
        backward(*arguments)

    monkeypatch.setattr(native, "moba_attention_backward_cuda", spy)
    for flag in (False, True):
        torch.use_deterministic_algorithms(flag, warn_only=True)
        try:
            for argument in (None, False, True):
                ways.clear()
                attend(CASE, torch.float32, cuda_device, argument)
                assert ways == [flag if argument is None else argument], (flag, argument)
        finally:
            torch.use_deterministic_algorithms(False)
