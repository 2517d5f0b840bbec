"""Descriptions of the kernels of decoding, bfloat16: a token of 8 sequences, 32 heads on 8, 128K tokens of 128."""

from __future__ import annotations

from model.paths import Passes
from model.problems import Case, Launch, of_one_size

BATCH_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 32, 8, 128
NUM_TOKENS, BLOCK_SIZE, TOP_K = 1 << 17, 128, 8
NUM_BLOCKS = NUM_TOKENS // BLOCK_SIZE
NUM_UNITS, NUM_ROWS = BATCH_SIZE * NUM_KV_HEADS, BATCH_SIZE * NUM_HEADS
KEYS_PER_SPLIT = 64
SPLITS = TOP_K * BLOCK_SIZE // KEYS_PER_SPLIT
ROW_BYTES = 2 * HEAD_DIM

_APPEND = Launch(
    NUM_UNITS,
    (
        Passes("for (uint32_t first = threadIdx.x", 1),
        Passes("for (int d = threadIdx.x; d < head_dim", 1),
        Passes("for (int first = 0; first < num_keys", 1),
    ),
    NUM_UNITS * (4 * ROW_BYTES + 8 * HEAD_DIM),
)
APPEND = of_one_size(
    "moba_cache_append", "decode_append_cuda", "moba_cache_appendINS_8BFloat16E", "a thread block's token", _APPEND,
    threads=128, rare=("copy_pieces<Element>",),
)  # fmt: skip
_SCORES = Launch(
    NUM_UNITS * NUM_BLOCKS / 32,
    (
        Passes("for (int i = threadIdx.x; i < num_rows * args.row_elements", 4, unrolled=4),
        Passes("for (int step = 0; step < num_blocks", 2),
        Passes("for (int row = 0; row < num_rows", 1),
        Passes("for (int slab = 0; slab < args.shape.num_slabs", 1),
        Passes("for (int distance = 4", 3),
    ),
    NUM_UNITS * NUM_BLOCKS * 4 * HEAD_DIM + NUM_ROWS * NUM_BLOCKS * 4,
)
SCORES = of_one_size(
    "moba_decode_scores", "decode_route_cuda", "moba_decode_scoresINS_8BFloat16ELi4E",
    "a warp's 4 queries x 4 centroids", _SCORES, tile="for (int step = 0; step < num_blocks", threads=128,
    shared_bytes=256 + 4 * 4 * HEAD_DIM, rare=("cache_place",),
)  # fmt: skip
_SELECT = Launch(
    NUM_ROWS,
    (
        Passes("for (int bit = 31", 16),
        Passes("for (int j = kScoresHeld; j < num_steps()", 0),
        Passes("for (int j = kScoresHeld; j < mine.num_steps()", 0),
        Passes("for (int slot = threadIdx.x; slot < args.force_first", 0),
        Passes("for (int i = threadIdx.x; i < args.force_last", 1),
    ),
    NUM_ROWS * NUM_BLOCKS * 4,
)
SELECT = of_one_size(
    "moba_select_blocks", "decode_route_cuda", "moba_select_blocks", "a warp's bit of 1024 ranks", _SELECT,
    tile="for (int bit = 31", threads=256, shared_bytes=128,
    rare=("for (int slot = threadIdx.x; slot < geometry.top_k",),
)  # fmt: skip
_ATTEND = Launch(
    NUM_ROWS * SPLITS,
    (
        Passes("for (int i = threadIdx.x; i < keys.count", 1),
        Passes("for (int step = 0; step < keys.count", KEYS_PER_SPLIT / 32),
        Passes("for (int slab = 0; slab < args.key_shape.num_slabs", 1),
        Passes("for (int distance = 4", 2),
        Passes("for (int i = lane_id(); i < keys.count", KEYS_PER_SPLIT / 32),
        Passes("for (int slab = 0; slab < args.value_shape.num_slabs", 1),
        Passes("for (int step = group; step < keys.count", KEYS_PER_SPLIT / 32),
        Passes("for (int e = threadIdx.x; e < lanes_per_row", 1),
        Passes("for (int g = 0; g < num_groups", 8, unrolled=4),
    ),
    NUM_ROWS * SPLITS * (KEYS_PER_SPLIT * 2 * ROW_BYTES + 4 * HEAD_DIM + 8),
)
ATTEND = of_one_size(
    "moba_decode_attend", "decode_attend_cuda", "moba_decode_attendINS_8BFloat16ELi8E", "a thread block's 64 keys",
    _ATTEND, threads=128, shared_bytes=32 + 32 * 128 + 16 * KEYS_PER_SPLIT,
    rare=("cap_score", "score = cuda::cap_score", "block_of_window"),
)  # fmt: skip
_MERGE = Launch(
    NUM_ROWS,
    (
        Passes("for (int slot = threadIdx.x; slot < top_k", 1),
        Passes("for (int split = threadIdx.x; split < args.num_splits", 1),
        Passes("} while (first_column < geometry.value_dim)", 1),
        Passes("for (int first = 0; first < args.num_splits", 1),
        Passes("for (int some = 0; some < count", SPLITS / 8),
    ),
    NUM_ROWS * (SPLITS * (4 * HEAD_DIM + 8) + ROW_BYTES),
)
MERGE = of_one_size(
    "moba_decode_merge", "decode_attend_cuda", "moba_decode_mergeINS_8BFloat16E", "a thread block's query", _MERGE,
    threads=128, shared_bytes=16 + 1024,
    rare=(
        "if (__syncthreads_or(is_unordered", "for (int other = 0", "for (int column = threadIdx.x; column < geometry",
    ),
)  # fmt: skip

KERNELS = (APPEND, SCORES, SELECT, ATTEND, MERGE)
CASES = (
    Case(
        "a token of 8 sequences of 128K, 32 heads on 8, D 128, block 128, top_k 8",
        ((APPEND, _APPEND), (SCORES, _SCORES), (SELECT, _SELECT), (ATTEND, _ATTEND), (MERGE, _MERGE)),
    ),
)
