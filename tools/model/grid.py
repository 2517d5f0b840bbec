"""Descriptions of the kernels of grid attention, bfloat16: 32 images of 5 heads, 128 x 128 tokens of 64."""

from __future__ import annotations

from model.paths import Passes
from model.problems import Case, KernelModel, Launch, of_one_size

NUM_HEADS, SIDE, HEAD_DIM = 5 * 32, 128, 64
NUM_TOKENS = NUM_HEADS * SIDE * SIDE
TENSOR_BYTES = NUM_TOKENS * HEAD_DIM * 2
TILE, LARGE_TILE = 64, 128


def _tiles(grid_size: int) -> int:
    return -(-grid_size * grid_size // TILE)


def _forward() -> Launch:
    passes = (
        Passes("for (uint32_t key_tile = 0", 1),
        Passes("for (int key = first; key < end", 2),
        Passes("if (is_first) return", 0.5),
        Passes("for (int i = lane_id(); i < cuda::kBlockRows * head_dim", 0),
    )
    return Launch(NUM_TOKENS / TILE, passes, 4 * TENSOR_BYTES + 12 * NUM_TOKENS)


def _forward_large(grid_size: int) -> Launch:
    tiles = _tiles(grid_size)
    passes = (
        Passes("for (uint32_t first_key = 0", tiles),
        Passes("if (first_key + kKeys < geometry.max_tokens)", 1 - 1 / tiles),
        Passes("for (int i = lane_id(); i < cuda::kBlockRows * head_dim", 0),
    )
    return Launch(NUM_TOKENS / LARGE_TILE, passes, 4 * TENSOR_BYTES + 12 * NUM_TOKENS)


_RARE = (
    "if (args.bias != nullptr) add_bias", "add_bias", "const bool is_there = (mine >>", "if (!is_there) weights",
    "const float* bias = args.bias", "if ((mine >> (n * 8 + e) & 1u)", "(mine >> (n * 8 + e % 2)",
    "reinterpret_cast<Element*>(data + offset)[column]",
)  # fmt: skip


def _rare_in_forward(has_bias: bool) -> tuple[str, ...]:
    return (
        "if ((mine >> (n * 8 + e % 2)", "reinterpret_cast<Element*>(data + offset)[column]",
        *(() if has_bias else ("const float* bias = args.bias", "if ((mine >> (n * 8 + e) & 1)")),
    )  # fmt: skip


def _forward_kernel(*, has_bias: bool = False) -> KernelModel:
    return of_one_size(
        "grid_attend", "grid_forward_cuda", "grid_attendINS_8BFloat16ELi64E",
        f"a warp's 16 queries x all keys, grid 8{', bias' if has_bias else ''}", _forward(), HEAD_DIM,
        variant=", one tile", rare=_rare_in_forward(has_bias),
    )  # fmt: skip


FORWARD = _forward_kernel()
FORWARD_WITH_BIAS = _forward_kernel(has_bias=True)
FORWARD_LARGE = of_one_size(
    "grid_attend_large", "grid_forward_cuda", "grid_attend_largeINS_8BFloat16ELi64E",
    "a warp's 32 queries x 64 of 256 keys, grid 16", _forward_large(16), HEAD_DIM,
    tile="for (uint32_t first_key = 0", threads=128, rare=_rare_in_forward(False), shared_bytes=49280,
)  # fmt: skip


def _unit_gradients(grid_size: int) -> Launch:
    """Of groups of up to 256 tokens with the gradient of queries and the shifts, of larger ones without."""
    is_whole, queries = grid_size <= 16, _tiles(grid_size)
    passes = (
        Passes("for (uint32_t first_query = 0", queries),
        Passes("for (int column = 0; column < static_cast<int>(kQueries)", 4),
        Passes("if (first_query > 0", 0.5 - 1 / queries),
        Passes("if (next_query < geometry.max_tokens)", 1 - 1 / queries),
        Passes("for (uint32_t key = 0", queries),
        Passes("for (int i = lane_id(); i < cuda::kBlockRows * head_dim", 0),
        Passes("for (int i = lane_id(); i < 32 * Shared::KeyTile::kChunks", 0),
    )
    if is_whole:
        rare: tuple[str, ...] = ("if (args.out.data == nullptr) shared.minus_shift",)
    else:
        rare = ("write_query_gradients", "part_of_shift", "*reinterpret_cast<uint32_t*>(to) = left")
    tensors = 8 if is_whole else 6
    return Launch(NUM_TOKENS / 256, passes, tensors * TENSOR_BYTES + 16 * NUM_TOKENS, rare=rare)


UNIT_GRADIENTS = of_one_size(
    "grid_unit_gradients", "grid_backward_cuda", "grid_unit_gradientsINS_8BFloat16ELi64E",
    "a warp's 32 keys x 64 of 256 queries, grid 16", _unit_gradients(16), HEAD_DIM, threads=256, shared_bytes=99968,
    tile="for (uint32_t first_query = 0",
    rare=(
        *_RARE, "clear_absent", "add_unit_bias", "scale_all", "if (args.bias != nullptr)",
        "if (args.d_score_scale != 1.0f)",
        "if (mine.there == 0 && args.grad_query", "for (int c = column",
    ),
)  # fmt: skip


def _terms() -> Launch:
    passes = (Passes("for (int d = 2 * lane", HEAD_DIM / 16, unrolled=4),)
    return Launch(NUM_TOKENS / 32, passes, 2 * TENSOR_BYTES + 4 * NUM_TOKENS)


ROW_TERMS = of_one_size(
    "grid_row_terms", "grid_backward_cuda", "grid_row_termsINS_8BFloat16E", "a warp's 4 tokens", _terms()
)


def _query_gradients(grid_size: int) -> Launch:
    passes = (
        Passes("for (uint32_t first_column = 0", _tiles(grid_size)),
        Passes("for (int column = 0; column < Shared::kColumns", 2),
        Passes("if (first_column + kColumns < geometry.max_tokens)", 1 - 1 / _tiles(grid_size)),
        Passes("for (int i = lane_id(); i < cuda::kBlockRows * head_dim", 0),
    )
    return Launch(NUM_TOKENS / LARGE_TILE, passes, 5 * TENSOR_BYTES + 12 * NUM_TOKENS)


# Of groups of more than 256 tokens, whose gradients of keys and values are those of grid_unit_gradients.
QUERY_GRADIENTS = of_one_size(
    "grid_large_gradients", "grid_backward_cuda", "grid_large_gradientsINS_8BFloat16ELi64E",
    "a warp's 32 queries x 64 keys", _query_gradients(32), HEAD_DIM, threads=128, shared_bytes=67200,
    tile="for (uint32_t first_column = 0", rare=_RARE,
)  # fmt: skip


def _group_gradients() -> Launch:
    passes = (
        Passes("for (int query = first; query < end", 2),
        Passes("for (int i = lane_id(); i < cuda::kBlockRows * head_dim", 0),
    )
    return Launch(NUM_TOKENS / TILE, passes, 8 * TENSOR_BYTES + 16 * NUM_TOKENS)


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

KERNELS = (
    FORWARD,
    FORWARD_LARGE,
    FORWARD_WITH_BIAS,
    ROW_TERMS,
    UNIT_GRADIENTS,
    QUERY_GRADIENTS,
    GROUP_GRADIENTS,
    BIAS,
    SUM,
)
_SIZE = "32 images of 5 heads, 128 x 128, D 64, grid"
_LOADS = 4 * TENSOR_BYTES
CASES = (
    Case(f"`grid_attention`, {_SIZE} 8", ((FORWARD, _forward()),), _LOADS),
    Case("its gradients", ((GROUP_GRADIENTS, _group_gradients()),), 2 * _LOADS),
    Case("with a bias, grid 8", ((FORWARD_WITH_BIAS, _forward()),), _LOADS),
    Case("the gradient of a bias, grid 8", ((BIAS, _bias()), (SUM, _SUM))),
    Case(f"`grid_attention`, {_SIZE} 16", ((FORWARD_LARGE, _forward_large(16)),), _LOADS),
    Case("its gradients, grid 16", ((UNIT_GRADIENTS, _unit_gradients(16)),), 2 * _LOADS),
    Case(
        "its gradients, grid 32",
        (
            (ROW_TERMS, _terms()),
            (UNIT_GRADIENTS, _unit_gradients(32)),
            (QUERY_GRADIENTS, _query_gradients(32)),
        ),
        2 * _LOADS,
    ),
)
