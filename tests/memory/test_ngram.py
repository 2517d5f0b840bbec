"""ngram_hash and nn.NgramMemory: hashes against plain ints, the layer against that of transformers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import topgather as tg

VOCAB, END = 50, 7
DIM, BATCH, LENGTH = 4, 2, 24
ORDERS = (1, 2, 4)


def make_tokens(seed: int = 0) -> Tensor:
    """With documents that end, one after the other too."""
    tokens = torch.randint(VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))
    tokens[0, 5] = tokens[0, 11] = tokens[0, 12] = tokens[1, 0] = END
    return tokens


def make_layer(**options: Any) -> "tg.nn.NgramMemory":
    torch.manual_seed(1)
    layer = tg.nn.NgramMemory(DIM, VOCAB, **{"num_tables": 2, "rows": 11, "embed_dim": 8, "num_streams": 2, **options})
    torch.nn.init.normal_(layer.conv_weight)
    for norm in (layer.key_norm, layer.query_norm, layer.conv_norm):
        torch.nn.init.normal_(norm.weight)
    return layer


def make_x(**options: Any) -> Tensor:
    return torch.randn(BATCH, LENGTH, 2 * DIM, generator=torch.Generator().manual_seed(2), **options)


# --- hashes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end_token", [None, END])
@pytest.mark.parametrize(
    "options",
    [
        {"rows": 2, "vocab_size": VOCAB, "seed": 3},
        {"rows": [1, 9, 2**31 - 1, 4, 5, 6]},
        {"rows": 2**20, "vocab_size": 2**31 - 1, "seed": 2**31 - 1},
    ],
    ids=str,
)
def test_hashes_are_those_of_plain_ints(options: dict[str, Any], end_token: int | None) -> None:
    options = {"num_tables": 2, "end_token": end_token, **options}
    tokens = make_tokens()
    expected = tg.reference.ngram_hash(tokens, ORDERS, **options)
    assert torch.equal(tg.ngram_hash(tokens, ORDERS, **options), expected)
    assert torch.equal(tg.ngram_hash(tokens.to(torch.int32), ORDERS, **options), expected)
    packed, cu_seqlens = tokens.flatten(), torch.tensor([0, 2, 2, 3, 30, BATCH * LENGTH], dtype=torch.int32)
    assert torch.equal(
        tg.ngram_hash(packed, ORDERS, cu_seqlens=cu_seqlens, **options),
        tg.reference.ngram_hash(packed, ORDERS, cu_seqlens=cu_seqlens, **options),
    )


@pytest.mark.parametrize("end_token", [None, END])
def test_hashes_of_a_document_in_pieces(end_token: int | None) -> None:
    options: dict[str, Any] = {"num_tables": 2, "rows": 1000, "end_token": end_token}
    tokens = make_tokens()
    state = torch.full((BATCH, ORDERS[-1] - 1), -1 if end_token is None else end_token)
    found = []
    for piece in tokens.split([1, 2, 0, 7, 1, 13], dim=1):
        indices, state = tg.ngram_hash(piece, ORDERS, state=state, **options)
        found.append(indices)
    assert torch.equal(torch.cat(found, dim=1), tg.ngram_hash(tokens, ORDERS, **options))
    assert torch.equal(state, tokens[:, -3:])


def test_largest_tokens_do_not_overflow() -> None:
    tokens = torch.tensor([[2**31 - 2, 0, 2**31 - 2, 2**31 - 2]])
    options: dict[str, Any] = {"num_tables": 3, "rows": 10**6}
    assert torch.equal(tg.ngram_hash(tokens, **options), tg.reference.ngram_hash(tokens, **options))
    assert int(tg.ngram_hash(torch.tensor([[-(2**62), 2**62]]), **options).min()) >= 0


def test_numbers_of_rows() -> None:
    assert tg.ngram_table_rows(1, 5) == (2, 3, 5, 7, 11)
    assert tg.ngram_table_rows(8, 2, skip=1) == (13, 17)
    assert tg.ngram_table_rows(20_000_000, 1) == (20_000_003,)


@pytest.mark.parametrize(
    "changed, exception, named",
    [
        ({"tokens": [[1]]}, TypeError, "tokens"),
        ({"tokens": torch.zeros(1, 2)}, TypeError, "tokens"),
        ({"tokens": torch.zeros(2, dtype=torch.int64)}, ValueError, "tokens"),
        ({"orders": 2}, TypeError, "orders"),
        ({"orders": ()}, ValueError, "orders"),
        ({"orders": (3, 2)}, ValueError, "orders"),
        ({"orders": (0, 1)}, ValueError, "orders"),
        ({"orders": (2, 65)}, ValueError, "orders"),
        ({"num_tables": 0}, ValueError, "num_tables"),
        ({"rows": 1.5}, TypeError, "rows"),
        ({"rows": [3]}, ValueError, "rows"),
        ({"cu_seqlens": torch.tensor([0, 2])}, ValueError, "tokens"),
        ({"cu_seqlens": torch.tensor([0, 1]), "tokens": torch.zeros(2, dtype=torch.int64)}, ValueError, "cu_seqlens"),
        ({"state": torch.zeros(1, 1, dtype=torch.int64)}, ValueError, "state"),
        ({"state": torch.zeros(1, 2)}, TypeError, "state"),
        ({"vocab_size": 2**31 + 1}, ValueError, "vocab_size"),
        ({"vocab_size": 5, "end_token": 5}, ValueError, "end_token"),
        ({"seed": -1}, ValueError, "seed"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(changed: dict[str, Any], exception: type[Exception], named: str) -> None:
    arguments = {"tokens": torch.zeros(1, 2, dtype=torch.int64), "num_tables": 1, "rows": 3, **changed}
    with pytest.raises(exception, match=named):
        tg.ngram_hash(**arguments)


# --- the layer --------------------------------------------------------------------------------------------------------


def test_layer_is_that_of_transformers() -> None:
    """Outputs, gradients and calls token by token of the per-layer embedding of ``qwen4_exp``."""
    modeling = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")
    config = modeling.Qwen4ExpTextConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        num_hidden_layers=2,
        hc_count=2,
        ple_layer_ids=[1, 2],
        ple_embed_dim=8,
        heads_per_ngram=2,
        ngram_vocab_size_base=11,
        eos_token_id=END,
        num_experts=2,
        num_experts_per_tok=1,
        seed=5,
    )
    theirs = modeling.Qwen4ExpTextPLELayer(config, layer_idx=1, ple_layer_index=1)
    layer = make_layer(end_token=END, layer_idx=1, seed=5)
    table = theirs.ple_embedding.ngram_embedding.weight
    norms = [
        (theirs.norm_key, layer.key_norm),
        (theirs.norm_query, layer.query_norm),
        (theirs.norm_conv, layer.conv_norm),
    ]
    with torch.no_grad():
        table[: layer.values.size(0)] = layer.values
        theirs.key_proj.weight.copy_(layer.key_proj.weight)
        theirs.value_proj.weight.copy_(layer.value_proj.weight)
        theirs.conv1d.weight.copy_(layer.conv_weight.unsqueeze(1))
        for their_norm, norm in norms:
            their_norm.weight.copy_(norm.weight.flatten() - 1)
    assert list(layer.table_rows) == theirs.ple_embedding.head_vocab_sizes
    tokens, x = make_tokens(), make_x(requires_grad=True)
    mask = torch.arange(LENGTH) >= torch.tensor([[3], [0]])
    padded = theirs(x, torch.where(mask, tokens, END), None, conv_mask=mask)
    torch.testing.assert_close(layer(x, tokens, mask=mask), padded)
    out, expected = layer(x, tokens), theirs(x, tokens, None)
    torch.testing.assert_close(out, expected)
    direction = torch.randn_like(out)
    mine = torch.autograd.grad(out, [x, layer.values, layer.conv_weight, layer.key_norm.weight], direction)
    wanted = torch.autograd.grad(expected, [x, table, theirs.conv1d.weight, theirs.norm_key.weight], direction)
    for actual, grad in zip(mine, wanted, strict=True):
        grad = grad[: actual.size(0)] if grad.shape[1:] == actual.shape[1:] else grad
        torch.testing.assert_close(actual, grad.reshape(actual.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"end_token": END}, {"kernel_size": 1, "orders": (1,)}, {"orders": (3,)}], ids=str)
def test_tokens_one_by_one(options: dict[str, Any]) -> None:
    """And in other pieces: as ``generate()`` calls, the prompt first."""
    layer = make_layer(**options)
    tokens, x = make_tokens(), make_x()
    expected = layer(x, tokens)
    for sizes in ([10] + [1] * 14, [3, 0, 21]):
        state, found = layer.make_state(BATCH), []
        for piece, piece_x in zip(tokens.split(sizes, 1), x.split(sizes, 1), strict=True):
            out, state = layer(piece_x, piece, state=state)
            found.append(out)
        torch.testing.assert_close(torch.cat(found, dim=1), expected)


@pytest.mark.parametrize("end_token", [None, END])
def test_padding_before_a_sequence_is_not_there(end_token: int | None) -> None:
    """The second prompt is shorter by 5; both go on token by token."""
    layer = make_layer(end_token=end_token)
    tokens, x = make_tokens(), make_x()
    mask = torch.arange(LENGTH) >= torch.tensor([[0], [5]])
    expected = layer(x[1:, 5:], tokens[1:, 5:])[0]
    torch.testing.assert_close(layer(x, tokens, mask=mask)[1, 5:], expected)
    first, state = layer(x[:, :9], tokens[:, :9], state=layer.make_state(BATCH), mask=mask[:, :9])
    rest, _ = layer(x[:, 9:], tokens[:, 9:], state=state)
    torch.testing.assert_close(torch.cat([first, rest], dim=1)[1, 5:], expected)


def test_packed_documents_are_each_alone() -> None:
    layer = make_layer()
    tokens, x = make_tokens().flatten(), make_x().flatten(0, 1)
    lengths = [1, 0, 30, 17]
    cu_seqlens = torch.tensor([0, 1, 1, 31, 48])
    parts = zip(tokens.split(lengths), x.split(lengths), strict=True)
    expected = torch.cat([layer(part_x[None], part[None])[0] for part, part_x in parts])
    torch.testing.assert_close(layer(x, tokens, cu_seqlens), expected)


def test_gradcheck() -> None:
    layer = make_layer(dtype=torch.float64, kernel_size=2, sparse_grad=False)
    tokens = make_tokens()[:, :6]
    x = make_x(dtype=torch.float64)[:, :6].clone().requires_grad_()
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(x: Tensor, *tensors: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x, tokens))

    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)
    tangent = torch.ones_like(x)
    _, forward = torch.func.jvp(lambda x: layer(x, tokens), (x.detach(),), (tangent,))
    (backward,) = torch.autograd.functional.vjp(lambda x: layer(x, tokens), x, forward)[1:]
    assert torch.isclose((forward * forward).sum(), (backward * tangent).sum())
    many = torch.func.vmap(lambda x: layer(x, tokens))(torch.stack([x, -x]).detach())
    torch.testing.assert_close(many, torch.stack([layer(x, tokens), layer(-x, tokens)]))


def test_sparse_gradients_and_row_optimizers() -> None:
    dense, sparse, rows = (make_layer(sparse_grad=flag) for flag in (False, True, False))
    tokens, x = make_tokens(), make_x()
    optimizers = [torch.optim.SGD([dense.values], 0.1), torch.optim.SGD([sparse.values], 0.1)]
    optimizers += [tg.optim.RowSGD([rows.values], 0.1)]
    for layer, optimizer in zip((dense, sparse, rows), optimizers, strict=True):
        layer(x, tokens).square().sum().backward()
        optimizer.step()
    assert sparse.values.grad is not None and sparse.values.grad.is_sparse and rows.values.grad is None
    torch.testing.assert_close(sparse.values, dense.values)
    torch.testing.assert_close(rows.values, dense.values)
    touched = torch.zeros(len(dense.values), dtype=torch.bool)
    touched[dense.rows_of(tokens)] = True
    assert torch.equal(dense.values.ne(make_layer().values).any(dim=1), touched)
    values_group = tg.nn.memory_parameter_groups(sparse, 1.0)[2]
    assert len(values_group["params"]) == 1 and values_group["params"][0] is sparse.values
    assert any(isinstance(module, torch.nn.EmbeddingBag) and module.sparse for _, module in sparse.named_modules())


def test_copies_and_state_dict() -> None:
    layer, other = make_layer(), make_layer(seed=1234)
    torch.nn.init.normal_(other.values)
    other.load_state_dict(layer.state_dict())
    tokens, x = make_tokens(), make_x()
    for twin in (other, copy.deepcopy(layer)):
        assert torch.equal(twin(x, tokens), layer(x, tokens))
    assert layer.to(torch.bfloat16)(x.bfloat16(), tokens).dtype == torch.bfloat16


def test_compile_and_export() -> None:
    layer = make_layer(end_token=END)
    tokens, x = make_tokens(), make_x()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, tokens), layer(x, tokens))
    state = layer.make_state(BATCH)
    for actual, expected in zip(compiled(x, tokens, state=state), layer(x, tokens, state=state), strict=True):
        torch.testing.assert_close(actual, expected)
    hashed = torch.compile(lambda t: tg.ngram_hash(t, num_tables=2, rows=100), fullgraph=True, backend="aot_eager")
    assert torch.equal(hashed(tokens), tg.ngram_hash(tokens, num_tables=2, rows=100))
    many = torch.func.vmap(lambda t: tg.ngram_hash(t, num_tables=2, rows=100))(torch.stack([tokens, tokens + 1]))
    assert torch.equal(many[1], tg.ngram_hash(tokens + 1, num_tables=2, rows=100))
    dynamic = {1: torch.export.Dim("tokens", min=2, max=4096)}
    program = torch.export.export(layer, (x, tokens), dynamic_shapes=(dynamic, dynamic)).module()
    torch.testing.assert_close(program(x[:, :9], tokens[:, :9]), layer(x[:, :9], tokens[:, :9]))


@pytest.mark.parametrize(
    "call, exception, named",
    [
        (lambda: make_layer(embed_dim=9), ValueError, "embed_dim"),
        (lambda: make_layer(rows=[1, 2, 3, 4]), TypeError, "rows"),
        (lambda: make_layer(kernel_size=0), ValueError, "kernel_size"),
        (lambda: make_layer(layer_idx=-1), ValueError, "layer_idx"),
        (lambda: make_layer(end_token=VOCAB), ValueError, "end_token"),
        (lambda: make_layer().make_state(-1), ValueError, "batch_size"),
        (lambda: make_layer()(make_x()[:, 1:], make_tokens()), ValueError, "x must"),
        (lambda: make_layer()(make_x().long(), make_tokens()), TypeError, "x must"),
        (lambda: make_layer()(make_x(), make_tokens(), state=(1, 2)), TypeError, "state"),
        (lambda: make_layer()(make_x(), make_tokens(), mask=make_tokens()), TypeError, "mask"),
        (lambda: make_layer()(make_x(), make_tokens(), mask=torch.ones(1, 1).bool()), ValueError, "mask"),
        (lambda: make_layer()(make_x(), make_tokens(), state=make_layer().make_state(1)), ValueError, "state"),
    ],
)
def test_bad_use_of_the_layer(call: Callable[[], Any], exception: type[Exception], named: str) -> None:
    with pytest.raises(exception, match=named):
        call()
