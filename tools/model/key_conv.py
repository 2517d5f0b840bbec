"""Descriptions of the kernels of the key convolution, bfloat16: 8 heads, 256K tokens of 128."""

from __future__ import annotations

from model.paths import Passes
from model.problems import Case, KernelModel, Launch, of_one_size

NUM_HEADS, NUM_TOKENS, HEAD_DIM = 8, 1 << 18, 128
TENSOR_BYTES = NUM_HEADS * NUM_TOKENS * HEAD_DIM * 2
STEP = 4
FORWARD_RUN = 64
BACKWARD_THREADS = 1 << 18


def _forward(width: int) -> Launch:
    threads = NUM_HEADS * NUM_TOKENS / FORWARD_RUN * HEAD_DIM / 8
    passes = (
        Passes("while (num_left >= kStep)", FORWARD_RUN / STEP),
        Passes("for (; num_left > 0", 0),
    )
    return Launch(threads / 128, passes, (2 + (width - 1) / FORWARD_RUN) * TENSOR_BYTES)


def _forward_kernel(width: int) -> KernelModel:
    return of_one_size(
        "key_conv_forward", "key_conv_forward_cuda", f"key_conv_forwardINS_8BFloat16ELi8ELi{width}E",
        f"a thread's 4 tokens of 8 channels, W {width}", _forward(width), tile="while (num_left >= kStep)", threads=128,
    )  # fmt: skip


def _vector(width: int) -> int:
    return 8 if width <= 4 else 4


def _backward_run(width: int) -> int:
    """Tokens that a thread walks: BackwardCut."""
    run, rows = 16, NUM_HEADS * HEAD_DIM // _vector(width)
    while run < NUM_TOKENS and rows * NUM_TOKENS // run > BACKWARD_THREADS:
        run *= 2
    return run


def _num_pieces(width: int) -> float:
    return NUM_TOKENS / (_backward_run(width) * 128 / (HEAD_DIM / _vector(width)))


def _backward(width: int) -> Launch:
    run, vector = _backward_run(width), _vector(width)
    threads = NUM_HEADS * NUM_TOKENS / run * HEAD_DIM / vector
    passes = (
        Passes("while (t >= stop)", 1),  # without the W - 1 tokens after the run, which are taken one by one
        Passes("for (; t >= lowest; t -= kStep)", run / STEP),
        Passes("if (t < last && t >= lowest)", 0),
        Passes("for (uint32_t r = 0; r < args.runs_per_block", 128 / (HEAD_DIM / vector), unrolled=4),
    )
    pieces = _num_pieces(width) * NUM_HEADS * width * HEAD_DIM * 4
    return Launch(threads / 128, passes, (3 + 2 * (width - 1) / run) * TENSOR_BYTES + pieces)


def _backward_kernel(width: int) -> KernelModel:
    vector = _vector(width)
    return of_one_size(
        "key_conv_backward", "key_conv_backward_cuda", f"key_conv_backwardINS_8BFloat16ELi{vector}ELi{width}E",
        f"a thread's 4 tokens of {vector} channels, W {width}", _backward(width),
        tile="for (; t >= lowest; t -= kStep)", threads=128, shared_bytes=128 * 4 * vector,
    )  # fmt: skip


def _sum(width: int) -> Launch:
    passes = (Passes("for (int64_t piece = 0; piece < args.num_pieces", _num_pieces(width), unrolled=8),)
    count = NUM_HEADS * width * HEAD_DIM
    return Launch(count / 128, passes, _num_pieces(width) * count * 4)


SUM = of_one_size(
    "key_conv_sum_weight", "key_conv_backward_cuda", "key_conv_sum_weightILi128E", "a thread's 8 pieces", _sum(3),
    tile="for (int64_t piece = 0; piece < args.num_pieces", threads=128, rare=("if (l == args.width) args.grad_bias",),
)  # fmt: skip

_FORWARD = {width: _forward_kernel(width) for width in (3, 5)}
_BACKWARD = {width: _backward_kernel(width) for width in (3, 5)}
KERNELS = (*_FORWARD.values(), *_BACKWARD.values(), SUM)
CASES = tuple(
    case
    for width in (3, 5)
    for case in (
        Case(
            f"`key_conv`, 8 heads, 256K tokens, D 128, W {width}",
            ((_FORWARD[width], _forward(width)),), 2 * TENSOR_BYTES,
        ),
        Case("its gradients", ((_BACKWARD[width], _backward(width)), (SUM, _sum(width))), 3 * TENSOR_BYTES),
    )
)  # fmt: skip
