"""The keyword arguments that transformers' models hand to an attention function, by what is done with them.

An argument in none of these lists raises: a model that passes one means something by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from . import _forward

IMPLEMENTATION = "moba"

# Read by the attention function.
USED = frozenset(
    {
        "attention_mask",
        "dropout",
        "scaling",
        "is_causal",
        "position_ids",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "seq_idx",
        "sliding_window",
        "softcap",
        "s_aux",
        "sinks",
        "block_indices",
    }
)

# Meant for other parts of a model, which passes all its arguments on: no attention function of transformers reads them.
OF_OTHER_PARTS = frozenset(
    {
        "cache",
        "cache_position",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_value",
        "past_key_values",
        "position_embeddings",
        "return_dict",
        "use_cache",
        "user_cache",  # so it is written in Nemotron-H of transformers 5.8
    }
)

# Change what is computed, and cannot be heeded. Others that a model may think of are refused as well; these are here
# for what can be said about them.
REFUSED = {
    "position_bias": "a bias of the scores",
    "head_mask": "a mask of heads",
    "block_table": "pages of a continuous batch",
    "indices": "the model's own choice of keys",
    "deterministic": "a choice of kernels that block attention makes with torch.use_deterministic_algorithms",
    "output_attentions": (
        "block attention never forms the matrix of weights; compute it from query and key with "
        'topgather.moba_attention(..., return_lse=True), or load the model with attn_implementation="eager"'
    ),
}


@dataclass(frozen=True)
class Scores:
    """What becomes of the scores of queries and keys. None: nothing, for ``scale`` 1 / sqrt(D)."""

    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def of_op(self) -> dict[str, Any]:
        """Keyword arguments of the ops of block attention."""
        return {"scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}

    @staticmethod
    def of_arguments(module: nn.Module, scaling: float | None, arguments: dict[str, Any]) -> Scores:
        """Those of a call, where the ops know them."""
        sinks = next((arguments[name] for name in ("s_aux", "sinks") if arguments.get(name) is not None), None)
        return Scores(scaling, arguments.get("softcap"), sinks)


def by_us(module: nn.Module) -> str:
    """Who refuses, and whom, for messages: the module, and the model whose forward it is called in."""
    model = _forward.name_of_model()
    of_model = "" if model is None else f" of {model}"
    return f'by attn_implementation="{IMPLEMENTATION}" in {type(module).__name__}{of_model}'


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, (bool, int, float, str)) else type(value).__name__


def check_names(module: nn.Module, arguments: dict[str, Any]) -> None:
    """Raise ``ValueError`` for the first argument that is not None and nobody would read."""
    for name, value in arguments.items():
        if value is None or name in USED or name in OF_OTHER_PARTS:
            continue
        if name == "output_attentions" and value is False:
            continue
        reason = REFUSED.get(name)
        because = f": {reason}" if reason else ""
        raise ValueError(f"{name} is not supported {by_us(module)}, got {_shown(value)}{because}")


def check_dropout(module: nn.Module, dropout: float) -> None:
    """Raise ``ValueError`` where attention weights are to be dropped, naming the field of the model's config."""
    if not dropout:
        return
    fields = vars(getattr(module, "config", None) or object).items()
    named = [name for name, value in fields if "drop" in name and not isinstance(value, bool) and value == dropout]
    named.sort(key=lambda name: "att" not in name)
    hint = f": set config.{named[0]} to 0" if named else ""
    raise ValueError(f"dropout must be 0 {by_us(module)}, got {dropout}{hint}")


def check_causal(module: nn.Module, is_causal: bool | None, num_queries: int, mask: Any) -> None:
    """Raise ``ValueError`` for attention to later tokens."""
    if getattr(module, "is_causal", True) if is_causal is None else is_causal:
        return
    # GPT-2 of transformers 4 says so what a kernel has to add: nothing to a mask, and nothing for one token.
    is_own = getattr(module, "is_causal", False) and not getattr(module, "is_cross_attention", True)
    if not is_own or (mask is None and num_queries > 1):
        raise ValueError(f"is_causal must be True {by_us(module)}, got False")
