"""Every causal model of the installed transformers, small enough to build in milliseconds, and what becomes of it.

``python -m tests.transformers.causal_models`` writes the table of docs/transformers.md.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from topgather.integrations import transformers as moba
from topgather.integrations._models import other_layers

DOCS = Path(__file__).parents[2] / "docs" / "transformers.md"
BEGIN, END = "<!-- causal models: begin -->\n", "<!-- causal models: end -->\n"

# Fields that a config may have, and what they are set to where it does.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions", "n_inner"), 64),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("head_dim", "v_head_dim", "global_head_dim", "mamba_d_head"), 16),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k"), 1),
    **dict.fromkeys(("num_key_value_heads", "linear_num_value_heads", "linear_num_key_heads", "mamba_expand"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state"), 8),
    **dict.fromkeys(("attention_dropout", "attn_pdrop"), 0.0),
    **dict.fromkeys(("initializer_range", "init_std"), 0.3),  # sharp enough that what is attended to matters
    "mamba_n_heads": 4,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "alibi": False,
    "sliding_window": None,
}
_LAYERS = ("layer_types", "mlp_layer_types", "layers_block_type")
MOST_PARAMETERS = 2e7
NEW, PROMPT = 6, 12


def kinds() -> list[str]:
    """``config.model_type`` of every model that ``AutoModelForCausalLM`` knows."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _shrink(config: Any) -> Any:
    for name in config.sub_configs or {}:
        if getattr(config, name, None) is not None:
            _shrink(getattr(config, name))
    fields = type(config)().to_dict()
    for name, small in SMALL.items():
        if name in fields:
            has_windows = name == "sliding_window" and "sliding_attention" in (fields.get("layer_types") or ())
            setattr(config, name, 8 if has_windows else small)
    if "qk_rope_head_dim" in fields:
        config.head_dim = 8
    for name in _LAYERS:
        if isinstance(fields.get(name), (list, tuple)):
            different = list(dict.fromkeys(fields[name]))  # one layer of each kind
            setattr(config, name, (different * 2)[:2])
    return config


@cache
def _class_and_config(kind: str) -> tuple[Any, Any]:
    config_class = CONFIG_MAPPING[kind]
    known = config_class().to_dict()
    try:
        config = config_class(**{name: small for name, small in SMALL.items() if name in known and small is not None})
    except Exception:  # sizes that do not go together, before the rest is made small
        config = config_class()
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    model_class = getattr(transformers, names if isinstance(names, str) else names[0])
    config = _shrink(config)
    with torch.device("meta"):
        size = sum(each.numel() for each in model_class._from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:.0e} parameters")
    return model_class, config


def build(kind: str, implementation: str) -> Any:
    """A small model of this kind, the same at every call."""
    model_class, config = _class_and_config(kind)
    torch.manual_seed(0)
    return model_class._from_config(config, attn_implementation=implementation).eval()


def inputs() -> tuple[Tensor, Tensor]:
    """Token ids ``[2, PROMPT]``, and a mask that pads the second row on the left."""
    ids = torch.randint(3, 60, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids, mask


def generated(model: Any, mask: Tensor | None = None, num_new: int = NEW, use_cache: bool = True) -> Tensor:
    """Logits ``[2, num_new, V]`` of greedy generation."""
    ids, _ = inputs()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=63,
        return_dict_in_generate=True,
        output_logits=True,
        use_cache=use_cache,
    )
    return torch.stack(out.logits, dim=1)


def _all_runs(kind: str, implementation: str) -> dict[str, Tensor]:
    ids, mask = inputs()
    model = build(kind, implementation)
    with torch.no_grad():
        runs = {"prefill": model(ids).logits}
    runs |= {"2 tokens": generated(build(kind, implementation), num_new=2), "6 tokens": generated(model)}
    return runs | {"padded": generated(model, mask), "without a cache": generated(model, use_cache=False)}


def outcome(kind: str) -> str:
    """What becomes of a kind of model: a row of the table.

    Raises:
        AssertionError: a result that is not eager attention's, or a refusal that does not name the model.
    """
    try:
        expected = _all_runs(kind, "eager")
    except Exception:  # transformers' own, of a config made small
        return "not built so small, or does not run there with `eager` itself"
    moba.register(block_size=4, top_k=64)  # more than there are: all of them
    try:
        actual = _all_runs(kind, "moba")
    except (ValueError, NotImplementedError) as error:
        return f"refused: {_reason(kind, str(error))}"
    for run, logits in expected.items():
        # Sums of float32 in another order, through two layers; relative to the largest logit.
        error = ((actual[run] - logits).abs().max() / logits.abs().max()).item()
        assert error < 1e-4, f"{kind}: {run} differs from eager by {error:.1e} of the largest logit"
    moba.register(block_size=4, top_k=2)
    sparse = build(kind, "moba")
    torch.testing.assert_close(generated(sparse), generated(sparse, use_cache=False), atol=1e-3, rtol=1e-3)
    others = other_layers(sparse.config.get_text_config(decoder=True))
    return "equals `eager`" + (f"; layers of {' and '.join(others)} keep their own way" if others else "")


def _reason(kind: str, message: str) -> str:
    """The refusal without the model's name, which has to be there."""
    model_class, _ = _class_and_config(kind)
    classes = {name for name, _ in inspect.getmembers(inspect.getmodule(model_class), inspect.isclass)}
    named = [name for name in re.findall(r"\w+", message) if name in classes]
    assert named, f"{kind}: a refusal must name the model or its module: {message}"
    for name in named:
        message = re.sub(rf"\b{name} does not work with .*?: | in {name}\b", "", message)
    return message.split(", got ")[0]


def table(outcomes: dict[str, str]) -> str:
    """Markdown: the kinds of each outcome."""
    rows: dict[str, list[str]] = {}
    for kind, result in outcomes.items():
        rows.setdefault(result, []).append(kind)
    lines = ["| outcome | `config.model_type` |", "|---|---|"]
    lines += [f"| {result} | {', '.join(found)} |" for result, found in sorted(rows.items())]
    return "\n".join(lines) + "\n"


def rows_of_docs() -> dict[str, str]:
    """The outcome that docs/transformers.md gives for each kind."""
    text = DOCS.read_text().partition(BEGIN)[2].partition(END)[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
    return {kind: result for result, found in rows for kind in found.split(", ")}


def main() -> None:
    """Write the table."""
    torch.set_num_threads(1)  # these models are too small for more
    transformers.logging.set_verbosity_error()
    text = DOCS.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    outcomes = {}
    for kind in kinds():
        try:
            outcomes[kind] = outcome(kind)
        except Exception as error:
            outcomes[kind] = f"FAULT: {type(error).__name__}: {' '.join(str(error).splitlines()[:1])}"
        print(kind, outcomes[kind], flush=True)
    DOCS.write_text(before + BEGIN + table(outcomes) + END + after)


if __name__ == "__main__":
    main()
