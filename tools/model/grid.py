"""Descriptions of the kernels of grid attention, bfloat16: 32 images of 5 heads, 128 x 128 tokens of 64."""

from __future__ import annotations

from model.paths import Passes
from model.problems import Case, KernelModel, Launch, of_one_size

NUM_HEADS, SIDE, HEAD_DIM = 5 * 32, 128, 64
NUM_TOKENS = NUM_HEADS * SIDE * SIDE
TENSOR_BYTES = NUM_TOKENS * HEAD_DIM * 2
TILE = 64


def _tiles(grid_size: int) -> int:
    return -(-grid_size * grid_size // TILE)


def _forward(grid_size: int) -> Launch:
    passes = (
        Passes("for (uint32_t key_tile = 0", _tiles(grid_size)),
        Passes("for (int key = first; key < end", 2),
        Passes("if (is_first) return", 0.5 / _tiles(grid_size)),
        Passes("if (key_tile + 1 < geometry.num_tiles)", 1 - 1 / _tiles(grid_size)),
        Passes(
            "if (key_tile + 2 < geometry.num_tiles)", 1 - 2 / (_tiles(grid_size) - 1) if _tiles(grid_size) > 2 else 0
        ),
        Passes("if (!is_single) {", min(1, _tiles(grid_size) - 1)),
        Passes("if (is_single) place_key", 2 - min(2, _tiles(grid_size))),
        Passes("for (int i = lane_id(); i < cuda::kBlockRows * head_dim", 0),
    )
    return Launch(NUM_TOKENS / TILE, passes, 4 * TENSOR_BYTES + 12 * NUM_TOKENS)


_RARE = (
    "if (args.bias != nullptr) add_bias", "add_bias", "const bool is_there = (mine >>", "if (!is_there) weights",
    "reinterpret_cast<Element*>(data + offsets[row])[column]",
)  # fmt: skip


def _forward_kernel(grid_size: int, *, has_bias: bool = False) -> KernelModel:
    is_single = _tiles(grid_size) == 1
    keys = "all" if is_single else "64 of 256"
    unit = f"a warp's 16 queries x {keys} keys, grid {grid_size}{', bias' if has_bias else ''}"
    return of_one_size(
        "grid_attend", "grid_forward_cuda", "grid_attendINS_8BFloat16ELi64E", unit,
        _forward(grid_size), HEAD_DIM, tile="" if is_single else "for (uint32_t key_tile = 0",
        variant=", one tile" if is_single else "",
        rare=(
            "if ((mine >> (n * 8 + e % 2)", "reinterpret_cast<Element*>(data + offsets[row])[column]",
            *(() if has_bias else ("const float* bias = args.bias", "if ((mine >> (n * 8 + e) & 1u)")),
        ),
    )  # fmt: skip


FORWARD = {size: _forward_kernel(size) for size in (8, 16)}
FORWARD_WITH_BIAS = _forward_kernel(8, has_bias=True)


def _terms() -> Launch:
    passes = (Passes("for (int d = 2 * lane", HEAD_DIM / 16, unrolled=4),)
    return Launch(NUM_TOKENS / 32, passes, 2 * TENSOR_BYTES + 4 * NUM_TOKENS)


ROW_TERMS = of_one_size(
    "grid_row_terms", "grid_backward_cuda", "grid_row_termsINS_8BFloat16E", "a warp's 4 tokens", _terms()
)


def _gradients(grid_size: int, num_written: int) -> Launch:
    passes = (
        Passes("for (uint32_t column_tile = 0", _tiles(grid_size)),
        Passes("for (int column = columns.first; has_work", 2),
        Passes("for (int i = lane_id(); i < cuda::kBlockRows * head_dim", 0),
    )
    return Launch(NUM_TOKENS / TILE, passes, (4 + num_written) * TENSOR_BYTES + 12 * NUM_TOKENS)


KEY_GRADIENTS = of_one_size(
    "grid_token_gradients", "grid_backward_cuda", "grid_token_gradientsINS_8BFloat16ELi64ELb1E",
    "a warp's 16 keys x 64 queries", _gradients(16, 2), HEAD_DIM, tile="for (uint32_t column_tile = 0", rare=_RARE,
)  # fmt: skip
QUERY_GRADIENTS = of_one_size(
    "grid_token_gradients", "grid_backward_cuda", "grid_token_gradientsINS_8BFloat16ELi64ELb0E",
    "a warp's 16 queries x 64 keys", _gradients(16, 1), HEAD_DIM, tile="for (uint32_t column_tile = 0", rare=_RARE,
)  # fmt: skip


def _group_gradients() -> Launch:
    passes = (
        Passes("for (int query = first; query < end", 2),
        Passes("for (int i = lane_id(); i < cuda::kBlockRows * head_dim", 0),
    )
    return Launch(NUM_TOKENS / TILE, passes, 7 * TENSOR_BYTES + 16 * NUM_TOKENS)


GROUP_GRADIENTS = of_one_size(
    "grid_group_gradients", "grid_backward_cuda", "grid_group_gradientsINS_8BFloat16ELi64E",
    "a warp's 16 keys x 32 queries", _group_gradients(), HEAD_DIM, tile="for (int query = first; query < end",
    rare=_RARE,
)  # fmt: skip
BIAS_PIECES = -(-528 // 5)


def _bias() -> Launch:
    images = 32 * (SIDE // 8) ** 2
    passes = (
        Passes("for (uint32_t first_image = first_piece", images / BIAS_PIECES),
        Passes("for (int k = 0; k < TileA::kColumns / 16", HEAD_DIM / 64),
    )
    return Launch(5 * BIAS_PIECES, passes, 4 * TENSOR_BYTES + 12 * NUM_TOKENS)


BIAS = of_one_size(
    "grid_bias_gradients", "grid_backward_cuda", "grid_bias_gradientsINS_8BFloat16E", "a warp's 16 queries x 64 keys",
    _bias(), 128, tile="for (uint32_t first_image = first_piece", threads=128,
)  # fmt: skip
_SUM = Launch(
    5 * 64 * 64 / 256, (Passes("for (int piece = 0; piece < args.num_pieces", BIAS_PIECES, unrolled=8),),
    BIAS_PIECES * 5 * 64 * 64 * 4,
)  # fmt: skip
SUM = of_one_size(
    "grid_sum_bias", "grid_backward_cuda", "grid_sum_biasILi256E", "a thread's 8 pieces", _SUM,
    tile="for (int piece = 0; piece < args.num_pieces",
)  # fmt: skip

KERNELS = (*FORWARD.values(), FORWARD_WITH_BIAS, ROW_TERMS, KEY_GRADIENTS, QUERY_GRADIENTS, GROUP_GRADIENTS, BIAS, SUM)
_SIZE = "32 images of 5 heads, 128 x 128, D 64, grid"
_LOADS = 4 * TENSOR_BYTES
CASES = (
    Case(f"`grid_attention`, {_SIZE} 8", ((FORWARD[8], _forward(8)),), _LOADS),
    Case("its gradients", ((ROW_TERMS, _terms()), (GROUP_GRADIENTS, _group_gradients())), 2 * _LOADS),
    Case("with a bias, grid 8", ((FORWARD_WITH_BIAS, _forward(8)),), _LOADS),
    Case("the gradient of a bias, grid 8", ((BIAS, _bias()), (SUM, _SUM))),
    Case(f"`grid_attention`, {_SIZE} 16", ((FORWARD[16], _forward(16)),), _LOADS),
    Case(
        "its gradients, grid 16",
        ((ROW_TERMS, _terms()), (KEY_GRADIENTS, _gradients(16, 2)), (QUERY_GRADIENTS, _gradients(16, 1))),
        2 * _LOADS,
    ),
)
