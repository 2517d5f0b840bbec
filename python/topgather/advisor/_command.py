"""``python -m topgather advise``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ._attention import BLOCK_SIZES, TOP_KS, Advice, advise
from ._law import Needle
from ._memory import MemoryAdvice, advise_memory
from ._show import print_advice

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m topgather advise",
        description="Measure here what dense attention, block attention or a memory layer cost, and advise a setting.",
    )
    shape = parser.add_argument_group("attention")
    shape.add_argument("--model", help="transformers config: a name, a folder, or a class as package.module:Class")
    shape.add_argument("--seq-len", type=int, nargs="+", help="tokens, one length or several (default: 16384)")
    shape.add_argument("--heads", type=int, help="query heads (default: the model's, or 8)")
    shape.add_argument("--kv-heads", type=int, help="key heads (default: the model's, or --heads)")
    shape.add_argument("--head-dim", type=int, help="channels of a head (default: the model's, or 64)")
    shape.add_argument("--batch-size", type=int, default=1, help="sequences at a time (default: 1)")
    shape.add_argument("--block-size", type=int, nargs="+", default=BLOCK_SIZES, help="keys per block to try")
    shape.add_argument("--top-k", type=int, nargs="+", default=TOP_KS, help="blocks per query to try")
    shape.add_argument("--needle", type=int, default=4, help="tokens of the needle to be found (default: 4)")
    shape.add_argument("--recall", type=float, default=0.9, help="how often it should be found (default: 0.9)")
    memory = parser.add_argument_group("memory layer")
    memory.add_argument(
        "--memory", type=int, nargs=3, metavar=("ROWS", "WIDTH", "TOP_K"), help="a memory layer instead of attention"
    )
    memory.add_argument("--memory-heads", type=int, default=4, help="queries per token (default: 4)")
    memory.add_argument("--tokens", type=int, default=4096, help="tokens at a time (default: 4096)")
    both = parser.add_argument_group("both")
    both.add_argument("--train", action="store_true", help="measure forward and backward")
    both.add_argument("--dtype", choices=_DTYPES, help="default: the model's, or float32")
    both.add_argument("--device", default="cpu", help="default: cpu")
    both.add_argument("--seconds", type=float, default=30.0, help="about how long to measure (default: 30)")
    both.add_argument("--html", type=Path, metavar="FILE", help="also write one page with the curves")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Measure, print, write, and return the exit code: 2 for arguments that are refused."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.html is not None:
            import matplotlib  # noqa: F401  said before measuring
    except ImportError as error:
        parser.error(f"--html needs the package matplotlib (pip install matplotlib): {error}")
    try:
        advice = _advice(options)
    except (TypeError, ValueError, ImportError) as error:
        parser.error(str(error))
    print_advice(advice)
    if options.html is not None:
        advice.save_html(options.html)
        print(f"\nWritten: {options.html}", file=sys.stderr)
    return 0


def _advice(options: argparse.Namespace) -> Advice | MemoryAdvice:
    dtype = None if options.dtype is None else _DTYPES[options.dtype]
    if options.memory is not None:
        return advise_memory(
            *options.memory,
            num_heads=options.memory_heads,
            num_tokens=options.tokens,
            train=options.train,
            dtype=dtype or torch.float32,
            device=options.device,
            seconds=options.seconds,
            progress=True,
        )
    return advise(
        seq_len=options.seq_len,
        heads=options.heads,
        kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        train=options.train,
        dtype=dtype,
        model=options.model,
        batch_size=options.batch_size,
        block_sizes=options.block_size,
        top_ks=options.top_k,
        device=options.device,
        seconds=options.seconds,
        needle=Needle(options.needle),
        min_recall=options.recall,
        progress=True,
    )
