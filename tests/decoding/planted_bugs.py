"""Bugs to plant in the CUDA sources of decoding with a cache; ``cuda/planted_bugs.py`` says how."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.block_attention.test_shared_choices import test_decoding
from tests.cuda.planted_bug import (
    OUT_OF_BOUNDS,
    OVERWRITTEN,
    RACE,
    READ_OUT_OF_BOUNDS,
    UNINITIALIZED,
    UNPUBLISHED,
    PlantedBug,
)
from tests.decoding import test_cuda_contract as contract
from tests.decoding.test_cuda_contract import Cache, CacheCase, check_results

CPU = torch.device("cpu")
BFLOAT16 = torch.bfloat16

# --- cases ------------------------------------------------------------------------------------------------------------

# Two splits a slot, three slots.
LONG_BLOCKS = CacheCase((300,), 1, 2, 1, block_size=129, top_k=3, max_seq_len=301)
# Several slots a split, several splits; one sequence shorter than its queries.
SHORT_BLOCKS = CacheCase((200, 3), 3, 2, 2, block_size=5, top_k=40, max_seq_len=200)
# Values of several slabs.
WIDE = CacheCase(head_dim=67, value_dim=131, query_len=1)
# More blocks than one thread block scores, and queries of a group than a tile holds.
MANY_BLOCKS = CacheCase((290, 64), 5, 8, 2, block_size=2, top_k=7, max_seq_len=300)


def check(case: CacheCase, dtype: torch.dtype) -> None:
    cache = Cache(case, dtype, CPU)
    check_results(cache, cache.run())


def on_cpu(test: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """What a test of the contract finds; a missing error counts as a finding."""

    def run() -> None:
        try:
            test(*arguments, CPU)
        except pytest.fail.Exception as failure:
            raise AssertionError(str(failure)) from failure

    return run


DECODE_CASES: dict[str, Callable[[], Any]] = {
    "decode": lambda: check(CacheCase((37, 80), 3, page_size=16), BFLOAT16),
    "decode long blocks": lambda: check(LONG_BLOCKS, BFLOAT16),
    "decode short blocks": lambda: check(SHORT_BLOCKS, torch.float32),
    "decode wide": lambda: check(WIDE, BFLOAT16),
    "decode many blocks": lambda: check(MANY_BLOCKS, torch.float32),
    "decode selection": on_cpu(contract.test_more_blocks_than_a_warp_holds, 40),
    "decode ties": on_cpu(contract.test_more_blocks_than_a_warp_holds, 9),
    "decode zeros": on_cpu(contract.test_zeros_of_either_sign_tie),
    "decode not finite": on_cpu(contract.test_scores_that_are_not_finite_rank_as_they_must),
    "decode appends": on_cpu(contract.test_appends_sum_in_order),
    "decode lengths": on_cpu(contract.test_lengths_of_any_content, 16),
    "decode places": on_cpu(contract.test_appends_of_any_content),
    "decode pages": on_cpu(contract.test_pages_that_do_not_exist, 13),
    "decode later blocks": on_cpu(contract.test_later_blocks_add_nothing),
    "decode twice": on_cpu(contract.test_choices_that_cannot_be, "twice apart"),
    "decode unseen": on_cpu(contract.test_values_that_are_not_seen_have_no_influence),
    "decode minus infinity": on_cpu(contract.test_one_split_at_minus_infinity),
    "decode shared choices": lambda: test_decoding(((40, 3), (1, 1)), 1, BFLOAT16, CPU),
    "decode waves": on_cpu(contract.test_many_small_waves, 300),
}

# --- bugs -------------------------------------------------------------------------------------------------------------

WRONG = "AssertionError"
WRONG_OUT = "AssertionError: (out|lse)"
# A choice that is not one of those promised.
WRONG_CHOICE = "AssertionError"

PAGES = "decode/decode_pages_cuda.cuh"
APPEND = "decode/decode_append_cuda.cu"
ROUTE = "decode/decode_route_cuda.cu"
ATTEND = "decode/decode_attend_cuda.cu"
DECODE_UNITS = {PAGES: ["decode_append_cuda.cu", "decode_route_cuda.cu", "decode_attend_cuda.cu"]}

# fmt: off
DECODE_BUGS = [
    PlantedBug("decode: queries one position early", PAGES,
               "return {count, length - count,", "return {count, length - count - 1,", "decode", WRONG),
    PlantedBug("decode: lengths past the room", PAGES,
               "length > geometry.capacity ||", "", "decode lengths", f"{WRONG}|{READ_OUT_OF_BOUNDS}"),
    PlantedBug("decode: a choice for every query head", PAGES,
               "static_cast<uint32_t>(row.head) / static_cast<uint32_t>(geometry.heads_per_choice);",
               "static_cast<uint32_t>(row.head);", "decode shared choices", f"{WRONG}|{READ_OUT_OF_BOUNDS}"),
    PlantedBug("decode: more tokens than there are", PAGES,
               "count < 0 || count > geometry.query_len)", "count < 0)", "decode lengths", WRONG),
    PlantedBug("decode: a page past the last", PAGES,
               "page < geometry.num_pages ?", "page <= geometry.num_pages ?",
               "decode pages", f"{WRONG}|{READ_OUT_OF_BOUNDS}"),
    PlantedBug("decode: the table of the first sequence", PAGES,
               "static_cast<int64_t>(sequence) * geometry.pages_per_sequence + column", "column",
               "decode", f"{WRONG}|{RACE}"),
    PlantedBug("decode: waves of the first tokens", PAGES,
               "result.token = wave.first_token +", "result.token =", "decode waves", f"{WRONG}|{UNINITIALIZED}"),
    PlantedBug("decode append: the sum of a block not divided", APPEND,
               "is_whole ? sum / static_cast<float>(block_size) : sum;", "sum;", "decode appends", WRONG),
    PlantedBug("decode append: divided too early", APPEND,
               "first + num_new == block_end,", "first + num_new + 1 == block_end,", "decode appends", WRONG),
    PlantedBug("decode append: a sum begun anew", APPEND,
               "is_begun ? centroid[d] : 0.0f;", "0.0f;", "decode appends", WRONG),
    PlantedBug("decode append: a new block begun from what stood there", APPEND,
               "is_begun ? centroid[d] : 0.0f;", "centroid[d];", "decode appends", WRONG),
    PlantedBug("decode append: the last block left out", APPEND,
               "divide_up(problem.query_len - 1, problem.block_size) + 1;",
               "divide_up(problem.query_len, problem.block_size);", "decode appends", WRONG),
    PlantedBug("decode append: tokens past the room", APPEND,
               "min(static_cast<int64_t>(cached) + count, geometry.capacity);", "static_cast<int64_t>(cached) + count;",
               "decode places", f"{WRONG}|{OUT_OF_BOUNDS}|{READ_OUT_OF_BOUNDS}|{RACE}"),
    PlantedBug("decode append: pages that do not exist", APPEND,
               "if (place.page == kNoSuchPage) return;", "", "decode places", OUT_OF_BOUNDS),
    PlantedBug("decode append: values not stored", APPEND,
               "args.value_pages.strides[2], num_new,", "args.value_pages.strides[2], 0,", "decode", WRONG),
    PlantedBug("decode route: the own block among the others", ROUTE,
               "mine.end = min(mine.first + per_warp, end);",
               "mine.end = min(mine.first + per_warp, end + 1);",
               "decode", f"{UNINITIALIZED}|{WRONG_CHOICE}"),
    PlantedBug("decode route: queries of the first head", ROUTE,
               "unit.kv_head * geometry.group + first_row + row - token * geometry.group;",
               "unit.kv_head * geometry.group;", "decode", WRONG_CHOICE),
    PlantedBug("decode route: places and queries not published", ROUTE,
               "// Publishes queries and places to all warps. __syncthreads();", "", "decode", UNPUBLISHED),
    PlantedBug("decode route: the last centroids not scored", ROUTE,
               "chunks = divide_up(args.max_blocks, kBlocksPerItem);", "chunks = args.max_blocks / kBlocksPerItem;",
               "decode many blocks", UNINITIALIZED),
    PlantedBug("decode route: the last tile of queries not scored", ROUTE,
               "tiles = divide_up(args.wave.num_rows, rows),", "tiles = args.wave.num_rows / rows,",
               "decode many blocks", UNINITIALIZED),
    PlantedBug("decode route: NaN ranks last", ROUTE,
               "if (isnan(score)) score = INFINITY;", "if (isnan(score)) score = -INFINITY;",
               "decode not finite", WRONG_CHOICE),
    PlantedBug("decode route: NaN ranks above infinity", ROUTE,
               "if (isnan(score)) score = INFINITY;", "", "decode not finite", WRONG_CHOICE),
    PlantedBug("decode route: zeros of either sign apart", ROUTE,
               "score == 0.0f ? 0u : __float_as_uint(score);", "__float_as_uint(score);",
               "decode zeros", WRONG_CHOICE),
    PlantedBug("decode route: ties to the higher block", ROUTE,
               "__popc(equal & before) < equal_left);", "__popc(equal >> lane_id() >> 1) < equal_left);",
               "decode ties", WRONG_CHOICE),
    PlantedBug("decode route: ties of the warps before not counted", ROUTE,
               "equal_taken = min(equal_before, equal_in_all);", "equal_taken = 0;",
               "decode selection", f"{RACE}|{WRONG_CHOICE}|{UNINITIALIZED}"),
    PlantedBug("decode route: blocks that no register holds left out of the count", ROUTE,
               "++j) count += read(j) >= threshold ? 1 : 0;", "++j) count += 0;",
               "decode selection", f"{WRONG_CHOICE}|{UNINITIALIZED}|{RACE}|{OUT_OF_BOUNDS}"),
    PlantedBug("decode route: more reach the last rank than are chosen", ROUTE,
               "if (total == num_chosen) break;", "if (total >= num_chosen) break;",
               "decode", f"{WRONG_CHOICE}|{RACE}|{UNINITIALIZED}|{OUT_OF_BOUNDS}"),
    PlantedBug("decode route: counts overwritten while read", ROUTE,
               "shared.counts[bit & 1];", "shared.counts[0];", "decode selection", OVERWRITTEN),
    PlantedBug("decode route: counts not published", ROUTE,
               "was read before the barrier of the last bit. __syncthreads();", "was read.\n",
               "decode selection", UNPUBLISHED),
    PlantedBug("decode route: own block left out", ROUTE,
               "choices[geometry.top_k - 1 - i] = row.own_block - i;", ";", "decode", UNINITIALIZED + "|" + WRONG),
    PlantedBug("decode attend: a later key seen", ATTEND,
               "key <= row.position - block * geometry.block_size)",
               "key <= row.position - block * geometry.block_size + 1)",
               "decode", WRONG_OUT),
    PlantedBug("decode attend: later blocks seen", ATTEND,
               "block <= row.own_block && key <= row.position - block * geometry.block_size)",
               "block < row.num_blocks)",
               "decode later blocks", f"{WRONG}|{READ_OUT_OF_BOUNDS}"),
    PlantedBug("decode attend: the second split of a slot skipped", ATTEND,
               "first_key = split % splits.per_slot * splits.keys_of_slot;",
               "first_key = split % splits.per_slot * splits.keys_of_slot * 2;", "decode long blocks", WRONG_OUT),
    PlantedBug("decode attend: slots of the first split", ATTEND,
               "first_slot = split / splits.per_slot * splits.slots;", "first_slot = split / splits.per_slot;",
               "decode short blocks", WRONG_OUT),
    PlantedBug("decode attend: the last split left out", ATTEND,
               "count = divide_up(num_slots, splits.slots) * splits.per_slot;",
               "count = num_slots / splits.slots * splits.per_slot;", "decode short blocks", WRONG_OUT),
    PlantedBug("decode attend: scores not published", ATTEND,
               "// Publishes scores to all warps. __syncthreads();", "", "decode", UNPUBLISHED),
    PlantedBug("decode attend: weights not published", ATTEND,
               "// Publishes weights and the warps' sums to all warps. __syncthreads();", "", "decode", UNPUBLISHED),
    PlantedBug("decode attend: columns not published", ATTEND,
               "// Publishes the groups' sums to all threads. __syncthreads();", "", "decode", UNPUBLISHED),
    PlantedBug("decode attend: columns overwritten while read", ATTEND,
               "used and may be overwritten by the next slab's. __syncthreads();", "used.\n",
               "decode wide", OVERWRITTEN),
    PlantedBug("decode attend: values of keys that are not seen read", ATTEND,
               "weights[r] = place.page != kNotSeen ? keys.weights[key] : 0.0f; if (place.page >= 0)",
               "weights[r] = key < keys.count ? keys.weights[key] : 0.0f;\n"
               "if (key < keys.count)", "decode unseen", f"{WRONG}|{READ_OUT_OF_BOUNDS}"),
    PlantedBug("decode attend: a maximum of minus infinity", ATTEND,
               "maximum == -INFINITY ? 0.0f : maximum;", "maximum;", "decode minus infinity", WRONG),
    PlantedBug("decode merge: splits not weighted", ATTEND,
               "exp2f(state.maximum - maximum);", "1.0f;", "decode long blocks", WRONG_OUT),
    PlantedBug("decode merge: a split that saw nothing added", ATTEND,
               "saw_none ? -1.0f : weight;", "weight;", "decode short blocks", f"{UNINITIALIZED}|{WRONG_OUT}"),
    PlantedBug("decode merge: lse without the maximum", ATTEND,
               "(maximum + log2f(sum)) * kLn2", "(0.0f + log2f(sum)) * kLn2", "decode", WRONG_OUT),
    PlantedBug("decode merge: maxima not published", ATTEND,
               "// Publishes the warps' maxima to all. __syncthreads();", "", "decode short blocks", UNPUBLISHED),
    PlantedBug("decode merge: weights not published", ATTEND,
               "// Publishes weights and sums to all threads. __syncthreads();", "",
               "decode short blocks", UNPUBLISHED),
    PlantedBug("decode merge: weights overwritten while read", ATTEND,
               "// Tells all threads that they have been used and may be overwritten. __syncthreads();", "",
               "decode wide", OVERWRITTEN),
    PlantedBug("decode merge: the last splits left out", ATTEND,
               "some < count; some += kSplitsInFlight", "some + kSplitsInFlight <= count; some += kSplitsInFlight",
               "decode", WRONG_OUT),
    PlantedBug("decode merge: choices that are twice there", ATTEND,
               "(block >= 0 && choices[other] == block);", "false;", "decode twice", WRONG),
]
# fmt: on
