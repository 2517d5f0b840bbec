"""N-gram memories inside a Llama: generate() with a cache against the whole sequence at every token."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import topgather as tg
from topgather.integrations import transformers as integration

DIM, VOCAB, END = 16, 40, 2
NUM_NEW = 6


def make_memory(layer_idx: int) -> "tg.nn.NgramMemory":
    memory = tg.nn.NgramMemory(DIM, VOCAB, num_tables=2, rows=30, end_token=END, layer_idx=layer_idx)
    torch.nn.init.normal_(memory.conv_weight)
    return memory


def make_model() -> Any:
    """What the memories add decides which tokens come."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=DIM,
        intermediate_size=DIM,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCAB,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    integration.add_ngram_memory(model, {0: make_memory(0), 2: make_memory(1)})
    return model


def prompts(padding: int = 3) -> tuple[Tensor, Tensor]:
    """Two, the second shorter, with padding before it."""
    tokens = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    tokens[0, 4] = END
    mask = torch.ones_like(tokens)
    tokens[1, :padding], mask[1, :padding] = 0, 0
    return tokens, mask


def generate(model: Any, **options: Any) -> Any:
    tokens, mask = prompts()
    return model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=NUM_NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_generate_streams(options: dict[str, Any]) -> None:
    """Of two prompts, one padded; and the memories matter, in every place."""
    model = make_model()
    streamed, whole = generate(model, **options), generate(model, use_cache=False, **options)
    assert torch.equal(streamed.sequences, whole.sequences)
    for mine, expected in zip(streamed.logits, whole.logits, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    for layer in (0, 2):
        other = make_model()
        torch.nn.init.zeros_(other.model.layers[layer].ngram_memory.value_proj.weight)
        assert not torch.allclose(torch.stack(generate(other, **options).logits), torch.stack(streamed.logits))


def test_padding_before_a_prompt_is_not_there() -> None:
    model, (tokens, mask) = make_model(), prompts()
    padded = model(tokens, attention_mask=mask).logits[1, 3:]
    torch.testing.assert_close(padded, model(tokens[1:, 3:]).logits[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_caches() -> None:
    """Two conversations in turn, a copy that goes its own way, a reset, and a call that is refused half-way."""
    model, (tokens, _) = make_model(), prompts(0)
    expected = model(tokens).logits
    first, second = DynamicCache(config=model.config), DynamicCache(config=model.config)
    model(tokens[:1, :5], past_key_values=first)
    model(tokens[1:, :7], past_key_values=second)
    twin = copy.deepcopy(first)
    model(tokens[1:, :2], past_key_values=twin)
    twin.reorder_cache(torch.tensor([0]))
    out = model(tokens[:1, 5:], past_key_values=first).logits
    torch.testing.assert_close(out, expected[:1, 5:], rtol=1e-4, atol=1e-4)
    second.reset()
    if second.get_seq_length():  # older versions only zero the keys
        plain = DynamicCache()
        plain.update(torch.ones(1, 1, 7, 2), torch.ones(1, 1, 7, 2), 0)
        plain.reset()
        assert plain.get_seq_length() == 7
        second = DynamicCache(config=model.config)
    before = copy.deepcopy(second.layers)
    hook = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens[1:, :7], past_key_values=second)
    hook.remove()
    second.layers[:] = before
    out = model(tokens[1:], past_key_values=second).logits
    torch.testing.assert_close(out, expected[1:], rtol=1e-4, atol=1e-4)
    made = model(tokens[:, :5], use_cache=True).past_key_values  # by the model itself
    out = model(tokens[:, 5:], past_key_values=made).logits
    torch.testing.assert_close(out, expected[:, 5:], rtol=1e-4, atol=1e-4)
    second.crop(-4)
    with pytest.raises(ValueError, match=r"the cache must be one .* not cut: it has 5 tokens"):
        model(tokens[1:, 5:], past_key_values=second)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_it_trains(checkpointed: bool) -> None:
    """Micro-batches forwarded before either's backward: each layer goes by the tokens of its own."""
    model, (tokens, _) = make_model(), prompts(0)
    model.train()
    names, parameters = zip(*((name, each) for name, each in model.named_parameters() if "ngram" in name), strict=True)
    assert any(name.endswith("layers.2.ngram_memory.values") for name in names)
    expected = [torch.autograd.grad(model(row[None]).logits.square().mean(), parameters) for row in tokens]
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # older versions need to be told
    losses = [model(row[None]).logits.square().mean() for row in tokens]
    for loss, wanted in zip(losses, expected, strict=True):
        for name, mine, gradient in zip(names, torch.autograd.grad(loss, parameters), wanted, strict=True):
            torch.testing.assert_close(mine, gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_saved_with_the_model() -> None:
    model, (tokens, _) = make_model(), prompts(0)
    other = make_model()
    for parameter in model.parameters():
        parameter.data += 0.01
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("implementation", ["moba", "eager"])
def test_other_attention(implementation: str) -> None:
    """Blocks that cover everything; arguments of the memories do not get to attention functions."""
    integration.register(block_size=4, top_k=8)
    model = make_model()
    expected = generate(model)
    model.set_attn_implementation(implementation)
    actual = generate(model)
    assert torch.equal(actual.sequences, expected.sequences)


def test_bad_use() -> None:
    model = make_model()
    tokens, mask = prompts(0)
    for memories, exception, named in (
        ({0: make_memory(0)}, ValueError, "layers that have none yet, got 0"),
        ({3: make_memory(0)}, ValueError, "layers below 3, got 3"),
        ({1: tg.nn.NgramMemory(8, VOCAB, num_tables=2, rows=30)}, ValueError, "dim=16"),
        ({1: torch.nn.Linear(2, 2)}, TypeError, "NgramMemory"),
        ([make_memory(0)], TypeError, "mapping"),
    ):
        with pytest.raises(exception, match=named):
            integration.add_ngram_memory(model, memories)
    with pytest.raises(TypeError, match="model must be"):
        integration.add_ngram_memory(torch.nn.Linear(2, 2), {})
    with pytest.raises(ValueError, match="input_ids must be given"):
        model(inputs_embeds=torch.randn(1, 3, DIM))
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        model(tokens, attention_mask=mask[:, None, None])
    cache = model(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"from the first token on.* have seen 0"):
        model(tokens, past_key_values=cache)
