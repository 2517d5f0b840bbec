"""What holds of grid and window attention's CUDA kernels alone: sizes around those of tiles, limits, schedules."""

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.common.native import described, workspace_bytes
from tests.common.schedules import CUDA_DTYPES, over_schedules
from tests.common.tensors import assert_bitwise_equal
from tests.grid.helpers import GridCase, check_grid, make_inputs, run_grid
from topgather._common import cuda as _cuda
from topgather.ops import grid

# Tokens of a group, on both sides of what shares a tile and of what fills one.
GROUPS = [
    GridCase(num_heads=1, rows=2 * rows, columns=2 * columns, step=(2, 2), head_dim=8, has_bias=True)
    for rows, columns in ((1, 15), (4, 4), (1, 17), (1, 31), (4, 8), (3, 11), (7, 9), (8, 8), (5, 13), (1, 129))
]
# The same of groups that are short on one side or the other: tiles that no token of a group is in.
SHORT_GROUPS = [
    GridCase(rows=9, columns=1, step=(8, 1), partition="window", head_dim=8, has_bias=True),
    GridCase(batch=1, rows=65, columns=2, step=(64, 2), partition="window", head_dim=8, has_bias=True),
    GridCase(batch=1, rows=11, columns=20, step=(10, 20), partition="window", head_dim=8, has_bias=True),
    GridCase(rows=5, columns=35, step=(4, 2), head_dim=8, has_bias=True),
]
# Images and groups of one head that are more than the pieces of the bias' gradient.
MANY_GROUPS = GridCase(batch=1, num_heads=33, rows=13, columns=10, step=(13, 5), head_dim=8, has_bias=True)


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("case", GROUPS + SHORT_GROUPS, ids=str)
def test_every_size_of_a_group(case: GridCase, dtype: torch.dtype, cuda_device: torch.device) -> None:
    check_grid(case, dtype, cuda_device)


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 7, 15, 16, 31, 48, 63, 65, 96, 127])
def test_every_tile_shape(head_dim: int, dtype: torch.dtype, cuda_device: torch.device) -> None:
    """Depths that fill a tile and those that do not; rows that must be padded."""
    check_grid(GridCase(batch=1, rows=10, columns=8, head_dim=head_dim, has_bias=True), dtype, cuda_device)


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
def test_more_groups_than_pieces_of_a_sum(dtype: torch.dtype, cuda_device: torch.device) -> None:
    check_grid(MANY_GROUPS, dtype, cuda_device)


@pytest.mark.parametrize("layout", ["fused", "offset", "padded", "transposed", "expanded"])
def test_padded_rows_of_any_layout(layout: str, cuda_device: torch.device) -> None:
    """Rows that no copy of 16 bytes can read are copied before; outputs are written where they belong."""
    for head_dim in (4, 12, 20):
        check_grid(GridCase(head_dim=head_dim, has_bias=True), torch.bfloat16, cuda_device, layout)


def test_float64_is_for_the_cpu(cuda_device: torch.device) -> None:
    image = torch.zeros(1, 1, 4, 4, 8, dtype=torch.float64, device=cuda_device)
    with pytest.raises(TypeError, match="query must have one of the dtypes"):
        tg.grid_attention(image, image, image, stride=2)
    with pytest.raises(TypeError, match="query must have one of the dtypes"):
        lse = torch.zeros(1, 1, 4, 4, dtype=torch.float64, device=cuda_device)
        torch.ops.topgather.grid_attention_backward(
            image, image, image, image, None, image, lse, "grid", 2, 2, 1.0, False
        )


def test_the_largest_head_dim(cuda_device: torch.device) -> None:
    most = grid.MAX_CUDA_HEAD_DIM
    image = torch.randn(1, 1, 3, 3, most + 1, device=cuda_device)
    with pytest.raises(ValueError, match=f"head_dim must be at most {most}"):
        tg.window_attention(image, image, image, window_size=2)
    assert most >= 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_schedule(dtype: torch.dtype, cuda_kind: str, cuda_device: torch.device) -> None:
    for case in (GridCase(has_bias=True), GridCase(batch=1, rows=9, columns=15, step=(1, 1), has_bias=True)):
        expected: dict[str, Tensor] = {}
        for schedule in over_schedules(cuda_kind):
            results = run_grid(make_inputs(case, dtype, cuda_device), case)
            expected = expected or results
            for name, tensor in results.items():
                assert_bitwise_equal(f"{name} with {schedule}", tensor, expected[name])


def test_a_workspace_too_small_is_refused(cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python asks how large it must be; a wrong answer does not write past its end."""
    native = _cuda.native_module()

    class OneByteLess:
        def __getattr__(self, name: str) -> object:
            return getattr(native, name)

        def grid_attention_backward_workspace_bytes(self, *args: object) -> int:
            return native.grid_attention_backward_workspace_bytes(*args) - 1

    monkeypatch.setattr(_cuda, "native_module", OneByteLess)
    for has_bias in (False, True):
        case = GridCase(has_bias=has_bias)
        with pytest.raises(ValueError, match="workspace"):
            run_grid(make_inputs(case, torch.float32, cuda_device), case)


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_memory_does_not_grow_with_copies(has_bias: bool, cuda_device: torch.device) -> None:
    """A number a token beside the gradients, and pieces of the bias' gradient within their bound."""
    case = GridCase(batch=4, num_heads=8, rows=64, columns=64, step=(8, 8), head_dim=64, has_bias=has_bias)
    image = described(case.batch, case.num_heads, 64, 64, case.head_dim, dtype=torch.bfloat16)
    bias = described(case.num_heads, 64, 64, dtype=torch.float32) if has_bias else None
    names = ("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value")
    num_bytes = workspace_bytes(
        _cuda.native_module(),
        "grid_attention_backward",
        **dict.fromkeys(names, image),
        is_window=False,
        rows_step=8,
        columns_step=8,
        scale=0.125,
        lse=described(case.batch, case.num_heads, 64, 64, dtype=torch.float32),
        softmax_terms=described(case.batch, case.num_heads, 64, 64, 2, dtype=torch.float32),
        bias=bias,
        grad_bias=bias,
    )
    per_token = case.batch * case.num_heads * 64 * 64 * 4
    assert per_token <= num_bytes <= per_token + 256 + has_bias * (64 << 20)
