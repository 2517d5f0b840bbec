"""Bugs to plant in the CUDA sources of the indexer; ``cuda/planted_bugs.py`` says how."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from tests.cuda.planted_bug import BEFORE_WAIT, OVERWRITTEN, UNPUBLISHED, PlantedBug
from tests.indexer.helpers import IndexCase, check_route
from tests.indexer.test_route import test_nan_and_inf

CPU = torch.device("cpu")
BFLOAT16 = torch.bfloat16

# Several tiles of queries and of keys of a block, some heads a key head, a short last block.
SMALL = IndexCase(batch=2, num_index_heads=4, num_key_heads=2, query_len=150, dim=40, block_size=36, top_k=2)
OPEN = IndexCase(query_len=90, block_size=20, top_k=3, force_last=0, force_first=1)
SUM = IndexCase(
    num_index_heads=4, query_len=80, reduction="relu_sum", num_choices=2, has_weights=True, force_last=0, top_k=3
)
# Tiles that are full, of rows as wide as the kernel's, some of whose keys some rows do not see.
WHOLE = IndexCase(query_len=150, dim=64, block_size=64, top_k=1, force_last=0)
# Lists too long for registers.
LONG = IndexCase(query_len=50, block_size=1, top_k=20, dim=3)

INDEXER_CASES: dict[str, Callable[[], Any]] = {
    "indexer": lambda: check_route(SMALL, BFLOAT16, CPU),
    "indexer open": lambda: check_route(OPEN, torch.float32, CPU),
    "indexer mean": lambda: check_route(replace(OPEN, reduction="mean"), BFLOAT16, CPU),
    "indexer sum": lambda: check_route(SUM, torch.float32, CPU),
    "indexer sum of many blocks": lambda: check_route(replace(SUM, block_size=4), torch.float32, CPU),
    "indexer small blocks": lambda: check_route(IndexCase(query_len=60, block_size=2, force_last=0), BFLOAT16, CPU),
    "indexer whole tiles": lambda: check_route(WHOLE, BFLOAT16, CPU),
    "indexer long lists": lambda: check_route(LONG, BFLOAT16, CPU),
    "indexer nonfinite": lambda: test_nan_and_inf("max", torch.float32, CPU),
}

WRONG = "AssertionError"
ROUTE = "indexer/indexer_route_cuda.cu"
INDEXER_UNITS: dict[str, list[str]] = {}

# fmt: off
INDEXER_BUGS = [
    PlantedBug("index_route: keys behind the query count", ROUTE,
               "key >= end || key > position[r]", "key >= end", "indexer open", WRONG),
    PlantedBug("index_route: keys of the next block count", ROUTE,
               "key >= end || key > position[r]", "key > position[r]", "indexer small blocks",
               WRONG),
    PlantedBug("index_route: full tiles hide nothing", ROUTE,
               "is_open = count == kKeys && next - 1 <= warp_position", "is_open = count == kKeys",
               "indexer whole tiles", WRONG),
    PlantedBug("index_route: queries of the first head stay", ROUTE,
               "(args.heads_per_choice > 1 || group == args.force_first)", "(group == args.force_first)",
               "indexer sum of many blocks", WRONG),
    PlantedBug("index_route: tiles overwritten while others read them", ROUTE,
               "// Every warp is done with the tiles before they are overwritten. __syncthreads();", "",
               "indexer sum", OVERWRITTEN),
    PlantedBug("index_route: the next tile in place of this one", ROUTE,
               "copy_rows(shared.key[buffer ^ 1], keys", "copy_rows(shared.key[buffer], keys", "indexer whole tiles",
               OVERWRITTEN),
    PlantedBug("index_route: tiles not published", ROUTE,
               "// Publishes the tile to every warp, and says that every warp is done with the other one. "
               "__syncthreads();", "", "indexer", UNPUBLISHED),
    PlantedBug("index_route: tiles not waited for", ROUTE, "cuda::copy_async_wait<0>();", "", "indexer", BEFORE_WAIT),
    PlantedBug("index_route: scores not published", ROUTE,
               "// Publishes the scores to their rows' lanes. __syncwarp();", "", "indexer", UNPUBLISHED),
    PlantedBug("index_route: groups before are forgotten", ROUTE,
               "group, count, group == args.force_first,", "group, count, true,", "indexer small blocks", WRONG),
    PlantedBug("index_route: ties go to the later block", ROUTE,
               "beats_this = !(score <= scores[r])", "beats_this = !(score < scores[r])", "indexer small blocks",
               WRONG),
    PlantedBug("index_route: ties go to the later block of long lists", ROUTE,
               "rank > 0 && score > scores[rank - 1]", "rank > 0 && score >= scores[rank - 1]", "indexer long lists",
               WRONG),
    PlantedBug("index_route: weights left out", ROUTE, "score *= shared.weights[row];", "", "indexer sum", WRONG),
    PlantedBug("index_route: negative products counted", ROUTE,
               "cuda::max_or_nan(product, 0.0f)", "product", "indexer sum", WRONG),
    PlantedBug("index_route: a mean over hidden keys too", ROUTE,
               "min(position_of_sums(args, warp_position, r) + 1, end_key) - first_of_block",
               "end_key - first_of_block", "indexer mean", WRONG),
    PlantedBug("index_route: NaN ranks last", ROUTE,
               "return isnan(score) ? INFINITY : score;", "return isnan(score) ? -INFINITY : score;",
               "indexer nonfinite", WRONG),
    PlantedBug("index_route: forced blocks compete", ROUTE,
               "visible > args.top_k ? visible - args.force_last : 0", "visible > args.top_k ? visible : 0",
               "indexer", WRONG),
]
# fmt: on
