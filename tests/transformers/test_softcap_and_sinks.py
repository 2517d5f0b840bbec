"""Gemma 2 caps scores and gpt-oss has sinks: with all blocks chosen both give what their eager attention gives."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, PretrainedConfig

import topgather as tg

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 6,
}
MODELS = [
    (Gemma2Config, {"attn_logit_softcapping": 2.0}),
    (GptOssConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
]


@pytest.mark.parametrize(("config", "options"), MODELS, ids=lambda value: getattr(value, "__name__", None))
def test_equals_eager(config: type[PretrainedConfig], options: dict[str, Any]) -> None:
    """Logits, gradients of all parameters, a padded batch, and what is generated."""
    tg.integrations.transformers.register(block_size=4, top_k=100)
    model = AutoModelForCausalLM.from_config(config(**SIZES, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                parameter.normal_()
    ids = torch.randint(0, 64, (2, 23))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    results: dict[str, list[torch.Tensor]] = {}
    for implementation in ("eager", "moba"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        logits = model(ids).logits
        logits.square().mean().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        padded = model(ids, attention_mask=mask).logits.detach()
        generated = model.generate(ids, max_new_tokens=5, do_sample=False)
        results[implementation] = [logits.detach(), padded[0, 5:], padded[1], generated, *gradients]
    for actual, expected in zip(results["moba"], results["eager"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
