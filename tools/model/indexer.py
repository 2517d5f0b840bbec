"""Description of the indexer's router, bfloat16: 4 index heads on one key head, 32K tokens of 128, blocks of 128."""

from __future__ import annotations

from model.paths import Passes
from model.problems import Case, Launch, insertions, of_one_size

NUM_CHOICES, NUM_TOKENS, HEAD_DIM, BLOCK_SIZE, TOP_K, FORCED = 4, 1 << 15, 128, 128, 16, 1
NUM_BLOCKS, LIST_LENGTH = NUM_TOKENS // BLOCK_SIZE, TOP_K - FORCED
QUERIES, KEYS, COLUMNS, KEPT = 128, 64, 16, 16  # IndexRouteTiles, csrc/indexer/indexer_config_cuda.h
NUM_WORK = NUM_CHOICES * NUM_TOKENS // QUERIES
ROW_BYTES = 2 * HEAD_DIM
NUM_GROUPS = (NUM_BLOCKS / COLUMNS + 1) / 2

_ROUTE = Launch(
    NUM_WORK,
    (
        Passes("for (uint32_t work = blockIdx.x", 1),
        Passes("for (int32_t group = args.force_first", NUM_GROUPS),
        Passes("for (int32_t h = 0; h < args.heads_per_choice", 1),
        Passes("if (args.heads_per_choice > 1 || group", 1 / NUM_GROUPS),
        Passes("for (int row = static_cast<int>(threadIdx.x); row < kQueries", 1),
        Passes("for (int32_t column = 0; column < group_end", COLUMNS),
        Passes("while (first < end_key)", BLOCK_SIZE / KEYS),
        Passes("while (marked != 0)", insertions(NUM_BLOCKS, LIST_LENGTH, columns=COLUMNS)),
        Passes("for (; count < visible", 0),
        Passes("for (; count < args.force_first", 0),
        Passes("for (int32_t block = visible - args.force_last", FORCED),
        Passes("for (; count < args.top_k", 0),
    ),
    NUM_CHOICES * NUM_TOKENS * (ROW_BYTES + 4 * TOP_K) + NUM_TOKENS * ROW_BYTES,
)
ROUTE = of_one_size(
    "index_route_kernel", "indexer_route_cuda", "index_route_kernelINS_8BFloat16ELi128E",
    "a warp's 32 queries x 16 blocks of 128 keys", _ROUTE, tile="for (int32_t group = args.force_first", threads=128,
    shared_bytes=(QUERIES + 2 * KEYS) * ROW_BYTES + 4 * QUERIES * (COLUMNS + 2),
    rare=(
        *("copy_some_rows", "copy_some_rows<", "hide_keys", "multiply_some_rows", "select_long", "sort_list"),
        *("join<IndexReduction::kMean>", "join<IndexReduction::kReluSum>", "score = cuda::sum_of_row"),
    ),
)  # fmt: skip

KERNELS = (ROUTE,)
CASES = (Case("`index_route`, 4 index heads, 32K tokens, D 128, block 128, top_k 16", ((ROUTE, _ROUTE),)),)
