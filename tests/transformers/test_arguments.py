"""Keyword arguments of attention functions: read, known to mean nothing here, or refused by name; none is dropped."""

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from topgather.integrations import _arguments as arguments
from topgather.integrations import transformers as moba

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
# Of calls that are not of a model's own attention: they name the tensors.
TENSORS = {"query", "key", "value"}


@pytest.fixture(autouse=True)
def registered() -> None:
    moba.register(block_size=8, top_k=2)


@cache
def names_at_call_sites() -> frozenset[str]:
    """The keyword names that the installed transformers hands to attention functions anywhere."""
    calls = set()
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        code = file.read_text()
        for found in re.finditer(r"\battention_interface\(", code):
            end, depth = found.end(), 1
            while depth:
                depth += {"(": 1, ")": -1}.get(code[end], 0)
                end += 1
            calls.add(code[found.start() : end])
    parsed = (ast.parse(call, mode="eval").body for call in calls)  # whole files would take half a minute
    return frozenset(
        keyword.arg
        for call in parsed
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg is not None
    )


def test_every_name_at_a_call_site_is_known() -> None:
    """A new version of transformers with a new argument fails here, and someone decides what becomes of it."""
    names = names_at_call_sites()
    there = {"dropout", "scaling", "sliding_window", "softcap"}
    if importlib.util.find_spec("transformers.models.minimax_m3_vl") is not None:
        there.add("block_indices")
    assert there <= names  # the scan finds what is there
    assert names - TENSORS <= arguments.USED | arguments.OF_OTHER_PARTS | arguments.REFUSED.keys()


def attention_of(**options: Any) -> torch.Tensor:
    module = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="moba")).model.layers[0].self_attn
    tensors = (torch.randn(1, 4, 12, 8) for _ in range(3))
    return moba._attention(module, *tensors, None, **options)[0]


@pytest.mark.parametrize("name", sorted(arguments.REFUSED) + ["of_another_model"])
@pytest.mark.parametrize("value", [1.5, torch.ones(4)], ids=["number", "tensor"])
def test_what_is_not_read_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"\b{name} is not supported .* LlamaAttention"):
        attention_of(**{name: value})


@pytest.mark.parametrize("name", sorted(arguments.REFUSED) + ["s_aux", "of_another_model"])
def test_none_means_nothing(name: str) -> None:
    assert attention_of(**{name: None}).shape == (1, 12, 4, 8)


def test_attention_weights_are_refused_with_what_to_use_instead() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="moba"))
    with pytest.raises(ValueError, match=r"output_attentions.*return_lse.*eager"):
        model(torch.arange(12)[None], output_attentions=True)


@pytest.mark.parametrize("how", ["alone", "beside a mask"])
def test_boundaries_of_keys_alone_are_refused(how: str) -> None:
    """Nobody would read them."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="moba"))
    mask = None if how == "alone" else (torch.arange(12) < 10)[None].long()
    with pytest.raises(ValueError, match=r"cu_seq_lens_k needs cu_seq_lens_q .* LlamaAttention of LlamaForCausalLM"):
        model(torch.arange(12)[None], attention_mask=mask, cu_seq_lens_k=torch.tensor([0, 6, 12]), use_cache=False)


@pytest.mark.parametrize(
    ("queries", "keys", "message"),
    [
        ([0, 6, 12], [0, 5, 12], "cu_seq_lens_k must be cu_seq_lens_q"),
        ([0, 6, 12], [0, 12], "cu_seq_lens_k must be cu_seq_lens_q"),
        ([0, 6, 10], [0, 6, 10], "cu_seq_lens_q must end with the number of tokens, 12, got 10"),
        ([0, 6, 14], [0, 6, 14], "cu_seq_lens_q must end with the number of tokens, 12, got 14"),
    ],
)
def test_boundaries_that_a_mask_does_not_go_with(queries: list[int], keys: list[int], message: str) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="moba"))
    boundaries = {"cu_seq_lens_q": torch.tensor(queries), "cu_seq_lens_k": torch.tensor(keys)}
    with pytest.raises(ValueError, match=message):
        model(
            torch.arange(12)[None], attention_mask=(torch.arange(12) < 10)[None].long(), use_cache=False, **boundaries
        )


def test_dropout_names_the_models_own_field() -> None:
    options = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**options, attn_pdrop=0.1, attn_implementation="moba")).train()
    with pytest.raises(ValueError, match=r"dropout must be 0 .*config\.attn_pdrop"):
        model(torch.arange(12)[None])
