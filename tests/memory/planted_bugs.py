"""Bugs to plant in the CUDA sources of memory layers; ``cuda/planted_bugs.py`` says how."""

from collections.abc import Callable
from typing import Any

import torch

import topgather as tg
from tests.common.tensors import integer_tensor, random_tensor
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
from tests.memory.bag_helpers import SIZES, BagCase, assert_bags_close, make_bags, run_bags, run_reference
from tests.memory.helpers import (
    LookupCase,
    TopkCase,
    assert_topk_contract,
    check_experts,
    check_lookup,
    check_topk,
    crowded_rows,
    make_lookup,
    run_lookup,
)
from tests.memory.quantized_helpers import FLOAT8, QuantizedCase, check_quantized
from tests.memory.row_steps import CASES, check_row_steps
from topgather import reference

CPU = torch.device("cpu")
BFLOAT16 = torch.bfloat16

# --- cases ------------------------------------------------------------------------------------------------------------

# Several tokens a warp, bags that end within a step, rows of whole vectors; then not, and rows that no one names.
LOOKUP = LookupCase(num_tokens=21, width=40, bag_size=11, width_in=24)
ODD_LOOKUP = LookupCase(num_rows=300, num_tokens=21, width=37, bag_size=11, width_in=150)
# Runs that begin, end and go on in other pieces.
RUNS = LookupCase(num_rows=20, num_tokens=60, width=16, bag_size=11, pattern="power_law")
# A run of more than two stretches of pieces, by far.
LONG_RUN = LookupCase(num_rows=3, num_tokens=4000, width=2, bag_size=8, pattern="hot")
# Two groups of scales that a slab of lanes shares; then groups that no lane's 16 columns fit.
QUANTIZED_ROWS = QuantizedCase(width=160, group_size=80, bag_size=9, num_tokens=5)
ODD_QUANTIZED = QuantizedCase(width=30, group_size=5, num_tokens=5, bag_size=20, sizes=(3, 0, 41, 30, 19))
RAGGED = BagCase(rest=4, width=24)
SEARCH = TopkCase(num_tokens=40, num_heads=2, num_keys=75, head_dim=48, top_k=20)
# Several chunks of keys, entries that wait for the next one.
CHUNKS = TopkCase(num_tokens=40, num_heads=1, num_keys=500, head_dim=24, top_k=20)
LONG_LISTS = TopkCase(num_tokens=5, num_heads=1, num_keys=150, head_dim=24, top_k=100)


def bad_index_case() -> None:
    """An index past the table: NaN for its token, nothing for its row."""
    lookup = make_lookup(LOOKUP, BFLOAT16, CPU)
    lookup.indices[5, 3] = 2**20
    result = run_lookup(lookup)
    is_nan = torch.zeros(LOOKUP.num_tokens, dtype=torch.bool)
    is_nan[5] = True
    assert torch.equal(result["out"].isnan().all(-1), is_nan), "out: NaN is not where the bad index is"
    assert torch.equal(result["out"].isnan().any(-1), is_nan), "out: NaN is not where the bad index is"
    dots = torch.ops.topgather.memory_dot(lookup.values_in.detach(), lookup.indices, lookup.x.detach())
    for name, tensor in (("d_weights", result["d_weights"]), ("dots", dots)):
        expected = lookup.indices >= LOOKUP.num_rows
        assert torch.equal(tensor.isnan(), expected), f"{name}: NaN is not where the bad index is"
    assert result["d_values"].isfinite().all(), "d_values: not finite"


def ragged_case() -> None:
    """Bags of other sizes beside each other in a warp, entries of nobody."""
    bags = make_bags(RAGGED, BFLOAT16, CPU)
    assert_bags_close(run_bags(bags), run_reference(bags), 0.1)
    bags["values"] = bags["values"].detach()
    (d_weights,) = torch.autograd.grad(tg.memory_lookup(**bags).float().sum(), bags["weights"])
    dots = bags["values"].float().sum(1)[bags["indices"]]
    dots[sum(SIZES) :] = 0
    torch.testing.assert_close(d_weights.float(), dots, rtol=0.1, atol=0.1, msg="frozen: not the sums of rows")


def bad_offsets_case() -> None:
    """NaN for a bag that leads past the last entry, nothing else."""
    bags = make_bags(RAGGED, torch.float32, CPU)
    bags["offsets"][-1] = len(bags["indices"]) + 1
    is_nan = run_bags(bags)["out"].isnan().any(-1)
    assert is_nan.nonzero().flatten().tolist() == [len(SIZES) - 1], "out: NaN is not where the wrong offset is"


def one_half_case() -> None:
    """All of the first half's list is chosen, the last of it found after the others."""
    query, keys = torch.ones(1, 1, 2, dtype=BFLOAT16), torch.zeros(1, 2, 75, 1, dtype=BFLOAT16)
    keys[0, 0, :19, 0], keys[0, 0, 70], keys[0, 1, 0] = torch.arange(40, 59).bfloat16(), 30, 64
    assert_topk_contract(*tg.product_key_topk(query, keys, 20), query, keys, 20)


def ties_case() -> None:
    """Small integers: scores are exact, many tie, and the choice equals the reference's."""
    query, keys = integer_tensor((9, 2, 6), BFLOAT16, CPU, 0), integer_tensor((2, 2, 90, 3), BFLOAT16, CPU, 1)
    for top_k in (9, 100):
        indices = tg.product_key_topk(query, keys, top_k)[1]
        assert torch.equal(indices, reference.product_key_topk(query, keys, top_k)[1]), "indices: not the reference's"


def crowded_case() -> None:
    """Rows that most keys beat anew, beside rows that few do: some have no room for a chunk."""
    query, keys = crowded_rows(BFLOAT16, CPU)
    indices = tg.product_key_topk(query, keys, 9)[1]
    assert torch.equal(indices, reference.product_key_topk(query, keys, 9)[1]), "indices: not the reference's"


def left_out_case() -> None:
    """The last of 32 chosen keys ties with another one, and nothing else does: the lower of the two is chosen."""
    query, keys = torch.ones(1, 1, 2, dtype=BFLOAT16), torch.zeros(1, 2, 40, 1, dtype=BFLOAT16)
    keys[0, 0, :, 0], keys[0, 1, 1:] = torch.arange(139, 99, -1), -1000
    keys[0, 0, 39] = 108
    expected = torch.arange(32)[None, None] * 40
    assert torch.equal(tg.product_key_topk(query, keys, 32)[1], expected), "indices: not the first ones"


def nonfinite_case() -> None:
    query, keys = random_tensor((5, 1, 8), BFLOAT16, CPU, 0).abs(), random_tensor((1, 2, 40, 4), BFLOAT16, CPU, 1)
    keys[0, 0, 3], keys[0, 1, 7], keys[0, 1, 9] = torch.nan, -torch.inf, torch.inf
    assert_topk_contract(*tg.product_key_topk(query, keys, 60), query, keys, 60)


def infinite_case() -> None:
    """Few and many infinite half scores: of equal sums the lower index, the numbers between them in order."""
    generator = torch.Generator().manual_seed(0)
    halves = torch.randint(-3, 4, (12, 2, 70), generator=generator).bfloat16()
    kinds = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=BFLOAT16)
    special = kinds[torch.randint(0, 3, halves.shape, generator=generator)]
    is_special = torch.rand(halves.shape, generator=generator) < torch.tensor([0.01, 0.1, 0.9]).repeat(4)[:, None, None]
    query, keys = torch.ones(1, 12, 2, dtype=BFLOAT16), torch.where(is_special, special, halves).unsqueeze(-1)
    keys[0, 0, 60], keys[1, :, 5:], keys[2, 0] = torch.inf, -torch.inf, -torch.inf
    # Numbers, the first key's the worst of them, then masked keys.
    keys[3] = -torch.inf
    keys[3, :, :5, 0] = torch.arange(5)
    for top_k in (3, 60, 128):
        indices = tg.product_key_topk(query, keys, top_k)[1]
        assert torch.equal(indices, reference.product_key_topk(query, keys, top_k)[1]), "indices: not the reference's"


def nan_of_e4m3_case() -> None:
    """The byte that stands for NaN, beside those of the largest and the smallest numbers."""
    values = torch.tensor([[0x7F], [0x7E], [0x01], [0x87]]).to(torch.uint8).view(FLOAT8)
    out = tg.quantized_lookup(values, torch.ones(4, 1), torch.arange(4).unsqueeze(1))
    torch.testing.assert_close(out, values.float(), rtol=0, atol=0, equal_nan=True, msg="out: not what the bytes are")


MEMORY_CASES: dict[str, Callable[[], Any]] = {
    "lookup": lambda: check_lookup(LOOKUP, BFLOAT16, CPU),
    "lookup odd": lambda: check_lookup(ODD_LOOKUP, BFLOAT16, CPU),
    "lookup runs": lambda: check_lookup(RUNS, BFLOAT16, CPU),
    "lookup long run": lambda: check_lookup(LONG_RUN, torch.float32, CPU),
    "experts": lambda: check_experts(LOOKUP, BFLOAT16, CPU),
    "experts odd": lambda: check_experts(ODD_LOOKUP, BFLOAT16, CPU),
    "bad index": bad_index_case,
    "ragged": ragged_case,
    "bad offsets": bad_offsets_case,
    "quantized": lambda: check_quantized(QUANTIZED_ROWS, torch.int8, CPU),
    "quantized odd": lambda: check_quantized(ODD_QUANTIZED, FLOAT8, CPU),
    "quantized nan": nan_of_e4m3_case,
    "row steps": lambda: check_row_steps(CASES["Adam"], CPU),
    "search": lambda: check_topk(SEARCH, BFLOAT16, CPU),
    "search chunks": lambda: check_topk(CHUNKS, BFLOAT16, CPU),
    "search crowded": crowded_case,
    "search left out": left_out_case,
    "search long lists": lambda: check_topk(LONG_LISTS, BFLOAT16, CPU),
    "search one half": one_half_case,
    "search ties": ties_case,
    "search nonfinite": nonfinite_case,
    "search infinite": infinite_case,
}

# --- bugs -------------------------------------------------------------------------------------------------------------

WRONG_OUT = "AssertionError: out"
WRONG_TABLE = "AssertionError: d_values"
WRONG_WEIGHTS = "AssertionError: d_weights"
WRONG_STEP = "AssertionError: (values|steps|first|second|decayed|squares)"
WRONG_SEARCH = "AssertionError: (indices|scores)"

LOOKUPS = "memory/memory_walks_cuda.cuh"
BAGS = "memory/memory_bags_cuda.cuh"
QUANTIZED = "memory/memory_quantized_cuda.cu"
ROWS = "cuda/lane_rows.cuh"
BACKWARD = "memory/memory_backward_cuda.cu"
UPDATE = "memory/memory_update_cuda.cu"
RUNS_OF_ROWS = "memory/memory_runs_cuda.cuh"
TOPK = "memory/memory_topk_cuda.cuh"
LISTS = "memory/memory_topk_lists_cuda.cuh"
MEMORY_UNITS = {
    ROWS: ["memory_lookup_cuda.cu"],
    LOOKUPS: ["memory_lookup_cuda.cu"],
    BAGS: ["memory_lookup_cuda.cu"],
    RUNS_OF_ROWS: ["memory_backward_cuda.cu"],
    TOPK: ["memory_topk_cuda.cu"],
    LISTS: ["memory_topk_cuda.cu"],
}
INFINITE = "memory/memory_topk_infinite_cuda.cu"

# fmt: off
MEMORY_BUGS = [
    PlantedBug("lookup: one entry past the bag", LOOKUPS,
               "k >= bag.size) return {kNoRow, 0.0f};", "k > bag.size) return {kNoRow, 0.0f};",
               "lookup", f"{WRONG_OUT}|{READ_OUT_OF_BOUNDS}"),
    PlantedBug("lookup: every row with the weight of the first", LOOKUPS,
               "__shfl_sync(kAllLanes, my_weight, e + i, lanes_per_row)",
               "__shfl_sync(kAllLanes, my_weight, e, lanes_per_row)", "lookup", WRONG_OUT),
    PlantedBug("lookup: a bad index followed", LOOKUPS,
               "is_row = next.index >= 0 && next.index < args.num_rows;", "is_row = next.index >= 0;",
               "bad index", OUT_OF_BOUNDS),
    PlantedBug("lookup: a bad index passed over", LOOKUPS,
               "is_row || !is_entry ? next.weight : not_a_number();", "is_row ? next.weight : 0.0f;",
               "bad index", WRONG_OUT),
    PlantedBug("lookup: what lies past the bag is a bad index", LOOKUPS,
               "is_row || !is_entry ? next.weight", "is_row ? next.weight", "lookup", WRONG_OUT),
    PlantedBug("dot: of another entry", LOOKUPS,
               "task.lane_in_row / 4 == (e + i) / 4", "task.lane_in_row / 4 == e / 4", "experts", "AssertionError"),
    PlantedBug("dot: a bad index passed over", LOOKUPS,
               "my_row == kNoRow ? not_a_number() : my_dot", "my_dot", "bad index", "AssertionError: dots"),
    PlantedBug("lookup: ragged bags without their last entry", BAGS,
               "bag.size = static_cast<int32_t>(end - first);", "bag.size = static_cast<int32_t>(end - first) - 1;",
               "ragged", WRONG_OUT),
    PlantedBug("lookup: ragged bags where equal ones lie", BAGS,
               "bag.first = first;", "bag.first = task.token;", "ragged", f"{WRONG_OUT}|{READ_OUT_OF_BOUNDS}"),
    PlantedBug("lookup: a warp stops at its first bag's end", BAGS,
               "bag.longest = max(bag.longest, __shfl_xor_sync(kAllLanes, bag.longest, distance));",
               "bag.longest = __shfl_sync(kAllLanes, bag.longest, 0);", "ragged", WRONG_OUT),
    PlantedBug("lookup: wrong offsets followed", BAGS,
               "first <= end && end <= args.num_entries;", "first <= end;", "bad offsets", READ_OUT_OF_BOUNDS),
    PlantedBug("lookup: wrong offsets passed over", LOOKUPS,
               "if (!bag.is_valid) {", "if (false) {", "bad offsets", WRONG_OUT),
    PlantedBug("dot: x of the first token", LOOKUPS,
               "row_of_x = args.tokens[task.token];", "row_of_x = args.tokens[0];", "ragged", "AssertionError"),
    PlantedBug("dot: entries of nobody not 0", LOOKUPS,
               "!has_x ? 0.0f : my_row == kNoRow ?", "my_row == kNoRow && has_x ? 1.0f : my_row >= 0 && !has_x ?",
               "ragged", "AssertionError: frozen"),
    PlantedBug("quantized: scales of the first group", QUANTIZED,
               "args.scales[row * args.scales_stride + column / args.group_size]",
               "args.scales[row * args.scales_stride]", "quantized", WRONG_OUT),
    PlantedBug("quantized: dot without the scale", QUANTIZED,
               "return fmaf(row.scales.of(0), of_lane, sum);", "return sum + of_lane;", "quantized", WRONG_WEIGHTS),
    PlantedBug("quantized: one scale for columns apart", QUANTIZED,
               "return values[kVector == 1 ? piece : 0];", "return values[0];",
               "quantized odd", f"{WRONG_OUT}|{WRONG_WEIGHTS}"),
    PlantedBug("quantized: NaN of e4m3 a number", QUANTIZED,
               "magnitude == 0x7fu ? not_a_number() :", "false ? not_a_number() :", "quantized nan", WRONG_OUT),
    PlantedBug("rows: stored past their end", ROWS,
               "if (first + i * step < row_dim) row[first + i * step] = cuda::from_float",
               "if (true) row[first + i * step] = cuda::from_float",
               "lookup odd", f"{OUT_OF_BOUNDS}|{RACE}|{WRONG_OUT}"),
    PlantedBug("rows: two of four sums swapped", ROWS,
               "const float high = (is_odd ? sums[3] : sums[2])", "const float high = (is_odd ? sums[2] : sums[3])",
               "experts", "AssertionError"),
    PlantedBug("rows: sums over half of the lanes", ROWS,
               "for (int distance = 4; distance < lanes_per_row;",
               "for (int distance = 4; distance * 2 < lanes_per_row;",
               "experts odd", "AssertionError"),
    PlantedBug("backward: tokens of ragged bags not looked up", RUNS_OF_ROWS,
               "if (args.tokens != nullptr) token = args.tokens[place];", "", "ragged", WRONG_TABLE),
    PlantedBug("backward: weights of nobody's entries NaN", BACKWARD,
               "args.tokens[place] < 0 ? 0.0f : not_a_number();", "args.tokens[place] < 0 ? not_a_number() : 0.0f;",
               "ragged", WRONG_WEIGHTS),
    PlantedBug("backward: products not published", BACKWARD,
               "Publishes every warp's products to the thread block. __syncthreads();", "", "lookup odd", UNPUBLISHED),
    PlantedBug("backward: a run from before written over", BACKWARD,
               "if (row == piece.row_before) sum =", "if (false) sum =",
               "lookup runs", f"{RACE}|{UNINITIALIZED}|{WRONG_TABLE}"),
    PlantedBug("backward: a run that goes on written over", BACKWARD,
               "if (row == piece.row_after) sum =", "if (false) sum =",
               "lookup runs", f"{RACE}|{UNINITIALIZED}|{WRONG_TABLE}"),
    PlantedBug("backward: sums go on into the next run", BACKWARD,
               "is_new_row ? 0.0f : sums[c]);", "sums[c]);", "lookup", WRONG_TABLE),
    PlantedBug("backward: values of the first row", BACKWARD,
               "row = mine[i].row == kNoRow ? 0u :", "row = e + i >= 0 ? 0u :", "lookup", WRONG_WEIGHTS),
    PlantedBug("backward: products of lanes past a row's end", BACKWARD,
               "if (columns.is_past_end()) products[i] = 0.0f;", "", "lookup", WRONG_WEIGHTS),
    PlantedBug("backward: entries of the step before", BACKWARD,
               "load_entry(entries + e + kEntriesInFlight + i)", "load_entry(entries + e + i)",
               "lookup", f"{WRONG_TABLE}|{UNINITIALIZED}"),
    PlantedBug("backward: entries past the last not marked", BACKWARD,
               "if (position >= args.num_padded_entries) return;", "if (position >= args.num_entries) return;",
               "lookup", UNINITIALIZED),
    PlantedBug("backward: rows of no entry not cleared", BACKWARD,
               "while (empty_rows != 0) {", "while (false) {", "lookup odd", WRONG_TABLE),
    PlantedBug("backward: rows past the table cleared", BACKWARD,
               "is_empty = mine < args.num_targets &&", "is_empty =", "lookup", OUT_OF_BOUNDS),
    PlantedBug("backward: the row after an entry's not cleared", BACKWARD,
               "args.targets[low] == target && row_at", "args.targets[low] <= target + 1 && row_at",
               "lookup odd", WRONG_TABLE),
    PlantedBug("backward: the row of a bad index written", RUNS_OF_ROWS,
               "return row >= 0 && row < args.num_rows ? row : kNoRow;", "return row;",
               "bad index", f"{OUT_OF_BOUNDS}|{READ_OUT_OF_BOUNDS}"),
    PlantedBug("backward: the weight of a bad index passed over", BACKWARD,
               "if (row_at(args, position) == kNoRow) {", "if (false) {", "bad index", WRONG_WEIGHTS),
    PlantedBug("backward: a long run begun twice", RUNS_OF_ROWS,
               "if (row_at(args, begin * kEntriesPerPiece - 1) == row) return run;", "",
               "lookup long run", f"{RACE}|{UNINITIALIZED}|{WRONG_TABLE}"),
    PlantedBug("backward: stretches left out", RUNS_OF_ROWS,
               "kPiecesPerStretch * sum_step, count,", "kPiecesPerStretch * sum_step, count - 1,",
               "lookup long run", WRONG_TABLE),
    PlantedBug("backward: heads after the stretches left out", RUNS_OF_ROWS,
               "if (piece < end) add_heads(piece, end);", "", "lookup long run", WRONG_TABLE),
    PlantedBug("update: a run that goes on stepped at once", UPDATE,
               "if (run_row == piece.row_after) sum =", "if (false) sum =",
               "row steps", f"{RACE}|{UNINITIALIZED}|{WRONG_STEP}"),
    PlantedBug("update: the run at a piece's end left out", UPDATE,
               "for (int e = 0; e <= kEntriesPerPiece; ++e) {", "for (int e = 0; e < kEntriesPerPiece; ++e) {",
               "row steps", f"{UNINITIALIZED}|{WRONG_STEP}"),
    PlantedBug("update: every run counts a step an entry", UPDATE,
               "row_at(args, position - 1) == entry.row ||", "", "row steps", f"{RACE}|{WRONG_STEP}"),
    PlantedBug("update: random bits of the other state", UPDATE,
               "args.is_stochastic, step.bits_of_states, 16);", "args.is_stochastic, step.bits_of_states, 0);",
               "row steps", WRONG_STEP),
    PlantedBug("update: squares not published", UPDATE,
               "Publishes every thread's squares to the first warp. __syncthreads();", "", "row steps", UNPUBLISHED),
    PlantedBug("search: keys not published", TOPK,
               "used and its stage may be overwritten. __syncthreads();", "", "search", f"{UNPUBLISHED}|{OVERWRITTEN}"),
    PlantedBug("search: copies not waited for", TOPK,
               "product_key::wait_for_slice(args.num_stages);", "", "search", f"{BEFORE_WAIT}|{UNPUBLISHED}"),
    PlantedBug("search: counts not published", TOPK,
               "Publishes the counts to all warps. __syncthreads();", "", "search", f"{UNPUBLISHED}|{RACE}"),
    PlantedBug("search: appended entries not published", TOPK,
               "return __syncthreads_or(is_full ? 1 : 0) != 0;", "return is_full;", "search",
               f"{UNPUBLISHED}|{UNINITIALIZED}|{RACE}"),
    PlantedBug("search: rows not published between the parts of a chunk", TOPK,
               "if (step > first_step) __syncthreads();", "", "search", f"{UNPUBLISHED}|{OVERWRITTEN}|{RACE}"),
    PlantedBug("search: a list overwritten while read", TOPK,
               "the list has been read and may be overwritten. __syncwarp();", "", "search", OVERWRITTEN),
    PlantedBug("search: pending sums not published", LISTS,
               "Publishes the pending entries to the warp. __syncwarp(); list.enter(pending[lane_id()]);",
               "\nlist.enter(pending[lane_id()]);", "search long lists", f"{UNPUBLISHED}|{OVERWRITTEN}"),
    PlantedBug("search: pending sums overwritten while read", LISTS,
               "they have been read and may be overwritten. __syncwarp(); if (passes", "\nif (passes",
               "search long lists", OVERWRITTEN),
    PlantedBug("search: lists not cleared", TOPK,
               "product_key::clear_lists<kPerLane>(shared, half, num_rows);", "", "search", UNINITIALIZED),
    PlantedBug("search: pending keys forgotten", TOPK,
               "product_key::Merging merging = product_key::Merging::kAll;",
               "product_key::Merging merging = product_key::Merging::kMany;",
               "search chunks", f"{WRONG_SEARCH}|{UNINITIALIZED}"),
    PlantedBug("search: keys that are not there", TOPK,
               "if (count < Shared::kKeys) product_key::hide_absent(sums, count - product_key);", "",
               "search crowded", WRONG_SEARCH),
    PlantedBug("search: a warp's keys in two parts of a chunk", TOPK,
               "key_group / Shared::kGroupsPerPart == step - 1;", "key_group / Shared::kGroupsPerPart <= step - 1;",
               "search", WRONG_SEARCH),
    PlantedBug("search: places of other warps' entries", TOPK,
               "if (group < key_group) own_start +=", "if (group <= key_group) own_start +=",
               "search", f"{WRONG_SEARCH}|{UNINITIALIZED}|{RACE}"),
    PlantedBug("search: a row takes more than it has room for", TOPK,
               "return num_pending + num_new <= Shared::kPending;",
               "return num_pending + num_new <= 2 * Shared::kPending;",
               "search crowded", f"{WRONG_SEARCH}|{RACE}|{OVERWRITTEN}|{UNINITIALIZED}"),
    PlantedBug("search: a chunk taken twice", TOPK,
               "(is_whole ? has_room : appending.takes_none());", "false;", "search crowded", WRONG_SEARCH),
    PlantedBug("search: rows that take nothing more", TOPK,
               "merging == Merging::kParts && (is_whole", "merging != Merging::kMany && (is_whole",
               "search crowded", WRONG_SEARCH),
    PlantedBug("search: one key of a half too few", TOPK,
               "min(args.top_k, args.num_keys) - 1;", "min(args.top_k, args.num_keys) - 2;",
               "search one half", WRONG_SEARCH),
    PlantedBug("search: halves of a pair exchanged", TOPK,
               "shared.first_keys[row][a]) * static_cast<uint32_t>(num_keys) + shared.keys[row][b];",
               "shared.keys[row][b]) * static_cast<uint32_t>(num_keys) + shared.first_keys[row][a];",
               "search", WRONG_SEARCH),
    PlantedBug("search: lists of 128 not merged", LISTS,
               "list[j + distance] = keep(first, second, false);", "list[j + distance] = second;",
               "search long lists", WRONG_SEARCH),
    PlantedBug("search: ties of 27 bits in any order", LISTS,
               "if (__any_sync(kAllLanes, is_tie) == 0) return", "if (true) return", "search ties", WRONG_SEARCH),
    PlantedBug("search: ties of keys' words in any order", TOPK,
               "if (!best.is_open()) { const bool is_there", "if (true) { const bool is_there",
               "search ties", WRONG_SEARCH),
    PlantedBug("search: ties of pairs' words in any order", TOPK,
               "if (!best.is_open()) { if (lane < args.top_k)", "if (true) { if (lane < args.top_k)",
               "search ties", WRONG_SEARCH),
    PlantedBug("search: ties with what is left out", LISTS,
               "is_order_open || is_choice_open) != 0;", "is_order_open) != 0;", "search left out", WRONG_SEARCH),
    PlantedBug("search: infinite rows left as they are", "memory/memory_topk_cuda.cu",
               "rewrite_infinite_rows(args, params.dtype, static_cast<cudaStream_t>(place.stream));", "",
               "search infinite", WRONG_SEARCH),
    PlantedBug("infinite: a NaN becomes infinite", INFINITE,
               "return ordinal == kNanOrdinal ? NAN : score_of(ordinal);",
               "return score_of(min(ordinal, kInfinityOrdinal));",
               "search nonfinite", WRONG_SEARCH),
    PlantedBug("infinite: opposite infinities come first", INFINITE,
               "const bool plus = exists && is_plus(entry), minus = exists && is_minus(entry);",
               "const bool plus = exists && is_plus(entry), minus = false;",
               "search nonfinite", WRONG_SEARCH),
    PlantedBug("infinite: only the best score looked at", INFINITE,
               "!isfinite(scores[0]) || !isfinite(scores[args.top_k - 1]);", "!isfinite(scores[0]);",
               "search infinite", WRONG_SEARCH),
    PlantedBug("infinite: lists not published", INFINITE,
               "Publishes the lists to the warp. __syncwarp();", "", "search infinite", f"{UNPUBLISHED}|{OVERWRITTEN}"),
    PlantedBug("infinite: lists overwritten while read", INFINITE,
               "Tells the warp that the lists have been read and may be overwritten. __syncwarp();", "",
               "search infinite", OVERWRITTEN),
    PlantedBug("infinite: numbers with +inf alone", INFINITE,
               "(is_plus(first) ? kNotMinus : kPlus)", "kPlus", "search infinite", WRONG_SEARCH),
    PlantedBug("infinite: keys that follow 32 others forgotten", INFINITE,
               "const int position = count + __popc(", "const int position = __popc(", "search infinite", RACE),
]
# fmt: on
