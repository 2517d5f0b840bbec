"""Descriptions of the kernels of block attention, bfloat16: hot loops, trip counts, thread blocks and bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from model.paths import Passes
from model.problems import Case, KernelModel, Launch, Problem, insertions, of_one_size

STEP_KEYS = {64: 64, 128: 32}
LIST_ITEM = 512
BACKWARD_ITEM = 4096
FORWARD_BUDGET, FORWARD_PAIR_BUDGET, BACKWARD_BUDGET = 512 << 20, 768 << 20, 1 << 30
DEPTH_LOOP = "for (int k = 0; k < TileA::kColumns / 16"


Launches = Callable[[Problem, str], list[Launch]]


def bfloat16(name: str) -> Callable[[int], str]:
    """The mangled name of a kernel of bfloat16, by head_dim."""
    return lambda head_dim: f"{name}INS_8BFloat16ELi{head_dim}E"


def depth(head_dim: int, unrolled: int = 4) -> Passes:
    return Passes(DEPTH_LOOP, head_dim / 16, unrolled)


# --- route ------------------------------------------------------------------------------------------------------------


MIN_FILTERED_BLOCKS, FILTER_LIST = 256, 16
OPEN_BLOCKS, MOST_OPEN_BLOCKS = 1.5, 5
"""Blocks that a row's bounds leave open, on average, and the most of a warp's rows: drawn for random scores, D 128."""


def route(problem: Problem, direction: str) -> list[Launch]:
    if problem.num_blocks >= MIN_FILTERED_BLOCKS:
        return []
    tiles = max(1.0, problem.num_blocks / 32)
    list_length = problem.top_k - 1
    passes = (
        Passes("for (uint32_t work = first_work", 1),
        Passes("for (int32_t first_block = 0", (tiles + 1) / 2),
        Passes("for (int row = threadIdx.x; row < Shared::kQueries", 1),
        Passes("for (int i = 0; i < kRows / kRowsAtOnce", problem.head_dim / 8, unrolled=8),
        Passes("for (int64_t i = threadIdx.x; i < num_list_entries", list_length, unrolled=4),
        Passes(DEPTH_LOOP, problem.head_dim / 64),
        Passes("for (int i = static_cast<int>(threadIdx.x); i < num_words", 0),
        Passes("if (head_dim == kHeadDim)", 0),  # the compiler lays the product without branches last
        Passes("} else if (args.list_length <= 8)", 0),
        Passes("while (marked != 0)", insertions(problem.num_blocks, list_length)),
        Passes("for (int32_t block = 0; block < forced.num_first", 0),
        Passes("for (int32_t i = forced.num_last - 1", 1),
        Passes("for (int slot = num_kept", 0),
    )
    bytes_moved = problem.num_rows * (problem.row_bytes + 4 * problem.top_k)
    return [Launch(problem.num_rows / 128, passes, bytes_moved)]


ROUTE = KernelModel(
    "moba_route",
    "moba_route_bfloat16_cuda",
    bfloat16("moba_route"),
    "a warp's 32 queries x 32 centroids",
    route,
    tile="for (int32_t first_block = 0",
    threads=128,
    rare=(
        *(
            "last_start_up_to",
            "plain_score",
            "repaired_score",
            "if (isnan(score))",
            "score = repaired_score",
            "write_all",
            "write_choices",
            "select_by_warp",
        ),
        *("if (is_rerun)", "has_failed", "hide_rows_but", "bool found = false"),
        *("route::write_all(", "route::select_by_warp", "route::select_by_lane<route::kMaxLaneList>"),
        "route::write_choices_by_lane<route::kMaxLaneList, Shared>",
        "for (int first = 0; !are_written_by_lanes",
    ),
    counted_tokens=8 * 1024,
)


def route_filter(problem: Problem, direction: str) -> list[Launch]:
    if problem.num_blocks < MIN_FILTERED_BLOCKS:
        return []
    tiles = max(1.0, problem.num_blocks / 32)
    passes = (
        Passes("for (int32_t first_block = 0", (tiles + 1) / 2),
        Passes("for (int row = threadIdx.x; row < Shared::kQueries", 1),
        Passes("for (int i = 0; i < kRows / kRowsAtOnce", problem.head_dim / 8, unrolled=8),
        Passes("for (int chunk = 0; chunk < Tile::kChunks; ++chunk", problem.head_dim / 8, unrolled=4),
        Passes("} while (!is_last)", insertions(problem.num_blocks, FILTER_LIST)),
        Passes("for (int first = 0; first < num_open", round(32 * OPEN_BLOCKS / 4)),
        Passes("for (int i = 0; i < num_open", MOST_OPEN_BLOCKS),
        Passes("for (int other = 0; other < num_open", MOST_OPEN_BLOCKS),
        Passes("for (int32_t block = 0; block < forced.num_first", 0),
        Passes("for (int32_t i = forced.num_last - 1", 1),
        Passes("for (int slot = num_kept", 0),
    )
    bytes_moved = problem.num_rows * (problem.row_bytes + 4 * problem.top_k)
    # The second launch is moba_route's, for rows that failed: there are none.
    return [Launch(problem.num_rows / 128, passes, bytes_moved), Launch(0, passes, 0)]


ROUTE_FILTER = KernelModel(
    "moba_route_filter",
    "moba_route_bfloat16_cuda",
    bfloat16("moba_route_filter"),
    "a warp's 32 queries x 32 centroids",
    route_filter,
    tile="for (int32_t first_block = 0",
    threads=128,
    rare=("last_start_up_to",),
)

# --- attend -----------------------------------------------------------------------------------------------------------


def num_waves(problem: Problem, budget: int, entry_bytes: int, row_bytes: int, unit_bytes: int = 0) -> int:
    """How many waves csrc/moba/moba_waves_cuda.cpp cuts a problem into."""
    of_row = 2 * problem.top_k * 4 + 2 + -(-problem.num_blocks * 4 // 256) + problem.top_k * entry_bytes + row_bytes
    of_unit = (4 * problem.num_blocks + 2) * 4 + unit_bytes
    queries = (budget - of_unit) // of_row
    if queries >= problem.num_tokens:
        units = min(max(budget // (of_unit + problem.num_tokens * of_row), 1), problem.num_units)
        return -(-problem.num_units // units)
    return problem.num_units * -(-problem.num_tokens // queries)


def forward_waves(problem: Problem) -> int:
    entry_bytes = problem.row_bytes + 8
    if num_waves(problem, FORWARD_BUDGET, entry_bytes, 0) == 1:
        return 1
    return num_waves(problem, FORWARD_PAIR_BUDGET, 2 * entry_bytes, 0)


def list_builds(problem: Problem) -> int:
    """For how many groups of waves the forward builds lists: ForwardPlan in csrc/moba/moba_forward_cuda.cu."""
    waves = forward_waves(problem)
    if waves == 1 or waves > problem.num_units:
        return waves
    units = -(-problem.num_units // waves)
    outputs = problem.num_tokens * problem.top_k * problem.row_bytes
    of_row = 2 * problem.top_k * 4 + 2 + -(-problem.num_blocks * 4 // 256) + 2 * 8 * problem.top_k
    left = FORWARD_PAIR_BUDGET - 2 * units * outputs
    fitting = left // ((4 * problem.num_blocks + 2) * 4 + problem.num_tokens * of_row)
    return -(-waves // min(max(fitting // units, 1), waves))


def backward_waves(problem: Problem) -> int:
    unit_bytes = problem.num_tokens * 2 * problem.head_dim * 4
    budget = max(BACKWARD_BUDGET, unit_bytes + (128 << 20))
    return num_waves(problem, budget, 0, 4 + 4 * problem.head_dim, unit_bytes)


def _attend_passes(problem: Problem, entries: float, merges: float) -> tuple[Passes, ...]:
    """``merges``: sets of rows that a warp merges."""
    keys_of_thread = problem.block_size * problem.head_dim / 8 / 128
    return (
        Passes("for (uint32_t share = thread_block", 1),
        Passes("for (; row < end; row += stride", merges),
        Passes("for (int first = 0; first < top_k; first += kSlots", 1),
        Passes("for (int slot = lane + kGroup", 0),
        Passes("for (int round = 0", entries / 128),
        Passes("for (int first_key = 0; first_key < num_keys", 1),
        Passes("if (!is_resident) {", 0),
        Passes("if (is_resident) {", 1),
        Passes("for (int step = 0; step < end", problem.block_size / STEP_KEYS[problem.head_dim]),
        Passes("if (step + kStepKeys >= end) after_scores", STEP_KEYS[problem.head_dim] / problem.block_size),
        Passes("for (unsigned first = 0; first < kCopies", problem.head_dim / 8, unrolled=4),
        Passes("if (is_first) return", 1 - STEP_KEYS[problem.head_dim] / problem.block_size),
        depth(problem.head_dim, unrolled=problem.head_dim // 32),
        Passes("for (int i = threadIdx.x; i < num_rows * Tile::kChunks", keys_of_thread, unrolled=4),
        Passes("for (int i = static_cast<int>(threadIdx.x); i < num_rows * decltype", keys_of_thread, unrolled=4),
        Passes("for (int key = static_cast<int>(threadIdx.x) / 8", 0),
    )


NO_MERGE = ("if (args.merge.rows_of_unit > 0)", "merge_rows", "merge_share", "write_row")


def _merge_bytes(problem: Problem) -> float:
    return problem.num_entries * (problem.row_bytes + 8) + problem.num_rows * (problem.row_bytes + 12)


def _rows_at_once(problem: Problem) -> float:
    """Rows that a thread block merges at once: two sets of each of four warps."""
    return 4 * 2 * 32 / (problem.head_dim / 8)


def attend(problem: Problem, direction: str) -> list[Launch]:
    items = problem.entries_of_block / LIST_ITEM + 0.5  # the last of a list is full by half
    num_items = problem.num_units * problem.num_blocks * items
    entries = problem.entries_of_block / items
    item_bytes = 2 * problem.block_size * problem.row_bytes + entries * (2 * problem.row_bytes + 12)
    waves = forward_waves(problem)
    alone = Launch(num_items / waves, _attend_passes(problem, entries, 0), num_items / waves * item_bytes, 1, NO_MERGE)
    if waves == 1:
        return [alone]
    # Every second thread block merges its share of the wave before.
    merges = round(problem.num_rows / (num_items / 2) / _rows_at_once(problem))
    both = Launch(
        num_items / waves,
        _attend_passes(problem, entries, merges),
        (num_items * item_bytes + _merge_bytes(problem)) * (waves - 1) / waves,
        waves - 1,
        other=alone,
    )
    return [alone, both]


_ATTEND_RARE = (
    *("last_start_up_to", "cap_scores", "hide_keys", "visible_keys_of", "multiply_visible", "move_bases"),
    *("keys_before_window", "if (end <= 0) after_scores", "has_sink", "if (hides_keys && "),
    *("for (int s = 0; s < kSets; ++s) mine[s] = terms_at", "load(false);", "words[s][j][c] = make_uint4"),
    "return sinks.data == nullptr ?",
)
ATTEND = KernelModel(
    "moba_attend_blocks",
    "moba_forward_bfloat16_cuda",
    bfloat16("moba_attend_blocks"),
    "a warp's 32 entries x 128 keys",
    attend,
    tile="for (int round = 0",
    threads=128,
    rare=_ATTEND_RARE,
)


def merge(problem: Problem, direction: str) -> list[Launch]:
    """The last wave's rows, by a launch without work items, taken as one round of thread blocks of all its rows."""
    waves, thread_blocks = forward_waves(problem), 264
    passes = _attend_passes(problem, 0, max(1.0, problem.num_rows / waves / thread_blocks / _rows_at_once(problem)))
    return [Launch(thread_blocks, passes, _merge_bytes(problem) / waves)]


MERGE = KernelModel(
    "moba_attend_blocks, merging alone",
    "moba_forward_bfloat16_cuda",
    bfloat16("moba_attend_blocks"),
    "a warp's 8 or 4 rows of 8 choices",
    merge,
    tile="for (; row < end; row += stride",
    threads=128,
    rare=_ATTEND_RARE,
    shared_bytes=100096,
)

# --- layout -----------------------------------------------------------------------------------------------------------


def waves_of(problem: Problem, direction: str) -> int:
    """How often lists are built."""
    return list_builds(problem) if direction == "forward" else backward_waves(problem)


def _layout(
    problem: Problem,
    direction: str,
    count: Callable[[float, float], float],
    bytes_of_row: float,
    *passes: Passes,
) -> list[Launch]:
    """``count``: thread blocks of a wave that holds a number of rows and units."""
    waves = waves_of(problem, direction)
    rows, units = problem.num_rows / waves, max(1.0, problem.num_units / waves)
    return [Launch(count(rows, units), passes, problem.num_rows * bytes_of_row, waves)]


MAX_BLOCKS_OF_ONE_SCAN, SCAN_WARPS, SCAN_THREADS = 128, 8, 512


def count_few_blocks(problem: Problem, direction: str) -> list[Launch]:
    if problem.num_blocks > MAX_BLOCKS_OF_ONE_SCAN:
        return []
    return _layout(
        problem, direction, lambda rows, units: rows / 256, 4 * problem.top_k + 2,
        Passes("for (int64_t row = first_of_chunk", 2), Passes("for (int turn = 0", 4, unrolled=4),
        Passes("for (int distance = 1", problem.top_k - 1, unrolled=4),
        Passes("for (int block = lane_id()", max(1, problem.num_blocks / 32)),
        Passes("for (int block = static_cast<int>(threadIdx.x)", 1),
    )  # fmt: skip


def count_choices(problem: Problem, direction: str) -> list[Launch]:
    if problem.num_blocks <= MAX_BLOCKS_OF_ONE_SCAN:
        return []
    return _layout(
        problem, direction, lambda rows, units: rows / 128, 4 * problem.top_k + 2,
        Passes("for (int distance = 1", problem.top_k - 1, unrolled=4),
    )  # fmt: skip


def _scan_rounds(problem: Problem, direction: str) -> Passes:
    """Rounds of 16 chunks that a warp scans, each of two times."""
    chunks = problem.num_tokens / 256 / max(1.0, waves_of(problem, direction) / problem.num_units)
    return Passes("for (int32_t first = first_chunk", max(1, round(chunks / SCAN_WARPS / 16)))


def _scan_items(problem: Problem, threads: int) -> tuple[Passes, ...]:
    items = problem.top_k * problem.block_size / LIST_ITEM + 0.5
    return (
        Passes("for (int32_t first = 0; first < num_blocks", max(1.0, problem.num_blocks / threads)),
        Passes("for (int32_t i = 0; i < items", round(items)),
    )


def scan_chunks(problem: Problem, direction: str) -> list[Launch]:
    if problem.num_blocks <= MAX_BLOCKS_OF_ONE_SCAN:
        return []
    return _layout(
        problem, direction, lambda rows, units: units * -(-problem.num_blocks // 32), 12 * problem.num_blocks / 256,
        _scan_rounds(problem, direction),
    )  # fmt: skip


def scan_blocks(problem: Problem, direction: str) -> list[Launch]:
    if problem.num_blocks <= MAX_BLOCKS_OF_ONE_SCAN:
        return []
    return _layout(problem, direction, lambda rows, units: units, 0, *_scan_items(problem, SCAN_THREADS))


def scan_few_blocks(problem: Problem, direction: str) -> list[Launch]:
    if problem.num_blocks > MAX_BLOCKS_OF_ONE_SCAN:
        return []
    return _layout(
        problem, direction, lambda rows, units: units, 12 * problem.num_blocks / 256,
        Passes("for (int32_t first = 0; first < static_cast", problem.num_blocks / 32),
        _scan_rounds(problem, direction), *_scan_items(problem, 256),
    )  # fmt: skip


FILL_ROUNDS = 4


def fill_lists(problem: Problem, direction: str) -> list[Launch]:
    return _layout(
        problem, direction, lambda rows, units: rows / 1024, 8 * problem.top_k + 2,
        Passes("for (int32_t block = lane_id()", problem.num_blocks // 32, unrolled=8),
        Passes("while (step_row < end)", 64 / FILL_ROUNDS),
        Passes("for (int turn = 0", 4, unrolled=4),
    )  # fmt: skip


def _layout_kernel(
    name: str, unit: str, launches: Launches, threads: int = 256, tile: str = "", counted_tokens: int = 0
) -> KernelModel:
    return KernelModel(
        name, "moba_layout_cuda", lambda _: name + "E", unit, launches, tile, threads,
        rare=("last_start_up_to",), directions=("forward", "backward"), head_dims=(128,), counted_tokens=counted_tokens,
    )  # fmt: skip


LAYOUT = (
    _layout_kernel("moba_count_few_blocks", "a warp's 32 rows of 8 choices", count_few_blocks, counted_tokens=8 * 1024),
    _layout_kernel("moba_count_choices", "a warp's 16 rows of 8 choices", count_choices),
    _layout_kernel("moba_scan_few_blocks", "64 blocks, 32 chunks", scan_few_blocks, counted_tokens=8 * 1024),
    _layout_kernel("moba_scan_chunks", "a warp's 32 blocks x 32 chunks", scan_chunks),
    _layout_kernel("moba_scan_blocks", "a warp's 32 blocks", scan_blocks, SCAN_THREADS),
    _layout_kernel("moba_fill_lists", "a warp's 16 rows of 8 choices", fill_lists, 128, "while (step_row < end)"),
)

# --- backward ---------------------------------------------------------------------------------------------------------


def row_terms(problem: Problem, direction: str) -> list[Launch]:
    waves = backward_waves(problem)
    passes = (
        Passes("for (int column = lane * kPerChunk", 1, unrolled=2),
        Passes("for (int column = lane * 4", problem.head_dim / 64, unrolled=4),
    )
    bytes_moved = problem.num_rows * (2 * problem.row_bytes + 4 * problem.head_dim + 4)
    return [Launch(problem.num_rows / 16 / waves, passes, bytes_moved, waves)]


def attend_backward(problem: Problem, direction: str) -> list[Launch]:
    list_length = problem.top_k * problem.block_size
    waves = backward_waves(problem)
    keys = 128 if problem.block_size > 64 else 64
    thread_blocks = problem.num_units * problem.num_blocks * max(1.0, problem.block_size / keys)
    steps = (4 if problem.head_dim == 64 else 1) if keys == 128 else 1
    passes = (
        Passes("for (int first_entry = 0", list_length / 64),
        Passes("for (unsigned i = 0; i < Tile::kRows", keys * problem.head_dim / 8 / 256, 4, within="const auto copy"),
        Passes("for (unsigned i = 0; i < Tile::kRows", 64 * problem.head_dim / 8 / 256, 4),
        Passes("for (int key = first_key", steps),
        Passes("for (int panel = 0", 1),
        Passes("if (is_unusual)", 0),
        # Two of eight warps place rows.
        Passes("if (is_placing() && !is_last)", 0.25),
        Passes("if (is_placing()) next_entry", 0.25),
    )
    # The own block's queries see some of its keys. Of grad_query every row leaves L2 once in the best case.
    tile_bytes = 64 * (2 * problem.row_bytes + 16)
    added = list_length * problem.head_dim * 4
    written = 4 * keys * problem.row_bytes
    bytes_moved = thread_blocks * (list_length / 64 * tile_bytes + added + written)
    return [Launch(thread_blocks / waves, passes, bytes_moved, waves)]


def clear_key_sums(problem: Problem, direction: str) -> list[Launch]:
    waves = backward_waves(problem)
    # A list of up to BACKWARD_ITEM entries is one work item, which wrote its keys' gradients itself.
    passes = (Passes("for (; left != 0", 0),)
    return [Launch(problem.num_units * problem.num_tokens / 256 / waves, passes, 8 * problem.num_blocks, waves)]


def write_grad_keys(problem: Problem, direction: str) -> list[Launch]:
    return clear_key_sums(problem, direction)


def write_grad_query(problem: Problem, direction: str) -> list[Launch]:
    waves = backward_waves(problem)
    passes = (Passes("for (int column = cuda::lane_id() * 2", problem.head_dim / 64),)
    return [Launch(problem.num_rows / 8 / waves, passes, problem.num_rows * 6 * problem.head_dim, waves)]


def _attend_backward_kernel(block_size: int) -> KernelModel:
    is_wide = block_size > 64
    keys = 128 if is_wide else 64
    return KernelModel(
        "moba_attend_blocks_backward", "moba_backward_bfloat16_cuda",
        lambda head_dim: bfloat16("moba_attend_blocks_backward")(head_dim)[:-1] + f"ELb{int(is_wide)}E",
        f"a warp's part of 64 entries x {keys} keys", attend_backward, "for (int first_entry = 0",
        rare=(
            "last_start_up_to", "has_unusual_chunks", "multiply_visible", "backward::multiply_visible", "cap_score",
            "slope_of_cap", "weigh<true>", "is_unusual = ", "const auto of_lse = read", "terms.largest = of",
            "terms.factor = of", "const bool is_visible = terms.sees", "sees", "keys_before_window",
            "weights[n][e] = is_visible", "d_scores[n][e] = is_visible", "float4& place", "const float4 before",
            "place = make_float4", "if (n * 16 >= num_columns) continue",
        ),
        directions=("backward",), variant=", block_size > 64" if is_wide else "",
        block_sizes=(block_size,),
    )  # fmt: skip


_NOT_SUMMED = ("last_start_up_to", "take_row", "for (; left != 0", "clear_row", "write_row", "for (int column =")
BACKWARD = (
    KernelModel(
        "moba_row_terms", "moba_backward_cuda", lambda _: "moba_row_termsINS_8BFloat16", "a warp's 2 rows", row_terms,
        rare=("for (int column = lane; column",), directions=("backward",),
    ),
    KernelModel(
        "moba_clear_key_sums", "moba_backward_cuda", lambda _: "moba_clear_key_sums", "a warp's 32 keys",
        clear_key_sums, rare=_NOT_SUMMED, directions=("backward",), head_dims=(128,),
    ),
    _attend_backward_kernel(64),
    _attend_backward_kernel(128),
    KernelModel(
        "moba_write_grad_query", "moba_backward_cuda", lambda _: "moba_write_grad_queryINS_8BFloat16", "a warp's row",
        write_grad_query, rare=("last_start_up_to", "for (int slot = 0"), directions=("backward",),
    ),
    KernelModel(
        "moba_write_grad_keys", "moba_backward_cuda", lambda _: "moba_write_grad_keysINS_8BFloat16", "a warp's 32 keys",
        write_grad_keys, rare=_NOT_SUMMED, directions=("backward",), head_dims=(128,),
    ),
)  # fmt: skip

# --- numbers that are not finite ------------------------------------------------------------------------------------

LARGE = Problem(64 * 1024, 128, 128)
_NUM_LISTS = LARGE.num_units * LARGE.num_blocks


def _without(rare: Sequence[str], *names: str) -> tuple[str, ...]:
    return tuple(name for name in rare if name not in names)


# Every row fails before the filter. A thread block has 32 tiles of queries. A row's list is full of what ranks as +inf
# after 7 insertions, and those are fewer than the tiles of centroids that it sees: one a tile.
_RERUN = Launch(
    LARGE.num_rows / 128 / 32,
    (
        Passes("for (uint32_t work = first_work", 32),
        Passes("for (int32_t first_block = 0", (LARGE.num_blocks / 32 + 1) / 2),
        Passes("for (int chunk = 0; chunk < num_chunks", LARGE.head_dim / 8),
        Passes("while (marked != 0)", 1),
        Passes("for (int i = static_cast<int>(threadIdx.x); i < num_words", 1),
        Passes("for (int i = 0; i < num_words", 4, unrolled=4),
        *(entry for entry in route(Problem(8 * 1024, 128, 128), "forward")[0].passes if entry.line not in (
            "for (uint32_t work = first_work", "for (int32_t first_block = 0", "while (marked != 0)",
            "for (int i = static_cast<int>(threadIdx.x); i < num_words",
        )),
    ),
    LARGE.num_rows * (LARGE.row_bytes + 4 * LARGE.top_k),
)  # fmt: skip
RERUN = of_one_size(
    "moba_route", ROUTE.source, bfloat16("moba_route")(128), "a warp's 32 queries x 32 centroids, all NaN", _RERUN,
    size=128, tile=ROUTE.tile, threads=128,
    rare=_without(
        ROUTE.rare, "plain_score", "repaired_score", "if (isnan(score))", "score = repaired_score", "if (is_rerun)",
        "has_failed", "hide_rows_but", "bool found = false",
    ),
)  # fmt: skip
# Of a block's list, the first entries are of the block's own queries. A warp's 32 of them hide keys in one step.
_CAREFUL_ATTEND = Launch(
    _NUM_LISTS,
    (
        Passes("for (int step = 0; step < end", 1),
        Passes("for (int k = 0; k < count; ++k)", STEP_KEYS[128]),
        *(entry for entry in _attend_passes(LARGE, 128, 0) if not entry.line.startswith("for (int step = 0")),
    ),
    0,
    1,
    NO_MERGE,
)
CAREFUL_ATTEND = of_one_size(
    "moba_attend_blocks", ATTEND.source, bfloat16("moba_attend_blocks")(128),
    "a warp's 32 entries x 32 keys, some hidden, values NaN", _CAREFUL_ATTEND, size=128, tile=ATTEND.tile, threads=128,
    rare=_without(_ATTEND_RARE, "multiply_visible", "visible_keys_of", "if (hides_keys && "),
)  # fmt: skip
_WIDE = _attend_backward_kernel(128)
_CAREFUL_BACKWARD = Launch(
    _NUM_LISTS,
    (
        Passes("for (int first_entry = 0", 128 / 64),
        Passes("if (is_unusual)", 1),
        Passes("for (int i = threadIdx.x; i < Tile::kRows * Tile::kChunks", 64 * 16 / 256),
        Passes("for (int k = 0; k < depth; ++k)", 128, within="backward::multiply_visible<false>"),
        Passes("for (int k = 0; k < depth; ++k)", 64),
        *(entry for entry in attend_backward(LARGE, "backward")[0].passes if entry.line not in (
            "for (int first_entry = 0", "if (is_unusual)",
        )),
    ),
    0,
)  # fmt: skip
CAREFUL_BACKWARD = of_one_size(
    "moba_attend_blocks_backward", _WIDE.source, _WIDE.symbol(128),
    "a warp's part of 64 entries x 128 keys, some hidden, NaN", _CAREFUL_BACKWARD, size=128, tile=_WIDE.tile,
    variant=_WIDE.variant,
    rare=_without(_WIDE.rare, "has_unusual_chunks", "multiply_visible", "backward::multiply_visible", "is_unusual = "),
)  # fmt: skip


def _stages(direction: str, *more: tuple[KernelModel, Launch]) -> tuple[tuple[KernelModel, Launch], ...]:
    """Everything a problem launches, and what numbers that are not finite add."""
    models = [model for model in _ALWAYS if direction in model.directions and model.takes(LARGE)]
    stages = [(model, launch) for model in models for launch in model.launches(LARGE, direction)]
    return (*((model, launch) for model, launch in stages if launch.thread_blocks > 0), *more)


_ALWAYS = (ROUTE, ROUTE_FILTER, *LAYOUT, ATTEND, MERGE, *BACKWARD)
KERNELS = (*_ALWAYS, RERUN, CAREFUL_ATTEND, CAREFUL_BACKWARD)
CASES = (
    Case(
        "block attention forward, 64K, D 128, block 128, every number NaN",
        _stages("forward", (RERUN, _RERUN), (CAREFUL_ATTEND, _CAREFUL_ATTEND)),
    ),
    Case(
        "its backward, every number NaN, or every number of grad_out inf",
        _stages("backward", (CAREFUL_BACKWARD, _CAREFUL_BACKWARD)),
    ),
)
