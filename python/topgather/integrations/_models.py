"""A model that is told to attend by blocks is checked when it is made or switched, and watched when it runs.

transformers asks ``PreTrainedModel.get_correct_attn_implementation`` what a model can do, when it is made and when its
``attn_implementation`` is set. Here it gets an answer for ``"moba"``:

- a model that computes its attention itself is refused;
- a part that takes no text, such as a vision tower, keeps its own attention;
- any other gets hooks. They see the cache that its attention modules are given, which the attention function does not,
  and take a failed forward back.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, __version__
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache, StaticLayer

from . import _forward
from ._arguments import IMPLEMENTATION
from ._cache import IndexedMobaLayer, MobaLayer
from ._indexed import INDEXED, hook_indexer, keeps_index

_logger = logging.getLogger(__name__)

_HOOKED = "_topgather_hooked"
_ASKED = "_topgather_asked"
_CALLS_TWICE = "_topgather_calls_twice"

# Fields of attention modules whose keys other layers attend to as well, and of those others (Gemma 3n and 4).
_SHARED_KEYS = ("store_full_length_kv", "is_kv_shared_layer")

# Kinds of layers, of config.layer_types.
_FULL = frozenset({"full_attention", "attention", "hybrid"})
_LOCAL = frozenset({"sliding_attention", "chunked_attention", "hybrid_sliding"})
_WITHOUT_ATTENTION = frozenset({"linear_attention", "conv", "mamba", "mamba2", "moe", "mlp", "recurrent", "dummy"})

# Models that ask transformers' attention interface and do more than it is told, by config.model_type.
_REFUSED = {
    "doge": "it adds a learned mask of its own to the scores",
    "git": "its text layers compute their attention themselves; only its vision tower asks the interface",
    **dict.fromkeys(
        ("mllama", "mllama_text_model"),
        "its cross-attention to images is not causal, and reads the cached keys itself",
    ),
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "it has no keys of its own, and attends to those of the model that it assists in both directions",
    ),
    "unlimited_ocr": "its vision tower looks its attention up in a table of its own, which does not know it",
}


def watch_models() -> None:
    """Have every model asked about that is made with ``"moba"``, or switched to it."""
    original = PreTrainedModel.get_correct_attn_implementation
    if hasattr(original, _HOOKED):
        return

    @functools.wraps(original)
    def get_correct_attn_implementation(
        self: PreTrainedModel, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        applicable: str = original(self, requested_attention, is_init_check)
        if applicable != IMPLEMENTATION:
            return applicable
        if not _takes_text(self):
            current = self.config._attn_implementation
            return original(self, None if current == IMPLEMENTATION else current, is_init_check)
        _check_model(self)
        _check_settings(self)
        for model in self.modules():  # when it is made, it has no parts yet, and they are asked themselves
            if isinstance(model, PreTrainedModel) and model.config is self.config:
                _hook_model(model)
        _say_what_stays(self)
        return applicable

    setattr(get_correct_attn_implementation, _HOOKED, True)
    setattr(PreTrainedModel, "get_correct_attn_implementation", get_correct_attn_implementation)  # noqa: B010  a method


# ------------------------------------------------------------------------------------------------------------- checks


def _takes_text(model: PreTrainedModel) -> bool:
    modalities = getattr(model, "input_modalities", None)  # not in older versions
    if modalities is None:
        return model.main_input_name in ("input_ids", "inputs_embeds")
    return "text" in ((modalities,) if isinstance(modalities, str) else modalities)


def _refuse(model: nn.Module, reason: str) -> None:
    raise ValueError(
        f'{type(model).__name__} does not work with attn_implementation="{IMPLEMENTATION}": {reason} '
        f"(transformers {__version__})"
    )


def _check_model(model: PreTrainedModel) -> None:
    """Raise ``ValueError`` for a model of which it is known that it would not attend by blocks."""
    reason = _REFUSED.get(model.config.model_type)
    if reason is not None:
        _refuse(model, reason)
    if getattr(model.config, "recurrent_kv_cache_mode", None) == "last_loop":  # Dory
        _refuse(model, "with config.recurrent_kv_cache_mode='last_loop' it reads the cached keys itself")
    kind: Any = type(model)  # hashable, which types of modules do not say
    if not _asks_interface(kind):
        _refuse(model, "it computes its attention itself, and does not go through transformers' attention interface")
    known = _FULL | _LOCAL | _WITHOUT_ATTENTION | INDEXED
    unknown = sorted(set(getattr(model.config, "layer_types", None) or ()) - known)
    if unknown:
        _refuse(model, f"config.layer_types has {', '.join(unknown)}, layers that choose their keys in their own way")


def _check_settings(model: PreTrainedModel) -> None:
    """Raise for settings that the model's forward would refuse, such as dense layers that it has not."""
    from ._settings import settings_of_config

    settings_of_config(model.config.get_text_config(decoder=True))


@functools.cache
def _asks_interface(kind: type[PreTrainedModel]) -> bool:
    """Whether the file that a model's attention is written in mentions transformers' attention interface."""
    for base in kind.__mro__:
        if base is PreTrainedModel:
            break
        if not issubclass(base, PreTrainedModel):
            continue
        try:
            code = inspect.getsource(sys.modules[base.__module__])
        except (KeyError, OSError, TypeError):  # made in a notebook
            continue
        if re.search(r"^class \w*Attention\w*\((nn\.)?Module\):", code, re.MULTILINE):
            return "ALL_ATTENTION_FUNCTIONS" in code or "AttentionInterface" in code
    return True


def other_layers(config: Any) -> list[str]:
    """The kinds of layers, of ``config.layer_types``, that do not attend to everything, sorted."""
    return sorted(set(getattr(config, "layer_types", None) or ()) - _FULL)


def layer_kind(module: nn.Module) -> str | None:
    """What ``config.layer_types`` calls the layer of an attention module; None where it says nothing."""
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    layer_idx = getattr(module, "layer_idx", None)
    return kinds[layer_idx] if kinds and layer_idx is not None and layer_idx < len(kinds) else None


def is_local(module: nn.Module, sliding_window: int | None) -> bool:
    """Whether a module attends to a window or chunk, and therefore as the model itself does."""
    return sliding_window is not None or layer_kind(module) in _LOCAL


def _say_what_stays(model: PreTrainedModel) -> None:
    """One line for a model of which some layers attend to a window: those keep their own attention."""
    kinds = getattr(model.config, "layer_types", None)
    if kinds:
        local = [layer_idx for layer_idx, kind in enumerate(kinds) if kind in _LOCAL]
    else:
        local = list(range(getattr(model.config, "num_hidden_layers", 0)))
        if getattr(model.config, "sliding_window", None) is None or not getattr(
            model.config, "use_sliding_window", True
        ):
            return
    if local:
        _say_once(
            f"{type(model).__name__}: layers {_ranges(local)} attend to a sliding window or chunk, and keep their own "
            f"attention and cache; the others attend by blocks"
        )


@functools.cache
def _say_once(line: str) -> None:
    _logger.warning(line)


def _ranges(numbers: list[int]) -> str:
    """``0-4, 6-10`` of ascending numbers."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


# -------------------------------------------------------------------------------------------------------------- hooks


def _hook_model(model: PreTrainedModel) -> None:
    if not model.__dict__.get(_HOOKED):
        model.register_forward_pre_hook(_before_model, with_kwargs=True)
        model.register_forward_hook(_after_model, with_kwargs=True, always_call=True)
        model.__dict__[_HOOKED] = True


def hook_attention(module: nn.Module) -> None:
    """Have an attention module say, before it runs, which cache layer it will ask."""
    if not module.__dict__.get(_HOOKED):
        module.register_forward_pre_hook(_before_attention, with_kwargs=True)
        hook_indexer(module)
        module.__dict__[_HOOKED] = True


def layer_of(module: nn.Module, key: torch.Tensor) -> MobaLayer | None:
    """The cache layer that the running ``module`` has its keys in, whose new tokens ``key [B, H, N, D]`` ends with.

    None where it has none, and where a module calls its attention function more than once in a forward (DiffLlama): its
    layer goes back to columns, and stays there.
    """
    layer = _forward.layer_asked_by(module)
    if layer is None:
        if _forward.is_part(key):
            _refuse(module, "its keys are those of another layer, whose cache gives new tokens alone")
        return None
    if layer.is_pending:
        return layer
    if not module.__dict__.get(_CALLS_TWICE) and key.shape[2] != layer.num_columns:
        _refuse(module, "it attends twice in a forward, and its cache was filled by a module that does not")
    module.__dict__[_CALLS_TWICE] = True
    layer.to_columns()
    return None


def _attends_by_blocks(module: nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == IMPLEMENTATION


def _caches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Cache]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, EncoderDecoderCache):
            yield value.self_attention_cache
        elif isinstance(value, Cache):
            yield value


class _Taken:
    """A forward of a model in progress: how its caches were, and how often the attention function had been called."""

    def __init__(self, caches: list[Cache]) -> None:
        self.num_calls = _forward.num_calls()
        self.caches = [
            (cache, list(cache.layers), [_snapshot(layer) for layer in cache.layers])
            for cache in caches
            if hasattr(cache, "layers")
        ]

    def take_back(self) -> None:
        for cache, layers, snapshots in self.caches:
            cache.layers[:] = layers
            for layer, snapshot in zip(layers, snapshots, strict=True):
                _restore(layer, snapshot)


_COUNTS, _LENGTH = "_topgather_counts", "_topgather_length"


def _snapshot(layer: Any) -> dict[str, Any]:
    if isinstance(layer, MobaLayer):
        return layer.snapshot()
    # transformers' growing layers replace their tensors; their lists of states hold some. Static layers count in place,
    # and forget with the count what they have written behind it.
    fields = {name: list(value) if isinstance(value, list) else value for name, value in vars(layer).items()}
    counts = [
        (value, value.clone()) for value in fields.values() if isinstance(value, torch.Tensor) and value.numel() == 1
    ]
    # In older versions their length is the number of keys that are not 0.
    counts_keys = isinstance(layer, StaticLayer) and layer.keys is not None and "cumulative_length" not in fields
    return {**fields, _COUNTS: counts, _LENGTH: layer.get_seq_length() if counts_keys else None}


def _restore(layer: Any, snapshot: dict[str, Any]) -> None:
    if isinstance(layer, MobaLayer):
        layer.restore(snapshot)
        return
    fields = dict(snapshot)
    for tensor, count in fields.pop(_COUNTS):
        tensor.copy_(count)
    length = fields.pop(_LENGTH)
    layer.__dict__.update(fields)
    if length is not None:
        for written in (layer.keys, layer.values):
            written[:, :, int(length) :] = 0


@functools.cache
def _check_takes_cache(kind: Any) -> None:
    """Raise ``ValueError`` for a model that would pass ``cache``, which newer ones read, on to nobody."""
    names = inspect.signature(kind.forward).parameters
    if "cache" not in names and "past_key_values" in names:
        raise ValueError(
            f"cache is no argument of {kind.__name__} in transformers {__version__}, and would not be read: "
            f"pass past_key_values"
        )


def _before_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return
    if "cache" in kwargs:
        kind: Any = type(model)  # hashable, which types of modules do not say
        _check_takes_cache(kind)
    _forward.begin(model, _Taken(list(_caches(args, kwargs))))
    if not model.__dict__.get(_ASKED):
        for module in model.modules():
            if hasattr(module, "layer_idx") and re.search("attention|attn", type(module).__name__, re.IGNORECASE):
                hook_attention(module)


def _after_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    forward = _forward.end(model)
    if output is None:  # it raised
        forward.take_back()
        return
    if not model.__dict__.get(_ASKED) and _attends_by_blocks(model):
        if forward.num_calls == _forward.num_calls():
            forward.take_back()
            _refuse(model, "its first forward never asked transformers' attention interface for it")
        model.__dict__[_ASKED] = True


def _before_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return
    _forward.ask(module, None)
    layer_idx = getattr(module, "layer_idx", None)
    cache = next(_caches(args, kwargs), None)
    if cache is None or layer_idx is None or not hasattr(cache, "layers"):
        return
    expects = _attends_by_blocks(module) and not is_local(module, getattr(module, "sliding_window", None))
    expects = expects and not module.__dict__.get(_CALLS_TWICE)
    # Who attends to keys of another layer needs all of them, as transformers' own layers give them.
    expects = expects and not any(getattr(module, name, False) for name in _SHARED_KEYS)
    if expects:
        _replace_layer(cache, layer_idx)
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if isinstance(layer, MobaLayer):
        layer.expect(expects)
        if expects:
            _forward.ask(module, layer)


def _replace_layer(cache: Cache, layer_idx: int) -> None:
    """Put a MoBA layer, with what is cached so far, in the place of a plain one."""
    from ._settings import registered

    if type(cache) is not DynamicCache or cache.offloading or torch.is_grad_enabled() or not registered().replace_cache:
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.extend(DynamicLayer() for _ in range(layer_idx + 1 - len(cache.layers)))
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if isinstance(layer, DynamicLayer) and type(layer) is DynamicLayer:
        cache.layers[layer_idx] = MobaLayer.of(layer)
    elif isinstance(layer, DynamicLayer) and not isinstance(layer, MobaLayer) and keeps_index(layer):
        cache.layers[layer_idx] = IndexedMobaLayer.of(layer)
