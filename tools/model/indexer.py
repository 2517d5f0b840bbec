"""Description of the indexer's router, bfloat16: 4 index heads on one key head, 32K tokens of 128, blocks of 128."""

from __future__ import annotations

from model.block_attention import depth
from model.paths import Passes
from model.problems import Case, Launch, insertions, of_one_size

NUM_CHOICES, NUM_TOKENS, HEAD_DIM, BLOCK_SIZE, TOP_K, FORCED = 4, 1 << 15, 128, 128, 16, 1
NUM_BLOCKS, LIST_LENGTH = NUM_TOKENS // BLOCK_SIZE, TOP_K - FORCED
QUERIES, KEYS = 64, 32  # of a thread block, and of a tile: csrc/indexer/indexer_config_cuda.h
NUM_WORK = NUM_CHOICES * NUM_TOKENS // QUERIES
ROW_BYTES = 2 * HEAD_DIM
# A warp enters its rows' scores of a block in two times 8 and waits for the one with the most entries to move, on
# average half of the list.
MOVES = insertions(NUM_BLOCKS, LIST_LENGTH, rows=8, columns=1) * LIST_LENGTH / 2

_ROUTE = Launch(
    NUM_WORK,
    (
        Passes("for (uint32_t work = blockIdx.x", 1),
        Passes("for (int32_t block = args.force_first; block < block_end", NUM_BLOCKS / 2),
        Passes("for (int32_t h = 0; h < args.heads_per_choice", 1),
        Passes("for (int32_t first = first_key; first < end_key", BLOCK_SIZE / KEYS),
        Passes("if (first == first_key && (args.heads_per_choice", 2 / NUM_BLOCKS / (BLOCK_SIZE / KEYS)),
        Passes("for (int i = static_cast<int>(threadIdx.x); i < Tile", QUERIES / 8, 4, "copy_rows(shared.query"),
        Passes("for (int i = static_cast<int>(threadIdx.x); i < Tile", KEYS / 8, 4, "copy_rows(shared.key"),
        depth(HEAD_DIM),
        Passes("for (; rank > 0 && score > scores[rank - 1]", MOVES),
        Passes("for (; count < visible", 0),
        Passes("for (; count < args.force_first", 0),
        Passes("for (int32_t i = 1; i < args.list_length", LIST_LENGTH - 1),
        Passes("for (; slot > 0 && list[slot - 1]", LIST_LENGTH / 4),
        Passes("for (int32_t block = visible - args.force_last", FORCED),
        Passes("for (; count < args.top_k", 0),
    ),
    NUM_CHOICES * NUM_TOKENS * (ROW_BYTES + 4 * TOP_K) + NUM_TOKENS * ROW_BYTES,
)
ROUTE = of_one_size(
    "index_route_kernel", "indexer_route_cuda", "index_route_kernelINS_8BFloat16ELi128E",
    "a warp's 16 queries x 128 keys", _ROUTE, tile="for (int32_t block = args.force_first; block < block_end",
    threads=128, shared_bytes=(QUERIES + KEYS) * ROW_BYTES,
)  # fmt: skip

KERNELS = (ROUTE,)
CASES = (Case("`index_route`, 4 index heads, 32K tokens, D 128, block 128, top_k 16", ((ROUTE, _ROUTE),)),)
