"""What the tests of memory layers share: problems, their inputs in every memory layout, checks against the oracle.

The checks raise AssertionError; ``test_helpers.py`` plants wrong data and demands that they do.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import topgather as tg
from tests.common.tensors import Case, assert_close, random_tensor, with_layout
from tests.common.tolerances import TOLERANCES, accumulation_dtype
from topgather import reference
from topgather.ops.memory import ACTIVATIONS

PATTERNS = ["uniform", "distinct", "hot", "power_law"]


def root_sum_square(terms: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Root sum of squares, how large the terms of a sum are."""
    return terms.square().sum(dim).sqrt()


# --- product_key_topk -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TopkCase(Case):
    num_tokens: int = 9
    num_heads: int = 2
    num_keys: int = 20
    head_dim: int = 16
    top_k: int = 8

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of query and keys."""
        keys = (self.num_heads, 2, self.num_keys, self.head_dim // 2)
        return (self.num_tokens, self.num_heads, self.head_dim), keys


def make_topk_inputs(
    case: TopkCase, dtype: torch.dtype, device: torch.device, seed: int = 0, layout: str = "contiguous"
) -> tuple[Tensor, Tensor]:
    """Random query and keys, leaves that require grad."""
    query_shape, keys_shape = case.shapes()
    query = with_layout(random_tensor(query_shape, dtype, device, seed), layout)
    keys = with_layout(random_tensor(keys_shape, dtype, device, seed + 1), layout)
    return query.requires_grad_(), keys.requires_grad_()


def half_scores(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the halves, float64 ``[T, H, 2, n]``, and how large what rounds in each is."""
    halves = query.double().unflatten(-1, (2, keys.shape[-1]))
    scores = torch.einsum("thsd,hsnd->thsn", halves, keys.double())
    terms = torch.einsum("thsd,hsnd->thsn", halves.square(), keys.double().square()).sqrt()
    return scores, terms + scores.abs()


def sums_of_pairs(halves: Tensor) -> Tensor:
    """``[T, H, 2, n]`` to ``[T, H, n * n]``."""
    return (halves[:, :, 0, :, None] + halves[:, :, 1, None, :]).flatten(2)


def assert_topk_contract(scores: Tensor, indices: Tensor, query: Tensor, keys: Tensor, top_k: int) -> None:
    """Scores and indices keep their promises: dtype, shape, range, distinct, the right scores, order, the highest.

    A score may lose to a lower one only by the rounding of both (``score`` row of the table), and of infinite ones any
    may be chosen; everything else is exact.
    """
    dtype = query.dtype
    num_tokens, num_heads, _ = query.shape
    num_keys, half_dim = keys.shape[2:]
    assert scores.dtype == accumulation_dtype(dtype), f"scores: dtype {scores.dtype}"
    assert indices.dtype == torch.int64, f"indices: dtype {indices.dtype}"
    for name, tensor in (("scores", scores), ("indices", indices)):
        assert tensor.shape == (num_tokens, num_heads, top_k), f"{name}: shape {tuple(tensor.shape)}"
    if scores.numel() == 0:
        return
    scores, indices, query, keys = (tensor.detach().cpu() for tensor in (scores, indices, query, keys))
    _assert_rows(((indices >= 0) & (indices < num_keys**2)).all(-1), indices, f"one not below {num_keys} squared")
    ascending = indices.sort(dim=-1).values
    _assert_rows((ascending[..., 1:] != ascending[..., :-1]).all(-1), indices, "one of them twice")

    halves, sizes = half_scores(query, keys)
    magnitudes = sums_of_pairs(sizes)
    tolerance = TOLERANCES["product_key_topk", "scores"]
    expected = sums_of_pairs(halves).gather(-1, indices)
    assert_close("scores", scores, expected, magnitudes.gather(-1, indices), tolerance, dtype, half_dim + 1)

    ranking = sums_of_pairs(torch.where(halves.isnan(), torch.inf, halves))
    ranking = torch.where(ranking.isnan(), -torch.inf, ranking)
    margins = tolerance.relative(dtype, half_dim + 1) * torch.where(ranking.isfinite(), magnitudes, 0.0)
    chosen, chosen_margins = ranking.gather(-1, indices), margins.gather(-1, indices)
    # What ranks as infinite is not seen in a score that is NaN.
    seen = torch.where(chosen.isfinite(), scores.double(), chosen)
    descends = (seen[..., :-1] > seen[..., 1:]) | (
        (seen[..., :-1] == seen[..., 1:]) & (indices[..., :-1] < indices[..., 1:])
    )
    _assert_rows(descends.all(-1), indices, "not in order of score, then of index")
    is_chosen = torch.zeros_like(ranking, dtype=torch.bool).scatter(-1, indices, True)
    weakest = (chosen + chosen_margins).amin(dim=-1)
    strongest_left = torch.where(is_chosen, -torch.inf, ranking - margins).amax(dim=-1)
    _assert_rows(weakest >= strongest_left, indices, "one left out that scores higher than one chosen")


def _assert_rows(holds: Tensor, indices: Tensor, what: str) -> None:
    """``holds`` is ``[T, H]``; names the first row that fails."""
    if not holds.all():
        where = tuple((~holds).nonzero()[0].tolist())
        raise AssertionError(f"indices at (token, head) {where} are {indices[where].tolist()}: {what}")


def assert_topk_gradients(
    gradients: tuple[Tensor, Tensor], query: Tensor, keys: Tensor, indices: Tensor, grad_scores: Tensor
) -> None:
    """Gradients of query and keys equal the oracle's on the same choice."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (query, keys)]

    def gradients_at(left: Tensor, right: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        scores = reference.product_key_scores(left, right).gather(-1, indices)
        return torch.autograd.grad(scores, leaves, grad, allow_unused=True)

    grad = grad_scores.double()
    expected = gradients_at(leaves[0], leaves[1], grad)
    # Scores are linear in each: squares of everything give the sums of the squared terms.
    squares = gradients_at(leaves[0], leaves[1].detach().square(), grad.square())[0]
    keys_squares = gradients_at(leaves[0].detach().square(), leaves[1], grad.square())[1]
    lengths = (indices.shape[-1], indices.shape[0] * indices.shape[-1])
    for name, actual, wanted, square, length in zip(
        ("d_query", "d_keys"), gradients, expected, (squares, keys_squares), lengths, strict=True
    ):
        assert actual.dtype == query.dtype, f"{name}: dtype {actual.dtype}"
        tolerance = TOLERANCES["product_key_topk", name]
        assert_close(name, actual, wanted, square.sqrt(), tolerance, query.dtype, length)


def crowded_rows(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Query and keys of ascending scores, which every key beats anew, beside rows of descending and mixed ones."""
    signs = torch.tensor([1.0, -1.0, 0.0])
    query = torch.stack([signs[torch.arange(40) % 3], signs[torch.arange(40) // 3 % 3]], -1)[:, None]
    keys = torch.stack([torch.arange(300.0), torch.arange(300.0).roll(150)])[None, ..., None]
    keys[0, 0, 256:, 0] = -1 - torch.arange(44.0)  # for rows that could take no more when others had no room
    return query.to(device, dtype), keys.to(device, dtype)


def check_topk(
    case: TopkCase, dtype: torch.dtype, device: torch.device, layout: str = "contiguous", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Search and differentiate a random problem; check both."""
    query, keys = make_topk_inputs(case, dtype, device, seed, layout)
    scores, indices = tg.product_key_topk(query, keys, case.top_k)
    assert_topk_contract(scores, indices, query, keys, case.top_k)
    grad_scores = random_tensor(tuple(scores.shape), scores.dtype, device, seed + 2)
    gradients = torch.autograd.grad(scores, (query, keys), grad_scores)
    assert_topk_gradients((gradients[0], gradients[1]), query, keys, indices, grad_scores)
    return scores.detach(), indices


# --- lookups ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LookupCase(Case):
    """``width`` of rows that are added up, ``width_in`` of rows that are multiplied with x."""

    num_rows: int = 40
    width: int = 16
    num_tokens: int = 12
    bag_size: int = 6
    pattern: str = "uniform"
    width_in: int = 8


def make_indices(case: LookupCase, device: torch.device, seed: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Rows of every entry: "distinct" repeats none before all were named, "hot" names but one."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.num_tokens, case.bag_size)
    num_entries = case.num_tokens * case.bag_size
    if case.pattern == "uniform":
        indices = torch.randint(0, max(case.num_rows, 1), shape, generator=generator)
    elif case.pattern == "distinct":
        rounds = max(-(-num_entries // case.num_rows), 1)
        order = [torch.randperm(case.num_rows, generator=generator) for _ in range(rounds)]
        indices = torch.cat(order)[:num_entries].view(shape)
    elif case.pattern == "hot":
        indices = torch.full(shape, case.num_rows // 2)
    elif case.pattern == "power_law":
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        indices = (case.num_rows * uniform**6).long().clamp(max=case.num_rows - 1)
    else:
        raise ValueError(f"pattern must be one of {PATTERNS}, got {case.pattern!r}")
    return indices.to(dtype).to(device)


@dataclass
class Lookup:
    """Inputs of one lookup. Those of ``expert_lookup`` have ``x`` and ``values_in`` as well."""

    values: Tensor
    indices: Tensor
    weights: Tensor
    grad_out: Tensor
    x: Tensor
    values_in: Tensor

    def leaves(self, experts: bool) -> dict[str, Tensor]:
        """What is differentiated, by the name of its gradient."""
        if not experts:
            return {"d_values": self.values, "d_weights": self.weights}
        return {"d_x": self.x, "d_values_in": self.values_in, "d_values": self.values, "d_weights": self.weights}


def make_lookup(
    case: LookupCase,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    layout: str = "contiguous",
    weights_dtype: torch.dtype | None = None,
    index_dtype: torch.dtype = torch.int64,
) -> Lookup:
    """Random inputs, all in the given layout, leaves that require grad."""
    bags = (case.num_tokens, case.bag_size)
    shapes = {
        "values": (case.num_rows, case.width),
        "weights": bags,
        "grad_out": (case.num_tokens, case.width),
        "x": (case.num_tokens, case.width_in),
        "values_in": (case.num_rows, case.width_in),
    }
    tensors = {}
    for number, (name, shape) in enumerate(shapes.items()):
        of_dtype = (weights_dtype or dtype) if name == "weights" else dtype
        tensors[name] = with_layout(random_tensor(shape, of_dtype, device, 8 * seed + number), layout)
        tensors[name].requires_grad_(name != "grad_out")
    indices = make_indices(case, device, 8 * seed + 7, index_dtype)
    if layout == "padded":
        indices = torch.cat([indices, indices[:, :1]], dim=1)[:, :-1] if case.bag_size else indices
    elif layout == "transposed":
        indices = indices.T.contiguous().T
    elif layout == "expanded":
        indices = indices[:1].expand(bags)
    return Lookup(indices=indices, **tensors)


def run_lookup(lookup: Lookup, sparse_grad: bool | str = False) -> dict[str, Tensor]:
    """Forward and backward of ``memory_lookup``; a sparse gradient stays sparse."""
    out = tg.memory_lookup(lookup.values, lookup.indices, lookup.weights, sparse_grad)
    return _with_gradients(out, lookup, experts=False)


def run_experts(lookup: Lookup, activation: str = "gelu", sparse_grad: bool | str = False) -> dict[str, Tensor]:
    """Forward and backward of ``expert_lookup``."""
    tables = (lookup.values_in, lookup.values)
    out = tg.expert_lookup(lookup.x, *tables, lookup.indices, lookup.weights, activation, sparse_grad)
    return _with_gradients(out, lookup, experts=True)


def _with_gradients(out: Tensor, lookup: Lookup, experts: bool) -> dict[str, Tensor]:
    leaves = lookup.leaves(experts)
    gradients = torch.autograd.grad(out, tuple(leaves.values()), lookup.grad_out)
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def add_by_row(terms: Tensor, indices: Tensor, num_rows: int) -> Tensor:
    """``[T, K, W]`` of every entry, added up into the rows of a table."""
    table = terms.new_zeros((num_rows, terms.shape[-1]))
    return table.index_add(0, indices.reshape(-1).long(), terms.flatten(0, 1))


def longest_run(indices: Tensor) -> int:
    """How many entries name the row that most do."""
    return int(indices.reshape(-1).long().bincount().max()) if indices.numel() else 1


def assert_lookup_close(result: dict[str, Tensor], lookup: Lookup) -> None:
    """Result and gradients of ``memory_lookup`` equal the oracle's."""
    values, weights, grad_out = (t.detach().double() for t in (lookup.values, lookup.weights, lookup.grad_out))
    indices, num_rows = lookup.indices.long(), values.shape[0]
    leaves = (values.requires_grad_(), weights.requires_grad_())
    out = reference.memory_lookup(leaves[0], indices, leaves[1])
    gradients = torch.autograd.grad(out, leaves, grad_out)
    expected = {"out": out.detach(), "d_values": gradients[0], "d_weights": gradients[1]}

    rows, factors = values.detach()[indices], weights.detach().unsqueeze(-1)
    grads = grad_out.unsqueeze(1)
    magnitudes = {
        "out": root_sum_square(rows * factors, 1),
        "d_values": add_by_row((grads * factors).square(), indices, num_rows).sqrt(),
        "d_weights": root_sum_square(rows * grads, -1),
    }
    lengths = {"out": indices.shape[1], "d_values": longest_run(indices), "d_weights": values.shape[1]}
    _assert_results("memory_lookup", result, expected, magnitudes, lengths, lookup)


def slope_and_curvature(hidden: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Absolute values of an activation's first and second derivative."""
    argument = hidden.detach().requires_grad_()
    with torch.enable_grad():
        activated = ACTIVATIONS[activation](argument)
        (slope,) = torch.autograd.grad(activated.sum(), argument, create_graph=True)
        curvature = torch.zeros_like(slope)
        if slope.requires_grad:
            (curvature,) = torch.autograd.grad(slope.sum(), argument)
    return slope.detach().abs(), curvature.abs()


def assert_experts_close(result: dict[str, Tensor], lookup: Lookup, activation: str = "gelu") -> None:
    """Result and gradients of ``expert_lookup`` equal the oracle's."""
    inputs = (lookup.x, lookup.values_in, lookup.values, lookup.weights)
    leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
    indices, num_rows = lookup.indices.long(), lookup.values.shape[0]
    grad_out = lookup.grad_out.double()
    out = reference.expert_lookup(*leaves[:3], indices, leaves[3], activation)
    gradients = torch.autograd.grad(out, leaves, grad_out)
    names = ("d_x", "d_values_in", "d_values", "d_weights")
    expected = {"out": out.detach(), **dict(zip(names, gradients, strict=True))}

    x, values_in, values, weights = (tensor.detach() for tensor in leaves)
    rows_in, rows, factors = values_in[indices], values[indices], weights.unsqueeze(-1).abs()
    dots = rows_in * x.unsqueeze(1)
    hidden, hidden_size = dots.sum(-1, keepdim=True), root_sum_square(dots, -1).unsqueeze(-1)
    hidden_size = hidden_size + hidden.abs()
    slope, curvature = slope_and_curvature(hidden, activation)
    products = rows * grad_out.unsqueeze(1)
    d_gates, d_gates_size = products.sum(-1, keepdim=True).abs(), root_sum_square(products, -1).unsqueeze(-1)
    # An activation and its slope pass on the error of their argument, and round a few times themselves.
    activated = slope * hidden_size + hidden.abs()
    gates = factors * activated
    d_hidden = factors * ((d_gates + d_gates_size) * slope + d_gates * (1 + curvature * hidden_size))
    magnitudes = {
        "out": root_sum_square(gates * rows, 1),
        "d_x": root_sum_square(d_hidden * rows_in, 1),
        "d_values_in": add_by_row((d_hidden * x.unsqueeze(1)).square(), indices, num_rows).sqrt(),
        "d_values": add_by_row((gates * grad_out.unsqueeze(1)).square(), indices, num_rows).sqrt(),
        "d_weights": ((d_gates + d_gates_size) * activated).squeeze(-1),
    }
    width_in, width, bag_size = values_in.shape[1], values.shape[1], indices.shape[1]
    run = longest_run(indices)
    lengths = {
        "out": width_in + bag_size,
        "d_x": width_in + width + bag_size,
        "d_values_in": width_in + width + run,
        "d_values": width_in + run,
        "d_weights": width_in + width,
    }
    _assert_results("expert_lookup", result, expected, magnitudes, lengths, lookup)


def _assert_results(
    op: str,
    result: dict[str, Tensor],
    expected: dict[str, Tensor],
    magnitudes: dict[str, Tensor],
    lengths: dict[str, int],
    lookup: Lookup,
) -> None:
    dtype = lookup.values.dtype
    assert set(result) <= set(expected), f"{op}: results {sorted(result)}, expected {sorted(expected)}"
    for name, tensor in result.items():
        result_dtype = lookup.weights.dtype if name == "d_weights" else dtype
        assert tensor.dtype == result_dtype, f"{name}: dtype {tensor.dtype}, expected {result_dtype}"
        actual = tensor.to_dense() if tensor.is_sparse else tensor
        assert_close(name, actual, expected[name], magnitudes[name], TOLERANCES[op, name], result_dtype, lengths[name])


def check_lookup(
    case: LookupCase,
    dtype: torch.dtype,
    device: torch.device,
    layout: str = "contiguous",
    seed: int = 0,
    sparse_grad: bool = False,
    weights_dtype: torch.dtype | None = None,
    index_dtype: torch.dtype = torch.int64,
) -> dict[str, Tensor]:
    """Look up and differentiate a random problem; check every result."""
    lookup = make_lookup(case, dtype, device, seed, layout, weights_dtype, index_dtype)
    result = run_lookup(lookup, sparse_grad)
    assert_lookup_close(result, lookup)
    return result


def check_experts(
    case: LookupCase,
    dtype: torch.dtype,
    device: torch.device,
    layout: str = "contiguous",
    seed: int = 0,
    activation: str = "gelu",
    sparse_grad: bool = False,
    weights_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The same of ``expert_lookup``."""
    lookup = make_lookup(case, dtype, device, seed, layout, weights_dtype)
    result = run_experts(lookup, activation, sparse_grad)
    assert_experts_close(result, lookup, activation)
    return result


def search(case: TopkCase, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    query, keys = make_topk_inputs(case, dtype, device, seed)
    scores, indices = tg.product_key_topk(query, keys, case.top_k)
    grad_scores = random_tensor(tuple(scores.shape), scores.dtype, device, seed + 2)
    gradients = torch.autograd.grad(scores, (query, keys), grad_scores)
    return {"scores": scores.detach(), "indices": indices, "d_query": gradients[0], "d_keys": gradients[1]}


def look_up(case: LookupCase, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Every result of lookups, and the parts of sparse gradients."""
    lookup = make_lookup(case, dtype, device, seed)
    results = {}
    for name, run in (("lookup", run_lookup), ("experts", run_experts)):
        for sparse_grad in (False, True):
            for part, tensor in run(lookup, sparse_grad=sparse_grad).items():
                if tensor.is_sparse:
                    results[f"{name} rows of {part}"] = tensor.indices()
                results[f"{name} {part} {sparse_grad}"] = tensor.values() if tensor.is_sparse else tensor
    return results
