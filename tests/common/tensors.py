"""What all tests share: random tensors in every memory layout, problem sizes, and comparisons."""

from dataclasses import fields

import torch
from torch import Tensor

from tests.common.tolerances import Tolerance

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = ["contiguous", "offset", "padded", "transposed", "expanded"]


class Case:
    """A problem size; its text is a test id, the fields that differ from the default."""

    def __str__(self) -> str:
        every = fields(self)  # type: ignore[arg-type]
        changed = [f"{f.name}={getattr(self, f.name)}" for f in every if getattr(self, f.name) != f.default]
        return ",".join(changed) or "default"


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Standard normal numbers, the same for every device, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def integer_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Integers from -2 to 2: with a power-of-two block size every routing score is exact, so ties are too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).to(dtype).to(device)


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides or another offset; last dimension contiguous. "expanded" repeats the first."""
    if layout == "contiguous":
        return tensor.clone(memory_format=torch.contiguous_format)
    if layout == "offset":
        # One element past the allocation's start: aligned to the element and to nothing wider.
        return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    if layout == "padded":
        storage = tensor.new_full([size + 3 for size in tensor.shape], float("nan"))
        view = storage[tuple(slice(1 + dim % 2, 1 + dim % 2 + size) for dim, size in enumerate(tensor.shape))]
        return view.copy_(tensor)
    if layout == "transposed":
        # Of two dimensions every other row: the last one stays contiguous.
        if tensor.ndim == 2:
            return tensor.repeat_interleave(2, dim=0)[::2]
        return tensor.transpose(0, -2).contiguous().transpose(0, -2)
    if layout == "expanded":
        return tensor[:1].clone().expand(tensor.shape)
    raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")


def assert_same_nonfinite(name: str, actual: Tensor, expected: Tensor) -> None:
    """NaN, +inf and -inf stand in the same places."""
    for kind, mask_of in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = mask_of(actual) != mask_of(expected)
        if differs.any():
            where = tuple(differs.nonzero()[0].tolist())
            raise AssertionError(
                f"{name}: {kind} mask differs at {int(differs.sum())} of {differs.numel()} elements, first "
                f"at {where}: got {actual[where].item()}, expected {expected[where].item()}"
            )


def assert_close(
    name: str,
    actual: Tensor,
    expected: Tensor,
    magnitude: Tensor,
    tolerance: Tolerance,
    dtype: torch.dtype,
    length: int,
    score_factor: float = 1.0,
) -> None:
    """``actual`` (of a kernel that ran in ``dtype``) is ``expected`` (float64) up to ``tolerance``."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert_same_nonfinite(name, actual, expected)
    is_finite = expected.isfinite()
    error = torch.where(is_finite, (actual.double() - expected).abs(), 0.0)
    size = torch.where(is_finite, expected.abs() + magnitude, 0.0)
    assert not size.isnan().any(), f"{name}: the magnitude of a finite result must not be NaN"
    bound = tolerance.relative(dtype, length, score_factor) * size + tolerance.absolute(dtype)
    exceeds = error > bound
    if exceeds.any():
        where = tuple(exceeds.nonzero()[(error / bound)[exceeds].argmax()].tolist())
        raise AssertionError(
            f"{name}: {int(exceeds.sum())} of {exceeds.numel()} elements out of tolerance, worst at {where}: "
            f"got {actual[where].item()!r}, expected {expected[where].item()!r}, "
            f"error {error[where].item():.3e}, allowed {bound[where].item():.3e} ({tolerance.reason})"
        )


def assert_bitwise_equal(name: str, actual: Tensor, expected: Tensor) -> None:
    """The same bits, NaN payloads and signs of zero included."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, f"{name}: dtype or shape differs"
    # A single number may have any stride, and a tensor without dimensions has none.
    left, right = (each.reshape(-1).clone(memory_format=torch.contiguous_format) for each in (actual, expected))
    assert left.view(torch.uint8).equal(right.view(torch.uint8)), f"{name}: bits differ"
