"""Block attention with the blocks chosen beforehand: what share of the machine's matrix-product rate it reaches.

    python bench/moba_shares.py           # a minute
    python bench/moba_shares.py --quick   # one small row of each kind

One row a direction, block size, head dimension and dtype: the products over visible pairs (2 forward, 5 backward),
the median time, and their rate as a share of the rate of torch's float32 product of two matrices of 2048 x 2048,
measured in turn with them: what else runs on a machine then slows both. Writes moba_shares.json to
bench/results/<device>/.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import topgather as tg
from _harness import begin, parse_options, results_folder, time_interleaved, write_json
from moba import BATCH_SIZE, NUM_HEADS, TOP_K, visible_pairs

FORWARD_TOKENS, BACKWARD_TOKENS, QUICK_TOKENS = 65536, 16384, 2048
BLOCK_SIZES = (32, 64, 128)
HEAD_DIMS = (64, 96, 128, 192, 256)
GEMM_SIZE = 2048
FORWARD, BACKWARD = "forward", "backward"


def shapes(is_quick: bool) -> list[tuple[str, str, int, int, int]]:
    """dtype, direction, tokens, block size and head dimension of every row."""
    if is_quick:
        return [(dtype, way, QUICK_TOKENS, 64, 64) for dtype in ("float32", "bfloat16") for way in (FORWARD, BACKWARD)]
    rows = [("float32", FORWARD, FORWARD_TOKENS, block, 64) for block in BLOCK_SIZES]
    half = FORWARD_TOKENS // 2
    rows += [("float32", FORWARD, half, block, dim) for dim in HEAD_DIMS[1:] for block in BLOCK_SIZES[1:]]
    rows += [("bfloat16", FORWARD, FORWARD_TOKENS, block, 64) for block in BLOCK_SIZES]
    rows += [("bfloat16", FORWARD, half, 128, 128)]
    rows += [(dtype, BACKWARD, BACKWARD_TOKENS, block, 64) for dtype in ("float32", "bfloat16") for block in (64, 128)]
    return rows


def measure(dtype: str, direction: str, num_tokens: int, block_size: int, head_dim: int) -> dict[str, float]:
    """Median seconds of a call, and the median over rounds of its share of the product's rate."""
    device = torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    shape = (4, BATCH_SIZE, NUM_HEADS, num_tokens, head_dim)
    query, key, value, grad_out = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
    routing = tg.BlockRouting(tg.moba_route(query, key, block_size, TOP_K).block_indices, block_size)
    attend = partial(tg.moba_attention, block_size=block_size, routing=routing)
    if direction == FORWARD:
        run: Callable[[], object] = torch.no_grad()(partial(attend, query, key, value))
    else:
        leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
        out: Tensor = attend(*leaves)
        run = partial(torch.autograd.grad, out, leaves, grad_out, retain_graph=True)
    left = torch.randn(GEMM_SIZE, GEMM_SIZE)
    timings = time_interleaved({"ours": run, "gemm": lambda: left @ left}, device, max_rounds=6, budget_seconds=2.0)
    num_products = 2 if direction == FORWARD else 5
    flops = num_products * 2 * head_dim * BATCH_SIZE * NUM_HEADS * visible_pairs(num_tokens, block_size)
    # The first round warms up.
    pairs = list(zip(timings["ours"].samples, timings["gemm"].samples, strict=False))[1:]
    share = statistics.median(flops / ours / (2 * GEMM_SIZE**3 / gemm) for ours, gemm in pairs)
    return {"seconds": statistics.median(ours for ours, _ in pairs), "share": share}


def main() -> None:
    options = parse_options(__doc__, "moba_shares")
    device, run = begin(options)
    table = Table("dtype", "direction", "N", "block", "D", "ms", "share of sgemm")
    rows = []
    for dtype, direction, num_tokens, block_size, head_dim in shapes(options.quick):
        found = measure(dtype, direction, num_tokens, block_size, head_dim)
        names = {"dtype": dtype, "direction": direction, "num_tokens": num_tokens}
        rows.append({**names, "block_size": block_size, "head_dim": head_dim, **found})
        numbers = (str(num_tokens), str(block_size), str(head_dim))
        table.add_row(dtype, direction, *numbers, f"{found['seconds'] * 1e3:.1f}", f"{found['share']:.0%}")
    Console().print(table)
    folder = options.output or (None if options.quick else results_folder(device))
    if folder is not None:
        write_json(folder / "moba_shares.json", {"run": run, "rows": rows})


if __name__ == "__main__":
    main()
