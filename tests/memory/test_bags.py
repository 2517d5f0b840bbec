"""Bags of memory_lookup as torch.nn.functional.embedding_bag has them: no weights, means, padding, any sizes."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import topgather as tg
from tests.common.bad_input import CPU, TYPE, VALUE, assert_refused, put
from tests.common.devices import widest_dtype
from tests.common.tensors import DTYPES, assert_bitwise_equal, random_tensor
from tests.memory.bag_helpers import (
    SIZES,
    BagCase,
    assert_bags_close,
    differentiate,
    leaves_of,
    make_bags,
    run_bags,
    run_reference,
)
from tests.memory.helpers import LookupCase, make_lookup, run_lookup
from tests.memory.test_lookup import CASES as DENSE_CASES
from tests.memory.test_lookup import LONG_RUNS
from topgather.ops import _bags

pytestmark = pytest.mark.sanitize

CASES = [
    BagCase(),
    BagCase(rest=4),
    BagCase(sizes=()),
    BagCase(sizes=(), rest=3),
    BagCase(sizes=(0, 0, 0)),
    BagCase(sizes=(1,)),
    BagCase(sizes=(200, 0, 1), width=37),
    BagCase(sizes=(0, 0, 9), width=1),
    BagCase(width=0),
    BagCase(is_weighted=False),
    BagCase(is_weighted=False, mode="mean"),
    BagCase(is_weighted=False, mode="mean", rest=2, width=40),
    BagCase(is_weighted=False, mode="mean", sizes=(), rest=2),
    BagCase(padding_idx=3),
    BagCase(padding_idx=-1, rest=4),
    BagCase(padding_idx=0, is_weighted=False, mode="mean"),
    BagCase(padding_idx=0, num_rows=1),
    BagCase(padding_idx=0, num_rows=2, is_weighted=False, mode="mean", width=70),
    BagCase(sizes=None, is_weighted=False),
    BagCase(sizes=None, is_weighted=False, mode="mean"),
    BagCase(sizes=None, is_weighted=False, mode="mean", bag_size=0),
    BagCase(sizes=None, padding_idx=2),
    BagCase(sizes=None, padding_idx=-2, is_weighted=False, mode="mean"),
    BagCase(sizes=None, padding_idx=2, num_tokens=0),
    BagCase(sizes=None, padding_idx=2, bag_size=0),
]


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bags_against_reference(case: BagCase, sparse_grad: bool, device: torch.device) -> None:
    bags = make_bags(case, torch.float32, device)
    assert_bags_close(run_bags(bags, sparse_grad), run_reference(bags))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [case for case in CASES if "mean" in str(case) or case.rest], ids=str)
def test_bags_of_16_bits_are_summed_in_float32(case: BagCase, dtype: torch.dtype, device: torch.device) -> None:
    """What a float32 table gives, rounded once; weights of a mean are not rounded to 16 bits."""
    bags = make_bags(case, dtype, device)
    wide = {**bags, **{name: leaf.detach().float().requires_grad_() for name, leaf in leaves_of(bags).items()}}
    out = tg.memory_lookup(**bags)
    assert torch.equal(out, tg.memory_lookup(**wide).to(dtype))
    grad_out = random_tensor(tuple(out.shape), dtype, device, 1)
    narrow = differentiate(out, bags, grad_out)
    for name, tensor in differentiate(tg.memory_lookup(**wide), wide, grad_out).items():
        assert torch.equal(narrow[name], tensor.to(dtype)), name


def embedding_bag(bags: dict[str, Any]) -> Tensor:
    names = {"values": "weight", "indices": "input", "weights": "per_sample_weights"}
    return torch.nn.functional.embedding_bag(**{names.get(name, name): value for name, value in bags.items()})


@pytest.mark.parametrize("seed", range(60))
def test_equals_torchs_embedding_bag(seed: int, device: torch.device) -> None:
    """Outputs and gradients of random bags; a padding row that is not finite reaches nobody."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    sizes = tuple(pick(0, 1, 2, 5, 40) for _ in range(pick(1, 4, 11)))
    mode = pick("sum", "mean")
    num_rows = pick(1, 2, 9)
    case = BagCase(
        sizes=pick(None, (*sizes, 3), (3, *sizes)),
        bag_size=pick(1, 3, 33),
        is_weighted=mode == "sum" and pick(True, False),
        mode=mode,
        padding_idx=pick(None, num_rows - 1, -1),
        num_rows=num_rows,
        width=pick(1, 8, 33),
    )
    bags = make_bags(case, torch.float32, device, seed)
    if case.padding_idx is not None:
        with torch.no_grad():
            bags["values"][case.padding_idx] = pick(1.0, torch.nan, torch.inf)
    if bags["offsets"] is not None and pick(True, False):
        end = bags["offsets"].new_tensor([bags["indices"].numel()])
        bags |= {"offsets": torch.cat([bags["offsets"], end]), "include_last_offset": True}
    actual = run_bags(bags, sparse_grad=pick(True, False))
    out = embedding_bag(bags)
    assert_bags_close(actual, differentiate(out, bags, random_tensor(tuple(out.shape), out.dtype, device, 99)))


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [case for case in DENSE_CASES if case.num_tokens], ids=str)
def test_offsets_of_equal_bags_give_the_bits_of_the_plain_call(
    case: LookupCase, sparse_grad: bool, dtype: torch.dtype, device: torch.device
) -> None:
    check_equal_bags(case, sparse_grad, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LONG_RUNS, ids=str)
def test_runs_of_thousands_of_entries(case: LookupCase, dtype: torch.dtype, device: torch.device) -> None:
    check_equal_bags(case, True, dtype, device)


def check_equal_bags(case: LookupCase, sparse_grad: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Outputs, gradients and dot products."""
    lookup = make_lookup(case, dtype, device)
    expected = run_lookup(lookup, sparse_grad)
    offsets = torch.arange(case.num_tokens, device=device) * case.bag_size
    indices, weights = lookup.indices.flatten(), lookup.weights.detach().flatten().requires_grad_()
    out = tg.memory_lookup(lookup.values, indices, weights, sparse_grad, offsets)
    d_values, d_weights = torch.autograd.grad(out, (lookup.values, weights), lookup.grad_out)
    assert_bitwise_equal("out", out.detach(), expected["out"])
    assert torch.equal(d_values.to_dense(), expected["d_values"].to_dense()), "d_values"
    assert_bitwise_equal("d_weights", d_weights, expected["d_weights"].flatten())
    if sparse_grad:
        assert d_values.is_coalesced() and torch.equal(d_values.indices(), expected["d_values"].indices())
    # The gradient of weights alone.
    table = lookup.values.detach()
    (frozen,) = torch.autograd.grad(tg.memory_lookup(table, indices, weights, False, offsets), weights, lookup.grad_out)
    plain = tg.memory_lookup(table, lookup.indices, lookup.weights)
    assert_bitwise_equal("d_weights", frozen, torch.autograd.grad(plain, lookup.weights, lookup.grad_out)[0].flatten())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bag_does_not_depend_on_the_others(dtype: torch.dtype, device: torch.device) -> None:
    bags = make_bags(BagCase(width=40), dtype, device)
    out = tg.memory_lookup(**bags)
    bounds = [*bags["offsets"].tolist(), len(bags["indices"])]
    for bag, (first, end) in enumerate(pairwise(bounds)):
        alone = tg.memory_lookup(bags["values"], bags["indices"][None, first:end], bags["weights"][None, first:end])
        assert_bitwise_equal(f"bag {bag}", out[bag].detach(), alone[0].detach())


@pytest.mark.parametrize("needs_values", [True, False], ids=["values", "frozen"])
def test_entries_of_nobody(needs_values: bool, device: torch.device) -> None:
    """Entries behind the last bag, and padding: gradients of 0, whatever rows and weights hold."""
    values = torch.ones(5, 4, device=device)
    values[3] = torch.nan
    weights = torch.tensor([1.0, 2.0, torch.inf, 3.0, torch.nan], device=device, requires_grad=True)
    indices = torch.tensor([0, 1, 3, 2, 3], device=device)
    offsets = torch.tensor([0, 0, 4], device=device)
    leaves = [weights, values.requires_grad_()] if needs_values else [weights]
    for options in ({"padding_idx": 3}, {"padding_idx": -2, "sparse_grad": True}):
        out = tg.memory_lookup(values, indices, weights, offsets=offsets, include_last_offset=True, **options)
        assert out.tolist() == [[0.0] * 4, [6.0] * 4]
        gradients = torch.autograd.grad(out.sum(), leaves)
        assert gradients[0].tolist() == [4.0, 4.0, 0.0, 4.0, 0.0]
        if needs_values:
            assert gradients[1].to_dense()[:, 0].tolist() == [1.0, 2.0, 3.0, 0.0, 0.0]
            assert not gradients[1].is_sparse or gradients[1].indices().tolist() == [[0, 1, 2]]


def test_a_table_that_is_all_padding(device: torch.device) -> None:
    bags = make_bags(BagCase(padding_idx=0, num_rows=1), torch.float32, device)
    for sparse_grad in (False, True):
        result = run_bags(bags, sparse_grad)
        assert all((tensor.to_dense() == 0).all() for tensor in result.values())
        assert not sparse_grad or result["d_values"]._nnz() == 0


def test_int32_offsets_and_any_strides(device: torch.device) -> None:
    bags = make_bags(BagCase(padding_idx=1), torch.float32, device)
    expected = run_bags(bags)
    spread = {name: bags[name].detach().repeat_interleave(2)[::2] for name in ("indices", "weights", "offsets")}
    spread["weights"].requires_grad_()
    for offsets in (bags["offsets"].int(), spread["offsets"]):
        for name, tensor in run_bags({**bags, **spread, "offsets": offsets}).items():
            assert_bitwise_equal(name, tensor, expected[name])


GRADCHECKS = [
    BagCase(sizes=(2, 0, 3), width=3, num_rows=4),
    BagCase(sizes=(2, 0, 3), width=2, num_rows=4, rest=2, padding_idx=1),
    BagCase(sizes=(2, 0, 3), width=2, num_rows=4, is_weighted=False, mode="mean", padding_idx=-1),
    BagCase(sizes=None, bag_size=3, num_tokens=3, width=2, num_rows=4, padding_idx=0),
]


@pytest.mark.parametrize("case", GRADCHECKS, ids=str)
def test_gradcheck(case: BagCase) -> None:
    """Reverse and forward mode, and both under vmap."""
    bags = make_bags(case, torch.float64, CPU)
    names = list(leaves_of(bags))
    modes = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}

    def look_up(*leaves: Tensor) -> Tensor:
        return tg.memory_lookup(**{**bags, **dict(zip(names, leaves, strict=True))})

    assert torch.autograd.gradcheck(look_up, tuple(leaves_of(bags).values()), **modes)


@pytest.mark.parametrize("case", GRADCHECKS, ids=str)
def test_tangents_are_exact(case: BagCase, device: torch.device, device_kind: str) -> None:
    """A lookup is linear in its table: the tangent is the lookup of the table's tangent, to the bit."""
    bags = make_bags(case, widest_dtype(device_kind), device)
    tangent = random_tensor(tuple(bags["values"].shape), bags["values"].dtype, device, 5)

    def look_up(values: Tensor) -> Tensor:
        return tg.memory_lookup(**{**bags, "values": values, "weights": _detached(bags["weights"])})

    _, actual = torch.func.jvp(look_up, (bags["values"].detach(),), (tangent,))
    assert_bitwise_equal("tangent", actual, look_up(tangent))


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


@pytest.mark.parametrize("name", ["values", "weights"])
@pytest.mark.parametrize("case", GRADCHECKS, ids=str)
def test_vmap_equals_a_loop(case: BagCase, name: str) -> None:
    bags = {
        key: value.detach() if isinstance(value, Tensor) else value
        for key, value in make_bags(case, torch.float64, CPU).items()
    }
    if bags[name] is None:
        return
    mapped = torch.stack([bags[name], 2 * bags[name], bags[name].sin()])

    def look_up(leaf: Tensor) -> Tensor:
        return tg.memory_lookup(**{**bags, name: leaf})

    for function in (look_up, torch.func.grad(lambda leaf: look_up(leaf).square().sum())):
        actual = torch.vmap(function)(mapped)
        torch.testing.assert_close(actual, torch.stack([function(leaf) for leaf in mapped]), rtol=1e-12, atol=1e-12)


COMPILED = [
    BagCase(padding_idx=2),
    BagCase(rest=3, width=5),
    BagCase(is_weighted=False, mode="mean"),
    BagCase(sizes=None, padding_idx=-1),
    BagCase(sizes=(4, 9, 1, 1), padding_idx=2),
]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(backend: str) -> None:
    """All options, sparse gradients too, and graphs for any numbers of bags and entries; inductor takes one."""
    torch._dynamo.reset()
    compiled = torch.compile(tg.memory_lookup, fullgraph=True, dynamic=True, backend=backend)
    for case in COMPILED if backend == "aot_eager" else COMPILED[:1]:
        for sparse_grad in (False, True) if backend == "aot_eager" else (True,):
            bags = make_bags(case, torch.float32, CPU)
            expected = run_bags(bags, sparse_grad)
            out = compiled(**bags, sparse_grad=sparse_grad)
            assert_bags_close(differentiate(out, bags, random_tensor(tuple(out.shape), out.dtype, CPU, 99)), expected)


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
def test_opcheck(sparse_grad: bool, device: torch.device) -> None:
    bags = make_bags(BagCase(rest=2), torch.float32, device)
    arguments = (bags["values"], bags["indices"], bags["weights"], sparse_grad, bags["offsets"])
    tests = (
        ("test_schema", "test_faketensor")
        if sparse_grad
        else ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    )
    torch.library.opcheck(torch.ops.topgather.memory_lookup.default, arguments, test_utils=tests)
    x = random_tensor((9, 6), torch.float32, device, 1).requires_grad_()
    torch.library.opcheck(
        torch.ops.topgather.memory_dot.default, (bags["values"], bags["indices"], x, False, bags["offsets"])
    )


# --- wrong arguments --------------------------------------------------------------------------------------------------


def arguments_of(device: torch.device, **changed: Any) -> dict[str, Any]:
    arguments = {**make_bags(BagCase(is_weighted=False), torch.float32, device), **changed}
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}


WRONG: list[tuple[str, Any, tuple[type[Exception], ...]]] = [
    ("mode", "max", VALUE),
    ("mode", "", VALUE),
    ("mode", None, TYPE),
    ("mode", 1, TYPE),
    ("padding_idx", 11, VALUE),
    ("padding_idx", -12, VALUE),
    ("padding_idx", 1.0, TYPE),
    ("padding_idx", True, TYPE),
    ("include_last_offset", 1, TYPE),
    ("include_last_offset", None, TYPE),
    ("offsets", [0, 2], TYPE),
    ("offsets", torch.tensor([0.0, 2.0]), TYPE),
    ("offsets", torch.tensor(0), VALUE),
    ("offsets", torch.tensor([[0, 2]]), VALUE),
    ("offsets", torch.tensor([0, 2]).to("meta"), VALUE),
    ("indices", torch.zeros(3, 4, dtype=torch.int64), VALUE),
    ("weights", torch.ones(3), VALUE),
    ("weights", torch.ones(58, dtype=torch.int64), TYPE),
]


@pytest.mark.parametrize(("name", "wrong", "exceptions"), WRONG, ids=str)
def test_wrong_arguments(name: str, wrong: Any, exceptions: tuple[type[Exception], ...], device: torch.device) -> None:
    if isinstance(wrong, Tensor) and wrong.device.type != "meta":
        wrong = wrong.to(device)
    assert_refused(tg.memory_lookup, arguments_of(device), put(name, wrong), name, exceptions)


def test_arguments_that_do_not_go_together(device: torch.device) -> None:
    weights = torch.ones(58, device=device)
    assert_refused(tg.memory_lookup, arguments_of(device, mode="mean"), put("weights", weights), "mode", VALUE)
    assert_refused(tg.memory_lookup, arguments_of(device), put("offsets", None), "indices", VALUE)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    changed = arguments_of(device, include_last_offset=True)
    assert_refused(tg.memory_lookup, changed, put("offsets", none), "offsets", VALUE)
    plain = {"values": torch.ones(3, 2, device=device), "indices": torch.zeros(2, 2, dtype=torch.int64, device=device)}
    tg.memory_lookup(**plain)
    assert_refused(tg.memory_lookup, dict(plain), put("include_last_offset", True), "include_last_offset", VALUE)
    assert_refused(tg.memory_lookup, dict(plain), put("padding_idx", 3), "padding_idx", VALUE)


WRONG_OFFSETS = [[1, 4, 9], [0, 5, 4], [0, 59], [0, -1], [0, 2**40], [0, -(2**40), 3], [0, 9, 8, 7]]


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("offsets", WRONG_OFFSETS, ids=str)
def test_numbers_of_offsets(offsets: list[int], padding_idx: int | None) -> None:
    arguments = arguments_of(CPU, padding_idx=padding_idx)
    assert_refused(tg.memory_lookup, arguments, put("offsets", torch.tensor(offsets)), "offsets", VALUE)


def test_an_index_out_of_range() -> None:
    for number in (-1, 11):
        arguments = arguments_of(CPU, padding_idx=2)
        indices = arguments["indices"].clone()
        indices[30] = number
        assert_refused(tg.memory_lookup, arguments, put("indices", indices), "indices", (IndexError,))


# --- what CUDA does instead of raising --------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("wrong", [1, -1, 2**40, -(2**40), 59], ids=str)
def test_wrong_offsets_are_nan_for_their_bags_alone(
    wrong: int, padding_idx: int | None, cuda_device: torch.device
) -> None:
    bags = make_bags(BagCase(padding_idx=padding_idx, width=40), torch.float32, cuda_device)
    expected = tg.memory_lookup(**bags).detach()
    offsets = bags["offsets"].clone()
    offsets[4] = wrong
    is_wrong = torch.zeros(len(SIZES), dtype=torch.bool, device=cuda_device)
    is_wrong[3] = True
    is_wrong[4] = wrong != 1 or padding_idx is not None
    result = run_bags({**bags, "offsets": offsets})
    assert torch.equal(result["out"].isnan().all(-1), is_wrong)
    is_other = ~is_wrong
    is_other[4] = False  # from 1 on, where no entry is padding: another bag, but a bag
    assert_bitwise_equal("out", result["out"][is_other], expected[is_other])


@pytest.mark.parametrize("offsets", WRONG_OFFSETS, ids=str)
def test_wrong_offsets_raise_on_cuda_where_asked(
    offsets: list[int], cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = arguments_of(cuda_device)
    tg.memory_lookup(**{**arguments, "offsets": torch.tensor(offsets, device=cuda_device)})
    monkeypatch.setenv("TOPGATHER_CHECK_INDICES", "1")
    wrong = torch.tensor(offsets, device=cuda_device)
    assert_refused(tg.memory_lookup, arguments, put("offsets", wrong), "offsets", VALUE)


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
def test_a_bad_index_is_nan_for_its_bag_alone(sparse_grad: bool, cuda_device: torch.device) -> None:
    """And its weight's gradient; what is nobody's is not looked at."""
    bags = make_bags(BagCase(rest=3, width=24), torch.bfloat16, cuda_device)
    expected = run_bags(bags, sparse_grad)
    for place, bag in ((8, 3), (59, None), (57, 8)):
        indices = bags["indices"].clone()
        indices[place] = 2**33
        result = run_bags({**bags, "indices": indices}, sparse_grad)
        bad = [] if bag is None else [bag]
        assert result["out"].isnan().any(-1).nonzero().flatten().tolist() == bad
        assert result["d_weights"].isnan().nonzero().flatten().tolist() == ([] if bag is None else [place])
        assert result["d_values"].to_dense().isfinite().all()
        if bag is None:
            assert torch.equal(result["out"], expected["out"])


# --- MemoryPool -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_a_pool_stands_in_for_an_embedding_bag(mode: str, sparse_grad: bool, device: torch.device) -> None:
    options = {"mode": mode, "padding_idx": 4, "include_last_offset": True}
    pool = tg.nn.MemoryPool(3, 6, sparse_grad, device, **options)
    bag = torch.nn.EmbeddingBag(9, 6, device=device, **options)
    assert (pool.values[4] == 0).all() and pool.values.count_nonzero() == 48
    bag.weight.data.copy_(pool.values)
    indices = torch.tensor([4, 0, 8, 4, 4, 1, 1], device=device)
    offsets = torch.tensor([0, 3, 5, 5, 7], device=device)
    weights = torch.linspace(-1, 1, 7, device=device) if mode == "sum" else None
    out = pool(indices, weights, offsets)
    torch.testing.assert_close(out, bag(indices, offsets, weights))
    (gradient,) = torch.autograd.grad(out.square().sum(), pool.values)
    (expected,) = torch.autograd.grad(bag(indices, offsets, weights).square().sum(), bag.weight)
    torch.testing.assert_close(gradient.to_dense(), expected)
    # Bags of one size need no offsets.
    assert torch.equal(pool(indices[None, :3])[0], pool(indices[:3], None, offsets[:2] * 1)[0])
    assert f"mode='{mode}'" in repr(pool) or mode == "sum"
    assert "padding_idx=4, include_last_offset=True" in repr(pool)


@pytest.mark.parametrize(
    ("options", "exceptions"),
    [
        ({"mode": "max"}, ValueError),
        ({"mode": 1}, TypeError),
        ({"padding_idx": 9}, ValueError),
        ({"padding_idx": "x"}, TypeError),
        ({"include_last_offset": 0}, TypeError),
    ],
    ids=str,
)
def test_a_pool_refuses_wrong_options(options: dict[str, Any], exceptions: type[Exception]) -> None:
    with pytest.raises(exceptions, match=next(iter(options))):
        tg.nn.MemoryPool(3, 6, **options)


def test_layers_take_pools_of_sums_alone() -> None:
    with pytest.raises(ValueError, match="pool must have mode 'sum'"):
        tg.nn.ProductKeyMemory(8, tg.nn.MemoryPool(4, 8, mode="mean"), top_k=2, key_dim=8)
    pool = tg.nn.MemoryPool(4, 8, padding_idx=-1)
    layer = tg.nn.ProductKeyMemory(8, pool, top_k=16, key_dim=8)
    layer(torch.randn(5, 8)).sum().backward()
    assert pool.padding_idx == 15 and pool.values.grad is not None
    assert (pool.values.grad[15] == 0).all() and (pool.values.grad[:15] != 0).any()


def test_modes_are_what_the_docstring_says() -> None:
    assert all(f'``"{mode}"``' in (tg.memory_lookup.__doc__ or "") for mode in _bags.MODES)
    function: Callable[..., Tensor] = tg.memory_lookup
    assert function(torch.eye(2), torch.tensor([[0, 1]]), mode="mean").tolist() == [[0.5, 0.5]]
