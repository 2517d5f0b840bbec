"""Tables of memory layers under parametrisations, pruning and weight normalisation, in optimizer groups and loads."""

import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import topgather as tg
from topgather.nn._tables import TableModule, table_parameters

DIM = 8


def memory(sparse_grad: bool = False, **options: Any) -> nn.Module:
    return tg.nn.ProductKeyMemory(DIM, tg.nn.MemoryPool(4, 8, sparse_grad), 2, 4, 8, **options)


def peer(**options: Any) -> nn.Module:
    return tg.nn.PeerMemory(DIM, 4, 2, 4, 8, **options)


class Scaled(nn.Module):
    """A parametrisation with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, original: torch.Tensor) -> torch.Tensor:
        return original * self.factor


def tables_of(model: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """Module, name and group of every table."""
    modules = [module for module in model.modules() if isinstance(module, TableModule)]
    return [(module, name, group) for module in modules for name, group in module.TABLES.items()]


TABLES = [
    pytest.param(make, index, id=f"{make.__name__}-{name}")
    for make in (memory, peer)
    for index, (_, name, _) in enumerate(tables_of(make()))
]
CHANGES: dict[str, Callable[[nn.Module, str], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm_of_columns": lambda module, name: parametrizations.weight_norm(module, name, 1),
    "spectral_norm": parametrizations.spectral_norm,
    "own": lambda module, name: parametrize.register_parametrization(module, name, Scaled()),
    "prune": lambda module, name: prune.random_unstructured(module, name, 0.5),
    "old_weight_norm": nn.utils.weight_norm,
    "old_spectral_norm": nn.utils.spectral_norm,
}


def change_table(how: str, module: nn.Module, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that the older ones are deprecated
        CHANGES[how](module, name)


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("make, index", TABLES)
def test_changed_tables(make: Callable[..., nn.Module], index: int, how: str) -> None:
    """The layer runs and trains, and what the table is computed from stands in the table's group."""
    model = make()
    module, name, group = tables_of(model)[index]
    before = {id(parameter) for parameter in model.parameters()} - {id(module.get_parameter(name))}
    change_table(how, module, name)
    own = [parameter for parameter in model.parameters() if id(parameter) not in before]
    assert own and {id(p) for p in own} == {id(p) for p in table_parameters(module, name)}
    groups = tg.nn.memory_parameter_groups(model, lr=1e-4, values_lr=1e-2, weight_decay=0.1)
    for one in groups:
        assert all((one["name"] == group) == any(p is q for q in one["params"]) for p in own)
    assert sum(len(one["params"]) for one in groups) == len(list(model.parameters()))

    x = torch.randn(6, DIM)
    model(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in own)
    with torch.no_grad():  # a pruned table is then computed without a graph
        model(x)
    assert tg.nn.memory_parameter_groups(model, lr=1e-4)[0]["params"] == groups[0]["params"]
    assert model.load_state_dict(model.state_dict())
    repr(model)
    module.reset_parameters()


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("make, index", TABLES)
def test_computed_tables_have_dense_gradients(make: Callable[..., nn.Module], index: int, how: str) -> None:
    """With ``sparse_grad`` too: most of what computes a table knows no sparse gradients, and it is whole anyway."""
    x = torch.randn(6, DIM)
    gradients = []
    for sparse_grad in (False, True):
        torch.manual_seed(0)
        model = make(sparse_grad=sparse_grad)
        module, name, group = tables_of(model)[index]
        change_table(how, module, name)
        model(x).square().sum().backward()
        computed = dict(module.named_parameters())
        own = {
            path for path, parameter in computed.items() if any(parameter is p for p in table_parameters(module, name))
        }
        assert own and not any(computed[path].grad.is_sparse for path in own)
        if sparse_grad and group == "values":  # what DistributedDataParallel goes by
            bags = [part for part in model.modules() if isinstance(part, nn.EmbeddingBag)]
            assert not any(bag.sparse for bag in bags)
        gradients.append([parameter.grad.to_dense() for parameter in model.parameters()])
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("make, index", TABLES)
def test_parametrised_modules_are_found_by_name(make: Callable[..., nn.Module], index: int) -> None:
    """functional_call and get_parameter go by names; removing gives the table back."""
    model = make()
    module, name, _ = tables_of(model)[index]
    expected = module.get_parameter(name).detach().clone()
    parametrizations.weight_norm(module, name)
    for path, parameter in model.named_parameters():
        assert model.get_parameter(path) is parameter
    x = torch.randn(6, DIM)
    params = {path: parameter.detach() for path, parameter in model.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(model, params, (x,)), model(x))
    parametrize.remove_parametrizations(module, name)
    torch.testing.assert_close(module.get_parameter(name), nn.Parameter(expected))
    assert not parametrize.is_parametrized(module)
    assert model(x).shape == x.shape


def test_unknown_tables_raise() -> None:
    model = memory()
    del model.pool.values
    model.pool.values = torch.randn(16, 8)
    with pytest.raises(ValueError, match="values of MemoryPool is no parameter"):
        tg.nn.memory_parameter_groups(model, lr=1e-3)


# --- loads that would be lost -----------------------------------------------------------------------------------------


def vit() -> nn.Module:
    return tg.models.SparseViT(
        depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), head_dim=8, rates=((1,), (1,)), base_size=64, fusion_dim=8
    )


def published(model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict of the names and shapes that the model asks for."""
    with mock.patch(f"{type(model).__module__}.copy_reference") as copy:
        model.load_reference_state_dict({})
    targets: dict[str, torch.Tensor] = copy.call_args.args[0]
    return {name: torch.randn(tensor.shape).to(tensor.dtype) for name, tensor in targets.items()}


LOADED = pytest.mark.parametrize("make", [memory, peer, vit])


@LOADED
def test_loads_into_meta_raise(make: Callable[[], nn.Module]) -> None:
    state_dict = published(make())
    with torch.device("meta"):
        model = make()
    with pytest.raises(ValueError, match=r"no memory to load state_dict\[.*meta device.*to_empty"):
        model.load_reference_state_dict(state_dict)
    model.to_empty(device="cpu").load_reference_state_dict(state_dict)
    loaded = make()
    loaded.load_reference_state_dict(state_dict)
    for left, right in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(left, right)


@LOADED
def test_loads_from_meta_raise(make: Callable[[], nn.Module]) -> None:
    state_dict = {name: tensor.to("meta") for name, tensor in published(make()).items()}
    model = make()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match="must hold numbers, but is on the meta device"):
        model.load_reference_state_dict(state_dict)
    assert all(torch.equal(left, right) for left, right in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("make, index", TABLES)
def test_loads_into_computed_tables_raise(make: Callable[..., nn.Module], index: int, how: str) -> None:
    model = make()
    state_dict = published(model)
    module, name, _ = tables_of(model)[index]
    change_table(how, module, name)
    with pytest.raises(ValueError, match=f"{name} of .* is computed from other tensors"):
        model.load_reference_state_dict(state_dict)


@pytest.mark.parametrize("name", ["gammas", "attention_gamma"])
def test_loads_into_computed_weights_raise(name: str) -> None:
    model = vit()
    state_dict = published(model)
    module = next(part for part in model.modules() if name in part._parameters)
    parametrize.register_parametrization(module, name, Scaled())
    with pytest.raises(ValueError, match=f"{name} of .* is computed from other tensors"):
        model.load_reference_state_dict(state_dict)
