"""attn_implementation="moba" in Hugging Face transformers: small random Llama and Qwen3 models, nothing downloaded."""

import copy
import importlib.util
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("transformers") is None:  # importorskip would hide a broken one too
    pytest.skip("transformers is not installed", allow_module_level=True)

import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import topgather as tg
from topgather.integrations import transformers as moba
from topgather.integrations._cache import MobaLayer

from .causal_models import IS_OF_TABLE

transformers.logging.set_verbosity_error()

VOCABULARY = 61
EVERYTHING = 1000
Model = Any


def llama(implementation: str = "moba", **options: Any) -> Model:
    return make(LlamaConfig, LlamaForCausalLM, implementation, options)


def qwen3(implementation: str = "moba", **options: Any) -> Model:
    return make(Qwen3Config, Qwen3ForCausalLM, implementation, {"head_dim": 8, **options})


def make(config: Any, model: Any, implementation: str, options: dict[str, Any]) -> Model:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,  # sharp enough that another choice of blocks is another token
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(1)
    return model(config(**{**sizes, "attn_implementation": implementation, **options})).eval()


FAMILIES = pytest.mark.parametrize("family", [llama, qwen3])
Family = Callable[..., Model]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    moba.register(block_size=8, top_k=2)
    yield
    moba.register()


def tokens(batch_size: int, length: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch_size, length))


def padded(lengths: list[int], side: str) -> tuple[Tensor, Tensor]:
    """Random sequences of these lengths and their mask, padded on one side."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(max(lengths) - length, None)
        ids[row, place] = tokens(1, length)[0]
        mask[row, place] = 1
    return ids, mask


def positions_of(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def recomputed(model: Model, ids: Tensor, num_new: int) -> Tensor:
    """Greedy generation, every step from scratch."""
    with torch.no_grad():
        for _ in range(num_new):
            best = model(ids, use_cache=False).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, best[:, None]], dim=1)
    return ids


def greedy(model: Model, ids: Tensor, num_new: int = 24, **options: Any) -> Tensor:
    return model.generate(ids, max_new_tokens=num_new, do_sample=False, **options)


def holds_moba_layers(cache: Any) -> bool:
    return all(isinstance(layer, MobaLayer) for layer in cache.layers)


# ------------------------------------------------------------------------------------------------------------ training


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_sdpa_where_all_blocks_are_chosen(family: Family, dtype: torch.dtype) -> None:
    ids = tokens(2, 50)
    model = family(moba_top_k=EVERYTHING).to(dtype)
    dense = family("sdpa").to(dtype)
    actual, expected = (each(ids, labels=ids) for each in (model, dense))
    # Two layers and the logits round at every step in the model's dtype, in another order in the two.
    tolerance = 300 * torch.finfo(dtype).eps
    assert actual.logits.dtype == dtype
    torch.testing.assert_close(actual.logits, expected.logits, atol=tolerance, rtol=tolerance)
    if dtype == torch.float32:
        actual.loss.backward()
        expected.loss.backward()
        for left, right in zip(model.parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(left.grad, right.grad, atol=1e-4, rtol=1e-4)


@FAMILIES
def test_is_block_attention(family: Family) -> None:
    """With few blocks the result differs from dense attention, and is that of the op."""
    ids = tokens(2, 50)
    model = family()
    calls = []
    module = model.model.layers[0].self_attn

    def spy(*arguments: Any, **options: Any) -> Any:
        calls.append((arguments, moba._attention(*arguments, **options)))
        return calls[-1][1]

    transformers.AttentionInterface.register("moba", spy)
    sparse = model(ids, use_cache=False).logits
    (found, query, key, value, mask), (out, _) = calls[0]
    assert found is module and mask is None and query.shape == (2, 4, 50, 8) and key.shape == (2, 2, 50, 8)
    expected = tg.moba_attention(query, key, value, block_size=8, top_k=2).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=0, rtol=0)
    assert not torch.allclose(sparse, family("sdpa")(ids).logits, atol=1e-2)


@FAMILIES
def test_the_loss_falls(family: Family) -> None:
    model = family(initializer_range=0.05).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids = tokens(1, 16).repeat(2, 4)  # the same passage again and again
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@FAMILIES
def test_gradient_checkpointing_changes_nothing(family: Family) -> None:
    ids, mask = padded([40, 23], "right")
    gradients = []
    for checkpointing in (False, True):
        model = family().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, atol=0, rtol=0)


def test_autocast() -> None:
    model = llama()
    ids, mask = padded([40, 23], "left")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        out = greedy(model, ids, 4, attention_mask=mask)
    assert out.shape == (2, 44)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------- padding and packing


@FAMILIES
@pytest.mark.parametrize("dense_layers", [(), (0,), (0, 1)], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_sequences_are_as_each_alone(family: Family, side: str, dense_layers: tuple[int, ...]) -> None:
    model = family(moba_dense_layers=dense_layers)
    lengths = [50, 17, 1, 33]
    ids, mask = padded(lengths, side)
    batch = model(ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False).logits
    weights = torch.randn_like(batch)
    (batch * weights * mask[:, :, None]).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for row in range(len(lengths)):
        real = mask[row].bool()
        alone = model(ids[row, real][None], use_cache=False).logits[0]
        torch.testing.assert_close(batch[row, real], alone, atol=1e-4, rtol=1e-4)
        (alone * weights[row, real]).sum().backward()
    for left, right in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(left, right.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dense_layers", [(), (0, 1)], ids=str)
def test_left_and_right_padding_are_equal(dense_layers: tuple[int, ...]) -> None:
    model = llama(moba_dense_layers=dense_layers)
    lengths = [30, 11]
    torch.manual_seed(0)
    left, left_mask = padded(lengths, "left")
    torch.manual_seed(0)
    right, right_mask = padded(lengths, "right")
    outs = [
        model(ids, attention_mask=mask, position_ids=positions_of(mask)).logits[mask.bool()]
        for ids, mask in ((left, left_mask), (right, right_mask))
    ]
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dense_layers", [(), (0,)], ids=str)
def test_rows_of_padding_are_0(dense_layers: tuple[int, ...]) -> None:
    """Whatever stands there, even NaN."""
    module = llama(moba_dense_layers=dense_layers).model.layers[0].self_attn
    query, key, value = (torch.randn(2, heads, 20, 8) for heads in (4, 2, 2))
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :7] = False
    for tensor in (query, key, value):
        tensor[1, :, :7] = torch.nan
        tensor.requires_grad_()
    out, _ = moba._attention(module, query, key, value, mask, scaling=0.3)
    assert out.shape == (2, 20, 4, 8)
    assert out[1, :7].eq(0).all() and out.isfinite().all()
    out.sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad[1, :, :7].eq(0).all()


def test_an_empty_sequence_and_holes() -> None:
    model = llama()
    ids = tokens(3, 30)
    mask = torch.ones_like(ids)
    mask[0] = 0
    mask[1, [0, 4, 5, 20]] = 0
    batch = model(ids, attention_mask=mask, position_ids=positions_of(mask)).logits
    real = mask[1].bool()
    torch.testing.assert_close(batch[1, real], model(ids[1, real][None]).logits[0], atol=1e-4, rtol=1e-4)
    assert batch.isfinite().all()


@FAMILIES
@pytest.mark.parametrize("named", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("dense_layers", [(), (1,)], ids=str)
def test_packed_sequences_are_as_each_alone(family: Family, named: str, dense_layers: tuple[int, ...]) -> None:
    model = family(moba_dense_layers=dense_layers)
    lengths = [25, 3, 22]
    ids = tokens(1, sum(lengths))
    options: dict[str, Any] = {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}
    if named == "cu_seq_lens":
        boundaries = torch.tensor([0, 25, 28, 50], dtype=torch.int32)
        options |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 25, "max_length_k": 25}
    packed = model(ids, **options).logits[0]
    for part, out in zip(ids[0].split(lengths), packed.split(lengths), strict=True):
        torch.testing.assert_close(out, model(part[None]).logits[0], atol=1e-4, rtol=1e-4)


def test_rows_packed_side_by_side() -> None:
    """Several rows, each packed in its own way."""
    model = llama()
    ids = tokens(2, 30)
    position_ids = torch.stack([torch.arange(30), torch.cat([torch.arange(12), torch.arange(18)])])
    packed = model(ids, position_ids=position_ids, use_cache=False).logits
    torch.testing.assert_close(packed[0], model(ids[:1]).logits[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed[1, 12:], model(ids[1:, 12:]).logits[0], atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------- generation


def test_padded_batches_on_every_device(device: torch.device) -> None:
    """The one case that runs wherever there are kernels: training's path, the prompt's, and that of single tokens."""
    model = llama(moba_dense_layers=[1]).to(device)
    ids, mask = (each.to(device) for each in padded([20, 9], "left"))
    options = {"attention_mask": mask, "position_ids": positions_of(mask)}
    batch = model(ids, use_cache=False, **options).logits
    batch[mask.bool()].square().mean().backward()
    alone = ids[1, mask[1].bool()][None]
    torch.testing.assert_close(batch[1, mask[1].bool()], model(alone, use_cache=False).logits[0], atol=1e-3, rtol=1e-3)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    for _ in range(2):
        out = greedy(model, ids, 3, attention_mask=mask)
        assert torch.equal(out[1, -3:], recomputed(model, alone, 3)[0, -3:])


@FAMILIES
@pytest.mark.parametrize("kind", ["its own", "contiguous", "tight", "paged", "stock", "static"])
def test_generate_equals_recomputing(family: Family, kind: str) -> None:
    model = family(moba_dense_layers=[1], num_hidden_layers=3)
    ids = tokens(2, 37)
    expected = recomputed(model, ids, 24)
    options: dict[str, Any] = {}
    if kind == "contiguous":
        options["past_key_values"] = moba.make_cache(model, max_seq_len=70)
    elif kind == "tight":
        options["past_key_values"] = moba.make_cache(model, max_seq_len=40)
    elif kind == "paged":
        options["past_key_values"] = moba.make_cache(model, max_seq_len=70, paged=True)
    elif kind == "stock":
        moba.register(block_size=8, top_k=2, replace_cache=False)
    elif kind == "static":
        options["cache_implementation"] = "static"
    for _ in range(2):  # the model's first forward ever, and a later one
        out = greedy(model, ids, return_dict_in_generate=True, **copy.deepcopy(options))
        assert torch.equal(out.sequences, expected)
        assert holds_moba_layers(out.past_key_values) == (kind not in ("stock", "static"))


@pytest.mark.parametrize("block_size", [5000, 2**31 - 1])
@pytest.mark.parametrize("paged", [False, True])
def test_blocks_longer_than_any_sequence(paged: bool, block_size: int) -> None:
    """All tokens are one block: dense attention, of a cache that is no larger for it."""
    model = llama(moba_block_size=block_size, moba_top_k=1)
    ids = tokens(2, 37)
    cache = moba.make_cache(model, max_seq_len=70, paged=True) if paged else moba.make_cache(model)
    out = greedy(model, ids, past_key_values=cache, return_dict_in_generate=True)
    assert torch.equal(out.sequences, greedy(llama("sdpa"), ids))
    assert cache.layers[0].moba_cache.max_seq_len <= 4096


@pytest.mark.parametrize("kind", ["its own", "paged", "stock"])
@FAMILIES
def test_batches_generate_as_each_alone(family: Family, kind: str) -> None:
    model = family(moba_dense_layers=[0])
    lengths = [40, 9, 26]
    ids, mask = padded(lengths, "left")
    moba.register(block_size=8, top_k=2, replace_cache=kind != "stock")
    expected = [recomputed(model, ids[row, mask[row].bool()][None], 20)[0, -20:] for row in range(3)]
    for _ in range(2):
        options = {"past_key_values": moba.make_cache(model, 60, paged=True)} if kind == "paged" else {}
        out = greedy(model, ids, 20, attention_mask=mask, return_dict_in_generate=True, **options)
        for row in range(3):
            assert torch.equal(out.sequences[row, -20:], expected[row]), row
    if kind != "stock":
        assert out.past_key_values.layers[0].moba_cache.lengths == [59, 28, 45]
        assert out.past_key_values.get_seq_length() == 59


@pytest.mark.parametrize("lengths", [[40, 40], [40, 17]], ids=str)
@pytest.mark.parametrize("paged", [False, True])
def test_beam_search_equals_the_stock_cache(paged: bool, lengths: list[int]) -> None:
    model = llama()
    ids, mask = padded(lengths, "left")
    outs = []
    for replace_cache in (False, True):
        moba.register(block_size=8, top_k=2, replace_cache=replace_cache)
        options = {"past_key_values": moba.make_cache(model, 60, paged=True)} if paged and replace_cache else {}
        outs.append(greedy(model, ids, 16, attention_mask=mask, num_beams=3, num_return_sequences=2, **options))
    assert torch.equal(*outs)


def test_assisted_generation_equals_greedy() -> None:
    """The assistant's wrong guesses are cut off the cache again."""
    model, assistant = llama(), llama(num_hidden_layers=1)
    ids = tokens(1, 30)
    expected = greedy(model, ids, 20)
    # A token that never comes: older versions of transformers cannot look for none here.
    for each in (model, assistant):
        each.generation_config.eos_token_id = VOCABULARY
    assert torch.equal(greedy(model, ids, 20, assistant_model=assistant), expected)
    assert torch.equal(greedy(model, ids, 20, prompt_lookup_num_tokens=4), expected)


def stock_in_chunks(ids: Tensor, mask: Tensor, chunk: int) -> Tensor | None:
    """What the installed transformers generates with its own attention; None where it takes no chunks."""
    try:
        return greedy(llama("sdpa"), ids, 8, attention_mask=mask, prefill_chunk_size=chunk)
    except ValueError as error:  # 5.0
        assert "Cannot use prefill chunking without a cache" in str(error)
        return None


@pytest.mark.parametrize("lengths", [[45, 45], [45, 20]], ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_chunked_prefill(chunk: int, lengths: list[int]) -> None:
    model = llama(moba_dense_layers=[1])
    ids, mask = padded(lengths, "left")
    stock = stock_in_chunks(ids, mask, chunk)
    if stock is not None and torch.equal(stock, greedy(llama("sdpa"), ids, 8, attention_mask=mask)):
        expected = greedy(model, ids, 8, attention_mask=mask)
        assert torch.equal(greedy(model, ids, 8, attention_mask=mask, prefill_chunk_size=chunk), expected)
    else:  # in 4 padded rows get wrong positions, whatever the attention
        assert not IS_OF_TABLE
        options = {"attention_mask": mask, "prefill_chunk_size": chunk}
        assert stock is None or torch.equal(greedy(llama(moba_top_k=EVERYTHING), ids, 8, **options), stock)
    position_ids = positions_of(mask)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=position_ids).logits
        cache, parts = moba.make_cache(model), []
        for start in range(0, 45, chunk):
            part = slice(start, min(start + chunk, 45))
            options = {"attention_mask": mask[:, : part.stop], "position_ids": position_ids[:, part]}
            parts.append(model(ids[:, part], past_key_values=cache, **options).logits)
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], atol=1e-4, rtol=1e-4)


def test_a_prompt_used_several_times() -> None:
    model = llama()
    prompt, ends = tokens(1, 30), [tokens(1, 5), tokens(1, 9)]
    cache = moba.make_cache(model)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    for end in ends:
        ids = torch.cat([prompt, end], dim=1)
        out = greedy(model, ids, 10, past_key_values=copy.deepcopy(cache))
        assert torch.equal(out, recomputed(model, ids, 10))
    assert cache.get_seq_length() == 30
    layer = cache.layers[0]
    shallow = copy.copy(layer)
    shallow.crop(-20)
    assert shallow.moba_cache.lengths == [10] and layer.moba_cache.lengths == [30]


@pytest.mark.parametrize("lengths", [[30, 30], [30, 12]], ids=str)
def test_a_cache_cut_repeated_and_selected(lengths: list[int]) -> None:
    """The next logits are those of the sequences that the cache then holds."""
    model = llama(moba_dense_layers=[1])
    ids, mask = padded(lengths, "left")
    new, ones = tokens(6, 3), torch.ones(6, 3, dtype=torch.long)
    cache = moba.make_cache(model)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions_of(mask), past_key_values=cache)
        cache.crop(-9)
        ids, mask = ids[:, :21], mask[:, :21]
        assert cache.get_seq_length() == 21
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([5, 0, 3, 1]))
        ids, mask = (each.repeat_interleave(3, 0)[[5, 0, 3, 1]] for each in (ids, mask))
        cache.reorder_cache(torch.tensor([1, 1, 2, 0]))
        ids, mask = (torch.cat([each[[1, 1, 2, 0]], more[:4]], 1) for each, more in ((ids, new), (mask, ones)))
        options = {"attention_mask": mask, "position_ids": positions_of(mask)}
        expected = model(ids, use_cache=False, **options).logits[:, -3:]
        options["position_ids"] = options["position_ids"][:, -3:]
        actual = model(ids[:, -3:], past_key_values=cache, **options).logits
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
        cache.reset()
        assert cache.get_seq_length() == 0


def test_models_with_hooks_are_copied_and_pickled() -> None:
    model = llama()
    ids = tokens(1, 30)
    expected = greedy(model, ids, 5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(greedy(other, ids, 5), expected)


def test_forwards_with_gradients_keep_the_stock_cache() -> None:
    model = llama()
    ids = tokens(1, 20)
    for _ in range(2):
        out = model(ids, labels=ids)
        out.loss.backward()
        assert not any(isinstance(layer, MobaLayer) for layer in out.past_key_values.layers)


# ------------------------------------------------------------------------------------------------------------ settings


def logits(model: Model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def test_settings_of_the_config_come_first() -> None:
    ids = tokens(1, 60)
    registered = logits(llama(), ids)
    moba.register(block_size=16, top_k=1)
    assert not torch.equal(logits(llama(), ids), registered)
    assert torch.equal(logits(llama(moba_block_size=8, moba_top_k=2), ids), registered)
    moba.register(block_size=8, top_k=1, dense_layers=[0, 1])
    assert torch.equal(logits(llama(moba_top_k=2, moba_dense_layers=()), ids), registered)
    moba.register(block_size=8, top_k=1)
    assert torch.equal(logits(llama(moba_top_k=2), ids), registered)


def test_dense_layers() -> None:
    ids = tokens(2, 60)
    dense = logits(llama("sdpa"), ids)
    for layers in ([0, 1], (-2, -1)):
        torch.testing.assert_close(logits(llama(moba_dense_layers=layers), ids), dense, atol=1e-4, rtol=1e-4)
    first, last = (logits(llama(moba_dense_layers=[layer]), ids) for layer in (0, 1))
    assert torch.equal(logits(llama(moba_dense_layers=[-1]), ids), last)
    for left, right in ((first, last), (first, dense), (last, dense), (last, logits(llama(), ids))):
        assert not torch.allclose(left, right, atol=1e-2)


@FAMILIES
def test_the_switch(family: Family) -> None:
    ids = tokens(1, 60)
    model = family("eager")
    dense = logits(model, ids)
    moba.set_moba(model)
    sparse = logits(model, ids)
    assert torch.equal(sparse, logits(family(), ids)) and not torch.allclose(sparse, dense, atol=1e-2)
    moba.set_moba(model, top_k=EVERYTHING)
    torch.testing.assert_close(logits(model, ids), dense, atol=1e-4, rtol=1e-4)
    moba.set_moba(model, block_size=4, top_k=3, dense_layers=[-1])
    expected = family(moba_block_size=4, moba_top_k=3, moba_dense_layers=[1])
    assert torch.equal(logits(model, ids), logits(expected, ids))
    moba.set_moba(model, enabled=False)
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(logits(model, ids), dense, atol=1e-4, rtol=1e-4)
    moba.set_moba(model, dense_layers=())
    assert model.config.moba_top_k == 3 and model.config._attn_implementation == "moba"


def test_settings_are_saved_with_the_model(tmp_path: Any) -> None:
    model = llama("sdpa")
    moba.set_moba(model, block_size=4, top_k=3, dense_layers=[1])
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="moba")
    ids = tokens(1, 40)
    assert (loaded.config.moba_block_size, loaded.config.moba_top_k) == (4, 3)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "exception", "named"),
    [
        ({"dropout": 0.1}, ValueError, "dropout"),
        ({"sliding_window": 64}, ValueError, "sliding_window"),
        ({"softcap": -30.0}, ValueError, "softcap"),
        ({"s_aux": torch.zeros(5)}, ValueError, "sinks"),
        ({"position_bias": torch.zeros(1, 4, 20, 20)}, ValueError, "position_bias"),
        ({"output_attentions": True}, ValueError, "output_attentions"),
        ({"is_causal": False}, ValueError, "is_causal"),
        ({"attention_mask": torch.ones(2, 1, 20, 20, dtype=torch.bool)}, ValueError, "attention_mask"),
        ({"attention_mask": "causal"}, ValueError, "attention_mask"),
        ({"cu_seq_lens_q": torch.tensor([0, 20]), "cu_seq_lens_k": torch.tensor([0, 20])}, ValueError, "cu_seq_lens_q"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_is_not_supported_is_refused(options: dict[str, Any], exception: type[Exception], named: str) -> None:
    module = llama().model.layers[0].self_attn
    inputs = (torch.randn(2, heads, 20, 8) for heads in (4, 2, 2))
    with pytest.raises(exception, match=rf"\b{named}\b"):
        moba._attention(module, *inputs, **{"attention_mask": None, "sliding_window": None, **options})


def test_models_that_need_more_are_refused() -> None:
    ids = tokens(1, 20)
    with pytest.raises(ValueError, match="attention_dropout"):
        llama(attention_dropout=0.1).train()(ids)
    both_ways, causal = (llama("eager", is_causal=is_causal)(ids).logits for is_causal in (False, True))
    if torch.equal(both_ways, causal):  # older versions do not read it
        assert not IS_OF_TABLE
        llama(is_causal=False)(ids)
    else:
        with pytest.raises(ValueError, match="is_causal"):
            llama(is_causal=False)(ids)


@pytest.mark.parametrize(
    ("options", "exception", "named"),
    [
        ({"moba_block_size": 0}, ValueError, "config.moba_block_size"),
        ({"moba_block_size": 8.0}, TypeError, "config.moba_block_size"),
        ({"moba_top_k": 0}, ValueError, "config.moba_top_k"),
        ({"moba_top_k": True}, TypeError, "config.moba_top_k"),
        ({"moba_dense_layers": 1}, TypeError, "config.moba_dense_layers"),
        ({"moba_dense_layers": ["0"]}, TypeError, "config.moba_dense_layers"),
    ],
    ids=str,
)
def test_bad_settings_in_the_config_are_refused(
    options: dict[str, Any], exception: type[Exception], named: str
) -> None:
    with pytest.raises(exception, match=named):
        llama(**options)(tokens(1, 20))


@pytest.mark.parametrize(
    ("options", "exception", "named"),
    [
        ({"block_size": 0}, ValueError, "block_size"),
        ({"block_size": "8"}, TypeError, "block_size"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"dense_layers": 3}, TypeError, "dense_layers"),
        ({"dense_layers": "01"}, TypeError, "dense_layers"),
        ({"dense_layers": [True]}, TypeError, "dense_layers"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(options: dict[str, Any], exception: type[Exception], named: str) -> None:
    model = llama("sdpa")
    for call in (moba.register, lambda **each: moba.set_moba(model, **each)):
        with pytest.raises(exception, match=named):
            call(**options)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("layer", [17, 2, -3])
def test_dense_layers_that_a_model_has_not_are_refused_when_it_is_made(layer: int) -> None:
    """And when it is switched; nothing of it changes then."""
    moba.register(block_size=4, top_k=2, dense_layers=[layer])
    with pytest.raises(ValueError, match=f"dense_layers must be from -2 to 1, got {layer}"):
        llama()
    model = llama("sdpa")
    with pytest.raises(ValueError, match=f"dense_layers must be from -2 to 1, got {layer}"):
        moba.set_moba(model, block_size=8)
    assert model.config._attn_implementation == "sdpa" and not hasattr(model.config, "moba_block_size")
    moba.set_moba(model, dense_layers=[1])
    model(tokens(1, 20))


def test_more_bad_arguments_are_refused() -> None:
    model = llama()
    for layer in (2, -3):
        with pytest.raises(ValueError, match="dense_layers"):
            moba.set_moba(model, dense_layers=[layer])
    with pytest.raises(TypeError, match="enabled"):
        moba.set_moba(model, enabled=1)
    for call in (moba.set_moba, moba.make_cache):
        with pytest.raises(TypeError, match="model"):
            call(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="max_seq_len"):
        moba.make_cache(model, max_seq_len=0)
    with pytest.raises(ValueError, match="max_seq_len"):
        moba.make_cache(model, paged=True)
    with pytest.raises(ValueError, match="num_pages"):
        moba.make_cache(model, 64, num_pages=3)
    with pytest.raises(TypeError, match="replace_cache"):
        moba.register(replace_cache=None)


def test_a_cache_used_wrongly_is_noticed() -> None:
    ids = tokens(1, 20)
    model = llama()
    cache = moba.make_cache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="no_grad"):
        model(ids, past_key_values=cache)

    cache = moba.make_cache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="attention_mask"):
            model(ids[:, :1], attention_mask=torch.ones(1, 1), past_key_values=cache)
        moba.set_moba(model, block_size=4)
        with pytest.raises(ValueError, match="block_size"):
            model(ids[:, :1], past_key_values=cache)


def test_a_cache_that_is_not_plain_stays_as_it_is() -> None:
    class Other(DynamicCache):
        pass

    model, ids = llama(), tokens(1, 30)
    expected = greedy(model, ids, 8)
    cache = Other(config=model.config)
    assert torch.equal(greedy(model, ids, 8, past_key_values=cache), expected)
    assert not any(isinstance(layer, MobaLayer) for layer in cache.layers)
    lazy = DynamicCache()  # makes its layers as they come
    assert torch.equal(greedy(model, ids, 8, past_key_values=lazy), expected)
    assert holds_moba_layers(lazy)
