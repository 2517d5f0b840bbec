"""One topgather call between cudaProfilerStart and cudaProfilerStop, for ncu.

    ncu --profile-from-start off python bench/gpu/profile_cases.py forward     # or backward, or memory

bfloat16, heads of 128, blocks of 128, top_k 8, causal; for memory top-k, lookup and their gradients together: the
benchmarks' main cases but smaller, because ncu runs every kernel some twenty times over. A first call outside the
profiled range warms up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

import topgather as tg

NUM_TOKENS, NUM_HEADS, HEAD_DIM = 32768, 4, 128
NUM_KEYS = 512  # of a half


def make_calls(
    device: torch.device, num_tokens: int = NUM_TOKENS, num_keys: int = NUM_KEYS
) -> dict[str, Callable[[], object]]:
    """What can be profiled. The backward's forward runs here, outside of the profiled range."""
    generator = torch.Generator(device).manual_seed(0)
    query, key, value, grad_out = (
        torch.randn(1, NUM_HEADS, num_tokens, HEAD_DIM, generator=generator, device=device, dtype=torch.bfloat16)
        for _ in range(4)
    )
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    out = tg.moba_attention(*leaves, block_size=128, top_k=8)
    return {
        "memory": make_memory_call(device, num_tokens // 8, num_keys),
        "forward": torch.no_grad()(lambda: tg.moba_attention(*leaves, block_size=128, top_k=8)),
        "backward": lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True),
    }


def make_memory_call(device: torch.device, num_tokens: int, num_keys: int) -> Callable[[], object]:
    """Top-k, lookup and all gradients: a memory layer without its projections."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).requires_grad_()

    query, keys, values = random(num_tokens, 4, 512), random(4, 2, num_keys, 256), random(num_keys**2, 1024)

    def call() -> object:
        scores, indices = tg.product_key_topk(query, keys, 32)
        weights = scores.softmax(dim=-1).view(num_tokens, -1)
        out = tg.memory_lookup(values, indices.view(num_tokens, -1), weights)
        return torch.autograd.grad(out.sum(), [query, keys, values])

    return call


def main() -> int:
    """Warm up, then make the one call that is profiled."""
    if len(sys.argv) != 2 or sys.argv[1] not in ("forward", "backward", "memory"):
        print(__doc__, file=sys.stderr)
        return 2
    call = make_calls(torch.device("cuda"))[sys.argv[1]]
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
