"""Sparse gradients under DistributedDataParallel, clipping of mixed gradients, and FSDP on the meta device: two
processes (gloo, CPU) against one that has all tokens. ``sparse_worker.py`` runs them all in one start.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import topgather as tg
import topgather.distributed

sys.path.insert(0, str(Path(__file__).parent))

from sparse_worker import (
    DIM,
    MODELS,
    NORMS,
    OPTIMIZERS,
    ROW_MODELS,
    WORLD_SIZE,
    backward,
    gradients,
    make,
    tokens,
    train_rows,
)

from tests.distributed.ranks import results_in, run_once

WORKER = Path(__file__).with_name("sparse_worker.py")


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each rank's results, by case; pytest's workers, if there are several, share one run."""
    return results_in(run_once(tmp_path_factory, "sparse_and_clipping", [WORKER]), WORLD_SIZE)


def results_of(name: str, ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for results in ranks:
        assert name in results, list(results.values())[-1]
        assert not isinstance(results[name], str), results[name]
    return [results[name] for results in ranks]


def mean_gradients(name: str, shift: int = 0) -> dict[str, Tensor]:
    """Those of the mean over all ranks, in one process."""
    model = make(name, False)
    totals = []
    for rank in range(WORLD_SIZE):
        backward(model, tokens(rank) + shift)
        totals.append(gradients(model))
    return {key: sum(one[key] for one in totals) / WORLD_SIZE for key in totals[0]}


def clipped_by_torch(grads: dict[str, Tensor], max_norm: float, norm_type: float) -> tuple[Tensor, dict[str, Tensor]]:
    parameters = [nn.Parameter(torch.zeros_like(grad)) for grad in grads.values()]
    for parameter, grad in zip(parameters, grads.values(), strict=True):
        parameter.grad = grad.clone()
    norm = nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
    return norm, dict(zip(grads, (parameter.grad for parameter in parameters), strict=True))


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_data_parallel(name: str, sparse_grad: bool, ranks: list[dict[str, Any]]) -> None:
    for result in results_of(f"ddp_{name}_{sparse_grad}", ranks):
        assert bool(result["sparse"]) == sparse_grad
        assert all("values" in table for table in result["sparse"])
        for step in range(2):
            torch.testing.assert_close(result[f"grad{step}"], mean_gradients(name, step))
        norm, clipped = clipped_by_torch(mean_gradients(name, 1), 0.05, 2.0)
        torch.testing.assert_close(result["norm"], norm)
        torch.testing.assert_close(result["clipped"], clipped)


@pytest.mark.parametrize("name", NORMS)
def test_clipping_with_a_sharded_table(name: str, ranks: list[dict[str, Any]]) -> None:
    norm_type, max_norm = NORMS[name]
    for result in results_of(f"sharded_{name}", ranks):
        norm, clipped = clipped_by_torch(result["grad"], max_norm, norm_type)
        torch.testing.assert_close(result["norm"], norm)
        torch.testing.assert_close(result["clipped"], clipped)
        # Where this changes, so may the documentation.
        assert "mixed torch.Tensor and DTensor" in result["torch_clips"]
        assert "mixed torch.Tensor and DTensor" in result["foreach_mixed"]


@pytest.mark.parametrize("name", NORMS)
def test_torchs_own_utilities_where_all_are_dtensors(name: str, ranks: list[dict[str, Any]]) -> None:
    """Clipping, GradScaler, foreach and fused optimizers give what they give in one process."""
    norm_type, max_norm = NORMS[name]
    expected = mean_gradients("shared")
    norm, clipped = clipped_by_torch(expected, max_norm, norm_type)
    for result in results_of(f"all_dtensors_{name}", ranks):
        for kind, (optimizer, options) in OPTIMIZERS.items():
            torch.testing.assert_close(result[kind]["grad"], expected)
            torch.testing.assert_close(result[kind]["norm"], norm)
            torch.testing.assert_close(result[kind]["clipped"], clipped)
            model = make("shared", False)
            for key, parameter in model.named_parameters():
                parameter.grad = clipped[key]
            optimizer(model.parameters(), **options).step()
            torch.testing.assert_close(result[kind]["after"], dict(model.named_parameters()), check_device=False)


def test_fsdp_on_the_meta_device(ranks: list[dict[str, Any]]) -> None:
    expected = {n: float(p.std()) for n, p in make_large().named_parameters()}
    for result in results_of("fsdp_on_meta", ranks):
        for deviations in result["deviations"]:
            assert set(deviations) == set(expected)
            for name, deviation in deviations.items():
                assert deviation == pytest.approx(expected[name], rel=0.2, abs=1e-12), name


def make_large() -> nn.Module:
    return tg.nn.ProductKeyMemory(256, tg.nn.MemoryPool(32, 256), 2, 4, 256, query_norm="batch")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_clipping_in_one_process(name: str, norm_type: float) -> None:
    """Sparse gradients, rows that stand twice in them too, as dense ones."""
    for max_norm in (1e-3, 1e6):
        dense, sparse = (make(name, sparse_grad) for sparse_grad in (False, True))
        for model in (dense, sparse):
            backward(model, tokens(0))
        for parameter in sparse.parameters():
            if parameter.grad.is_sparse:
                parameter.grad = parameter.grad / 2 + parameter.grad / 2
        expected = nn.utils.clip_grad_norm_(dense.parameters(), max_norm, norm_type)
        torch.testing.assert_close(tg.distributed.clip_grad_norm_(sparse.parameters(), max_norm, norm_type), expected)
        torch.testing.assert_close(gradients(sparse), gradients(dense))


def test_clipping_edges() -> None:
    clip = tg.distributed.clip_grad_norm_
    parameter = nn.Parameter(torch.zeros(3))
    assert clip(parameter, 1.0) == 0 and clip([], 1.0) == 0
    parameter.grad = torch.full((3,), float("nan"))
    assert clip(parameter, 1.0).isnan()
    parameter.grad = torch.tensor([1.0, float("inf"), 2.0])
    with pytest.raises(RuntimeError, match=r"norm of order 2\.0 of the gradients is inf"):
        clip([parameter], 1.0, error_if_nonfinite=True)
    assert parameter.grad.tolist() == [1.0, float("inf"), 2.0]
    for arguments, error, named in (
        ({"max_norm": "1"}, TypeError, "max_norm"),
        ({"max_norm": 1.0, "norm_type": 0.0}, ValueError, "norm_type"),
    ):
        with pytest.raises(error, match=named):
            clip([parameter], **arguments)


def test_names_and_order_of_parameters() -> None:
    """What PeerMemory shows to DistributedDataParallel changes no name and no parameter."""
    names = [
        [name for name, _ in tg.nn.PeerMemory(DIM, 4, 2, 4, 8, sparse_grad=s).named_parameters()] for s in (False, True)
    ]
    assert set(names[0]) == set(names[1]) and len(names[0]) == len(names[1])
    layer = tg.nn.PeerMemory(DIM, 4, 2, 4, 8, sparse_grad=True)
    assert set(layer.state_dict()) == set(names[0])
    assert dict(layer.named_modules())[""] is layer


def test_row_optimizer_of_a_sharded_table(ranks: list[dict[str, Any]]) -> None:
    """Its steps, states and the norm are those of one process; rows that fully_shard cuts are refused in words."""
    model = make("shared", False)
    expected, _ = train_rows(model, model[0].pool.values, 1.0, list(range(WORLD_SIZE)))
    for result in results_of("row_optimizer", ranks):
        for name, value in expected.items():
            torch.testing.assert_close(result[name], value, msg=lambda text, name=name: f"{name}: {text}")
        assert result["loaded"]
        assert "sharded by columns alone" in result["refused"] and "ignored_params" in result["refused"]


@pytest.mark.parametrize("kind", ROW_MODELS)
def test_row_optimizers_under_data_parallelism(kind: str, ranks: list[dict[str, Any]]) -> None:
    """Every rank steps its copy by the averaged gradient, not by what it looked up itself."""
    expected = make("shared", False)[0].pool.values.detach().clone()
    for step in range(2):
        expected -= mean_gradients("shared", step)["0.pool.values"]
    for result in results_of(f"ddp_rows_{kind}", ranks):
        torch.testing.assert_close(result["table"], expected)
        assert "DistributedDataParallel does with sparse_grad=False" in result["refused"]


def test_what_a_sharded_table_refuses(ranks: list[dict[str, Any]]) -> None:
    """In words that say so, whatever torch would say of DTensors and of functions without a setup_context."""
    for result in results_of("refused_of_sharded", ranks):
        assert len(result) == 14
        for name, refusal in result.items():
            is_transform = name.endswith(("vmap", "grad"))
            words = "cannot be called under torch.vmap" if is_transform else "sharded over ranks"
            words = "must have no row optimizer yet" if name.endswith("attached") else words
            assert words in refusal, f"{name}: {refusal}"
