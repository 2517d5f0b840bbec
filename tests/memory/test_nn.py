"""nn.MemoryPool, nn.ProductKeyMemory and nn.PeerMemory: the layers are their projections around the ops."""

import copy
import inspect
import math
import pickle
import re
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import topgather as tg
from tests.common.devices import widest_dtype

DIM, NUM_KEYS, VALUE_DIM = 10, 5, 6
SMALL: dict[str, Any] = {"num_heads": 2, "top_k": 3, "key_dim": 8}
Layer = tg.nn.ProductKeyMemory | tg.nn.PeerMemory


def product_key_memory(value_dim: int = VALUE_DIM, **options: Any) -> "tg.nn.ProductKeyMemory":
    place = {name: options[name] for name in ("device", "dtype") if name in options}
    pool = tg.nn.MemoryPool(NUM_KEYS, value_dim, options.pop("sparse_grad", False), **place)
    return tg.nn.ProductKeyMemory(DIM, pool, **{**SMALL, **options})


def peer_memory(**options: Any) -> "tg.nn.PeerMemory":
    return tg.nn.PeerMemory(DIM, NUM_KEYS, **{**SMALL, **options})


BOTH = pytest.mark.parametrize("make", [product_key_memory, peer_memory])
Make = Callable[..., Layer]


# --- the definition, in float64 ---------------------------------------------------------------------------------------


def linear_by_hand(linear: nn.Linear, x: Tensor) -> Tensor:
    out = x.double() @ linear.weight.double().T
    return out if linear.bias is None else out + linear.bias.double()


def chosen_by_hand(layer: Layer, tokens: Tensor, query_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows and weights of the heads, side by side."""
    query = linear_by_hand(layer.query_proj, tokens)
    norm = layer.query_norm
    if isinstance(norm, nn.BatchNorm1d):
        centred = query - query.mean(dim=0)
        query = centred / (centred.square().mean(dim=0) + norm.eps).sqrt() * norm.weight + norm.bias
    of_halves = norm if isinstance(norm, (nn.RMSNorm, nn.LayerNorm)) else None
    indices, weights = tg.reference.product_key_weights(
        query.view(-1, layer.num_heads, layer.key_dim),
        layer.keys,
        layer.top_k,
        {nn.RMSNorm: "rms", nn.LayerNorm: "layer"}.get(type(norm)),
        None if of_halves is None else of_halves.weight,
        getattr(of_halves, "bias", None),
        query_mask,
        layer.key_norm,
        layer.score_activation,
        layer.temperature,
        getattr(of_halves, "eps", 0.0) or 0.0,
    )
    return indices.flatten(1), weights.flatten(1)


def by_hand(layer: Layer, x: Tensor, query_mask: Tensor | None = None) -> Tensor:
    tokens = x.reshape(-1, DIM)
    indices, weights = chosen_by_hand(layer, tokens, query_mask)
    if isinstance(layer, tg.nn.PeerMemory):
        out = tg.reference.expert_lookup(
            tokens, layer.values_in, layer.values_out, indices, weights, activation=layer.activation
        )
        return out.view(x.shape)
    out = tg.reference.memory_lookup(layer.pool.values, indices, weights)
    if layer.swilu_projection is not None:
        out = out * F.silu(linear_by_hand(layer.swilu_projection, tokens))
    if layer.value_proj is not None:
        out = linear_by_hand(layer.value_proj, out)
    return out.view(*x.shape[:-1], -1)


def assert_equals_definition(layer: Layer, device_kind: str, device: torch.device) -> None:
    dtype = widest_dtype(device_kind)
    x = torch.randn(2, 4, DIM, dtype=dtype, device=device, requires_grad=True)
    torch.manual_seed(5)
    out = layer(x)
    # The layer's own dropout once more.
    torch.manual_seed(5)
    ones = torch.ones(8, layer.num_heads, layer.key_dim, dtype=dtype, device=device)
    expected = by_hand(layer, x, F.dropout(ones, layer.query_dropout, layer.training))
    torch.testing.assert_close(out, expected.to(dtype))
    wanted = [x, *layer.parameters()]
    direction = torch.randn_like(out)
    for left, right in zip(
        torch.autograd.grad((out * direction).sum(), wanted),
        torch.autograd.grad((expected * direction).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(left, right)


# Each option of how a query chooses and weighs, and those that meet in one line of the layer.
OF_CHOICE: list[dict[str, Any]] = [
    {"query_norm": "layer"},
    {"query_norm": "layer", "key_norm": True, "score_activation": "relu", "temperature": 0.25},
    {"score_activation": "relu"},
    {"temperature": 3.0},
    {"temperature": 0.1, "query_norm": "rms"},
    {"query_dropout": 0.4},
    {"query_dropout": 0.3, "query_norm": "layer", "temperature": 2.0},
    {"query_dropout": 0.5, "query_norm": "batch", "score_activation": "relu"},
]


@pytest.mark.parametrize("options", OF_CHOICE, ids=str)
@BOTH
def test_choice_equals_its_definition(
    make: Make, options: dict[str, Any], device: torch.device, device_kind: str
) -> None:
    layer = make(**options, device=device, dtype=widest_dtype(device_kind))
    if isinstance(layer.query_norm, (nn.RMSNorm, nn.LayerNorm)):
        for parameter in layer.query_norm.parameters():
            nn.init.normal_(parameter)
    assert_equals_definition(layer, device_kind, device)


def test_queries_are_dropped_in_training_alone() -> None:
    layer = product_key_memory(query_dropout=0.5).eval()
    x = torch.randn(8, DIM)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gated": False},
        {"gated": False, "value_dim": DIM},
        {"gated": False, "value_dim": DIM, "has_value_proj": True},
        {"out_dim": 7, "bias": False},
        {"query_norm": "batch"},
        {"query_norm": "rms", "key_norm": True},
        {"num_heads": 1, "top_k": NUM_KEYS**2},
    ],
    ids=str,
)
def test_memory_equals_its_definition(options: dict[str, Any], device: torch.device, device_kind: str) -> None:
    layer = product_key_memory(**options, device=device, dtype=widest_dtype(device_kind))
    assert (layer.value_proj is None) == (options == {"gated": False, "value_dim": DIM})
    assert_equals_definition(layer, device_kind, device)


@pytest.mark.parametrize(
    "options",
    [{}, {"activation": "silu", "bias": False}, {"query_norm": "batch", "key_norm": True}, {"activation": "relu"}],
    ids=str,
)
def test_peer_equals_its_definition(options: dict[str, Any], device: torch.device, device_kind: str) -> None:
    layer = peer_memory(**options, device=device, dtype=widest_dtype(device_kind))
    assert_equals_definition(layer, device_kind, device)


# --- the pool ---------------------------------------------------------------------------------------------------------


def test_layers_share_a_pool(device: torch.device) -> None:
    """The shared table's gradient is the sum of the layers' own, sparse or not, and its state is one tensor."""
    pool = tg.nn.MemoryPool(NUM_KEYS, VALUE_DIM, device=device)
    layers = nn.ModuleList(tg.nn.ProductKeyMemory(DIM, pool, **SMALL, device=device) for _ in range(2))
    assert sum(parameter is pool.values for parameter in layers.parameters()) == 1
    x = torch.randn(4, DIM, device=device)
    own = [torch.autograd.grad(layer(x).square().sum(), pool.values)[0] for layer in layers]
    sum(layer(x).square().sum() for layer in layers).backward()
    torch.testing.assert_close(pool.values.grad, own[0] + own[1])
    pool.values.grad, pool.sparse_grad = None, True
    sum(layer(x).square().sum() for layer in layers).backward()
    assert pool.values.grad.is_sparse
    torch.testing.assert_close(pool.values.grad.to_dense(), own[0] + own[1])


def test_layers_reach_the_table_through_the_pool() -> None:
    """Another forward of the pool, such as one over a table in parts, is all that a layer needs."""
    layer = product_key_memory()
    x = torch.randn(4, DIM)
    expected = layer(x)
    table = layer.pool.values.detach()
    layer.pool.values = nn.Parameter(torch.empty(0))
    layer.pool.forward = lambda indices, weights: tg.memory_lookup(table, indices, weights)
    assert torch.equal(layer(x), expected)


def test_first_values() -> None:
    pool = tg.nn.MemoryPool(64, 16)
    assert pool.values.shape == (64 * 64, 16) and abs(pool.values.std().item() - 16**-0.5) < 0.01
    before = pool.values.clone()
    pool.reset_parameters()
    assert not torch.equal(pool.values, before)
    assert repr(pool) == "MemoryPool(num_keys=64, value_dim=16, sparse_grad=False)"
    layer = tg.nn.ProductKeyMemory(32, pool, num_heads=2, top_k=4, key_dim=16)
    assert 0.24 < layer.keys.abs().max() <= 0.25
    before, values = layer.keys.clone(), pool.values.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.keys, before) and torch.equal(pool.values, values)


# --- how torch uses layers --------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(make: Make, dtype: torch.dtype, device: torch.device) -> None:
    layer = make(device=device, dtype=dtype)
    x = torch.randn(3, DIM, device=device, dtype=dtype)
    assert layer(x).dtype == dtype and layer(x).shape == x.shape
    converted = make(device=device, track_usage=True).to(dtype)
    assert converted(x).dtype == dtype and converted.usage().num_lookups == 3 * 6


def test_a_pool_of_another_dtype(device: torch.device) -> None:
    layer = product_key_memory(gated=False, device=device)
    layer.pool.to(torch.bfloat16)
    assert layer(torch.randn(3, DIM, device=device)).dtype == torch.float32


@BOTH
@pytest.mark.parametrize("query_norm", [None, "batch", "rms"])
def test_autocast(make: Make, query_norm: str | None, device: torch.device) -> None:
    layer = make(query_norm=query_norm, key_norm=True, device=device)
    x = torch.randn(2, 3, DIM, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == (torch.float32 if make is peer_memory else torch.bfloat16)
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert all(parameter.grad is not None for parameter in layer.parameters())


@BOTH
@pytest.mark.parametrize("query_norm", [None, "batch", "rms"])
@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (0, 3), (1, 2, 1, 2)], ids=str)
def test_leading_dimensions(make: Make, query_norm: str | None, shape: tuple[int, ...], device: torch.device) -> None:
    layer = make(query_norm=query_norm, track_usage=True, device=device)
    layer.train(query_norm != "batch" or math.prod(shape) != 1)  # batch statistics want 2 tokens
    x = torch.randn(*shape, DIM, device=device, requires_grad=True)
    out = layer(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert layer.usage().num_lookups == 6 * math.prod(shape)
    if query_norm == "batch":
        assert layer.query_norm.running_var.isfinite().all()


@BOTH
@pytest.mark.parametrize("query_norm", [None, "batch", "rms"])
def test_compile(make: Make, query_norm: str | None, device: torch.device) -> None:
    torch._dynamo.reset()
    layer = make(query_norm=query_norm, key_norm=True, track_usage=True, device=device).eval()
    x = torch.randn(2, 4, DIM, device=device, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    usage = layer.usage()
    layer.reset_usage()
    expected = layer(x)
    torch.testing.assert_close(out, expected)
    assert usage == layer.usage() and usage.num_lookups == 2 * 4 * 6
    wanted = [x, *layer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), wanted), torch.autograd.grad(expected.square().sum(), wanted)
    )


@BOTH
def test_copies_and_state(make: Make, device: torch.device) -> None:
    layer = make(query_norm="batch", track_usage=True, device=device).eval()
    x = torch.randn(3, DIM, device=device)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    other = make(query_norm="batch", device=device).eval()
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert not any("usage" in name for name in layer.state_dict())
    assert "top_k=3" in repr(layer) and "key_dim=8" in repr(layer)


def test_state_and_copies_of_a_shared_pool(device: torch.device) -> None:
    def model() -> nn.Sequential:
        pool = tg.nn.MemoryPool(NUM_KEYS, VALUE_DIM, device=device)
        return nn.Sequential(*(tg.nn.ProductKeyMemory(DIM, pool, **SMALL, device=device) for _ in range(2)))

    first, second = model(), model()
    x = torch.randn(3, DIM, device=device)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
    copied = copy.deepcopy(first)
    assert copied[0].pool is copied[1].pool is not first[0].pool
    assert torch.equal(first(x), copied(x))


def test_value_dropout(device: torch.device) -> None:
    """Whole channels of what was looked up are dropped and the rest scaled; in evaluation nothing is."""
    layer = product_key_memory(DIM, gated=False, value_dropout=0.5, device=device)
    peer = peer_memory(value_dropout=0.5, device=device)
    x = torch.randn(20, DIM, device=device)
    for either in (layer, peer):
        whole = either.eval()(x)
        dropped = either.train()(x)
        is_kept = dropped != 0
        assert 0.3 < is_kept.float().mean() < 0.7
        torch.testing.assert_close(dropped[is_kept], 2 * whole[is_kept])


# --- use of rows ------------------------------------------------------------------------------------------------------


@BOTH
def test_usage_equals_the_counts_by_hand(make: Make, device: torch.device) -> None:
    layer = make(device=device)
    layer(torch.randn(3, DIM, device=device))
    with pytest.raises(RuntimeError, match="track_usage"):
        layer.usage()
    layer.track_usage = True
    assert layer.track_usage
    nothing = layer.usage()
    assert nothing.num_lookups == 0 and nothing.share_touched == 0 and math.isnan(nothing.kl_divergence)

    batches = [torch.randn(3, DIM, device=device), torch.randn(2, DIM, device=device)]
    use = torch.zeros(NUM_KEYS**2, dtype=torch.float64, device=device)
    for batch in batches:
        layer(batch)
        for row, weight in zip(*(chosen.flatten() for chosen in chosen_by_hand(layer, batch)), strict=True):
            use[row] += weight
    usage = layer.usage()
    share = use[use > 0] / use.sum()
    assert usage.num_lookups == (3 + 2) * 6
    assert usage.share_touched == pytest.approx(len(share) / NUM_KEYS**2)
    expected = sum(p * math.log(p * NUM_KEYS**2) for p in share.tolist())
    assert usage.kl_divergence == pytest.approx(expected, rel=1e-5)

    layer.reset_usage()
    assert layer.usage().num_lookups == 0 and layer.usage().share_touched == 0
    layer.track_usage = False
    assert not layer.track_usage


def test_usage_at_its_bounds() -> None:
    layer = product_key_memory(num_heads=1, top_k=1, track_usage=True)
    layer(torch.randn(1, DIM))
    assert layer.usage() == tg.nn.MemoryUsage(1 / 25, pytest.approx(math.log(25)), 1)
    even = product_key_memory(num_heads=1, top_k=25, track_usage=True)
    nn.init.zeros_(even.keys)
    even(torch.randn(4, DIM))
    assert even.usage() == tg.nn.MemoryUsage(1.0, pytest.approx(0.0, abs=1e-9), 100)


# --- the published layer's parameters ---------------------------------------------------------------------------------


def published_state(value_dim: int, **extra: tuple[int, ...]) -> dict[str, Tensor]:
    """Random tensors by the published names and in their shapes."""
    num_heads, key_dim = SMALL["num_heads"], SMALL["key_dim"]
    shapes = {
        "keys": (2 * num_heads * NUM_KEYS, key_dim // 2),
        "values.weight": (NUM_KEYS**2, value_dim),
        "value_proj.weight": (DIM, value_dim),
        "value_proj.bias": (DIM,),
        "swilu_projection.weight": (value_dim, DIM),
        "swilu_projection.bias": (value_dim,),
        "query_proj.query_mlps.0.weight": (num_heads * key_dim, DIM),
        "query_proj.query_mlps.0.bias": (num_heads * key_dim,),
    }
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in (shapes | extra).items()}


def published_choice(state: dict[str, Tensor], x: Tensor) -> list[list[tuple[int, Tensor]]]:
    """For each token the rows and weights of all heads, the flat keys read by their row: head, then half, then key."""
    num_heads, top_k, half_dim = SMALL["num_heads"], SMALL["top_k"], SMALL["key_dim"] // 2
    chosen: list[list[tuple[int, Tensor]]] = []
    for token in x:
        query = state["query_proj.query_mlps.0.weight"] @ token + state["query_proj.query_mlps.0.bias"]
        bag: list[tuple[int, Tensor]] = []
        for head in range(num_heads):
            scores = []
            for i in range(NUM_KEYS):
                for j in range(NUM_KEYS):
                    start = head * 2 * half_dim
                    first, second = query[start : start + half_dim], query[start + half_dim : start + 2 * half_dim]
                    first_key = state["keys"][(head * 2 + 0) * NUM_KEYS + i]
                    second_key = state["keys"][(head * 2 + 1) * NUM_KEYS + j]
                    scores.append(first @ first_key + second @ second_key)
            best = torch.stack(scores).topk(top_k)
            bag += zip(best.indices.tolist(), best.values.softmax(dim=0), strict=True)
        chosen.append(bag)
    return chosen


@pytest.mark.parametrize("keys_ndim", [2, 4])
def test_published_memory(keys_ndim: int) -> None:
    state = published_state(VALUE_DIM)
    x = torch.randn(3, DIM, dtype=torch.float64)
    looked_up = torch.stack(
        [sum(weight * state["values.weight"][row] for row, weight in bag) for bag in published_choice(state, x)]
    )
    gate = F.silu(x @ state["swilu_projection.weight"].T + state["swilu_projection.bias"])
    expected = (looked_up * gate) @ state["value_proj.weight"].T + state["value_proj.bias"]
    if keys_ndim == 4:
        state["keys"] = state["keys"].view(SMALL["num_heads"], 2, NUM_KEYS, -1)
    layer = product_key_memory(dtype=torch.float64)
    elsewhere = {"model.norm.weight": torch.ones(2)}
    layer.load_reference_state_dict(elsewhere | {f"model.ffn.{name}": t for name, t in state.items()}, "model.ffn.")
    torch.testing.assert_close(layer(x), expected)


def test_published_peer() -> None:
    state = published_state(DIM, **{"values_u.weight": (NUM_KEYS**2, DIM), "values_v.weight": (NUM_KEYS**2, DIM)})
    del state["values.weight"]
    x = torch.randn(3, DIM, dtype=torch.float64)
    expected = torch.stack(
        [
            sum(
                weight * F.gelu(token @ state["values_u.weight"][row]) * state["values_v.weight"][row]
                for row, weight in bag
            )
            for token, bag in zip(x, published_choice(state, x), strict=True)
        ]
    )
    layer = peer_memory(dtype=torch.float64)
    layer.load_reference_state_dict(state)
    torch.testing.assert_close(layer(x), expected)
    tables = {"values_u.weight", "values_v.weight"}
    layer.load_reference_state_dict({name: t for name, t in state.items() if name not in tables})
    torch.testing.assert_close(layer(x), expected)


def test_published_values_may_be_another_layers() -> None:
    state = published_state(VALUE_DIM)
    del state["values.weight"]
    layer = product_key_memory()
    before = layer.pool.values.clone()
    layer.load_reference_state_dict(state)
    assert torch.equal(layer.pool.values, before)
    assert torch.equal(layer.value_proj.weight, state["value_proj.weight"].float())


def test_published_batch_norm() -> None:
    state = published_state(VALUE_DIM)
    norm = nn.BatchNorm1d(16)
    norm(torch.randn(9, 16) * 3 + 1)
    state |= {f"query_proj.query_mlps.1.{name}": tensor for name, tensor in norm.state_dict().items()}
    layer = product_key_memory(query_norm="batch")
    layer.load_reference_state_dict(state)
    loaded = layer.query_norm.state_dict()
    assert loaded.keys() == norm.state_dict().keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in norm.state_dict().items())


@BOTH
def test_published_state_that_does_not_fit(make: Make) -> None:
    state = published_state(DIM if make is peer_memory else VALUE_DIM)
    if make is peer_memory:
        state["values_u.weight"] = state["values_v.weight"] = state.pop("values.weight")
    layer = make()
    before = copy.deepcopy(layer.state_dict())
    wrong = {**state, "gating.weight": torch.ones(1), "more": torch.ones(1)}
    del wrong["keys"]
    with pytest.raises(ValueError, match=r"missing keys; unknown gating\.weight, more"):
        layer.load_reference_state_dict(wrong)
    with pytest.raises(ValueError, match=r"query_mlps\.0\.bias.* must have shape \(16,\), got \(15,\)"):
        layer.load_reference_state_dict({**state, "query_proj.query_mlps.0.bias": torch.ones(15)})
    with pytest.raises(TypeError, match="state_dict"):
        layer.load_reference_state_dict([state])
    with pytest.raises(TypeError, match="state_dict"):
        layer.load_reference_state_dict({**state, "keys": [1.0]})
    with pytest.raises(TypeError, match="prefix"):
        layer.load_reference_state_dict(state, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    for options in ({"query_norm": "rms"}, {"key_norm": True}):
        with pytest.raises(ValueError, match="norm"):
            make(**options).load_reference_state_dict(state)


# --- training ---------------------------------------------------------------------------------------------------------


def test_parameter_groups() -> None:
    pool = tg.nn.MemoryPool(NUM_KEYS, VALUE_DIM)
    memories = [tg.nn.ProductKeyMemory(DIM, pool, **SMALL) for _ in range(2)]
    peer = peer_memory()
    model = nn.Sequential(nn.Linear(DIM, DIM), *memories, peer)
    model[0].bias.requires_grad_(False)
    rest, keys, values = tg.nn.memory_parameter_groups(model, 0.1, values_lr=0.2, keys_lr=0.3, weight_decay=0.4)
    assert [group["name"] for group in (rest, keys, values)] == ["rest", "keys", "values"]
    assert [(group["lr"], group["weight_decay"]) for group in (rest, keys, values)] == [
        (0.1, 0.4),
        (0.3, 0.4),
        (0.2, 0),
    ]
    assert {id(p) for p in keys["params"]} == {id(layer.keys) for layer in (*memories, peer)}
    assert [id(p) for p in values["params"]] == [id(pool.values), id(peer.values_in), id(peer.values_out)]
    grouped = [id(p) for group in (rest, keys, values) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert tg.nn.memory_parameter_groups(model, 0.1)[1]["lr"] == 0.1
    assert [len(group["params"]) for group in tg.nn.memory_parameter_groups(nn.Linear(2, 2), 0.1)] == [2, 0, 0]


@pytest.mark.parametrize("sparse_grad", [False, True])
@BOTH
def test_the_optimizers_of_the_docstring(make: Make, sparse_grad: bool) -> None:
    """The examples are run as they are written."""
    docstring = tg.nn.memory_parameter_groups.__doc__
    assert docstring is not None
    # Python 3.13 takes the indentation away by itself.
    example = re.findall(r"::\n\n((?:    .*\n|\n)+)", inspect.cleandoc(docstring) + "\n")[sparse_grad]
    model = make(sparse_grad=sparse_grad)
    names: dict[str, Any] = {"torch": torch, "tg": tg, "model": model, "num_steps": 20}
    exec(textwrap.dedent(example), names)
    optimizers = names["optimizers"] if sparse_grad else [names["optimizer"]]
    x, target = torch.randn(16, DIM), torch.randn(16, DIM)
    losses = []
    for _ in range(10):
        loss = (model(x) - target).square().mean()
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if not sparse_grad:
            names["schedule"].step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    if not sparse_grad:
        rates = {group["name"]: group["lr"] for group in optimizers[0].param_groups}
        assert rates == {"rest": pytest.approx(1.5e-4), "keys": pytest.approx(1.5e-4), "values": 1e-3}


@BOTH
def test_it_recalls(make: Make) -> None:
    """Fifty random answers to fifty random questions are learnt by heart."""
    x, answers = torch.randn(50, DIM), torch.randint(DIM, (50,))
    model = nn.Sequential(make(query_norm="batch"), nn.BatchNorm1d(DIM))
    optimizer = torch.optim.Adam(tg.nn.memory_parameter_groups(model, lr=1e-2, values_lr=3e-2))
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(model(x), answers).backward()
        optimizer.step()
    assert (model(x).argmax(dim=1) == answers).float().mean() > 0.9


# --- bad input --------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("arguments", "exception", "named"),
    [
        ({"num_heads": 0}, ValueError, "num_heads"),
        ({"num_heads": True}, TypeError, "num_heads"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_k": 26}, ValueError, "top_k"),
        ({"top_k": 2.0}, TypeError, "top_k"),
        ({"key_dim": 0}, ValueError, "key_dim"),
        ({"key_dim": 7}, ValueError, "key_dim"),
        ({"key_dim": None}, TypeError, "key_dim"),
        ({"query_norm": "instance"}, ValueError, "query_norm"),
        ({"query_norm": True}, TypeError, "query_norm"),
        ({"key_norm": 1}, TypeError, "key_norm"),
        ({"value_dropout": 1.0}, ValueError, "value_dropout"),
        ({"value_dropout": -0.1}, ValueError, "value_dropout"),
        ({"value_dropout": math.nan}, ValueError, "value_dropout"),
        ({"value_dropout": None}, TypeError, "value_dropout"),
        ({"bias": 1}, TypeError, "bias"),
        ({"track_usage": None}, TypeError, "track_usage"),
        ({"sparse_grad": 1}, TypeError, "sparse_grad"),
    ],
    ids=str,
)
def test_bad_options_are_refused(make: Make, arguments: dict[str, Any], exception: type[Exception], named: str) -> None:
    with pytest.raises(exception, match=rf"\b{named}\b"):
        make(**arguments)


@pytest.mark.parametrize(
    ("call", "exception", "named"),
    [
        (lambda: product_key_memory(gated=1), TypeError, "gated"),
        (lambda: product_key_memory(out_dim=0), ValueError, "out_dim"),
        (lambda: product_key_memory(out_dim="8"), TypeError, "out_dim"),
        (lambda: product_key_memory(has_value_proj=1), TypeError, "has_value_proj"),
        (lambda: product_key_memory(has_value_proj=False), ValueError, "has_value_proj"),
        (lambda: product_key_memory(gated=False, has_value_proj=False), ValueError, "has_value_proj"),
        (lambda: tg.nn.ProductKeyMemory(0, tg.nn.MemoryPool(3, 4)), ValueError, "dim"),
        (lambda: tg.nn.ProductKeyMemory(8, nn.Embedding(9, 4)), TypeError, "pool"),
        (lambda: peer_memory(activation="tanh"), ValueError, "activation"),
        (lambda: peer_memory(activation=F.gelu), TypeError, "activation"),
        (lambda: tg.nn.PeerMemory(8.0, 4), TypeError, "dim"),
        (lambda: tg.nn.PeerMemory(8, 0), ValueError, "num_keys"),
        (lambda: tg.nn.MemoryPool(46341, 1), ValueError, "num_keys"),
        (lambda: tg.nn.MemoryPool(3.0, 1), TypeError, "num_keys"),
        (lambda: tg.nn.MemoryPool(3, 0), ValueError, "value_dim"),
        (lambda: setattr(peer_memory(), "track_usage", 1), TypeError, "track_usage"),
        (lambda: tg.nn.memory_parameter_groups([], 0.1), TypeError, "model"),
        (lambda: tg.nn.memory_parameter_groups(nn.Linear(2, 2), "0.1"), TypeError, "lr"),
        (lambda: tg.nn.memory_parameter_groups(nn.Linear(2, 2), 0.1, values_lr=-1.0), ValueError, "values_lr"),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[], Any], exception: type[Exception], named: str) -> None:
    with pytest.raises(exception, match=rf"\b{named}\b"):
        call()


@BOTH
@pytest.mark.parametrize(
    ("x", "exception"),
    [(torch.zeros(2, DIM + 1), ValueError), (torch.zeros(()), ValueError), ([[0.0]], TypeError)],
    ids=["channels", "0d", "list"],
)
def test_bad_x_is_refused(make: Make, x: Any, exception: type[Exception]) -> None:
    with pytest.raises(exception, match=r"\bx\b"):
        make()(x)
