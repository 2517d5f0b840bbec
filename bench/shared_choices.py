"""What it gains that the query heads of a key head share a choice of blocks: the forward, against one choice a head.

    python bench/shared_choices.py

Both attend to the same blocks, chosen once for each key head and query, and give the same bits; one is told so by
``block_indices [B, Hkv, Nq, top_k]``, the other has them copied for every query head. Prints milliseconds a call, taken
in turn, and writes shared_choices.json to bench/results/<device>/.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from rich.console import Console
from rich.table import Table

import topgather as tg
from _harness import begin, parse_options, results_folder, time_interleaved, write_json

BLOCK_SIZE, HEAD_DIM, TOP_K = 128, 128, 16
LENGTHS = ((64, 16384), (256, 16384), (2048, 16384), (8192, 8192))  # new queries, keys
HEADS = ((16, 2), (16, 1))  # query heads, key heads


def measure(
    num_queries: int, num_keys: int, heads: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Milliseconds of either, without gradients."""
    generator = torch.Generator().manual_seed(0)
    num_heads, num_kv_heads = heads
    query = torch.randn((1, num_heads, num_queries, HEAD_DIM), generator=generator).to(device, dtype)
    key, value = torch.randn((2, 1, num_kv_heads, num_keys, HEAD_DIM), generator=generator).to(device, dtype)
    choice = tg.moba_route(query[:, :: num_heads // num_kv_heads], key, BLOCK_SIZE, TOP_K).block_indices
    copied = choice.repeat_interleave(num_heads // num_kv_heads, dim=1)
    calls = {
        name: partial(tg.moba_attention, query, key, value, BLOCK_SIZE, routing=tg.BlockRouting(blocks, BLOCK_SIZE))
        for name, blocks in (("shared", choice), ("a head", copied))
    }
    assert torch.equal(calls["shared"](), calls["a head"]())
    timings = time_interleaved(calls, device, max_rounds=9)
    return {name: timing.median_seconds * 1e3 for name, timing in timings.items()}


def main() -> None:
    options = parse_options(__doc__, "shared_choices")
    device, run = begin(options)
    table = Table("dtype", "query / key heads", "queries / keys", "a choice a head, ms", "shared, ms", "gain")
    rows = []
    with torch.no_grad():
        lengths_taken = LENGTHS[:2] if options.quick else LENGTHS
        for dtype, heads, lengths in product((torch.float32, torch.bfloat16), HEADS, lengths_taken):
            found = measure(*lengths, heads, dtype, device)
            name = str(dtype).removeprefix("torch.")
            rows.append({"dtype": name, "heads": list(heads), "lengths": list(lengths), "milliseconds": found})
            numbers = (f"{found['a head']:.1f}", f"{found['shared']:.1f}", f"{found['a head'] / found['shared']:.2f}")
            table.add_row(name, f"{heads[0]} / {heads[1]}", f"{lengths[0]} / {lengths[1]}", *numbers)
    Console().print(table)
    folder = options.output or (None if options.quick else results_folder(device))
    if folder is not None:
        write_json(folder / "shared_choices.json", {"run": run, "rows": rows})


if __name__ == "__main__":
    main()
