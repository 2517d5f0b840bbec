"""Every module that the package exports, drawn anew: in any order of modules, and on the meta device first, its
parameters have the constructor's distribution.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import topgather as tg

UNSET = -12345


def exported() -> dict[str, type[nn.Module]]:
    """The classes of modules, by name."""
    found = {name: getattr(package, name) for package in (tg.nn, tg.models) for name in package.__all__}
    return {name: cls for name, cls in found.items() if inspect.isclass(cls) and issubclass(cls, nn.Module)}


def pool() -> nn.Module:
    return tg.nn.MemoryPool(16, 64)


def memory(**options: Any) -> nn.Module:
    return tg.nn.ProductKeyMemory(128, tg.nn.MemoryPool(16, 64), 2, 4, 64, **options)


def peer(**options: Any) -> nn.Module:
    return tg.nn.PeerMemory(128, 16, 2, 4, 64, **options)


# How each is made, with what makes it hold all that it can hold.
MAKE: dict[str, list[Callable[[], nn.Module]]] = {
    "MemoryPool": [pool],
    "OffloadedMemoryPool": [lambda: tg.nn.OffloadedMemoryPool(16, 64, "cpu", cache_rows=4)],
    "QuantizedMemoryPool": [lambda: tg.nn.QuantizedMemoryPool(16, 64, group_size=32)],
    "ProductKeyMemory": [
        lambda: memory(query_norm="batch", track_usage=True),
        lambda: memory(query_norm="rms"),
        lambda: memory(query_norm="layer", bias=False),
        lambda: memory(gated=False),
    ],
    "NgramMemory": [lambda: tg.nn.NgramMemory(64, 1000, rows=101, num_streams=2)],
    "PeerMemory": [lambda: peer(query_norm="batch", track_usage=True), lambda: peer(query_norm="rms")],
    "MobaAttention": [lambda: tg.nn.MobaAttention(128, 2, kernel_size=3, bias=True)],
    "IndexedAttention": [lambda: tg.nn.IndexedAttention(128, 2, index_dim=32, bias=True)],
    "SparseSelfAttention2d": [
        lambda: tg.nn.SparseSelfAttention2d(128, 2, grid_size=9, relative_position_bias=True),
        lambda: tg.nn.SparseSelfAttention2d(128, 2, window_size=4, qkv_bias=False),
    ],
    "LearnableFeatureFusion": [lambda: tg.nn.LearnableFeatureFusion([64, 128], 128, 16, init_value=0.25)],
    "SparseViT": [
        lambda: tg.models.SparseViT(
            depths=(1, 1, 1, 1), dims=(32, 32, 64, 64), rates=((1,), (1,)), base_size=64, fusion_dim=32, out_channels=16
        )
    ],
}
CASES = [pytest.param(make, id=f"{name}{index}") for name, makes in MAKE.items() for index, make in enumerate(makes)]


def test_every_exported_module_is_tried() -> None:
    assert set(MAKE) == set(exported())


def reset_parents_first(module: nn.Module) -> None:
    for part in module.modules():
        reset_one(part)


def reset_children_first(module: nn.Module) -> None:
    for part in reversed(list(module.modules())):
        reset_one(part)


def reset_alone(module: nn.Module) -> None:
    """The outermost ``reset_parameters``, and that of pools, which belong to no layer."""
    module.reset_parameters()
    for part in module.modules():
        if isinstance(part, (tg.nn.MemoryPool, tg.nn.QuantizedMemoryPool)):
            part.reset_parameters()


def reset_as_fsdp_does(module: nn.Module) -> None:
    """Only what holds something itself, and that must know how."""
    for part in module.modules():
        if [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
            part.reset_parameters()


def reset_one(part: nn.Module) -> None:
    if hasattr(part, "reset_parameters"):
        part.reset_parameters()


RESETS = pytest.mark.parametrize(
    "reset", [reset_parents_first, reset_children_first, reset_alone, reset_as_fsdp_does], ids=lambda f: f.__name__
)


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def assert_same_distribution(name: str, actual: Tensor, expected: Tensor) -> None:
    """Kolmogorov and Smirnov's test of two samples, at a level of about 1e-5."""
    samples = [tensor.detach().double().flatten().sort().values for tensor in (actual, expected)]
    if samples[1][0] == samples[1][-1]:
        assert torch.equal(actual, expected), f"{name}: {actual.unique()} instead of {expected.unique()}"
        return
    points = torch.cat(samples)
    shares = [torch.searchsorted(sample, points, right=True).double() / sample.numel() for sample in samples]
    distance = float((shares[0] - shares[1]).abs().max())
    assert distance < 2.5 * math.sqrt(2 / samples[0].numel()), f"{name}: another distribution, distance {distance}"


@RESETS
@pytest.mark.parametrize("make", CASES)
def test_reset_draws_what_the_constructor_draws(
    make: Callable[[], nn.Module], reset: Callable[[nn.Module], None]
) -> None:
    torch.manual_seed(0)
    fresh = dict(tensors_of(make()))
    module = make()
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.fill_(UNSET if tensor.dtype != torch.int8 else 77)
    reset(module)
    for name, tensor in tensors_of(module):
        assert_same_distribution(name, tensor, fresh[name])


@RESETS
@pytest.mark.parametrize("make", CASES)
def test_meta_then_memory_then_reset(make: Callable[[], nn.Module], reset: Callable[[nn.Module], None]) -> None:
    torch.manual_seed(0)
    fresh = dict(tensors_of(make()))
    with torch.device("meta"):
        module = make()
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            # Stands for whatever the memory holds.
            tensor.fill_(UNSET if tensor.dtype != torch.int8 else 77)
    reset(module)
    assert {name for name, _ in tensors_of(module)} == set(fresh)
    for name, tensor in tensors_of(module):
        assert tensor.dtype == fresh[name].dtype and tensor.shape == fresh[name].shape
        assert_same_distribution(name, tensor, fresh[name])


def test_the_comparison_sees_another_distribution() -> None:
    torch.manual_seed(0)
    uniform = torch.rand(5000)
    assert_same_distribution("uniform", torch.rand(5000), uniform)
    for other in (1.1 * torch.rand(5000), uniform.std() * torch.randn(5000) + 0.5):
        with pytest.raises(AssertionError, match="another distribution"):
            assert_same_distribution("other", other, uniform)
