"""Descriptions of the kernels of memory layers, bfloat16: top-k, lookup and its gradients."""

from __future__ import annotations

from dataclasses import replace

from model.paths import Passes
from model.problems import Case, Launch, of_one_size

NUM_TOKENS, BAG_SIZE, NUM_ROWS, ROW_DIM = 16384, 128, 1 << 20, 1024
NUM_ENTRIES = NUM_TOKENS * BAG_SIZE
ROW_BYTES = 2 * ROW_DIM
SLABS = ROW_DIM // 256  # of 16 bytes a lane
PIECE = 128
NUM_PIECES = NUM_ENTRIES // PIECE
TOUCHED = NUM_ROWS * (1 - (1 - 1 / NUM_ROWS) ** NUM_ENTRIES)
"""Rows that random entries choose at least once."""
NEW_ROW = TOUCHED / NUM_ENTRIES
"""How often a sorted entry is the first of its row."""
_IS_SPLIT = 1 - NEW_ROW
"""How often a run goes on in the next piece."""

# --- lookup -----------------------------------------------------------------------------------------------------------

_LOOKUP = Launch(
    NUM_TOKENS * SLABS / 4,
    (
        Passes("for (int first = 0; first < bag.longest", BAG_SIZE / 32),
        Passes("for (int e = 0; e < count; e += kRowsInFlight", 4),
    ),
    NUM_ENTRIES * (ROW_BYTES + 12) + NUM_TOKENS * ROW_BYTES,
)
LOOKUP = of_one_size(
    "memory_lookup", "memory_lookup_cuda", "memory_lookupINS_8BFloat16ELi8ELb0E", "a warp's 32 entries of 256 columns",
    _LOOKUP, tile="for (int first = 0; first < bag.longest", threads=128,
)  # fmt: skip

# --- gradients --------------------------------------------------------------------------------------------------------

_GATHER = Launch(NUM_ENTRIES / 256, (), NUM_ENTRIES * (8 + 4 + 4 + 32 + 16))
GATHER = of_one_size(
    "memory_backward_gather", "memory_backward_cuda", "memory_backward_gather", "a warp's 32 entries", _GATHER,
    rare=("if (args.tokens != nullptr) token",),
)  # fmt: skip

_CLEAR = Launch(
    NUM_ROWS / 256,
    (
        Passes("while (low < high)", 21),
        Passes("while (empty_rows != 0)", 32 * (1 - TOUCHED / NUM_ROWS)),
        Passes("for (int column = lane_id() * kVector", SLABS, unrolled=1),
    ),
    (NUM_ROWS - TOUCHED) * ROW_BYTES + 4 * NUM_ENTRIES,
)
CLEAR = of_one_size(
    "memory_backward_clear", "memory_backward_cuda", "memory_backward_clearINS_8BFloat16ELi8E", "a warp's 32 rows",
    _CLEAR,
)  # fmt: skip

_OF_PIECES = (
    Passes("for (int slab = warp_of_piece", 1),
    Passes("for (int e = 0; e < kEntriesPerPiece", PIECE / 4),
    Passes("if (is_new_row) write_run", NEW_ROW),
    Passes("for (int distance = 4", 3),
    Passes("for (int e = static_cast<int>(threadIdx.x)", 1),
    Passes("for (int w = 0; w < warps_per_piece", SLABS, unrolled=4),
)
_SUM_BYTES = NUM_PIECES * _IS_SPLIT * 2 * 4 * ROW_DIM
_PIECES = Launch(
    NUM_PIECES / 2, _OF_PIECES,
    2 * TOUCHED * ROW_BYTES + NUM_TOKENS * ROW_BYTES + NUM_ENTRIES * (16 + 4 + 8 + 4) + _SUM_BYTES,
)  # fmt: skip
_OF_FOUR_ROWS = replace(
    _PIECES, passes=[replace(p, passes=1) if p.line.startswith("if (is_new_row)") else p for p in _OF_PIECES]
)
PIECES = of_one_size(
    "memory_backward_pieces", "memory_backward_cuda", "memory_backward_piecesINS_8BFloat16ELi8ELb1E",
    "a warp's 4 entries of 256 columns, of 4 rows", _OF_FOUR_ROWS,
    tile="for (int e = 0; e < kEntriesPerPiece", shared_bytes=16384,
    rare=(
        "return args.sums + (2 * piece + 1)", "*reinterpret_cast<float4*>(row + first + i)",
        "dot = args.tokens != nullptr",
    ),
)  # fmt: skip
PIECES_WITHOUT_WEIGHTS = of_one_size(
    "memory_backward_pieces", "memory_backward_cuda", "memory_backward_piecesINS_8BFloat16ELi8ELb0E",
    "the same, without the gradient of the weights", _OF_FOUR_ROWS, tile="for (int e = 0; e < kEntriesPerPiece",
    shared_bytes=16384, rare=PIECES.rare,
)  # fmt: skip

_STRETCHES = Launch(
    (NUM_PIECES / 64 - 1) * SLABS * 2 / 8,
    (Passes("for (int first = 0; first < count; first += kPiecesInFlight", 8),),
    0.0,
)
STRETCHES = of_one_size(
    "memory_backward_stretches", "memory_backward_cuda", "memory_backward_stretches", "a warp's stretch of 64 pieces",
    _STRETCHES,
)  # fmt: skip
_RUNS = Launch(
    NUM_PIECES * _IS_SPLIT * SLABS * 2 / 8,
    (
        Passes("for (int first = 0; first < count; first += kPiecesInFlight", 1),
        Passes("while (count < max_count)", 1),
    ),
    _SUM_BYTES + NUM_PIECES * _IS_SPLIT * ROW_BYTES,
)
RUNS = of_one_size(
    "memory_backward_runs", "memory_backward_cuda", "memory_backward_runsINS_8BFloat16E",
    "a warp's 128 columns of a run of two pieces", _RUNS, rare=("if (goes_on && piece < num_pieces)",),
)  # fmt: skip

# --- steps of a row optimizer -----------------------------------------------------------------------------------------

_STATE_BYTES = 2 * ROW_BYTES  # two states in bfloat16
# At a row's 1000th step or so.
_UPDATE_GATHER_PASSES = (Passes("for (; exponent > 0; exponent >>= 1", 10),)
_UPDATE_GATHER = Launch(
    NUM_ENTRIES / 256, _UPDATE_GATHER_PASSES, NUM_ENTRIES * (8 + 4 + 4 + 8 + 16) + TOUCHED * (2 * 4 + 2 * 8 + 32)
)
UPDATE_GATHER = of_one_size(
    "memory_update_gather", "memory_update_cuda", "memory_update_gather", "a warp's 32 entries, some of new rows",
    _UPDATE_GATHER,
)  # fmt: skip
_OF_STEPS = (
    Passes("for (int slab = warp_id() % warps_per_piece", 1),
    Passes("for (int e = 0; e <= kEntriesPerPiece", PIECE),
    Passes("if (is_new_row && run_row != kNoRow)", NEW_ROW),
    Passes("for (int other = thread + kLanes", 7),
    Passes("for (int lane = 1; lane < kLanes", 31, unrolled=1),
)
_UPDATE = Launch(
    NUM_PIECES / 2, _OF_STEPS,
    2 * TOUCHED * (ROW_BYTES + _STATE_BYTES) + NUM_TOKENS * ROW_BYTES + NUM_ENTRIES * 16 + _SUM_BYTES,
)  # fmt: skip
UPDATE = of_one_size(
    "memory_update_pieces", "memory_update_cuda", "memory_update_piecesINS_8BFloat16ELi8E",
    "a warp's entry of 256 columns, within a run", _UPDATE, tile="for (int e = 0; e <= kEntriesPerPiece",
    shared_bytes=2048,
    rare=(
        "return args.sums + (2 * piece + 1)", "*reinterpret_cast<float4*>(row + first + i)",
        "if (columns.has(i)) squares", "sums[thread] = squares",
    ),
)  # fmt: skip

# --- product keys -----------------------------------------------------------------------------------------------------

NUM_HEADS, NUM_KEYS, HEAD_DIM, TOP_K = 4, 1024, 512, 32
ROWS, CHUNK = 64, 128
MERGES, GROUPS = 5.4, 7.95
"""Times that a row merges its pending entries, and sets of up to 32 of them, of each half; by simulation."""
STEPS = 1.15
"""Times that a chunk's scores are appended: the first chunk's in two parts; by simulation."""
_TOPK = Launch(
    NUM_TOKENS / ROWS * NUM_HEADS,
    (
        Passes("for (int half = 0; half < 2", 2),
        Passes("for (int first_key = 0; first_key < args.num_keys", NUM_KEYS / CHUNK),
        Passes("for (int slice = 0; slice < num_slices", HEAD_DIM / 2 / 32),
        Passes("for (int step = first_step", STEPS),
        Passes("for (unsigned rows = __ballot_sync", 8 * MERGES / (NUM_KEYS / CHUNK * STEPS)),
        Passes("if (num_pending > kLanes) best.enter", (GROUPS - MERGES) / MERGES),
        Passes("for (int i = 0; i < args.num_stages - 1", 2),
        Passes("for (int r = 0; r < num_rows", 8),
        Passes("for (int r = 0; r < Shared::kRowsPerWarp", 8),
        Passes("for (int slot = lane; slot - lane < args.num_pairs", 4),
        Passes("for (int i = threadIdx.x; i < args.num_pairs", 1),
    ),
    NUM_TOKENS * NUM_HEADS * (2 * HEAD_DIM + 12 * TOP_K),
)  # fmt: skip
TOPK = of_one_size(
    "product_key_topk", "memory_topk_cuda", "product_key_topkINS_8BFloat16ELi1E", "a warp's part of 64 rows x 128 keys",
    _TOPK, HEAD_DIM, tile="for (int first_key = 0; first_key < args.num_keys", variant=", top_k <= 32",
    rare=(
        "hide_absent", "cuda::copy_async_wait<0>()", "cuda::copy_async_wait<2>()", "uint64_t list[kPerLane];",
        "SumList<kPerLane> sums(args.top_k)",
    ),
)  # fmt: skip

KERNELS = (TOPK, LOOKUP, GATHER, CLEAR, PIECES, PIECES_WITHOUT_WEIGHTS, STRETCHES, RUNS, UPDATE_GATHER, UPDATE)
_SIZE = "1M rows of 1024, 16K tokens of 128 entries"
CASES = (
    Case("`product_key_topk`, 16K tokens of 4 heads, D 512, n 1024, top_k 32", ((TOPK, _TOPK),)),
    Case(f"`memory_lookup`, {_SIZE}", ((LOOKUP, _LOOKUP),), _LOOKUP.bytes),
    Case(
        "its gradients, dense", ((GATHER, _GATHER), (CLEAR, _CLEAR), (PIECES, _PIECES), (STRETCHES, _STRETCHES),
        (RUNS, _RUNS)), (TOUCHED + NUM_ROWS + NUM_TOKENS) * ROW_BYTES,
    ),
    Case(
        "its gradients, sparse, without the sort of the indices",
        ((GATHER, _GATHER), (PIECES, _PIECES), (STRETCHES, _STRETCHES), (RUNS, _RUNS)),
        (2 * TOUCHED + NUM_TOKENS) * ROW_BYTES,
    ),
    Case(
        "a step of `RowAdam` with bfloat16 states, without the sort of the indices and long runs",
        ((UPDATE_GATHER, _UPDATE_GATHER), (UPDATE, _UPDATE)),
        2 * TOUCHED * (ROW_BYTES + _STATE_BYTES) + NUM_TOKENS * ROW_BYTES,
    ),
)  # fmt: skip
