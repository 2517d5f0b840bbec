"""Bugs to plant in the CUDA sources of block attention; ``cuda/planted_bugs.py`` says how."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import topgather as tg
from tests.block_attention.helpers import (
    AttentionCase,
    assert_attention_close,
    assert_routing_contract,
    check_attention,
    make_gradients,
    make_inputs,
    run_attention,
)
from tests.block_attention.test_cuda_unusual_work import check_work
from tests.block_attention.test_filtered_routing import check_exact_scores, check_roundings_that_mislead
from tests.block_attention.test_shared_choices import shared_choice_case
from tests.block_attention.test_softcap_and_sinks import (
    test_against_reference,
    test_decoding_gives_the_rows_of_attention,
)
from tests.block_attention.test_varlen import Packed
from tests.block_attention.test_window import CASES as WINDOW_CASES
from tests.block_attention.test_window import check as check_window
from tests.block_attention.test_window import (
    test_decoding_gives_the_rows_of_attention as test_decoding_with_a_window,
)
from tests.common import emulated
from tests.common.tensors import assert_bitwise_equal, integer_tensor
from tests.cuda.planted_bug import (
    BEFORE_WAIT,
    OUT_OF_BOUNDS,
    OVERWRITTEN,
    RACE,
    READ_OUT_OF_BOUNDS,
    UNINITIALIZED,
    UNPUBLISHED,
    PlantedBug,
)
from topgather import reference

CPU = torch.device("cpu")
BFLOAT16 = torch.bfloat16

# --- cases ------------------------------------------------------------------------------------------------------------

# Several query heads a key head, fewer choices than blocks, a short last block.
SMALL = AttentionCase(batch=2, num_heads=4, num_kv_heads=2, query_len=75, head_dim=32, block_size=16, top_k=3)
# Several tiles of queries a warp, several steps of keys a block, and as many choices as blocks.
MANY_QUERIES = AttentionCase(
    num_kv_heads=1, query_len=100, key_len=230, head_dim=32, block_size=120, top_k=2, is_causal=False
)
# Blocks of more keys than the kernels hold on chip.
LARGE_BLOCKS = AttentionCase(num_heads=1, query_len=150, key_len=430, head_dim=32, block_size=200, top_k=2)
# More blocks than a kernel adds up in one go.
MANY_BLOCKS = AttentionCase(num_heads=1, query_len=10, key_len=520, head_dim=16, block_size=1, top_k=2)
# Many blocks, of which several queries choose the same.
SHARED_BLOCKS = replace(MANY_BLOCKS, query_len=64, key_len=150, top_k=8)
# More queries of one block than one work item holds.
LONG_LIST = AttentionCase(num_heads=1, query_len=4200, key_len=8, head_dim=16, block_size=8, top_k=1, is_causal=False)
# So many blocks that their scores are bounded first.
FILTERED = AttentionCase(num_heads=1, query_len=40, key_len=560, head_dim=64, block_size=2, top_k=8, is_causal=False)


def small_waves_case() -> None:
    """Little workspace: every key head takes several waves of queries."""
    emulated.native().moba_cuda_set_budget(20_000)
    check_attention(SMALL, BFLOAT16, CPU)


def routed_case() -> None:
    """The user's own routing: blocks in any order, unused slots anywhere, blocks after the query's own."""
    generator = torch.Generator().manual_seed(0)
    shape = (SMALL.batch, SMALL.num_heads, SMALL.query_len, SMALL.num_blocks)
    block_indices = torch.rand(shape, generator=generator).argsort(dim=-1)[..., :3].to(torch.int32)
    block_indices[torch.rand(block_indices.shape, generator=generator) < 0.3] = -1
    inputs, gradients = make_inputs(SMALL, BFLOAT16, CPU), make_gradients(SMALL, BFLOAT16, CPU, 0)
    result = run_attention(*inputs, *gradients, SMALL, tg.BlockRouting(block_indices, SMALL.block_size))
    assert_attention_close(result, inputs, gradients, block_indices, SMALL)


def unchosen_blocks_case() -> None:
    """Blocks that no query chose get gradients of zero, not what memory held."""
    inputs, gradients = make_inputs(SMALL, BFLOAT16, CPU), make_gradients(SMALL, BFLOAT16, CPU, 0)
    block_indices = torch.zeros(SMALL.batch, SMALL.num_heads, SMALL.query_len, 1, dtype=torch.int32)
    result = run_attention(*inputs, *gradients, SMALL, tg.BlockRouting(block_indices, SMALL.block_size))
    assert_attention_close(result, inputs, gradients, block_indices, SMALL)


def named_twice_case() -> None:
    """A row that names a block twice is NaN, whatever lies between; its neighbours in the warp are not."""
    query, key, value = (tensor.detach() for tensor in make_inputs(SMALL, BFLOAT16, CPU))
    block_indices = tg.moba_route(query, key, SMALL.block_size, SMALL.top_k).block_indices
    rows = torch.tensor([60, 65, 74])
    block_indices[0, 1, rows] = torch.tensor([0, 3, 0], dtype=torch.int32)
    routing = tg.BlockRouting(block_indices, SMALL.block_size)
    out = tg.moba_attention(query, key, value, SMALL.block_size, routing=routing)
    is_faulty = torch.zeros(out.shape[:3], dtype=torch.bool)
    is_faulty[0, 1, rows] = True
    assert torch.equal(out.isnan().all(dim=-1), is_faulty), "out: other rows are NaN than named a block twice"


def nonfinite_case() -> None:
    """An infinite key and an infinite value reach the queries that see them and no other."""
    case = AttentionCase(num_heads=2, query_len=60, block_size=16)
    query, key, value = (tensor.detach() for tensor in make_inputs(case, BFLOAT16, CPU))
    key[0, 1, 21, 2] = value[0, 0, 37, 3] = torch.inf
    inputs = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_())
    gradients = make_gradients(case, BFLOAT16, CPU, 0)
    block_indices = tg.moba_route(query, key, case.block_size, case.top_k).block_indices
    assert_attention_close(run_attention(*inputs, *gradients, case), inputs, gradients, block_indices, case)


def varlen_case() -> None:
    """Packed sequences, one without queries, of more keys than queries and the other way round."""
    packed = Packed(([30, 25, 0, 20], [41, 30, 5, 13]), BFLOAT16, CPU)
    block_indices = tg.moba_route_varlen(packed.query, packed.key, *packed.cu_seqlens, 8, 3).block_indices
    for seq_idx in range(4):
        query, key = packed.tokens(packed.query, seq_idx), packed.tokens(packed.key, seq_idx, of_key=True)
        assert_routing_contract(packed.columns(block_indices, seq_idx), query, key, 8, 3, is_causal=True)
    packed.check(packed.run(8, 3, True), block_indices, 8, 3, True)


def deterministic_case() -> None:
    """The deterministic way gives the same bits whatever the order: in float32, whose last bits show it."""
    case = replace(SMALL, block_size=70, top_k=2)
    torch.use_deterministic_algorithms(True)
    first = check_attention(case, torch.float32, CPU).tensors()
    emulated.native().set_options(order="descending", cp_async="at_issue")
    for name, tensor in check_attention(case, torch.float32, CPU).tensors().items():
        assert_bitwise_equal(name, tensor, first[name])


def deterministic_long_list_case() -> None:
    """No list is cut, however long."""
    torch.use_deterministic_algorithms(True)
    check_attention(LONG_LIST, BFLOAT16, CPU)


def check_routing(case: AttentionCase) -> None:
    query, key = (tensor.detach() for tensor in make_inputs(case, BFLOAT16, CPU)[:2])
    chosen = tg.moba_route(query, key, case.block_size, case.top_k, case.is_causal).block_indices
    assert_routing_contract(chosen, query, key, case.block_size, case.top_k, case.is_causal)


def routing_long_lists_case() -> None:
    """Lists that do not fit shared memory, and so little workspace that thread blocks take several tiles of queries."""
    emulated.native().moba_cuda_set_budget(100_000)
    check_routing(AttentionCase(num_heads=1, query_len=300, block_size=2, top_k=100))


def check_ties(block_size: int, top_k: int) -> None:
    """Small integers: scores are exact, many tie, and the choice equals the reference's."""
    query, key = (integer_tensor((1, 2, 90, 5), BFLOAT16, CPU, seed) for seed in (0, 1))
    key[:, :, 88:] = 1
    chosen = tg.moba_route(query, key, block_size, top_k).block_indices
    expected = reference.moba_route(query, key, block_size, top_k)
    assert torch.equal(chosen, expected), "block_indices: not the reference's"


def routing_minus_infinity_case() -> None:
    """Scores of -inf are chosen where there are no better ones."""
    query, key = torch.ones((1, 1, 80, 4), dtype=BFLOAT16), torch.ones((1, 1, 80, 4), dtype=BFLOAT16)
    key[:, :, 8:48] = -torch.inf
    chosen = tg.moba_route(query, key, 8, 6).block_indices
    assert torch.equal(chosen, reference.moba_route(query, key, 8, 6)), "block_indices: not the reference's"


def packed_centroids_case() -> None:
    """Room for all blocks, then for one of each sequence."""
    key = integer_tensor((95, 2, 24), BFLOAT16, CPU, 0)
    bounds = torch.tensor([0, 9, 9, 10, 60, 95])
    expected = reference.block_centroids(key, 16, bounds, 50)
    for max_seqlen in (50, 16):
        centroids = tg.block_centroids(key, 16, bounds, max_seqlen)
        wanted = expected[:, :, : centroids.shape[2]]
        assert torch.allclose(centroids.double(), wanted, atol=1e-6), "centroids: not the reference's"


def centroids_case() -> None:
    """Means of blocks, the last one short."""
    key = integer_tensor((1, 2, 37, 20), torch.float32, CPU, 0)
    centroids = tg.block_centroids(key, 16)
    assert torch.allclose(centroids.double(), reference.block_centroids(key, 16)), "centroids: not the reference's"


BLOCK_ATTENTION_CASES: dict[str, Callable[[], Any]] = {
    "small": lambda: check_attention(SMALL, BFLOAT16, CPU),
    "small full": lambda: check_attention(replace(SMALL, is_causal=False), BFLOAT16, CPU),
    "many queries": lambda: check_attention(MANY_QUERIES, BFLOAT16, CPU),
    "many queries float32": lambda: check_attention(MANY_QUERIES, torch.float32, CPU),
    "large blocks": lambda: check_attention(LARGE_BLOCKS, BFLOAT16, CPU),
    "steep": lambda: check_attention(replace(MANY_QUERIES, scale=1.0), BFLOAT16, CPU),
    "many blocks": lambda: check_attention(MANY_BLOCKS, BFLOAT16, CPU),
    "many blocks chosen alike": lambda: check_attention(SHARED_BLOCKS, BFLOAT16, CPU),
    "long list": lambda: check_attention(LONG_LIST, BFLOAT16, CPU),
    "small waves": small_waves_case,
    "routed": routed_case,
    "shared choices": shared_choice_case,
    "nonfinite": nonfinite_case,
    "work of NaN": lambda: check_work(torch.nan, emulated.native()),
    "named twice": named_twice_case,
    "unchosen blocks": unchosen_blocks_case,
    "varlen": varlen_case,
    "deterministic": deterministic_case,
    "deterministic long list": deterministic_long_list_case,
    "routing": lambda: check_routing(AttentionCase(num_kv_heads=1, query_len=299, block_size=4, top_k=4)),
    "routing full": lambda: check_routing(AttentionCase(query_len=150, block_size=4, top_k=4, is_causal=False)),
    "routing long lists": routing_long_lists_case,
    "routing by warps": lambda: check_routing(AttentionCase(num_heads=1, query_len=160, block_size=2, top_k=20)),
    "routing ties": lambda: check_ties(8, 3),
    "routing ties by warps": lambda: check_ties(2, 20),
    "routing minus infinity": routing_minus_infinity_case,
    "routing filtered": lambda: check_routing(FILTERED),
    "routing filtered steps": lambda: check_exact_scores("in any order", BFLOAT16, CPU, 1.0, 8, False),
    "routing filtered misled": lambda: check_roundings_that_mislead(BFLOAT16, CPU),
    "routing filtered equal": lambda: check_exact_scores("equal", BFLOAT16, CPU, 1.0, 8, False),
    "centroids": centroids_case,
    "centroids packed": packed_centroids_case,
    "softcap and sinks": lambda: test_against_reference(BFLOAT16, {"softcap": 1.5, "has_sinks": True}, True, CPU),
    "window": lambda: check_window(WINDOW_CASES[3], BFLOAT16, CPU),
    "decoding with a window": lambda: test_decoding_with_a_window(5, BFLOAT16, CPU),
    "decoding with softcap and sinks": lambda: test_decoding_gives_the_rows_of_attention(
        BFLOAT16, {"softcap": 1.5, "has_sinks": True}, CPU
    ),
}


# --- bugs -------------------------------------------------------------------------------------------------------------

WRONG_OUT = "AssertionError: out"
WRONG_LSE = "AssertionError: lse"
WRONG_GRADIENT = "AssertionError: d_"
WRONG_CHOICE = "AssertionError: block_indices"

LAYOUT = "moba/moba_layout_cuda.cu"
FORWARD = "moba/moba_forward_cuda.cuh"
MERGE = "moba/moba_merge_cuda.cuh"
FORWARD_STEPS = "moba/moba_forward_cuda.cu"
BACKWARD = "moba/moba_backward_cuda.cuh"
DECODE_ATTEND = "decode/decode_attend_cuda.cu"
BACKWARD_STEPS = "moba/moba_backward_cuda.cu"
ROUTE = "moba/moba_route_cuda.cuh"
ROUTE_ROWS = "moba/moba_route_rows_cuda.cuh"
FILTER = "moba/moba_route_filter_cuda.cuh"
ROUTE_STEPS = "moba/moba_route_cuda.cu"
CENTROIDS = "moba/moba_centroids_cuda.cu"
STAGES = "moba/moba_stages_cuda.cuh"
GEOMETRY = "moba/moba_geometry_cuda.cuh"
WINDOW = "moba/moba_window_cuda.cu"
TILE_MATH = "cuda/tile_math.cuh"
TILE_PRODUCTS = "cuda/tile_products.cuh"
SHARED_TILE = "cuda/shared_tile.cuh"

# What is compiled for an edit of a file, if not the file alone: enough for the case to meet the bug.
BLOCK_ATTENTION_UNITS = {
    FORWARD: ["moba_forward_bfloat16_cuda.cu"],
    MERGE: ["moba_forward_bfloat16_cuda.cu"],
    BACKWARD: ["moba_backward_bfloat16_cuda.cu"],
    ROUTE: ["moba_route_bfloat16_cuda.cu"],
    ROUTE_ROWS: ["moba_route_bfloat16_cuda.cu"],
    FILTER: ["moba_route_bfloat16_cuda.cu"],
    STAGES: ["moba_layout_cuda.cu", "moba_forward_cuda.cu", "moba_forward_bfloat16_cuda.cu"],
    GEOMETRY: ["moba_layout_cuda.cu", "moba_forward_cuda.cu", "moba_forward_bfloat16_cuda.cu"],
    TILE_MATH: ["moba_forward_bfloat16_cuda.cu"],
    TILE_PRODUCTS: ["moba_backward_bfloat16_cuda.cu"],
    SHARED_TILE: ["moba_forward_bfloat16_cuda.cu"],
}
FORWARD_FLOAT32 = ["moba_forward_float32_cuda.cu"]


# fmt: off
BARRIERS = [
    PlantedBug("layout: sums of chunks not published", LAYOUT,
               "Publishes every warp's sums to all warps. __syncthreads();", "", "long list", UNPUBLISHED),
    PlantedBug("layout: chunks of the warps before left out", LAYOUT,
               "w < warp_id() ? shared.chunk_sums[w][lane_id()] : 0", "0", "long list", f"{RACE}|{UNINITIALIZED}"),
    PlantedBug("layout: totals not published", LAYOUT,
               "Publishes every warp's totals to all warps. __syncthreads();", "", "small", UNPUBLISHED),
    PlantedBug("layout: totals overwritten while read", LAYOUT,
               "have been read and the next blocks may overwrite them. __syncthreads();", "",
               "many blocks", OVERWRITTEN),
    PlantedBug("layout: cursors not published", LAYOUT,
               "Publishes the cursors to the warp's lanes. __syncwarp();", "", "small full", UNPUBLISHED),
    PlantedBug("layout: cursors not published to the next row", LAYOUT,
               "Publishes the cursors moved by this row's lanes to the next row's. __syncwarp();", "", "small", RACE),
    PlantedBug("layout: counts of a row's lanes not published to the next row's", LAYOUT,
               "Publishes the counts of this row's lanes to the next row's. __syncwarp();", "", "small", RACE),
    PlantedBug("forward: keys not published", FORWARD,
               "are on chip, to all warps. __syncthreads();", "", "small", UNPUBLISHED),
    PlantedBug("forward: keys of large blocks not published", FORWARD,
               "Publishes keys and values to all warps, and each warp's queries to its lanes. __syncthreads();", "",
               "large blocks", UNPUBLISHED),
    PlantedBug("forward: keys of large blocks overwritten while read", FORWARD,
               "Tells all warps that the keys before have been used and may be overwritten. __syncthreads();", "",
               "large blocks", OVERWRITTEN),
    PlantedBug("forward: queries not published", FORWARD,
               "Publishes the warp's queries to its lanes. __syncwarp();", "", "many queries", UNPUBLISHED),
    PlantedBug("forward: queries overwritten while read", FORWARD,
               "publishes where those lie. __syncwarp();", "", "small", f"{OVERWRITTEN}|{UNPUBLISHED}"),
    PlantedBug("forward: queries overwritten a step of keys too early", FORWARD,
               "if (step + kStepKeys >= end) after_scores();", "if (step == 0) after_scores();",
               "many queries", OVERWRITTEN),
    PlantedBug("forward: weights in float32 not published", FORWARD,
               "Publishes the warp's weights to its lanes. __syncwarp();", "",
               "many queries float32", UNPUBLISHED, FORWARD_FLOAT32),
    PlantedBug("forward: weights in float32 overwritten while read", FORWARD,
               "Tells the lanes that the weights have been used and may be overwritten. __syncwarp();", "",
               "many queries float32", OVERWRITTEN, FORWARD_FLOAT32),
    PlantedBug("forward: warps not told of values that are not finite", FORWARD,
               "Publishes it to all warps. __syncthreads();", "", "nonfinite", RACE),
    PlantedBug("backward: places of rows not published", BACKWARD,
               "Publishes the first tile's rows to all threads. __syncthreads();", "", "small", UNPUBLISHED),
    PlantedBug("backward: queries not published", BACKWARD,
               "have been used and may be overwritten. __syncthreads();", "", "small", UNPUBLISHED),
    PlantedBug("backward: weights not published", BACKWARD,
               "Publishes weights and d_scores to all warps. __syncthreads();", "", "small full", UNPUBLISHED),
    PlantedBug("backward: a tile overwritten while read", BACKWARD,
               "publishes where those lie. __syncthreads();", "", "long list", f"{OVERWRITTEN}|{UNPUBLISHED}"),
    PlantedBug("backward: the next tile's rows over those in use", BACKWARD,
               "next_entry, shared, buffer ^ 1);", "next_entry, shared, buffer);",
               "long list", f"{OVERWRITTEN}|{UNINITIALIZED}"),
    PlantedBug("route: centroids not published", ROUTE,
               "the first time queries, lists and what rows see, to all warps. __syncthreads();", "",
               "routing", UNPUBLISHED),
    PlantedBug("route: centroids overwritten while read", ROUTE,
               "publishes each warp's scores to its lanes. __syncthreads();", "__syncwarp();", "routing", OVERWRITTEN),
    PlantedBug("route: scores not published", ROUTE,
               "publishes each warp's scores to its lanes. __syncthreads();", "",
               "routing", f"{UNPUBLISHED}|{OVERWRITTEN}"),
    PlantedBug("route: list entries overwritten while read", ROUTE,
               "All lanes have read before any of them writes. __syncwarp();", "", "routing by warps", OVERWRITTEN),
    PlantedBug("route: moved list entries not published", ROUTE,
               "Publishes the moved entries to the warp. __syncwarp();", "", "routing by warps", RACE),
    PlantedBug("route: what rows see not published", ROUTE,
               "Publishes what the rows see to all warps. __syncthreads();", "", "many queries", UNPUBLISHED),
    PlantedBug("route: lists overwritten by the next tile of queries", ROUTE,
               "and may be overwritten by the next tile's. __syncthreads();", "", "routing long lists", RACE),
    PlantedBug("filter: centroids not published", FILTER,
               "and tells that all have used the tile before. __syncthreads();", "",
               "routing filtered", f"{UNPUBLISHED}|{OVERWRITTEN}"),
    PlantedBug("filter: centroids overwritten while read", FILTER,
               "copy_next_centroids(num_left, buffer ^ 1);", "copy_next_centroids(num_left, buffer);",
               "routing filtered", f"{OVERWRITTEN}|{UNINITIALIZED}"),
    PlantedBug("filter: upper bounds not published", FILTER,
               "Publishes the warp's upper bounds to its lanes. __syncwarp();", "", "routing filtered", UNPUBLISHED),
    PlantedBug("filter: upper bounds overwritten while read", FILTER,
               "Tells the warp that the upper bounds have been read. __syncwarp();", "",
               "routing filtered", OVERWRITTEN),
    PlantedBug("filter: open blocks not published", FILTER,
               "Publishes the queue to the warp. __syncwarp();", "",
               "routing filtered", f"{UNPUBLISHED}|{OUT_OF_BOUNDS}"),
    PlantedBug("filter: open blocks overwritten while read", FILTER,
               "the next ones stand elsewhere. __syncwarp();", "", "routing filtered", OVERWRITTEN),
    PlantedBug("filter: scores not published", FILTER,
               "Publishes the scores to the rows' lanes. __syncwarp();", "", "routing filtered", UNPUBLISHED),
    PlantedBug("centroids: sums not published", CENTROIDS,
               "Step 2: publishes every group's sums to the first group. __syncthreads();", "",
               "centroids", UNPUBLISHED),
]

COPIES_AND_ATOMICS = [
    PlantedBug("forward: keys not waited for", FORWARD,
               "cuda::copy_async_wait<0>(); // Publishes keys and values, where", "// Publishes keys and values, where",
               "small", UNPUBLISHED),
    PlantedBug("forward: next queries not waited for", FORWARD,
               "cuda::copy_async_wait<0>(); if (is_resident) {", "if (is_resident) {",
               "many queries", BEFORE_WAIT),
    PlantedBug("backward: copies not waited for", BACKWARD,
               "cuda::copy_async_wait<0>();", "", "small", BEFORE_WAIT),
    PlantedBug("filter: copies not waited for", FILTER,
               "cuda::copy_async_wait<0>(); // Publishes centroids", "// Publishes centroids",
               "routing filtered", BEFORE_WAIT),
    PlantedBug("route: copies not waited for", ROUTE,
               "cuda::copy_async_wait<0>();", "", "routing", BEFORE_WAIT),
    PlantedBug("layout: lost atomic in the counts", LAYOUT,
               "if (is_seen) cuda::add_atomic(counts + row / kRowsPerChunk * args.geometry.num_blocks + block, 1);",
               "if (is_seen) counts[row / kRowsPerChunk * args.geometry.num_blocks + block] += 1;",
               "many blocks chosen alike", RACE),
    PlantedBug("backward: lost atomic in grad_query", BACKWARD,
               "cuda::add_atomic_quad(grad + n * 16, four[n]);", "grad[n * 16] += four[n].x;", "small", RACE),
    PlantedBug("backward: lost atomic in grad_key", BACKWARD,
               "cuda::add_atomic_pair(row + column, pair);", "row[column] += pair.x;",
               "long list", RACE),
    PlantedBug("forward: one row past a short last block", FORWARD,
               "row_chunks, row < num_keys);", "row_chunks, row <= num_keys);", "small", READ_OUT_OF_BOUNDS),
    PlantedBug("backward: one row past a short last block", BACKWARD,
               "row < num_keys ? rows", "row <= num_keys ? rows", "small", READ_OUT_OF_BOUNDS),
    PlantedBug("tiles: rows that are not there copied", SHARED_TILE,
               "is_row_there && chunk_idx < row_chunks", "chunk_idx < row_chunks", "small", READ_OUT_OF_BOUNDS),
    PlantedBug("tiles: rows that are not there not zeroed", SHARED_TILE,
               "copy_async_16(tile.chunk(", "if (is_copied) copy_async_16(tile.chunk(", "small", UNINITIALIZED),
]

LISTS = [
    PlantedBug("layout: lists filled one entry late", LAYOUT,
               "counts[block] + list_starts[block];", "counts[block] + list_starts[block] + 1;",
               "small", UNINITIALIZED),
    PlantedBug("layout: a chunk starts where it ends", LAYOUT,
               "counts[(first + i) * num_blocks] = start;", "counts[(first + i) * num_blocks] = start + count[i];",
               "small", f"{RACE}|{UNINITIALIZED}"),
    PlantedBug("layout: work items rounded down", LAYOUT,
               "divide_up(entries, args.lists.entries_per_item)", "(entries / args.lists.entries_per_item)",
               "small", UNINITIALIZED),
    PlantedBug("layout: a block named twice by a row counted twice", LAYOUT,
               "return result && choice >= 0;", "return false;", "named twice", f"{RACE}|AssertionError: out"),
    PlantedBug("layout: cursors of one warp for several", LAYOUT,
               "static_cast<size_t>(warps * warp_bytes) : 0", "static_cast<size_t>(warp_bytes) : 0",
               "long list", OUT_OF_BOUNDS),
    PlantedBug("layout: unused slots counted", LAYOUT,
               "rows[round].query, choice) > 0;", "rows[round].query, choice) >= 0;", "small", OUT_OF_BOUNDS),
    PlantedBug("layout: choices past the causal limit listed", LAYOUT,
               "choices[round]) > 0 && is_valid", "choices[round]) >= 0 && choices[round] >= 0 && is_valid",
               "routed", f"{RACE}|{UNINITIALIZED}|{OUT_OF_BOUNDS}"),
    PlantedBug("layout: blocks of packed sequences numbered one short", LAYOUT,
               "args.block_starts[i] = num_blocks + blocks;",
               "args.block_starts[i] = num_blocks + blocks - (i > 1 ? 1 : 0);", "varlen", WRONG_OUT),
    PlantedBug("stages: query heads interleaved over key heads", STAGES,
               "unit.kv_head * geometry.group + head_in_group", "unit.kv_head + head_in_group * geometry.num_kv_heads",
               "small", WRONG_OUT),
    PlantedBug("stages: every wave takes the first queries", STAGES,
               "wave.first_query + query,", "query + 0 * wave.first_query,", "small waves", WRONG_OUT),
    PlantedBug("stages: a choice for every query head", STAGES,
               "geometry.by_heads_per_choice.quotient(static_cast<uint32_t>(place.head));",
               "static_cast<uint32_t>(place.head);", "shared choices", f"{READ_OUT_OF_BOUNDS}|{WRONG_OUT}"),
    PlantedBug("stages: the choice of another group", STAGES,
               "geometry.by_heads_per_choice.quotient(static_cast<uint32_t>(place.head));",
               "geometry.by_heads_per_choice.quotient(geometry.num_query_heads - 1 - place.head);",
               "shared choices", WRONG_OUT),
    PlantedBug("geometry: a query sees one key after its own", GEOMETRY,
               "query + block.visible_offset + 1;", "query + block.visible_offset + 2;", "small", WRONG_OUT),
    PlantedBug("geometry: queries stand at the first keys", GEOMETRY,
               "sequence.position_offset = sequence.num_keys - sequence.num_queries;", "sequence.position_offset = 0;",
               "varlen", WRONG_CHOICE, BLOCK_ATTENTION_UNITS[ROUTE]),
]

WINDOWS = [
    PlantedBug("window: a chosen block listed again", WINDOW,
               "if (choices[slot] == block) return -1;", "if (choices[slot] == block + 1) return -1;",
               "window", WRONG_OUT),
    PlantedBug("window: the edge a whole block too", WINDOW,
               "own < 0 || has_edge ? first + 1 : first;", "first;", "window", WRONG_OUT),
    PlantedBug("window: no edge", WINDOW,
               "own >= 0 && has_edge ? unless_chosen(first) : -1;", "-1;", "window", WRONG_OUT),
    PlantedBug("window: the joined choices of the first batch entry", WINDOW,
               "{num_heads * head_elements, head_elements,", "{0, head_elements,", "window", WRONG_OUT),
    PlantedBug("window: begins a key late", GEOMETRY,
               "query + block.visible_offset + 1 - geometry.window;",
               "query + block.visible_offset + 2 - geometry.window;", "window", WRONG_OUT),
    PlantedBug("window: every choice an edge", GEOMETRY,
               "geometry.window > 0 && entry - row * geometry.top_k == geometry.top_k - 1;", "geometry.window > 0;",
               "window", WRONG_OUT),
    PlantedBug("window: an edge seen from its first key", FORWARD,
               "? ~keys_before_window(args.geometry, block, place.query) : num_visible_keys",
               "? num_visible_keys(args.geometry, block, place.query) : num_visible_keys", "window", WRONG_OUT),
    PlantedBug("window: an edge seen past the block", FORWARD,
               "min(window, num_keys - start)", "window", "window", WRONG_OUT),
    PlantedBug("window: gradients of an edge from its first key", BACKWARD,
               "num_visible |= max(0, min(start, Shared::kKeys)) << 16;", "", "window", "AssertionError: gradient of"),
    PlantedBug("decode: a window begins a key early", DECODE_ATTEND,
               "key <= row.position - geometry.window -", "key < row.position - geometry.window -",
               "decoding with a window", WRONG_OUT),
    PlantedBug("decode: a window's block that was chosen seen twice", DECODE_ATTEND,
               "if (choices[slot] == block) return -1;", "if (choices[slot] == block + 1) return -1;",
               "decoding with a window", WRONG_OUT),
]

SCORES = [
    PlantedBug("forward: scores not capped", FORWARD,
               "if (args.softcap > 0.0f) cap_scores(scores, args.softcap);", "", "softcap and sinks", WRONG_OUT),
    PlantedBug("backward: the slope of the cap forgotten", BACKWARD,
               "if (kIsCapped) d_score *= cuda::slope_of_cap(score, args.inverse_softcap);", "",
               "softcap and sinks", "AssertionError: gradient of query"),
    PlantedBug("merge: the sink forgotten", MERGE,
               "const float factor = is_valid ? share / sum : NAN;",
               "const float factor = is_valid ? 1.0f / sum : NAN;",
               "softcap and sinks", WRONG_OUT),
    PlantedBug("decode: scores not capped", DECODE_ATTEND,
               "if (args.softcap > 0.0f) score =", "if (false) score =", "decoding with softcap and sinks", WRONG_OUT),
    PlantedBug("decode: the sink forgotten", DECODE_ATTEND,
               "result / sum * share", "result / sum", "decoding with softcap and sinks", WRONG_OUT),
]

ARITHMETIC = [
    PlantedBug("tiles: left operands of an mma swapped", TILE_MATH,
               "left[m][i] = w[m][2 * k + i / 2][i % 2];", "left[m][i] = w[m][2 * k + i % 2][i / 2];",
               "small", WRONG_OUT),
    PlantedBug("tiles: right operands of an mma swapped", TILE_MATH,
               "((lane >> 4) << 3), (lane >> 3) & 1));", "((lane >> 4) << 3), 1 - ((lane >> 3) & 1)));",
               "small", WRONG_OUT),
    PlantedBug("tiles: a left operand's second rows where its second columns belong", TILE_PRODUCTS,
               "tile.chunk(first_row + lane_here() % 16, lane_here() / 16)",
               "tile.chunk(first_row + lane_here() % 8 + lane_here() / 16 * 8, lane_here() / 8 % 2)",
               "small", WRONG_GRADIENT),
    PlantedBug("tiles: a step of 16 multiplied twice", TILE_PRODUCTS,
               "load(k, operands);", "load(k == 0 ? 0 : k - 1, operands);", "small", WRONG_GRADIENT),
    PlantedBug("tiles: right operand not transposed", TILE_MATH,
               "load_matrix_x4_transposed(right, TileB::further(", "load_matrix_x4(right, TileB::further(",
               "small", WRONG_OUT),
    PlantedBug("tiles: four columns of a row stored at another lane's", TILE_MATH,
               "return t % 2 * 8 + t / 2 * 4;", "return t / 2 * 8 + t % 2 * 4;", "small", WRONG_OUT),
    PlantedBug("route: every NaN score computed once more, though the list is full", ROUTE,
               "if (scores[kKept - 1] == INFINITY) break;", "",
               "work of NaN", "AssertionError: route: .* times the accesses"),
    PlantedBug("route by warps: every NaN score computed once more, though the list is full", ROUTE,
               "block < shared.num_visible[row] && *last_score < INFINITY;", "block < shared.num_visible[row];",
               "work of NaN", "AssertionError: route: .* times the accesses"),
    PlantedBug("forward: hidden keys from one too late", FORWARD,
               "static_cast<uint32_t>(key - start) < count;", "static_cast<uint32_t>(key - start) <= count;",
               "small", WRONG_OUT),
    PlantedBug("forward: outputs not rescaled to a new maximum", FORWARD,
               "running.out[m][n][e] *= rescale[e / 2];", ";", "steep", WRONG_OUT),
    PlantedBug("forward: sums not rescaled to a new maximum", FORWARD,
               "running.sum[m][h] *= rescale[h];", "running.sum[m][h] *= 1.0f;", "steep", WRONG_OUT),
    PlantedBug("forward: hidden values that are not finite", FORWARD,
               "if (hides_keys && shared.has_unusual_values) {", "if (false) {",
               "nonfinite", "AssertionError: out: NaN mask differs"),
    PlantedBug("forward: every step of a block with NaN takes care", FORWARD,
               "if (hides_keys && shared.has_unusual_values) {", "if (shared.has_unusual_values) {",
               "work of NaN", "AssertionError: forward: .* times the accesses"),
    PlantedBug("forward: weights of visible pairs from one key too early", FORWARD,
               "if (k % 8 != 7) continue;", "if (k % 8 != 6) continue;", "nonfinite", "AssertionError: out"),
    PlantedBug("merge: the first slot weighs twice", MERGE,
               "weight_of_lane[s], in_group + j, kGroup);",
               "weight_of_lane[s], in_group + j, kGroup) * (first + j == 0 ? 2.0f : 1.0f);",
               "small", WRONG_OUT),
    PlantedBug("merge: slots that see nothing take part", MERGE,
               "if (all || ((seen[s] >> j & 1) != 0 && chunks_left > c * kGroup))", "if (chunks_left > c * kGroup)",
               "small", UNINITIALIZED),
    PlantedBug("merge: the wave's own outputs instead of those of the wave before", FORWARD_STEPS,
               "workspace.outputs[wave_idx % 2]", "workspace.outputs[0]", "small waves", RACE),
    PlantedBug("layout: a choice that sees nothing left unmarked", LAYOUT,
               "args.terms != nullptr && entry[round] >= 0 && !is_seen", "false", "small", UNINITIALIZED),
    PlantedBug("merge: lse in base 2", MERGE,
               "(maximum + log2f(sum)) * kLn2", "(maximum + log2f(sum))", "small", WRONG_LSE),
    PlantedBug("merge: a row's sum missing in its softmax terms", MERGE,
               "write_softmax_terms(maximum, is_valid ? sum : NAN,", "write_softmax_terms(maximum, 1.0f,",
               "small", WRONG_GRADIENT),
    PlantedBug("backward: hidden keys from one too late", BACKWARD,
               "return key < (num_visible & 0xffff)", "return key <= (num_visible & 0xffff)", "small", WRONG_GRADIENT),
    PlantedBug("backward: gradients of hidden scores kept", BACKWARD,
               "d_scores[n][e] = is_visible ?", "d_scores[n][e] = true ?", "small", WRONG_GRADIENT),
    PlantedBug("backward: scale missing on grad_key", BACKWARD,
               "grad_key, args.gradient_scale, warp_key", "grad_key, 1.0f, warp_key", "small", "AssertionError: d_key"),
    PlantedBug("backward: scale missing on grad_query", BACKWARD_STEPS,
               "const float scale = args.gradient_scale;", "const float scale = 1.0f;",
               "small", "AssertionError: d_query"),
    PlantedBug("backward: gradient of lse left out", BACKWARD_STEPS,
               "if (args.grad_lse.data != nullptr)", "if (false)", "small", WRONG_GRADIENT),
    PlantedBug("backward: sums of earlier waves cleared", BACKWARD_STEPS,
               "if (wave.first_query == 0 && problem.key_len > 0) {", "if (problem.key_len > 0) {",
               "small waves", "AssertionError: d_key"),
    PlantedBug("backward: a key past a short last block", BACKWARD,
               "if (key >= num_keys || column", "if (key > num_keys || column", "small", "RuntimeError"),
    PlantedBug("backward: every item of a list writes its keys' gradients", BACKWARD,
               "if (args.writes_keys && item.is_whole_list) {", "if (args.writes_keys) {", "long list", RACE),
    PlantedBug("backward: sums of keys not cleared", BACKWARD_STEPS,
               "if (owner != KeyOwner::kManyItems) return;", "return;", "long list", UNINITIALIZED),
    PlantedBug("backward: keys that nobody chose left as they were", BACKWARD_STEPS,
               "unsigned left = with_sums | __ballot_sync(cuda::kAllLanes, owner == KeyOwner::kNobody);",
               "unsigned left = with_sums;", "unchosen blocks", "AssertionError: d_key"),
    PlantedBug("backward: hidden queries that are not finite", BACKWARD,
               "if (backward::any_of(rows.hides_keys)) {", "if (false) {", "nonfinite", "AssertionError"),
    PlantedBug("backward: shifts of rows lost", BACKWARD,
               "cuda::copy_async_4(&rows.terms[i].shift, shift, is_there);", "rows.terms[i].shift = 0.0f;",
               "small", WRONG_GRADIENT),
    PlantedBug("backward, deterministic: all chunks of a block at once", BACKWARD_STEPS,
               "if (!args.is_deterministic) return kernel.launch(", "if (true) return kernel.launch(",
               "deterministic", RACE),
    PlantedBug("backward, deterministic: lists cut into items", BACKWARD_STEPS,
               "is_deterministic ? INT32_MAX :", "", "deterministic long list", RACE),
    PlantedBug("backward, deterministic: atomic sums all the same", BACKWARD_STEPS,
               "= params.deterministic; const DeviceGuard", "= false; const DeviceGuard",
               "deterministic", "AssertionError: d_.*: bits differ"),
]

CHOICES = [
    PlantedBug("route: own block dropped", ROUTE_ROWS,
               "choices[num_kept++] = forced.own_block - i;", "choices[num_kept++] = -1;", "routing", WRONG_CHOICE),
    PlantedBug("route: own block dropped, long lists", ROUTE,
               "choices[slot] = forced.own_block + 1 - (num_chosen - slot); } for", "choices[slot] = -1; } for",
               "routing by warps", WRONG_CHOICE),
    PlantedBug("route: own block ranked with those before it", ROUTE_ROWS,
               "geometry.is_causal ? own + 1 :", "geometry.is_causal ? own + 2 :", "routing", WRONG_CHOICE),
    PlantedBug("route: ties go to the later block", ROUTE,
               "beats_this = !(score <= scores[r]), beats_one_before = !(score <= scores[r - 1]);",
               "beats_this = !(score < scores[r]), beats_one_before = !(score < scores[r - 1]);",
               "routing ties", WRONG_CHOICE),
    PlantedBug("route: ties go to the later block, long lists", ROUTE_ROWS,
               "block < other_block)", "block > other_block)", "routing ties by warps", WRONG_CHOICE),
    PlantedBug("route: a moved entry leaves its block behind", ROUTE,
               "blocks[r] = beats_one_before ? blocks[r - 1] :", "blocks[r] = beats_one_before ? blocks[r] :",
               "routing", WRONG_CHOICE),
    PlantedBug("route: an empty entry beats a score of -inf", ROUTE,
               "args.has_lane_lists ? NAN : -INFINITY", "-INFINITY", "routing minus infinity", WRONG_CHOICE),
    PlantedBug("route: centroids rounded to bfloat16", ROUTE_STEPS,
               "? rest - cuda::to_float(head) : 0.0f", "? 0.0f : 0.0f", "routing", WRONG_CHOICE),
    PlantedBug("route: a tile of centroids ends one early", ROUTE,
               "min(count, shared.num_visible[row] - first_block)",
               "min(count - 1, shared.num_visible[row] - first_block)", "routing", WRONG_CHOICE),
    PlantedBug("route: a tile of centroids ends one early, long lists", ROUTE,
               "column < count && block < shared", "column + 1 < count && block < shared",
               "routing by warps", WRONG_CHOICE),
    PlantedBug("route: query heads interleaved over key heads", ROUTE_ROWS,
               "unit.kv_head * geometry.group + head_of_units % static_cast<uint32_t>(geometry.group)",
               "unit.kv_head + head_of_units % static_cast<uint32_t>(geometry.group) * geometry.num_kv_heads",
               "small", WRONG_CHOICE),
    PlantedBug("filter: bounds halved", ROUTE_STEPS,
               "norm < route::kLargeNorm ? bound :", "norm < route::kLargeNorm ? 0.5f * bound :",
               "routing filtered misled", WRONG_CHOICE),
    PlantedBug("filter: bounds zeroed", ROUTE_STEPS,
               "norm < route::kLargeNorm ? bound :", "norm < route::kLargeNorm ? 0.0f * bound :",
               "routing filtered misled", WRONG_CHOICE),
    PlantedBug("filter: norms of queries halved", FILTER,
               "fmaf(sqrtf(sum), kNormSlack, kTinyNorm)", "fmaf(0.5f * sqrtf(sum), kNormSlack, kTinyNorm)",
               "routing filtered misled", WRONG_CHOICE),
    PlantedBug("filter: the last tile of centroids left out", FILTER,
               "fails ? 0 : num_visible - first_block;", "fails ? 0 : num_visible - first_block - 32;",
               "routing filtered", f"{WRONG_CHOICE}|{UNINITIALIZED}"),
    PlantedBug("filter: blocks left out not asked for", FILTER,
               "fails || (num_visible > kFilterList && (open >> (kFilterList - 1) & 1) != 0)", "fails",
               "routing filtered equal", WRONG_CHOICE),
    PlantedBug("filter: open blocks by their bounds", FILTER,
               "if (num_better < num_missing) chosen |= bit;", "if (i < num_missing) chosen |= bit;",
               "routing filtered steps", WRONG_CHOICE),
    PlantedBug("filter: rows that failed not done again", FILTER,
               "if (lane_id() == 0) *failed = failing;", "if (lane_id() == 0) *failed = 0;",
               "routing filtered equal", f"{WRONG_CHOICE}|{UNINITIALIZED}"),
    PlantedBug("centroids: packed blocks of the sequence before", CENTROIDS,
               "args.centroids.at<float>(sequence_idx, unit.kv_head, block_of_sequence)",
               "args.centroids.at<float>(sequence_idx > 0 ? sequence_idx - 1 : 0, unit.kv_head, block_of_sequence)",
               "centroids packed", "AssertionError: centroids|RuntimeError: RACE"),
    PlantedBug("centroids: packed blocks counted through all sequences", CENTROIDS,
               "block_of_sequence = block - geometry.block_starts[sequence_idx];", "block_of_sequence = block;",
               "centroids packed", f"AssertionError: centroids|{OUT_OF_BOUNDS}"),
    PlantedBug("centroids: packed blocks without room written", CENTROIDS,
               "if (block_of_sequence >= args.centroids.sizes[2]) return;", "",
               "centroids packed", f"{OUT_OF_BOUNDS}|RuntimeError: RACE|AssertionError"),
    PlantedBug("centroids: a short block divided by a full one's size", CENTROIDS,
               "static_cast<float>(key_block.num_keys)", "static_cast<float>(geometry.block_size)",
               "routing full", WRONG_CHOICE),
]

# fmt: on

BLOCK_ATTENTION_BUGS = [
    *BARRIERS,
    *COPIES_AND_ATOMICS,
    *LISTS,
    *SCORES,
    *ARITHMETIC,
    *CHOICES,
    *WINDOWS,
]
