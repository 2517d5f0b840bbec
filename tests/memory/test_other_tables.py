"""Pools and layers whose table, device or dtype is another than the one that they were used with before."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

import topgather as tg

INDICES = torch.tensor([[1, 2], [3, 3]])
ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tables in files need Linux")


def offloaded(cache_rows: int = 8) -> tg.nn.OffloadedMemoryPool:
    torch.manual_seed(0)
    return tg.nn.OffloadedMemoryPool(4, 8, "cpu", cache_rows=cache_rows)


# --- rows that were sent of another table -----------------------------------------------------------------------------


def assign(pool: nn.Module, values: Tensor) -> None:
    pool.load_state_dict({"values": values}, assign=True)


def replace(pool: nn.Module, values: Tensor) -> None:
    pool.values = nn.Parameter(values)


@pytest.mark.parametrize("change", [assign, replace])
@pytest.mark.parametrize("is_asked_ahead", [False, True])
def test_rows_of_a_replaced_table_are_not_used(is_asked_ahead: bool, change: Callable[..., None]) -> None:
    """Its number of changes may be that of the table before."""
    pool = offloaded()
    replace(pool, torch.randn(16, 8))
    for _ in range(3):
        pool(INDICES)
        if is_asked_ahead:
            pool.prefetch(INDICES)
        change(pool, torch.randn(16, 8))
        assert torch.equal(pool(INDICES), tg.memory_lookup(pool.values, INDICES))


def test_rows_of_a_table_for_one_call_are_its_own() -> None:
    pool = offloaded()
    replace(pool, torch.randn(16, 8))
    for _ in range(3):
        values = torch.randn(16, 8)
        assert torch.equal(functional_call(pool, {"values": values}, (INDICES,)), tg.memory_lookup(values, INDICES))
        assert torch.equal(pool(INDICES), tg.memory_lookup(pool.values, INDICES))


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_a_table_in_host_memory_refuses_transforms(transform: str) -> None:
    pool, values, weights = offloaded(), torch.randn(16, 8), torch.rand(2, 2)

    def lookup(values: Tensor) -> Tensor:
        return functional_call(pool, {"values": values}, (INDICES, weights))

    calls: dict[str, Callable[[], Any]] = {
        "vmap": lambda: vmap(lookup)(values.expand(2, 16, 8)),
        "grad": lambda: grad(lambda values: lookup(values).sum())(values),
        "jvp": lambda: jvp(lookup, (values,), (values,)),
    }
    with pytest.raises(NotImplementedError, match=r"OffloadedMemoryPool cannot be called under torch\.vmap"):
        calls[transform]()


def test_a_tangent_of_a_table_in_host_memory_is_refused() -> None:
    """It would be zero; that of weights is right."""
    pool, weights = offloaded(), torch.rand(2, 2)
    pool.requires_grad_(False)
    with forward_ad.dual_level():
        out = pool(INDICES, forward_ad.make_dual(weights, weights.cos()))
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, pool(INDICES, weights.cos()))
        values = forward_ad.make_dual(torch.randn(16, 8), torch.randn(16, 8))
        with pytest.raises(NotImplementedError, match="values must not have a tangent"):
            functional_call(pool, {"values": values}, (INDICES, weights))


@pytest.mark.parametrize("options", [{"padding_idx": 3}, {"include_last_offset": True}])
def test_rows_that_no_bag_names_have_no_gradient(options: dict[str, Any]) -> None:
    """Padding, and entries behind the last bag: an optimizer would step them by their moments."""
    torch.manual_seed(0)
    plain = tg.nn.MemoryPool(4, 8, sparse_grad=True, **options)
    pool = tg.nn.OffloadedMemoryPool.from_pool(plain, "cpu")
    indices, offsets = torch.tensor([1, 3, 5, 3, 7]), torch.tensor([0, 2, 4])
    for each in (plain, pool):
        each(indices, None, offsets).square().sum().backward()
    assert torch.equal(pool.values.grad.indices(), plain.values.grad.indices())
    assert torch.equal(pool.values.grad.values(), plain.values.grad.values())
    found = []
    for each in (plain, pool):
        out = each(indices, None, offsets)
        several = torch.randn(2, *out.shape, generator=torch.Generator().manual_seed(0))
        found.append(torch.autograd.grad(out, each.values, several, is_grads_batched=True)[0])
    torch.testing.assert_close(found[1], found[0])


# --- tables in files --------------------------------------------------------------------------------------------------


@ON_LINUX
@pytest.mark.parametrize("is_by_hand", [None, True, False])
def test_what_any_step_changes_is_written_back(is_by_hand: bool | None, tmp_path: Path) -> None:
    """Momentum moves the rows of earlier gradients on; a gradient may come from elsewhere than a backward, or be
    dense.
    """
    pool = tg.nn.MemoryPool.from_file(tmp_path / "table", 4, 8)
    values = pool.values.detach().clone().requires_grad_()
    ours, theirs = (torch.optim.SGD([table], lr=0.1, momentum=0.9) for table in (pool.values, values))
    for number in range(4):
        indices = torch.tensor([[number, 3 * number]])
        for table, optimizer in ((pool.values, ours), (values, theirs)):
            optimizer.zero_grad()
            other = table if is_by_hand is False else values.detach().clone().requires_grad_()
            tg.memory_lookup(other, indices, sparse_grad=True).square().sum().backward()
            table.grad = other.grad.to_dense() if is_by_hand is None else other.grad
            optimizer.step()
        pool.flush()
        assert torch.equal(pool.values, values)
    pool.close()


@ON_LINUX
def test_a_table_in_a_file_is_not_taken_into_host_memory(tmp_path: Path) -> None:
    """What is trained there would not be written back."""
    pool = tg.nn.MemoryPool.from_file(tmp_path / "table", 4, 8)
    with pytest.raises(TypeError, match="must have its table in memory"):
        tg.nn.OffloadedMemoryPool.from_pool(pool, "cpu")
    with pytest.raises(TypeError, match="must be a MemoryPool"):
        tg.nn.OffloadedMemoryPool.from_pool(nn.Embedding(16, 8), "cpu")  # type: ignore[arg-type]
    pool.close()


# --- another default device -------------------------------------------------------------------------------------------


def memory(**options: Any) -> nn.Module:
    return tg.nn.ProductKeyMemory(8, tg.nn.MemoryPool(4, 8), 2, 3, 8, **options)


TOKENS = torch.arange(10).view(2, 5)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "memory": (lambda: memory(track_usage=True), (torch.randn(5, 8),)),
    "experts": (lambda: tg.nn.PeerMemory(8, 4, 2, 3, 8, sparse_grad=True), (torch.randn(5, 8),)),
    "8 bits": (lambda: tg.nn.MemoryPool(4, 8).quantize(), (INDICES,)),
    "bags": (lambda: tg.nn.MemoryPool(4, 8, padding_idx=3, mode="mean"), (INDICES,)),
    "host memory": (offloaded, (INDICES,)),
    "n-grams": (lambda: tg.nn.NgramMemory(16, 20, num_tables=2, rows=9), (torch.randn(2, 5, 16), TOKENS)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_leaves_the_default_device_alone(name: str) -> None:
    """The meta device, from which nothing can be copied, stands for any other."""
    make, arguments = LAYERS[name]
    layers = []
    for default in ("cpu", "meta"):
        torch.manual_seed(0)
        layer = make()
        tables = [table for table in layer.parameters() if table.ndim == 2 and table.is_leaf]
        optimizer = tg.optim.RowAdam(tables, weight_decay=0.1) if name == "bags" else None
        with torch.device(default):
            out = layer(*arguments)
            if out.requires_grad:
                out.square().sum().backward()
            if optimizer is not None:
                tg.optim.clip_grad_norm_(layer.parameters(), 0.1, optimizer)
                optimizer.step()
                optimizer.settle()
            use = layer.usage() if name in ("memory", "host memory") else None
        layers.append([use, out.detach(), *(parameter.detach() for parameter in layer.parameters())])
    assert layers[0][0] == layers[1][0]
    for found, expected in zip(layers[1][1:], layers[0][1:], strict=True):
        assert torch.equal(found, expected)


@ON_LINUX
def test_a_table_in_a_file_leaves_the_default_device_alone(tmp_path: Path) -> None:
    with torch.device("meta"):
        pool = tg.nn.MemoryPool.from_file(tmp_path / "table", 4, 8)
        pool(INDICES).sum().backward()
        torch.optim.SGD([pool.values], lr=1.0).step()
        pool.flush()
        assert pool.values.device.type == "cpu"
        pool.load_state_dict(pool.state_dict())
    pool.close()


# --- another dtype ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64, torch.complex64, torch.bool], ids=str)
def test_numbers_of_another_kind_are_loaded_into_no_table(dtype: torch.dtype) -> None:
    """``copy_`` would convert them, to numbers that mean nothing without scales, or without an imaginary part."""
    layers = [memory(), tg.nn.PeerMemory(8, 4, 2, 3, 8), tg.nn.NgramMemory(16, 20, num_tables=2, rows=9)]
    for layer in layers:
        for name, value in layer.state_dict().items():
            is_table = name.rpartition(".")[2] in ("keys", "values", "values_in", "values_out")
            if is_table:
                before = value.clone()
                with pytest.raises(RuntimeError, match=f"{name} is of {dtype}"):
                    layer.load_state_dict({**layer.state_dict(), name: value.to(dtype)}, strict=False)
                assert torch.equal(layer.state_dict()[name], before)
    published = {"keys": layers[0].keys, "values.weight": layers[0].pool.values}
    for name, linear in (
        ("query_proj.query_mlps.0", layers[0].query_proj),
        ("swilu_projection", layers[0].swilu_projection),
        ("value_proj", layers[0].value_proj),
    ):
        published |= {f"{name}.weight": linear.weight, f"{name}.bias": linear.bias}
    layers[0].load_reference_state_dict(published)
    for name, value in published.items():
        with pytest.raises(ValueError, match=f"{name} is of {dtype}"):
            layers[0].load_reference_state_dict({**published, name: value.detach().to(dtype)})


def test_scales_of_another_dtype_are_refused_where_they_are_loaded() -> None:
    pool = tg.nn.MemoryPool(4, 8).quantize()
    saved = {**pool.state_dict(), "scales": pool.scales.to(torch.bfloat16)}
    for assigns in (False, True):
        with pytest.raises(RuntimeError, match=r"scales must have dtype torch\.float32"):
            pool.load_state_dict(saved, assign=assigns)


def test_a_layer_in_float64_takes_a_pool_in_8_bits() -> None:
    torch.manual_seed(0)
    layer = tg.nn.ProductKeyMemory(8, tg.nn.MemoryPool(4, 8).quantize(), 2, 3, 8)
    x = torch.randn(5, 8)
    expected = layer(x)
    torch.testing.assert_close(layer.double()(x.double()).float(), expected)


# --- attributes and padding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_norm", "norm_type", "scale_grad_by_freq"])
def test_what_nobody_reads_is_not_set(name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        setattr(tg.nn.MemoryPool(4, 8), name, 1.0)


def test_what_padding_holds_does_not_matter() -> None:
    torch.manual_seed(0)
    layer = tg.nn.NgramMemory(16, 20, num_tables=2, rows=9)
    nn.init.normal_(layer.conv_weight)
    x, tokens = torch.randn(1, 6, 16), torch.arange(6)[None]
    mask = torch.tensor([[False, False, True, True, True, True]])
    x[:, :2] = torch.nan
    torch.testing.assert_close(layer(x, tokens, mask=mask)[:, 2:], layer(x[:, 2:], tokens[:, 2:]))


def test_an_experts_layer_is_called_with_other_tables_in_a_graph() -> None:
    torch.manual_seed(0)
    layer = tg.nn.PeerMemory(8, 4, 2, 3, 8, sparse_grad=True)
    x = torch.randn(5, 8)
    parameters = {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}
    call = torch.compile(lambda x: functional_call(layer, parameters, (x,)), backend="aot_eager", fullgraph=True)
    call(x).sum().backward()
    layer(x).sum().backward()
    torch.testing.assert_close(parameters["values_in"].grad.to_dense(), layer.values_in.grad.to_dense())
