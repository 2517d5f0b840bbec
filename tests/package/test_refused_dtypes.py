"""Every module given integers, such as images of bytes or numbers of tokens: refused by the argument's name."""

import inspect

import pytest
import torch
from torch import Tensor, nn

from tests.package.test_initialisation import CASES, exported, memory
from topgather.nn import MemoryPool

IMAGES = {"SparseSelfAttention2d": (1, 128, 8, 8), "SparseViT": (1, 3, 64, 64)}
NO_FLOATS = [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64]


def arguments_of(module: nn.Module) -> dict[str, Tensor | list[Tensor] | None]:
    """What its forward takes, by name; None for what it may do without."""
    name = type(module).__name__
    if name in ("MemoryPool", "QuantizedMemoryPool", "OffloadedMemoryPool"):
        indices, offsets = torch.zeros(6, dtype=torch.int64), torch.tensor([0, 2, 4])
        return {"indices": indices, "weights": torch.ones(6), "offsets": offsets}
    if name == "LearnableFeatureFusion":
        return {"maps": [torch.randn(1, 64, 8, 8), torch.randn(1, 128, 4, 4)]}
    if name == "NgramMemory":
        tokens = torch.arange(8).view(2, 4)
        return {"x": torch.randn(2, 4, 128), "tokens": tokens, "mask": tokens > 0, "cu_seqlens": None, "state": None}
    return {"x": torch.randn(IMAGES.get(name, (2, 4, 128)))}


@pytest.mark.parametrize("make", CASES)
def test_arguments_are_those_of_forward(make: object) -> None:
    """All but options that are words."""
    module = make()  # type: ignore[operator]
    parameters = inspect.signature(module.forward).parameters
    assert set(arguments_of(module)) == {name for name, each in parameters.items() if "str" not in each.annotation}
    module(**arguments_of(module))


@pytest.mark.parametrize("dtype", NO_FLOATS, ids=str)
@pytest.mark.parametrize("make", CASES)
def test_integers_are_refused_by_name(make: object, dtype: torch.dtype) -> None:
    module = make()  # type: ignore[operator]
    assert type(module).__name__ in exported()
    for name, value in arguments_of(module).items():
        if isinstance(value, list):
            wrongs = [[*value[:i], value[i].to(dtype), *value[i + 1 :]] for i in range(len(value))]
        elif value is not None and value.is_floating_point():
            wrongs = [value.to(dtype)]
        else:
            continue
        for wrong in wrongs:
            with pytest.raises(TypeError, match=rf"^{name}\b.*must have .*dtypes?\b.*got {dtype}"):
                module(**{**arguments_of(module), name: wrong})


def test_floating_indices_are_refused_by_name() -> None:
    pool = memory().pool
    assert isinstance(pool, MemoryPool)
    with pytest.raises(TypeError, match=r"^indices must have dtype .*got torch.float32"):
        pool(torch.zeros(3, 2), torch.ones(3, 2))
