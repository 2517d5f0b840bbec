"""What a call costs before any arithmetic: our registration against its alternatives.

    python bench/overhead.py

Every contestant wraps the very same CPU kernels, on a problem so small that their own time hardly counts:

    no registration            the kernel as a plain Python function (the floor; no gradient)
    autograd.Function          a bare autograd.Function, no dispatcher, no torch.compile
    torch.library.custom_op    the high-level way to register an op with autograd
    topgather op               torch.ops.topgather.*: a low-level Library with an autograd.Function behind it
    topgather function         tg.*: the op with the argument checks of the public function

Prints microseconds a call and writes overhead.json to bench/results/<device>/. One thread; all interleaved.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import topgather as tg
from _harness import describe_run, results_folder, time_interleaved, write_json
from topgather._common import spec as _spec

BLOCK_SIZE, TOP_K, SCALE = 8, 2, 0.5
CALLS_PER_SAMPLE = 100

# --- Alternatives: block_centroids --------------------------------------------------------------------------

centroids_kernel = _spec.CPU_KERNELS["block_centroids"]
centroids_backward: Any = _spec.OPS["block_centroids"].backward


class BareCentroids(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: Tensor, block_size: int) -> Tensor:
        ctx.key, ctx.block_size = _spec.meta_of(key), block_size
        return centroids_kernel(key, block_size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (*centroids_backward(grad, ctx.key, ctx.block_size, None), None)


@torch.library.custom_op("topgather_bench::block_centroids", mutates_args=())
def custom_centroids(key: Tensor, block_size: int) -> Tensor:
    return centroids_kernel(key, block_size)


def _centroids_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.key, ctx.block_size = _spec.meta_of(inputs[0]), inputs[1]


custom_centroids.register_autograd(
    lambda ctx, grad: (*centroids_backward(grad, ctx.key, ctx.block_size, None), None),
    setup_context=_centroids_setup,
)

# --- Alternatives: moba_attention with given blocks ---------------------------------------------------------


Attended = tuple[Tensor, Tensor, Tensor]  # out, lse, softmax_terms


def attention_kernel(query: Tensor, key: Tensor, value: Tensor, block_indices: Tensor) -> Attended:
    return _spec.CPU_KERNELS["moba_attention"](query, key, value, block_indices, BLOCK_SIZE, True, SCALE)


def attention_backward(grad_out: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    *forward, softmax_terms = saved
    return _spec.CPU_KERNELS["moba_attention_backward"](
        grad_out, None, *forward, BLOCK_SIZE, True, SCALE, softmax_terms=softmax_terms
    )


class BareAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, block_indices: Tensor) -> Attended:
        out, lse, softmax_terms = attention_kernel(query, key, value, block_indices)
        ctx.save_for_backward(query, key, value, out, lse, block_indices, softmax_terms)
        ctx.set_materialize_grads(False)
        return out, lse, softmax_terms

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        return (*attention_backward(grad_out, *ctx.saved_tensors), None)


@torch.library.custom_op("topgather_bench::moba_attention", mutates_args=())
def custom_attention(query: Tensor, key: Tensor, value: Tensor, block_indices: Tensor) -> Attended:
    return attention_kernel(query, key, value, block_indices)


@torch.library.custom_op("topgather_bench::moba_attention_backward", mutates_args=())
def custom_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor,
    softmax_terms: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward(grad_out, query, key, value, out, lse, block_indices, softmax_terms)


def _attention_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Attended) -> None:
    query, key, value, block_indices = inputs
    out, lse, softmax_terms = output
    ctx.save_for_backward(query, key, value, out, lse, block_indices, softmax_terms)
    ctx.set_materialize_grads(False)


custom_attention.register_autograd(
    lambda ctx, grad_out, *_: (*custom_attention_backward(grad_out, *ctx.saved_tensors), None),
    setup_context=_attention_setup,
)

# --- Measuring ----------------------------------------------------------------------------------------------

Call = Callable[[], Any]


def contestants(requires_grad: bool) -> dict[str, dict[str, Call]]:
    """For each op, what calls it in each of the ways."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 32, 8, requires_grad=requires_grad) for _ in range(3))
    routing = tg.moba_route(query, key, block_size=BLOCK_SIZE, top_k=TOP_K)
    block_indices = routing.block_indices
    ops = torch.ops.topgather
    qkv_blocks = (query, key, value, block_indices)
    attention = {
        "autograd.Function": lambda: BareAttention.apply(*qkv_blocks)[0],
        "torch.library.custom_op": lambda: custom_attention(*qkv_blocks)[0],
        "topgather op": lambda: ops.moba_attention.default(*qkv_blocks, BLOCK_SIZE, True, SCALE)[0],
        "topgather function": lambda: tg.moba_attention(
            query, key, value, block_size=BLOCK_SIZE, routing=routing, scale=SCALE
        ),
        "topgather function, routing included": lambda: tg.moba_attention(
            query, key, value, block_size=BLOCK_SIZE, top_k=TOP_K, scale=SCALE
        ),
    }
    centroids = {
        "autograd.Function": lambda: BareCentroids.apply(key, BLOCK_SIZE),
        "torch.library.custom_op": lambda: custom_centroids(key, BLOCK_SIZE),
        "topgather op": lambda: ops.block_centroids.default(key, BLOCK_SIZE),
        "topgather function": lambda: tg.block_centroids(key, block_size=BLOCK_SIZE),
    }
    if not requires_grad:
        attention = {"no registration": lambda: attention_kernel(*qkv_blocks)[0], **attention}
        centroids = {"no registration": lambda: centroids_kernel(key, BLOCK_SIZE), **centroids}
    return {"block_centroids": centroids, "moba_attention": attention}


def repeated(call: Call, *, with_backward: bool) -> Callable[[], None]:
    """Enough calls in a row for the clock to resolve."""
    grad = torch.ones_like(call())

    def forward() -> None:
        for _ in range(CALLS_PER_SAMPLE):
            call()

    def forward_and_backward() -> None:
        for _ in range(CALLS_PER_SAMPLE):
            call().backward(grad)

    return forward_and_backward if with_backward else forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="samples of each contestant (default: 40)")
    parser.add_argument("--output", type=Path, help="folder for overhead.json")
    options = parser.parse_args()
    device = torch.device("cpu")
    folder = options.output or results_folder(device)
    torch.set_num_threads(1)

    results: dict[str, dict[str, dict[str, Any]]] = {}
    for setting, requires_grad, with_backward in (
        ("no gradient", False, False),
        ("forward", True, False),
        ("forward+backward", True, True),
    ):
        for op, calls in contestants(requires_grad).items():
            runs = {name: repeated(call, with_backward=with_backward) for name, call in calls.items()}
            timings = time_interleaved(runs, device, max_rounds=options.rounds, budget_seconds=60.0)
            for name, timing in timings.items():
                results.setdefault(op, {}).setdefault(name, {})[setting] = timing.per_call(CALLS_PER_SAMPLE).to_json()

    console = Console(width=120)
    run = describe_run(device)
    console.print(run)
    for op, by_name in results.items():
        table = Table("way", title=f"{op}: microseconds a call, minimum of {options.rounds} samples")
        for setting in ("no gradient", "forward", "forward+backward"):
            table.add_column(setting, justify="right")
        for name, by_setting in by_name.items():
            cells = [by_setting.get(setting) for setting in ("no gradient", "forward", "forward+backward")]
            table.add_row(name, *("" if cell is None else f"{cell['min_seconds'] * 1e6:.1f}" for cell in cells))
        console.print(table)
    write_json(folder / "overhead.json", {"run": run, "times": results})
    console.print(f"Written: {folder / 'overhead.json'}", soft_wrap=True)


if __name__ == "__main__":
    main()
