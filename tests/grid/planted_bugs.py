"""Bugs to plant in the CUDA sources of grid and window attention; ``cuda/planted_bugs.py`` says how."""

from collections.abc import Callable
from typing import Any

import torch

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
from tests.grid.helpers import GridCase, assert_grid_close, check_grid, make_inputs, run_grid

CPU = torch.device("cpu")
BFLOAT16 = torch.bfloat16

# --- cases ------------------------------------------------------------------------------------------------------------

# Groups of up to 20 tokens, of all four sizes: two to a tile.
GRID = GridCase(rows=7, columns=9, step=(2, 2), head_dim=24, has_bias=True)
# 27 windows of up to 12 tokens, four to a tile; those at the edges are short.
WINDOWS = GridCase(batch=1, num_heads=3, rows=7, columns=9, step=(3, 4), head_dim=24, partition="window", has_bias=True)
# One group of more than two tiles.
LARGE = GridCase(rows=13, columns=11, step=(1, 1), head_dim=24, has_bias=True)
# One group of more tokens than gradients of queries and keys are made of in one pass.
HUGE = GridCase(batch=1, num_heads=1, rows=9, columns=29, step=(1, 1), head_dim=24, has_bias=True)
# Four groups of more than a tile, of four sizes.
RAGGED = GridCase(batch=1, rows=17, columns=19, step=(2, 2), head_dim=24, has_bias=True, scale=1.5)
# A group whose tokens of one row, of two, are followed by a block of none. (A step of queries without any needs a head
# dimension over 64, whose kernels are not built here: tests/grid/test_attention.py has that case.)
HOLES = GridCase(batch=1, num_heads=1, rows=2, columns=38, step=(2, 32), head_dim=24, partition="window", has_bias=True)
SCALED = GridCase(rows=7, columns=9, step=(2, 2), head_dim=24, has_bias=True, scale=2.5)
# More groups of one head than its bias' gradient is summed in pieces.
MANY_GROUPS = GridCase(batch=1, num_heads=33, rows=13, columns=10, step=(13, 5), head_dim=8, has_bias=True)


def nonfinite_case() -> None:
    """The first token of all, which stands in for those that are not there, is not finite."""
    inputs = make_inputs(GRID, BFLOAT16, CPU)
    value = inputs.value.detach().clone()
    value[0, 0, 0, 0] = torch.inf
    inputs.value = value.requires_grad_()
    assert_grid_close(run_grid(inputs, GRID), inputs, GRID)


def low_scores_case() -> None:
    """Scores so low that a token that is not there, whose own are 0, would outweigh them all."""
    case = GridCase(1, 1, rows=9, columns=13, step=(1, 1))
    inputs = make_inputs(case, BFLOAT16, CPU)
    inputs.query = (inputs.query.detach() * 0.125 + 8).requires_grad_()
    inputs.key = (inputs.key.detach() * 0.125 - 8).requires_grad_()
    assert_grid_close(run_grid(inputs, case), inputs, case)


def empty_case() -> None:
    """No image, but a bias; memory that nobody writes is NaN."""
    torch.use_deterministic_algorithms(True)
    check_grid(GridCase(batch=0, has_bias=True), BFLOAT16, CPU)


GRID_CASES: dict[str, Callable[[], Any]] = {
    "grid": lambda: check_grid(GRID, BFLOAT16, CPU),
    "grid windows": lambda: check_grid(WINDOWS, BFLOAT16, CPU),
    "grid large": lambda: check_grid(LARGE, BFLOAT16, CPU),
    "grid huge": lambda: check_grid(HUGE, BFLOAT16, CPU),
    "grid ragged": lambda: check_grid(RAGGED, BFLOAT16, CPU),
    "grid large float32": lambda: check_grid(LARGE, torch.float32, CPU),
    "grid many groups": lambda: check_grid(MANY_GROUPS, BFLOAT16, CPU),
    "grid holes": lambda: check_grid(HOLES, BFLOAT16, CPU),
    "grid scaled": lambda: check_grid(SCALED, BFLOAT16, CPU),
    "grid nonfinite": nonfinite_case,
    "grid low scores": low_scores_case,
    "grid empty": empty_case,
}

# --- bugs -------------------------------------------------------------------------------------------------------------

WRONG_OUT = "AssertionError: out"
NEVER_WAITED = "RuntimeError: a thread exits with asynchronous copies it did not wait for"
MISALIGNED = "RuntimeError: (copy_async: )?MISALIGNED"  # one byte before the first row
WRONG_GRADIENT = "AssertionError: d_"
WRONG_BIAS = "AssertionError: d_bias"

GEOMETRY = "grid/grid_geometry_cuda.cuh"
FORWARD = "grid/grid_forward_cuda.cu"
BACKWARD = "grid/grid_backward_cuda.cuh"
GROUPS = "grid/grid_backward_groups_cuda.cuh"
LARGE_GROUPS = "grid/grid_backward_large_cuda.cuh"
UNITS = "grid/grid_backward_units_cuda.cuh"
BACKWARD_STEPS = "grid/grid_backward_cuda.cu"
GRID_UNITS = {
    GEOMETRY: ["grid_forward_cuda.cu"],
    BACKWARD: ["grid_backward_cuda.cu"],
    GROUPS: ["grid_backward_cuda.cu"],
    LARGE_GROUPS: ["grid_backward_cuda.cu"],
    UNITS: ["grid_backward_cuda.cu"],
}

# fmt: off
GRID_BUGS = [
    PlantedBug("grid: groups begin one row late", GEOMETRY,
               "row_group * geometry.rows.group_step +", "(row_group + 1) * geometry.rows.group_step +",
               "grid", f"{WRONG_OUT}|{UNINITIALIZED}"),
    PlantedBug("grid: tokens of a group one column too near", GEOMETRY,
               "token_column * geometry.columns.token_step;", "token_column * (geometry.columns.token_step - 1);",
               "grid", f"{WRONG_OUT}|{RACE}|{UNINITIALIZED}"),
    PlantedBug("grid: windows one token further apart", GEOMETRY,
               "column_group * geometry.columns.group_step +", "column_group * (geometry.columns.group_step + 1) +",
               "grid windows", f"{WRONG_OUT}|{RACE}|{UNINITIALIZED}"),
    PlantedBug("grid: tokens past the last column", GEOMETRY,
               "row < geometry.rows.size && column < geometry.columns.size;", "row < geometry.rows.size;",
               "grid", f"{WRONG_OUT}|{RACE}|{READ_OUT_OF_BOUNDS}"),
    PlantedBug("grid: tokens past the last row", GEOMETRY,
               "row < geometry.rows.size && column", "row <= geometry.rows.size && column",
               "grid windows", f"{WRONG_OUT}|{RACE}|{READ_OUT_OF_BOUNDS}"),
    PlantedBug("grid: a unit past the last", GEOMETRY,
               "is_there = unit < geometry.num_units() &&", "is_there = unit <= geometry.num_units() &&",
               "grid windows", f"{READ_OUT_OF_BOUNDS}|{OUT_OF_BOUNDS}"),
    PlantedBug("grid: places not published", GEOMETRY,
               "return __syncthreads_or(is_there ? 1 : 0) != 0;", "return true;", "grid", UNPUBLISHED),
    PlantedBug("grid: groups of up to 32 tokens in slots of 16", GEOMETRY,
               "(max_tokens <= 32 ? 32 : tile_tokens)", "(max_tokens <= 32 ? 16 : tile_tokens)",
               "grid", f"{WRONG_OUT}|{UNINITIALIZED}",
               # A function of the host, of which the linker keeps one.
               units=["grid_forward_cuda.cu", "grid_backward_cuda.cu"]),
    PlantedBug("grid: rows of tokens that are not there copied", GEOMETRY,
               "const bool is_copied = is_column && offset >= 0;", "const bool is_copied = is_column;",
               "grid nonfinite", MISALIGNED),
    PlantedBug("grid: tokens that are not there taken for the first of all", GEOMETRY,
               "return token.is_there ? image.offset(", "return true ? image.offset(",
               "grid nonfinite", f"{WRONG_OUT}|{RACE}"),
    PlantedBug("grid: columns past head_dim copied", GEOMETRY,
               "const bool is_copied = is_column && offset >= 0;", "const bool is_copied = offset >= 0;",
               "grid", f"{WRONG_OUT}|{READ_OUT_OF_BOUNDS}|{UNINITIALIZED}"),
    PlantedBug("grid: results of tokens that are not there written", GEOMETRY,
               "if (offset[i] == kNotThere || chunk", "if (chunk", "grid", MISALIGNED),
    PlantedBug("grid: results not published to the warp", GEOMETRY,
               "Publishes the warp's results to its lanes. __syncwarp();", "", "grid", f"{RACE}|{UNINITIALIZED}"),
    PlantedBug("grid: weights in float32 not published", GEOMETRY,
               "Publishes the warp's weights to its lanes. __syncwarp();", "", "grid large float32", UNPUBLISHED),
    PlantedBug("grid: weights in float32 overwritten while read", GEOMETRY,
               "Tells the lanes that the weights have been used and may be overwritten. __syncwarp();", "",
               "grid large float32", OVERWRITTEN),
    PlantedBug("grid forward: a key that is not there attended to", FORWARD,
               "if ((mine >> (n * 8 + e % 2) & 1) == 0) scores[m][n][e] = -INFINITY;", "", "grid", WRONG_OUT),
    PlantedBug("grid forward: a bit of another lane's key", FORWARD,
               "const Bits mine = there >> 2 * t;", "const Bits mine = there >> t;",
               "grid", f"{WRONG_OUT}|{READ_OUT_OF_BOUNDS}"),
    PlantedBug("grid forward: steps of some keys taken for whole ones", FORWARD,
               "if (there == kAll) return;", "if ((there & 1u) != 0) return;", "grid", WRONG_OUT),
    PlantedBug("grid forward: bias dropped", FORWARD,
               "if ((mine >> (n * 8 + e) & 1) != 0) score = fmaf(", "if (false) score = fmaf(", "grid", WRONG_OUT),
    PlantedBug("grid forward: the bias of keys in the first tile", FORWARD,
               "const uint32_t first_number = key_tile * Shared::kTokens + static",
               "const uint32_t first_number = static", "grid large float32", WRONG_OUT),
    PlantedBug("grid forward: bias of the first head", FORWARD,
               "(token.head * group + token.number)", "(0 * group + token.number)", "grid", WRONG_OUT),
    PlantedBug("grid forward: outputs not rescaled", FORWARD,
               "running.out[m][n][e] *= rescale[2 * m + e / 2];", ";", "grid large", WRONG_OUT),
    PlantedBug("grid forward: outputs of later tiles not rescaled", FORWARD,
               "key_tile == 0 && key == first);", "key == first);", "grid large float32", WRONG_OUT),
    PlantedBug("grid forward: sums of one lane", FORWARD,
               "const float sum = cuda::sum_of_row(running.sum[h]);", "const float sum = running.sum[h];",
               "grid", WRONG_OUT),
    PlantedBug("grid forward: softmax terms without the maximum", FORWARD,
               "write_softmax_terms(maximum, sum,", "write_softmax_terms(0.0f, sum,",
               "grid", WRONG_GRADIENT),
    PlantedBug("grid forward: the last tile of keys left out", FORWARD,
               "key_tile < num_tiles;", "key_tile + 1 < num_tiles;",
               "grid large float32", f"{WRONG_OUT}|{NEVER_WAITED}"),
    PlantedBug("grid forward: keys not published", FORWARD,
               "been used and the next one may overwrite it. __syncthreads();", "", "grid", UNPUBLISHED),
    PlantedBug("grid forward: keys overwritten while read", FORWARD,
               "gather_keys(shared.stages[(key_tile + 1) % 2],", "gather_keys(shared.stages[key_tile % 2],",
               "grid large float32", f"{OVERWRITTEN}|{RACE}|{BEFORE_WAIT}|{WRONG_OUT}"),
    PlantedBug("grid forward: keys of the tile before", FORWARD,
               "shared.places[(key_tile + 1) % 3]);", "shared.places[key_tile % 3]);",
               "grid large float32", WRONG_OUT),
    PlantedBug("grid forward: places of keys not published", FORWARD,
               "Publishes the places of both tiles to all threads. __syncthreads();", "", "grid large float32",
               f"{UNPUBLISHED}|{UNINITIALIZED}|{RACE}"),
    PlantedBug("grid forward: keys found in the tile that is attended to", FORWARD,
               "find_keys(key_tile + 2);", "find_keys(key_tile + 3);", "grid large float32",
               f"{OVERWRITTEN}|{RACE}|{UNINITIALIZED}|{WRONG_OUT}"),
    PlantedBug("grid forward: room for one tile where there are several", FORWARD,
               "Shared::bytes(is_single));", "Shared::bytes(true));", "grid large float32", OUT_OF_BOUNDS,
               alone=True),
    PlantedBug("grid forward: copies not waited for", FORWARD,
               "cuda::copy_async_wait<0>(); Publishes keys and values, the next tile's places, and the first time "
               "queries, to all warps; tells all threads that the tile before has been used and the next one may "
               "overwrite it. __syncthreads();", "__syncthreads();", "grid",
               f"{BEFORE_WAIT}|{UNPUBLISHED}|{NEVER_WAITED}"),
    PlantedBug("grid forward, large groups: the unit not published", FORWARD,
               "leave it there: registers are scarce. __syncthreads();", "", "grid large", UNPUBLISHED),
    PlantedBug("grid forward, large groups: copies not waited for", FORWARD,
               "cuda::copy_async_wait<0>(); Publishes keys and values, and the first time queries, to all warps; tells "
               "all threads that the stage before has been used and may be overwritten. __syncthreads();",
               "__syncthreads();", "grid large",
               f"{BEFORE_WAIT}|{UNPUBLISHED}|{NEVER_WAITED}"),
    PlantedBug("grid forward, large groups: keys overwritten while read", FORWARD,
               "the stage before has been used and may be overwritten. __syncthreads();", "", "grid large",
               f"{UNPUBLISHED}|{OVERWRITTEN}"),
    PlantedBug("grid forward, large groups: one stage", FORWARD,
               "Stage& stage = shared.stages[first_key / kKeys % 2]; grid::", "Stage& stage = shared.stages[0]; grid::",
               "grid large", f"{OVERWRITTEN}|{UNINITIALIZED}|{WRONG_OUT}"),
    PlantedBug("grid forward, large groups: the last keys left out", FORWARD,
               "first_key = 0; first_key < geometry.max_tokens;",
               "first_key = 0; first_key + kKeys < geometry.max_tokens;", "grid large", f"{WRONG_OUT}|{NEVER_WAITED}"),
    PlantedBug("grid forward, large groups: bias of the first head", FORWARD,
               "return (head * group + number) * group;", "return number * group;", "grid large", WRONG_OUT),
    PlantedBug("grid forward, large groups: bias past the last query", FORWARD,
               "min(static_cast<int64_t>(first_number) + row, group - 1)", "static_cast<int64_t>(first_number) + row",
               "grid large", READ_OUT_OF_BOUNDS),
    PlantedBug("grid forward, large groups: a lane writes another row's lse", FORWARD,
               "if (lane_id() / 8 == h) {", "if (h == 0) {", "grid large", WRONG_GRADIENT),
    PlantedBug("grid: columns that a unit lacks", GEOMETRY,
               "row < num_rows && column < num_columns}", "row < num_rows}", "grid ragged",
               f"{WRONG_OUT}|{RACE}|{READ_OUT_OF_BOUNDS}"),
    PlantedBug("grid: a column of a short unit left out", GEOMETRY,
               "quotient(axis.size - 1 - first) + 1,", "quotient(axis.size - 1 - first),", "grid ragged",
               f"{WRONG_OUT}|{UNINITIALIZED}"),
    PlantedBug("grid backward: tokens that are not there weigh", BACKWARD,
               "if (!is_there) weights[0][n][e] =", "if (false) weights[0][n][e] =", "grid", WRONG_GRADIENT),
    PlantedBug("grid backward: terms of columns past the tile", BACKWARD,
               "if (n % 2 == 0 && n * 8 >= count) break;", "", "grid windows", UNINITIALIZED),
    PlantedBug("grid backward: bias dropped", BACKWARD,
               "if (args.bias != nullptr) add_bias", "if (false) add_bias", "grid", WRONG_GRADIENT),
    PlantedBug("grid backward: bias turned where keys are rows", BACKWARD,
               "rows.bias_row[row] * (kAreRowsKeys ? 1 : group);",
               "rows.bias_row[row] * (kAreRowsKeys ? group : 1);", "grid windows",
               f"{WRONG_GRADIENT}|{READ_OUT_OF_BOUNDS}"),
    PlantedBug("grid backward: shift dropped", BACKWARD,
               "(d_scores[0][n][e] - shared.shift[query]);", "d_scores[0][n][e];", "grid", WRONG_GRADIENT),
    PlantedBug("grid backward: gradient of values zeroed", BACKWARD,
               "const float ones[2] = {1.0f, 1.0f};", "const float ones[2] = {0.0f, 0.0f};",
               "grid large float32", "AssertionError: d_value"),
    PlantedBug("grid backward: scale dropped", BACKWARD,
               "factors[2] = {args.gradient_scale, args.gradient_scale};", "factors[2] = {1.0f, 1.0f};",
               "grid large float32", WRONG_GRADIENT),
    PlantedBug("grid backward: columns not published", BACKWARD,
               "and the first time those of the rows, to all warps. __syncthreads();", "", "grid large float32",
               UNPUBLISHED),
    PlantedBug("grid backward, large groups: the unit not published", LARGE_GROUPS,
               "leave it there: registers are scarce. __syncthreads();", "", "grid huge", UNPUBLISHED),
    PlantedBug("grid backward, large groups: copies not waited for", LARGE_GROUPS,
               "cuda::copy_async_wait<0>();", "", "grid huge", f"{BEFORE_WAIT}|{UNPUBLISHED}|{NEVER_WAITED}"),
    PlantedBug("grid backward, large groups: keys overwritten while read", LARGE_GROUPS,
               "the stage before has been used and may be overwritten. __syncthreads();", "", "grid huge",
               f"{UNPUBLISHED}|{OVERWRITTEN}"),
    PlantedBug("grid backward, large groups: bias of the first query", LARGE_GROUPS,
               "+ row * group;", "+ 0 * row;", "grid huge", "AssertionError: d_query"),
    PlantedBug("grid backward, whole groups: the unit not published", UNITS,
               "leave it there: registers are scarce. __syncthreads();", "", "grid large", UNPUBLISHED),
    PlantedBug("grid backward, whole groups: keys and values not published", UNITS,
               "Publishes keys and values to all warps. __syncthreads();", "", "grid large", UNPUBLISHED),
    PlantedBug("grid backward, whole groups: queries overwritten while read", UNITS,
               "have been used and may be overwritten. __syncthreads(); const uint32_t next_query",
               "have been used and may be overwritten. const uint32_t next_query", "grid large",
               f"{UNPUBLISHED}|{OVERWRITTEN}"),
    PlantedBug("grid backward, whole groups: d_scores not published", UNITS,
               "tells them that the stage and its terms have been used. __syncthreads();", "", "grid large",
               f"{UNPUBLISHED}|{OVERWRITTEN}"),
    PlantedBug("grid backward, whole groups: d_scores of absent keys not cleared", UNITS,
               "if (mine.there == 0 && args.grad_query.data != nullptr) {", "if (false) {", "grid large",
               f"{UNINITIALIZED}|AssertionError: d_query"),
    PlantedBug("grid backward, whole groups: keys overwritten while read", UNITS,
               "that keys and d_scores have been used and may be overwritten. __syncthreads();", "", "grid large",
               f"{OVERWRITTEN}|{RACE}"),
    PlantedBug("grid backward, whole groups: terms of the first queries", UNITS,
               "if (first_query > 0 && first_query % Shared::kTerms == 0) {", "if (false) {", "grid large",
               f"{WRONG_GRADIENT}|{UNINITIALIZED}"),
    PlantedBug("grid backward, whole groups: shift with the wrong sign", UNITS,
               "shared.minus_shift[query] = -shift;", "shared.minus_shift[query] = shift;", "grid large",
               WRONG_GRADIENT),
    PlantedBug("grid backward, whole groups: shift not left for the bias", UNITS,
               "if (token.is_there) args.shift[", "if (false) args.shift[", "grid large",
               f"{WRONG_BIAS}|{UNINITIALIZED}"),
    PlantedBug("grid backward, whole groups: bias turned", UNITS,
               "static_cast<int64_t>(first_query) + i) * group]", "static_cast<int64_t>(first_query) + i)]",
               "grid large", WRONG_GRADIENT),
    PlantedBug("grid backward, whole groups: gradient of values zeroed", UNITS,
               "ones[4] = {1.0f, 1.0f, 1.0f, 1.0f};", "ones[4] = {0.0f, 0.0f, 0.0f, 0.0f};", "grid large",
               "AssertionError: d_value"),
    PlantedBug("grid backward, whole groups: scale left out of d_scores", UNITS,
               "if (args.d_score_scale != 1.0f) scale_all", "if (false) scale_all", "grid ragged", WRONG_GRADIENT),
    PlantedBug("grid backward, whole groups: half of the columns of grad_query", UNITS,
               "first_column = warp / 4 * kColumns;", "first_column = 0;", "grid ragged",
               f"{RACE}|AssertionError: d_query"),
    PlantedBug("grid backward, small groups: rows not published", GROUPS,
               "Publishes rows and shifts to all warps. __syncthreads();", "", "grid", f"{UNPUBLISHED}|{BEFORE_WAIT}"),
    PlantedBug("grid backward, small groups: rows not waited for", GROUPS,
               "cuda::copy_async_wait<0>();", "", "grid", f"{BEFORE_WAIT}|{UNPUBLISHED}"),
    PlantedBug("grid backward, small groups: d_scores not published", GROUPS,
               "Publishes d_scores to all warps. __syncthreads();", "", "grid", f"{UNPUBLISHED}|{UNINITIALIZED}"),
    PlantedBug("grid backward, small groups: d_scores of another slot", GROUPS,
               "if (k * 16 >= slot_tokens) break;", "", "grid windows", f"{WRONG_GRADIENT}|{UNINITIALIZED}"),
    PlantedBug("grid backward, small groups: d_scores not turned", GROUPS,
               "cuda::load_matrix_x4_transposed(of_queries, Scores", "cuda::load_matrix_x4(of_queries, Scores",
               "grid", "AssertionError: d_query"),
    PlantedBug("grid backward, small groups: scale left out of d_scores", GROUPS,
               "d_scores[0][n][e] *= args.d_score_scale;", "d_scores[0][n][e] *= 1.0f;", "grid scaled", WRONG_GRADIENT),
    PlantedBug("grid backward, small groups: d_scores of absent keys", GROUPS,
               "if (tokens_there<16>(shared.places.there, first_key + k * 16, Shared::kTokens) == 0) continue;", "",
               "grid holes", UNINITIALIZED),
    PlantedBug("grid backward, small groups: gradient of queries unscaled", GROUPS,
               "grad_query); const float factors[2] = {args.gradient_scale, args.gradient_scale};",
               "grad_query); const float factors[2] = {1.0f, 1.0f};", "grid", "AssertionError: d_query"),
    PlantedBug("grid backward, small groups: keys behind a hole left out", GROUPS,
               "first_key + k * 16, Shared::kTokens) == 0) continue;",
               "first_key + k * 16, Shared::kTokens) == 0) break;",
               "grid holes", "AssertionError: d_query"),
    PlantedBug("grid backward, whole groups: tokens that are not there weigh something", UNITS,
               "if (!is_there) weights[m][n][e] = d_scores[m][n][e] = 0.0f;", "", "grid low scores", WRONG_GRADIENT),
    PlantedBug("grid backward: columns overwritten while read", BACKWARD,
               "the tile has been used and the next one may overwrite it. __syncthreads();", "",
               "grid large float32", OVERWRITTEN),
    PlantedBug("grid backward: rows for the bias not published", BACKWARD,
               "Publishes rows and numbers to all warps. __syncthreads();", "", "grid", UNPUBLISHED),
    PlantedBug("grid backward: rows for the bias overwritten while read", BACKWARD,
               "the tiles have been used and the next ones may overwrite them. __syncthreads();", "",
               "grid many groups", OVERWRITTEN),
    PlantedBug("grid backward: the bias' gradient of one image a piece", BACKWARD,
               "sums[step][n][e] += d_scores[0][n][e];", "sums[step][n][e] = d_scores[0][n][e];",
               "grid many groups", WRONG_BIAS),
    PlantedBug("grid backward: the last piece of the bias' gradient left out", BACKWARD_STEPS,
               "piece < args.num_pieces; ++piece", "piece + 1 < args.num_pieces; ++piece", "grid", WRONG_BIAS),
    PlantedBug("grid backward: shift of every other channel", BACKWARD_STEPS,
               "fmaf(left.x, right.x, fmaf(left.y, right.y, sum))", "fmaf(left.x, right.x, sum)",
               "grid", WRONG_GRADIENT),
    PlantedBug("grid backward: the bias' gradient of no image not cleared", BACKWARD_STEPS,
               "if (!needs_grad_bias || bias_sums_of(problem) == 0) return;", "return;", "grid empty", WRONG_BIAS),
]
# fmt: on
