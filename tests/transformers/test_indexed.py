"""Models whose layers choose blocks by an indexer: MiniMax-M3, small and random, against its own sdpa and eager."""

import copy
import importlib.util
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("transformers") is None:  # importorskip would hide a broken one too
    pytest.skip("transformers is not installed", allow_module_level=True)
if importlib.util.find_spec("transformers.models.minimax_m3_vl") is None:
    pytest.skip("this transformers has no MiniMax-M3", allow_module_level=True)

from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLForCausalLM

import topgather as tg
from tests.transformers.test_integration import VOCABULARY, greedy, padded, positions_of, tokens
from topgather.integrations import transformers as moba
from topgather.integrations._cache import IndexedMobaLayer, MobaLayer

LAYERS = {
    "mixed": ["full_attention", "minimax_m3_sparse", "full_attention", "minimax_m3_sparse"],
    "sparse": ["minimax_m3_sparse"] * 2,
}
BLOCK_SIZE, SLOTS = 8, 3
# The argument that takes a cache, which has had another name.
CACHE = "cache" if "cache" in inspect.signature(MiniMaxM3VLForCausalLM.forward).parameters else "past_key_values"


@pytest.fixture(autouse=True)
def registered() -> None:
    """With settings that a layer of full attention must not go by."""
    moba.register(block_size=4, top_k=1)


def model(implementation: str = "moba", layers: str = "mixed", **options: Any) -> Any:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        **dict.fromkeys(("intermediate_size", "dense_intermediate_size", "shared_intermediate_size"), 32),
        "num_hidden_layers": len(LAYERS[layers]),
        "layer_types": LAYERS[layers],
        "mlp_layer_types": ["dense"] + ["sparse"] * (len(LAYERS[layers]) - 1),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_block_size": BLOCK_SIZE,
        "index_topk_blocks": SLOTS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "max_position_embeddings": 512,
        "initializer_range": 0.3,  # sharp enough that another choice of blocks is another token
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(1)
    return MiniMaxM3VLForCausalLM(
        MiniMaxM3VLTextConfig(**{**sizes, "attn_implementation": implementation, **options})
    ).eval()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=3e-5)


def assert_same_training(ours: Any, theirs: Any, ids: Tensor, **arguments: Tensor) -> None:
    labels = ids.masked_fill(arguments.get("attention_mask", torch.ones_like(ids)) == 0, -100)
    actual, expected = (each(ids, labels=labels, **arguments) for each in (ours, theirs))
    is_real = labels != -100
    assert_close(actual.logits[is_real], expected.logits[is_real])
    actual.loss.backward()
    expected.loss.backward()
    for (name, left), right in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (left.grad is None) == (right.grad is None), name
        assert left.grad is None or left.grad.shape == right.grad.shape
        if left.grad is not None:
            assert_close(left.grad, right.grad)
    assert ours.model.layers[1].self_attn.q_proj.weight.grad.count_nonzero() > 0


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_training_equals_its_own(implementation: str, layers: str) -> None:
    assert_same_training(model(layers=layers), model(implementation, layers), tokens(2, 61))


@pytest.mark.parametrize(("heads", "options"), [("one", {"index_n_heads": 1}), ("of query", {"index_n_heads": 4})])
def test_other_scopes_of_a_choice(heads: str, options: dict[str, int]) -> None:
    assert_same_training(model(**options), model("sdpa", **options), tokens(2, 40))


def test_more_local_blocks_and_slots_than_blocks() -> None:
    for options in ({"index_local_blocks": 2}, {"index_topk_blocks": 50}, {"index_block_size": 100}):
        assert_same_training(model(**options), model("sdpa", **options), tokens(2, 40))


def test_the_choice_matters() -> None:
    """Were fewer blocks chosen, or others, the results would differ."""
    ids = tokens(2, 61)
    with torch.no_grad():
        expected = model()(ids).logits
        assert (model(index_topk_blocks=50)(ids).logits - expected).abs().max() > 0.1
        assert (model(index_topk_blocks=1)(ids).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    ids = tokens(2, 40)
    with torch.no_grad():
        # All blocks: in 16 bits the indexers of two models may round to other choices.
        actual, expected = (model(each, index_topk_blocks=50).to(dtype)(ids).logits for each in ("moba", "sdpa"))
    assert actual.dtype == dtype
    tolerance = 300 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


# --- padding and packing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_positions", [False, True], ids=["columns", "positions"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_sequences_give_what_they_give_alone(side: str, with_positions: bool) -> None:
    """Left padding as well, of which transformers' own path says that it shifts the blocks."""
    lengths = [61, 37, 5]
    ids, mask = padded(lengths, side)
    ours = model()
    arguments = {"position_ids": positions_of(mask)} if with_positions else {}
    out = ours(ids, attention_mask=mask, **arguments).logits
    gradient_of: list[Tensor] = []
    weight = ours.model.layers[1].self_attn.k_proj.weight
    gradient_of.append(torch.autograd.grad(out[mask.bool()].square().sum(), weight)[0])
    alone = [ours(row[real.bool()][None]).logits[0] for row, real in zip(ids, mask, strict=True)]
    for row, real, expected in zip(out, mask, alone, strict=True):
        assert_close(row[real.bool()], expected)
    gradient_of.append(torch.autograd.grad(torch.cat(alone).square().sum(), weight)[0])
    torch.testing.assert_close(*gradient_of, atol=1e-2, rtol=1e-4)


def test_right_padding_trains_as_its_own_does() -> None:
    ids, mask = padded([61, 37], "right")
    assert_same_training(model(), model("sdpa"), ids, attention_mask=mask)


@pytest.mark.parametrize("told_by", ["position_ids", "cu_seq_lens"])
def test_packed_sequences_give_what_they_give_alone(told_by: str) -> None:
    ours, ids, lengths = model(), tokens(1, 61), [20, 33, 8]
    arguments: dict[str, Any] = {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}
    if told_by == "cu_seq_lens":
        bounds = torch.tensor([0, 20, 53, 61], dtype=torch.int32)
        arguments = {
            **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds),
            "max_length_q": 33,
            "max_length_k": 33,
        }
    with torch.no_grad():
        out = ours(ids, **arguments).logits
        for part, row in zip(ids.split(lengths, dim=1), out.split(lengths, dim=1), strict=True):
            assert_close(row, ours(part).logits)


def test_gradient_checkpointing() -> None:
    plain, ours = model(), model()
    ours.train().gradient_checkpointing_enable()
    ids, mask = padded([40, 21], "left")
    for each in (plain, ours):
        each(ids, attention_mask=mask, use_cache=False).logits[mask.bool()].square().mean().backward()
    for left, right in zip(ours.parameters(), plain.parameters(), strict=True):
        if right.grad is not None:
            torch.testing.assert_close(left.grad, right.grad)


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", LAYERS)
def test_generation_equals_its_own(layers: str) -> None:
    ids = tokens(2, 30)
    ours, theirs = model(layers=layers), model("sdpa", layers)
    assert torch.equal(greedy(ours, ids), greedy(theirs, ids))
    assert torch.equal(greedy(ours, ids, num_beams=3), greedy(theirs, ids, num_beams=3))


def test_generation_of_left_padded_prompts() -> None:
    ids, mask = padded([30, 17, 3], "left")
    ours = model()
    out = greedy(ours, ids, attention_mask=mask)
    for row, real, generated in zip(ids, mask, out, strict=True):
        prompt = row[real.bool()][None]
        assert torch.equal(generated[ids.shape[1] :], greedy(ours, prompt)[0, prompt.shape[1] :])


@pytest.mark.parametrize("made", ["ours", "paged", "replaced", "theirs", "static"])
def test_caches(made: str) -> None:
    """A prompt in chunks, then single tokens: logits of one pass, whichever cache keeps the index keys."""
    moba.register(block_size=4, top_k=1, replace_cache=made != "theirs")
    ours, ids = model(), tokens(2, 45)
    make = {
        "ours": lambda: moba.make_cache(ours, max_seq_len=64),
        "paged": lambda: moba.make_cache(ours, max_seq_len=64, paged=True),
        "replaced": lambda: DynamicCache(config=ours.config),
        "theirs": lambda: DynamicCache(config=ours.config),
        "static": lambda: StaticCache(config=ours.config, max_cache_len=64),
    }[made]
    with torch.no_grad():
        expected = ours(ids, use_cache=False).logits
        cache, parts = make(), []
        for part in ids.split([20, 13, 1, 1, 10], dim=1):
            parts.append(ours(part, **{CACHE: cache}, use_cache=True).logits)
    assert_close(torch.cat(parts, dim=1), expected)
    if made in ("ours", "paged", "replaced"):
        assert type(cache.layers[0]) is MobaLayer and type(cache.layers[1]) is IndexedMobaLayer
        assert all(layer.moba_cache is not None and layer.keys is None for layer in cache.layers)
    else:
        assert not any(isinstance(layer, MobaLayer) for layer in cache.layers)


@pytest.mark.parametrize("made", ["replaced", "paged", "theirs"])
def test_what_generation_does_to_a_cache(made: str) -> None:
    """Beams of padded prompts reorder it, rejected tokens of assisted generation are cut off."""
    moba.register(block_size=4, top_k=1, replace_cache=made != "theirs")
    ours, (ids, mask) = model(), padded([30, 17], "left")
    options: dict[str, Any] = {"num_beams": 3}

    def cache() -> dict[str, Any]:
        return {CACHE: moba.make_cache(ours, max_seq_len=128, paged=True)} if made == "paged" else {}

    beams = greedy(ours, ids, attention_mask=mask, **cache(), **options)
    for row, real, generated in zip(ids, mask, beams, strict=True):
        prompt = row[real.bool()][None]
        assert torch.equal(generated[ids.shape[1] :], greedy(ours, prompt, **options)[0, prompt.shape[1] :])
    prompt = ids[:1].repeat(1, 2)
    assert torch.equal(greedy(ours, prompt, prompt_lookup_num_tokens=3, **cache()), greedy(ours, prompt))


def test_another_implementation_in_the_middle_of_a_conversation() -> None:
    ours, (ids, mask) = model(), padded([30, 17], "right")
    mask[:] = 1
    with torch.no_grad():
        expected = ours(ids, use_cache=False).logits
        cache, parts = DynamicCache(config=ours.config), []
        for number, part in enumerate(ids.split([20, 4, 3, 3], dim=1)):
            moba.set_moba(ours, enabled=number % 2 == 0)
            parts.append(ours(part, **{CACHE: cache}, use_cache=True).logits)
    assert_close(torch.cat(parts, dim=1), expected)


def test_a_forward_that_fails_takes_nothing() -> None:
    ours, ids = model(), tokens(2, 30)
    with torch.no_grad():
        expected = ours(ids, use_cache=False).logits
        cache = DynamicCache(config=ours.config)
        ours(ids[:, :20], **{CACHE: cache}, use_cache=True)
        hook = ours.model.layers[3].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ours(ids[:, 20:], **{CACHE: cache}, use_cache=True)
        hook.remove()
        assert_close(ours(ids[:, 20:], **{CACHE: cache}, use_cache=True).logits, expected[:, 20:])


def test_chunked_prefill_and_a_copied_prompt() -> None:
    ours, ids = model(), tokens(1, 40)
    expected = greedy(ours, ids)
    assert torch.equal(greedy(ours, ids, prefill_chunk_size=16), expected)
    with torch.no_grad():
        prompt = DynamicCache(config=ours.config)
        ours(ids[:, :-1], **{CACHE: prompt}, use_cache=True)
    for _ in range(2):
        assert torch.equal(greedy(ours, ids, **{CACHE: copy.deepcopy(prompt)}), expected)


def test_switched_in_the_middle() -> None:
    ours, ids = model("sdpa"), tokens(2, 30)
    expected = ours(ids).logits
    moba.set_moba(ours)
    assert_close(ours(ids).logits, expected)
    moba.set_moba(ours, enabled=False)
    torch.testing.assert_close(ours(ids).logits, expected)


# --- what does not go -------------------------------------------------------------------------------------------------


def test_choices_that_cannot_be_read() -> None:
    ours = model()
    attention = ours.model.layers[1].self_attn
    query, key, value = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    choice = torch.zeros(1, 2, 9, 1, dtype=torch.int64)

    def attend(module: Any, block_indices: Any, **arguments: Any) -> Tensor:
        out, _ = moba._attention(module, query, key, value, None, block_indices=block_indices, **arguments)
        return out

    assert attend(attention, choice).shape == (1, 9, 4, 16)
    for wrong in (choice.float(), choice[0], "blocks"):
        with pytest.raises(ValueError, match=r"block_indices must be integers \[batch, heads, queries, slots\]"):
            attend(attention, wrong)
    with pytest.raises(ValueError, match=r"block_indices must have shape .* those of key"):
        attend(attention, choice[:, :, 1:])
    with pytest.raises(IndexError, match="block_indices holds 2"):
        attend(attention, choice + 2)
    other = copy.deepcopy(attention)
    other.config = LlamaConfig()
    with pytest.raises(ValueError, match=r"block_indices are read .* config\.index_block_size"):
        attend(other, choice)
    # Several sequences in a row, and nobody saw what the indexer was given.
    with pytest.raises(ValueError, match="need what the indexer was given"):
        attend(attention, choice, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))


def test_compiled() -> None:
    torch._dynamo.reset()
    ours, ids = model(layers="sparse", mlp_layer_types=["dense", "dense"]), tokens(2, 20)
    with torch.no_grad():
        expected = ours(ids, use_cache=False).logits
        compiled = torch.compile(ours, backend="aot_eager")
        assert_close(compiled(ids, use_cache=False).logits, expected)
    torch._dynamo.reset()


def test_choices_are_not_recorded() -> None:
    """The model's indexer chose them: there is nothing of ours to replay."""
    with tg.record_routing() as record, torch.no_grad():
        model()(tokens(1, 30))
    assert record.num_calls == 0
