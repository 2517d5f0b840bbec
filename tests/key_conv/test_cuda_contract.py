"""What holds of the key convolution's CUDA kernels alone: sizes around those of runs, limits, schedules, boundaries."""

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.common.native import described, workspace_bytes
from tests.common.schedules import CUDA_DTYPES, over_schedules
from tests.common.tensors import assert_bitwise_equal
from tests.key_conv.helpers import Inputs, KeyConvCase, check_key_conv, make_inputs, run_key_conv
from topgather._common import cuda as _cuda


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [3, 4, 5, 15, 16, 17, 127, 128, 129])
def test_every_length_of_a_run(num_tokens: int, dtype: torch.dtype, cuda_device: torch.device) -> None:
    check_key_conv(KeyConvCase(batch=1, num_tokens=num_tokens, head_dim=24, has_state=True), dtype, cuda_device)


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 4, 6, 8, 12, 20, 48, 508, 512, 516, 520])
def test_every_kind_of_row(head_dim: int, dtype: torch.dtype, cuda_device: torch.device) -> None:
    """Rows that are read 16 bytes at a time, four elements at a time, or one; of one thread block and of two."""
    check_key_conv(KeyConvCase(batch=1, num_tokens=18, head_dim=head_dim, width=5), dtype, cuda_device)


@pytest.mark.parametrize("layout", ["offset", "padded", "transposed", "expanded"])
def test_rows_that_allow_no_vectors(layout: str, cuda_device: torch.device) -> None:
    for head_dim in (4, 16, 20):
        check_key_conv(KeyConvCase(head_dim=head_dim, has_state=True), torch.bfloat16, cuda_device, layout)


def test_boundaries_are_never_followed_outside(cuda_device: torch.device) -> None:
    """Whatever they hold: tokens of no sequence are NaN and add nothing, no access leaves the tensors."""
    case = KeyConvCase(lengths=(10, 20, 12), width=6)
    for wrong, missing in (
        ([3, 10, 30, 42], slice(0, 3)),
        ([0, 10, 30, 36], slice(36, 42)),
        ([0, 10, 30, 50], slice(0, 0)),
        ([-7, 10, 30, 2**40], slice(0, 0)),
        ([0, 0, 0, 0], slice(0, 42)),
        ([42, 42, 42, 42], slice(0, 42)),
        ([-5, -4, -3, -1], slice(0, 42)),
    ):
        inputs = make_inputs(case, torch.float32, cuda_device)
        inputs.cu_seqlens = torch.tensor(wrong, device=cuda_device)
        result = run_key_conv(inputs)
        is_missing = torch.zeros(42, dtype=torch.bool, device=cuda_device)
        is_missing[missing] = True
        for name in ("out", "d_key"):
            assert result[name][is_missing].isnan().all()
            assert result[name][~is_missing].isfinite().all()
        assert result["d_weight"].isfinite().all()
        right = [min(max(bound, 0), 42) for bound in wrong]
        kept = slice(right[0], right[-1])
        alone = Inputs(
            inputs.key.detach()[kept].requires_grad_(),
            inputs.weight,
            inputs.grad_out[kept],
            cu_seqlens=torch.tensor([bound - right[0] for bound in right], device=cuda_device),
        )
        for name, tensor in run_key_conv(alone).items():
            if name == "d_weight":
                torch.testing.assert_close(result[name], tensor)
            else:
                assert_bitwise_equal(name, result[name][kept], tensor)


def test_boundaries_out_of_order(cuda_device: torch.device) -> None:
    """Some sequence or none: no access leaves the tensors."""
    case = KeyConvCase(lengths=(10, 20, 12), width=6)
    for wrong in ([0, 30, 10, 42], [42, 30, 10, 0], [5, -3, 60, 7], [2**62, -(2**62), 2**62, 0]):
        inputs = make_inputs(case, torch.float32, cuda_device)
        inputs.cu_seqlens = torch.tensor(wrong, device=cuda_device)
        run_key_conv(inputs)


def test_float64_is_for_the_cpu(cuda_device: torch.device) -> None:
    key = torch.zeros(1, 1, 4, 8, dtype=torch.float64, device=cuda_device)
    weight = torch.zeros(1, 8, 3, dtype=torch.float64, device=cuda_device)
    with pytest.raises(TypeError, match="key must have one of the dtypes"):
        tg.key_conv(key, weight)
    with pytest.raises(TypeError, match="key must have one of the dtypes"):
        torch.ops.topgather.key_conv_backward(key, key, weight, None, None, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_schedule(dtype: torch.dtype, cuda_kind: str, cuda_device: torch.device) -> None:
    for case in (KeyConvCase(num_tokens=300, has_state=True), KeyConvCase(lengths=(40, 0, 33), width=7)):
        expected: dict[str, Tensor] = {}
        for schedule in over_schedules(cuda_kind):
            results = run_key_conv(make_inputs(case, dtype, cuda_device))
            expected = expected or results
            for name, tensor in results.items():
                assert_bitwise_equal(f"{name} with {schedule}", tensor, expected[name])


def test_a_workspace_too_small_is_refused(cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python asks how large it must be; a wrong answer does not write past its end."""
    native = _cuda.native_module()

    class OneByteLess:
        def __getattr__(self, name: str) -> object:
            return getattr(native, name)

        def key_conv_backward_workspace_bytes(self, *args: object) -> int:
            return native.key_conv_backward_workspace_bytes(*args) - 1

    monkeypatch.setattr(_cuda, "native_module", OneByteLess)
    with pytest.raises(ValueError, match="workspace"):
        run_key_conv(make_inputs(KeyConvCase(), torch.float32, cuda_device))


def test_workspace_is_small(cuda_device: torch.device) -> None:
    """Beside 1 GiB of keys and more: pieces of the weight's gradient, whatever the shape."""
    for batch, heads, tokens, dim, width in ((1, 8, 2**20, 64, 3), (64, 8, 2**14, 64, 8), (1, 1, 2**19, 1024, 8)):
        keys = described(batch, heads, tokens, dim, dtype=torch.bfloat16)
        weight = described(heads, dim, width, dtype=torch.float32)
        given = {**dict.fromkeys(("grad_out", "key", "grad_key"), keys), "weight": weight}
        given |= {"has_silu": True, **dict.fromkeys(("cu_seqlens", "bias", "state", "grad_bias", "grad_state"))}
        native = _cuda.native_module()
        assert 0 < workspace_bytes(native, "key_conv_backward", **given, grad_weight=weight) <= 64 << 20
        assert workspace_bytes(native, "key_conv_backward", **given, grad_weight=None) == 0
