"""Tables in 8 bits: the bounds of quantisation, the lookup against the reference, the layer, saving and loading."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import topgather as tg
from tests.common.tensors import assert_bitwise_equal
from tests.memory.quantized_helpers import DTYPES, FLOAT8, QuantizedCase, check_quantized, make_quantized, run_quantized
from topgather import reference

CASES = [
    QuantizedCase(),
    QuantizedCase(width=128, group_size=32, bag_size=9),
    QuantizedCase(width=37, bag_size=3),
    QuantizedCase(width=150, group_size=15, padding=3),
    QuantizedCase(width=1, bag_size=0),
    QuantizedCase(width=0),
    QuantizedCase(num_tokens=0),
    QuantizedCase(width=1040, num_tokens=3, bag_size=33),
    QuantizedCase(num_tokens=5, bag_size=20, sizes=(3, 0, 41, 30, 19)),
    QuantizedCase(width=21, num_tokens=5, bag_size=20, sizes=(3, 0, 41)),
]


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lookup_against_reference(case: QuantizedCase, dtype: torch.dtype, device: torch.device) -> None:
    check_quantized(case, dtype, device)


@pytest.mark.sanitize
@pytest.mark.usefixtures("cpu_target")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(dtype: torch.dtype) -> None:
    for case in CASES[:4]:
        check_quantized(case, dtype, torch.device("cpu"))


def test_every_number_of_e4m3(device: torch.device) -> None:
    """All 256, one a row, NaN among them: what torch makes of them."""
    values = torch.arange(256, device=device).to(torch.uint8).view(FLOAT8).unsqueeze(1)
    bags = torch.arange(256, device=device).unsqueeze(1)
    scales, weights = torch.full((256, 1), 0.5, device=device), torch.full((256, 1), 2.0, device=device)
    out = tg.quantized_lookup(values, scales, bags, weights)
    # A sum that begins with 0 has no -0.
    torch.testing.assert_close(out, values.float(), rtol=0, atol=0, equal_nan=True)
    dots = torch.ops.topgather.memory_dot_quantized(values, scales, bags, torch.full((256, 1), 2.0, device=device))
    torch.testing.assert_close(dots, values.float(), rtol=0, atol=0, equal_nan=True)


def test_results_do_not_depend_on_flushed_denormals() -> None:
    inputs = make_quantized(QuantizedCase(), FLOAT8, torch.device("cpu"))
    expected = run_quantized(inputs)
    try:
        torch.set_flush_denormal(True)
        found = run_quantized(inputs)
    finally:
        torch.set_flush_denormal(False)
    for name in ("out", "d_weights"):
        assert_bitwise_equal(name, found[name], expected[name])


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bounds_of_quantisation(dtype: torch.dtype, group_size: int | None) -> None:
    """Each number within its bound, over magnitudes from float32's smallest to its largest."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 64, generator=generator) * torch.logspace(-35, 34, 300).unsqueeze(1)
    rows[:, ::5] *= 1e-3
    rows[7] = 0.0
    values, scales = tg.nn.quantize_rows(rows, dtype, group_size)
    assert values.dtype == dtype and scales.dtype == torch.float32
    assert scales.shape == (300, 64 // (group_size or 64))
    columns = scales.double().repeat_interleave(64 // scales.size(1), 1)
    error = (reference.quantized_rows(values, scales) - rows.double()).abs()
    if dtype == torch.int8:
        bound = 0.501 * columns
    else:
        bound = torch.maximum(2.0**-4 * rows.double().abs(), 2.0**-10 * columns) * (1 + 1e-6)
    assert (error <= bound).all()
    assert (error[7] == 0).all()
    largest = rows.double().abs().unflatten(1, (scales.size(1), -1)).amax(2)
    limit = 127 if dtype == torch.int8 else 448
    used = largest > 0
    torch.testing.assert_close(scales.double()[used], (largest / limit)[used], rtol=1e-6, atol=1e-44)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_is_read_as_nan(dtype: torch.dtype, number: float) -> None:
    rows = torch.ones(3, 8)
    rows[1, 5] = number
    out = tg.quantized_lookup(*tg.nn.quantize_rows(rows, dtype, 4), torch.tensor([[0], [1], [2]]))
    expected = torch.ones(3, 8)
    expected[1, 4:] = torch.nan
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=0, atol=1e-6)


def test_many_rows_are_quantised_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(50, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = tg.nn.quantize_rows(rows)
    monkeypatch.setattr("topgather.ops.quantized.CHUNK_BYTES", 4 * 12 * 7)
    assert all(map(torch.equal, tg.nn.quantize_rows(rows), whole))


def test_a_second_derivative_and_16_bits() -> None:
    """Weights of 16 bits get gradients of 16 bits; the result is rounded once."""
    inputs = make_quantized(QuantizedCase(), torch.int8, torch.device("cpu"))
    wide = tg.quantized_lookup(**inputs)
    assert torch.equal(tg.quantized_lookup(**inputs, dtype=torch.bfloat16), wide.bfloat16())
    half = inputs["weights"].detach().bfloat16().requires_grad_()
    (gradient,) = torch.autograd.grad(
        tg.quantized_lookup(**{**inputs, "weights": half}).square().sum(), half, create_graph=True
    )
    assert gradient.dtype == torch.bfloat16
    # out_t = sum_k w_k row_k: the gradient of |out|^2 is 2 row_k . out, and that of its sum over k, 2 row_k . sum rows.
    (second,) = torch.autograd.grad(gradient.float().sum(), half)
    rows = reference.quantized_rows(inputs["values"], inputs["scales"])[inputs["indices"]]
    expected = 2 * (rows * rows.sum(1, keepdim=True)).sum(-1)
    torch.testing.assert_close(second.double(), expected, rtol=2**-6, atol=2**-6 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"values": torch.zeros(40, 48)}, TypeError, r"^values must have dtype"),
        ({"scales": torch.ones(40, 1, dtype=torch.float64)}, TypeError, r"^scales must have dtype"),
        ({"scales": torch.ones(40, 5)}, ValueError, r"^scales must have a number of groups that divides the 48"),
        ({"scales": torch.ones(39, 1)}, ValueError, r"^scales must have"),
        ({"scales": torch.ones(40, 1, requires_grad=True)}, ValueError, r"^scales must not require a gradient"),
        ({"weights": torch.ones(12, 11, dtype=torch.float64)}, TypeError, r"^weights must have dtype"),
        ({"indices": torch.full((12, 11), 40)}, IndexError, r"^indices must be between 0 and 39"),
        ({"dtype": torch.float64}, ValueError, r"^dtype must be one of"),
        ({"dtype": "float32"}, TypeError, r"^dtype must be a torch.dtype"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], match: str) -> None:
    inputs = make_quantized(QuantizedCase(), torch.int8, torch.device("cpu"))
    with pytest.raises(error, match=match):
        tg.quantized_lookup(**{**inputs, **change})


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((torch.zeros(2, 6, dtype=torch.int8),), TypeError, r"^values must have .*dtype"),
        ((torch.zeros(2, 6), torch.float16), ValueError, r"^dtype must be one of torch.int8"),
        ((torch.zeros(2, 6), "int8"), TypeError, r"^dtype must be a torch.dtype"),
        ((torch.zeros(2, 6), torch.int8, 4), ValueError, r"^group_size must divide the 6 columns"),
        ((torch.zeros(2, 6), torch.int8, 2.0), TypeError, r"^group_size must"),
    ],
)
def test_bad_tables(arguments: tuple[Any, ...], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        tg.nn.quantize_rows(*arguments)


# --- layers -----------------------------------------------------------------------------------------------------------


def make_layer(**options: Any) -> Any:
    torch.manual_seed(0)
    pool = tg.nn.MemoryPool(8, 48)
    return tg.nn.ProductKeyMemory(24, pool, num_heads=2, top_k=4, key_dim=8, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_within_its_bound(dtype: torch.dtype) -> None:
    """A trained layer's rows in 8 bits: its sums move by no more than the bound says, and the rest still learns."""
    layer = make_layer(gated=False, has_value_proj=False, out_dim=48)
    small = copy.deepcopy(layer)
    small.pool = layer.pool.quantize(dtype, group_size=16)
    x = torch.randn(30, 24, generator=torch.Generator().manual_seed(2))
    out = small(x)
    rows, columns = layer.pool.values.detach(), small.pool.scales.repeat_interleave(16, 1)
    bound = 0.501 * columns if dtype == torch.int8 else torch.maximum(rows.abs() / 16, columns / 1024)
    indices, weights = layer._choose(x)
    assert ((out - layer(x)).abs() <= tg.memory_lookup(bound, indices, weights) + 1e-6).all()
    out.square().sum().backward()
    assert small.keys.grad is not None and small.keys.grad.abs().sum() > 0
    assert {name for name, _ in small.named_parameters()} == {"keys", "query_proj.weight", "query_proj.bias"}


def test_a_table_of_another_kind_is_not_loaded() -> None:
    """``copy_`` would make 127 rows of the number 127, or of 448 an int8; floats of 16 and 32 bits are one kind."""
    pool = tg.nn.MemoryPool(4, 6)
    states = {dtype: pool.quantize(dtype).state_dict() for dtype in DTYPES}
    states |= {torch.bfloat16: {"values": torch.ones(16, 6, dtype=torch.bfloat16)}, torch.float32: pool.state_dict()}
    for own in (torch.float32, *DTYPES):
        other = tg.nn.MemoryPool(4, 6) if own == torch.float32 else tg.nn.QuantizedMemoryPool(4, 6, own)
        for dtype, state in states.items():
            before = other.values.detach().view(torch.uint8).clone()
            if own == dtype or (own == torch.float32 and dtype == torch.bfloat16):
                other.load_state_dict(state)
                continue
            for assign in (False, True):
                with pytest.raises(RuntimeError, match=r"values is of .*, the table is of"):
                    other.load_state_dict(state, strict=False, assign=assign)
            assert torch.equal(other.values.detach().view(torch.uint8), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saved_and_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    """By torch and by safetensors, into a model on the meta device too; conversions leave the table's bits alone."""
    safetensors = pytest.importorskip("safetensors.torch")
    layer = make_layer()
    layer.pool = layer.pool.quantize(dtype, 24)
    layer.pool.scales[3] = 1e-30  # no bfloat16
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(3))
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    for state in (safetensors.load_file(tmp_path / "layer.safetensors"), torch.load(tmp_path / "layer.pt")):
        other = make_layer()
        other.pool = tg.nn.QuantizedMemoryPool(8, 48, dtype, 24)
        other.load_state_dict(state)
        assert torch.equal(other(x), layer(x))
        with torch.device("meta"):
            empty = make_layer()
            empty.pool = tg.nn.QuantizedMemoryPool(8, 48, dtype, 24)
        empty.load_state_dict(state, assign=True)
        assert torch.equal(empty(x), layer(x))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.pool.values.dtype == dtype and half.keys.dtype == torch.bfloat16
    assert torch.equal(half.pool.scales, layer.pool.scales)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert half.pool(torch.zeros(1, 2, dtype=torch.int64)).dtype == torch.bfloat16


def test_options_of_a_pool_go_with_it() -> None:
    pool = tg.nn.MemoryPool(4, 6, mode="mean", padding_idx=-1, include_last_offset=True, dtype=torch.bfloat16).eval()
    small = pool.quantize()
    assert not small.training and small.num_embeddings == 16 and small.embedding_dim == 6
    indices, offsets = torch.tensor([1, 15, 3, 2, 15]), torch.tensor([0, 3, 4, 5])
    expected, found = pool(indices, offsets=offsets), small(indices, offsets=offsets)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    assert "mode='mean', padding_idx=15, include_last_offset=True" in repr(small)
    with pytest.raises(ValueError, match="pool must have mode 'sum'"):
        tg.nn.ProductKeyMemory(24, small, num_heads=2, top_k=4, key_dim=8)


def test_compiled() -> None:
    layer = make_layer()
    layer.pool = layer.pool.quantize(FLOAT8)
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    assert isinstance(layer.pool, nn.Module)
