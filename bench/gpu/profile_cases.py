"""One topgather call between cudaProfilerStart and cudaProfilerStop, for ncu.

    ncu --profile-from-start off python bench/gpu/profile_cases.py forward     # or another of NAMES

bfloat16, heads of 128, blocks of 128, top_k 8, causal; for memory top-k, lookup and their gradients together; for grid
attention and its gradients, a bias' among them; for decode one token of each of 8 sequences, appended, routed and
attended to; for key_conv the convolution and its gradients: the benchmarks' main cases but smaller, because ncu runs
every kernel some twenty times over. A first call outside the profiled range warms up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

import topgather as tg

NAMES = ("forward", "backward", "memory", "grid", "decode", "key_conv")
NUM_TOKENS, NUM_HEADS, HEAD_DIM = 32768, 4, 128
NUM_KEYS = 512  # of a half
SIDE = 128  # of an image, in tokens


def make_calls(
    device: torch.device, num_tokens: int = NUM_TOKENS, num_keys: int = NUM_KEYS, side: int = SIDE
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
        "grid": make_grid_call(device, side),
        "decode": make_decode_call(device, num_tokens),
        "key_conv": make_key_conv_call(device, num_tokens),
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


def make_grid_call(device: torch.device, side: int) -> Callable[[], object]:
    """Grid attention with a bias in groups of 8 by 8 tokens, and all gradients."""
    generator = torch.Generator(device).manual_seed(0)
    *leaves, grad_out = (
        torch.randn(4, 5, side, side, 64, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(4)
    )
    leaves.append(torch.randn(5, 64, 64, generator=generator, device=device))
    query, key, value, bias = (tensor.requires_grad_() for tensor in leaves)

    def call() -> object:
        out = tg.grid_attention(query, key, value, 8, bias=bias)
        return torch.autograd.grad(out, [query, key, value, bias], grad_out)

    return call


def make_decode_call(device: torch.device, num_tokens: int) -> Callable[[], object]:
    """One token of each of 8 sequences of 4 key heads and 16 query heads."""
    generator = torch.Generator(device).manual_seed(0)

    def random(num_heads: int, length: int) -> torch.Tensor:
        shape = (8, num_heads, length, HEAD_DIM)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    room = num_tokens + 8
    cache = tg.MobaCache(8, 4, HEAD_DIM, block_size=128, max_seq_len=room, dtype=torch.bfloat16, device=device)
    cache.append(random(4, num_tokens), random(4, num_tokens))
    query, key, value = random(16, 1), random(4, 1), random(4, 1)

    @torch.no_grad()
    def call() -> object:
        cache.append(key, value)
        return tg.moba_decode(query, cache, top_k=8)

    return call


def make_key_conv_call(device: torch.device, num_tokens: int) -> Callable[[], object]:
    """Three taps over the keys of 8 heads, and all gradients."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, 8, num_tokens, HEAD_DIM)
    key, grad_out = (
        torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(2)
    )
    weight = torch.randn(8, HEAD_DIM, 3, generator=generator, device=device).requires_grad_()

    def call() -> object:
        return torch.autograd.grad(tg.key_conv(key, weight), [key, weight], grad_out)

    return call


def main() -> int:
    """Warm up, then make the one call that is profiled."""
    if len(sys.argv) != 2 or sys.argv[1] not in NAMES:
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
