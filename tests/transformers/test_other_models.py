"""Models that are no causal language models: what is not causal keeps its own attention, or is refused in words.

What attends to later tokens would differ from its eager attention if it were made causal, even with all blocks chosen;
and what takes no text keeps its own with one block chosen too.
"""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

import transformers
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from topgather.integrations import transformers as moba

from .causal_models import IS_OF_TABLE, register_zeros
from .small_models import SMALL

transformers.logging.set_verbosity_error()

SIZES: dict[str, Any] = {
    **{name: small for name, small in SMALL.items() if name != "sliding_window"},
    **dict.fromkeys(
        ("dim", "hidden_dim", "embed_dim", "embedding_size", "d_ff", "encoder_ffn_dim", "projection_dim"), 32
    ),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "encoder_attention_heads"), 2),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "hidden_dropout", "dropout"), 0.0),
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
    "d_kv": 16,
    "decoder_start_token_id": 1,
}

KEEP_THEIR_OWN = ["aimv2_vision_model", "beit", "clip_vision_model", "deit", "dinov2", "hubert", "ijepa", "vit"]
REFUSED = [
    "bart", "bert", "distilbert", "electra", "eurobert", "longformer", "marian", "mbart", "modernbert", "mpnet",
    "neomme", "openai_privacy_filter", "pegasus", "roberta", "splinter", "t5", "t5gemma2", "umt5",
]  # fmt: skip
# Their text is causal, and attends by blocks; the images do not.
MIXED = ["clip", "clipseg", "llava", "mistral3", "qwen3_vl"]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    yield
    moba.register()


def shrink(config: Any) -> Any:
    for name in config.sub_configs or {}:
        if getattr(config, name, None) is not None:
            shrink(getattr(config, name))
    fields = config.to_dict()
    for name, small in SIZES.items():
        if name in fields and not isinstance(fields[name], (list, tuple, dict)):
            setattr(config, name, int(small) if type(fields[name]) is int else small)
    if isinstance(fields.get("layer_types"), (list, tuple)):
        config.layer_types = (list(dict.fromkeys(fields["layer_types"])) * 2)[:2]
    return config


def run(kind: str, implementation: str) -> list[Tensor]:
    """Every floating-point output of a small model."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers does not know {kind}")
    config = shrink(AutoConfig.for_model(kind))
    text = config.get_text_config()
    if kind == "qwen3_vl" and getattr(text, "rope_scaling", ...) is None:  # older versions have no default
        text.rope_scaling = {"rope_type": "default", "mrope_section": [4, 2, 2]}
    torch.manual_seed(0)
    model = AutoModel.from_config(config, attn_implementation=implementation).eval()
    torch.manual_seed(1)
    ids = torch.randint(3, 60, (2, 12))
    pixels = torch.randn(2, 3, 32, 32)
    audio = {"input_values": torch.randn(2, 4000), "input_features": torch.randn(2, 80, 32)}
    inputs = {"pixel_values": {"pixel_values": pixels}}.get(model.main_input_name)
    if inputs is None and model.main_input_name in audio:
        inputs = {model.main_input_name: audio[model.main_input_name]}
    if inputs is None:
        inputs = {"input_ids": ids}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids[:, :7]
        if kind.startswith("clip"):
            inputs["pixel_values"] = pixels
    with torch.no_grad():
        out = model(**inputs)
    found = [value for value in out.values() if isinstance(value, Tensor) and value.is_floating_point()]
    assert found
    return found


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for left, right in zip(actual, expected, strict=True):
        scale = right.abs().max().item()  # sums of float32 in another order, through two layers
        torch.testing.assert_close(left, right, atol=1e-4 * scale, rtol=0)


@pytest.mark.parametrize("kind", KEEP_THEIR_OWN)
def test_what_takes_no_text_keeps_its_own_attention(kind: str) -> None:
    moba.register(block_size=4, top_k=1)
    assert_equal(run(kind, "moba"), run(kind, "eager"))


@pytest.mark.parametrize("kind", REFUSED)
def test_text_that_is_not_causal_is_refused_by_name(kind: str) -> None:
    moba.register(block_size=4, top_k=64)
    named = r'\w+Model does not work with attn_implementation="moba"|="moba".* in (\w+ of )?\w+Model\b'
    with pytest.raises(ValueError, match=named):
        run(kind, "moba")
    run(kind, "eager")


def test_a_table_of_attentions_of_its_own_is_refused() -> None:
    config_class = getattr(transformers, "UnlimitedOcrConfig", None)
    if config_class is None:
        pytest.skip("this transformers does not know the model")
    moba.register(block_size=4, top_k=64)
    with pytest.raises(ValueError, match=r'UnlimitedOcr\w+ does not work with attn_implementation="moba".*a table of'):
        AutoModel.from_config(config_class(), attn_implementation="moba")


@pytest.mark.parametrize("kind", MIXED)
def test_causal_text_beside_images_attends_by_blocks(kind: str) -> None:
    expected = run(kind, "eager")
    moba.register(block_size=4, top_k=64)
    try:
        actual = run(kind, "moba")
    except ValueError as error:
        assert not IS_OF_TABLE and 'attn_implementation="moba" in CLIP' in str(error)
        asked = register_zeros()
        run(kind, "zeros")
        assert 4 in asked.masks  # older versions made the mask themselves
        return
    assert_equal(actual, expected)
    moba.register(block_size=4, top_k=1)
    with pytest.raises(AssertionError):
        assert_equal(run(kind, "moba"), expected)
