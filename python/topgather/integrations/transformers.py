"""Block attention in Hugging Face transformers: ``attn_implementation="moba"``.

::

    from topgather.integrations import transformers as moba

    moba.register(block_size=128, top_k=8)
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="moba")
    model.generate(...)  # decodes with a topgather.MobaCache

Sources: MoBA, arXiv 2502.13189, section 2.2 (block attention) and section 3.2 (layers that stay dense, and the change
between dense and sparse while training). docs/transformers.md says what is supported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import _checks as checks

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
except ImportError as error:
    raise ImportError(
        f"topgather.integrations.transformers needs transformers 4.56 or newer, pip install 'topgather[transformers]': "
        f"{error}"
    ) from error

from ._attend import LastOne, PackedRows, Settings, as_autocast, attend, attend_packed
from ._cache import MobaLayer

__all__ = ["make_cache", "register", "set_moba"]

IMPLEMENTATION = "moba"


@dataclass(frozen=True)
class _Registered:
    """What models whose config says nothing go by."""

    block_size: int = 128
    top_k: int = 8
    dense_layers: tuple[int, ...] = ()
    replace_cache: bool = True


_registered = _Registered()


def register(
    block_size: int = 128, top_k: int = 8, dense_layers: Sequence[int] = (), *, replace_cache: bool = True
) -> None:
    """Add ``attn_implementation="moba"`` (MoBA, arXiv 2502.13189) to transformers.

    Works for decoders that go through transformers' attention interface, such as Llama and Qwen3. May be called again
    to change the settings, which a model's ``config.moba_block_size``, ``config.moba_top_k`` and
    ``config.moba_dense_layers`` override where it has them; they are read at every forward.

    Args:
        block_size: keys per block, at least 1.
        top_k: blocks per query, the own one included, at least 1.
        dense_layers: numbers of the layers that attend to everything, from 0; negative ones count from the last layer.
        replace_cache: whether a plain ``DynamicCache``, which ``generate`` makes for itself, gets layers that hold
            :class:`topgather.MobaCache` in a forward without gradients. Otherwise it stays as it is, and every new
            token costs time that grows with all tokens before it.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: ``block_size`` or ``top_k`` below 1.
        ImportError: from the import of this module, where transformers is missing or too old.
    """
    global _registered
    checks.check_count("block_size", block_size)
    checks.check_count("top_k", top_k)
    checks.check_flag("replace_cache", replace_cache)
    _registered = _Registered(block_size, top_k, _check_layers("dense_layers", dense_layers), replace_cache)
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def set_moba(
    model: PreTrainedModel,
    enabled: bool = True,
    *,
    block_size: int | None = None,
    top_k: int | None = None,
    dense_layers: Sequence[int] | None = None,
    dense_implementation: str = "sdpa",
) -> None:
    """Switch a model to block attention, or back to dense attention, at any time (MoBA, arXiv 2502.13189, section 3.2).

    The weights are the same either way, so training may start dense and go on sparse, or the other way round. What is
    given is written to the model's config, and is saved with it; what is None stays as it was.

    Args:
        model: a transformers model, loaded with any ``attn_implementation``.
        enabled: whether it attends block-sparsely from now on.
        block_size: keys per block, at least 1, as ``config.moba_block_size``.
        top_k: blocks per query, the own one included, at least 1, as ``config.moba_top_k``.
        dense_layers: numbers of the layers that attend to everything, negative ones from the last, as
            ``config.moba_dense_layers``.
        dense_implementation: the ``attn_implementation`` to go to where not ``enabled``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a size below 1, a layer that the model has not, or a model that does not go through transformers'
            attention interface.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel, got {type(model).__name__}")
    checks.check_flag("enabled", enabled)
    config = model.config.get_text_config(decoder=True)
    if block_size is not None:
        checks.check_count("block_size", block_size)
    if top_k is not None:
        checks.check_count("top_k", top_k)
    if dense_layers is not None:
        dense_layers = _check_layers("dense_layers", dense_layers)
        num_layers = config.num_hidden_layers
        for layer_idx in dense_layers:
            if not -num_layers <= layer_idx < num_layers:
                raise ValueError(f"dense_layers must be from {-num_layers} to {num_layers - 1}, got {layer_idx}")

    if IMPLEMENTATION not in AttentionInterface().valid_keys():
        register()
    implementation = IMPLEMENTATION if enabled else dense_implementation
    if config is model.config:
        model.set_attn_implementation(implementation)
    else:  # only the text decoder of a model with several parts
        parts = [name for name in model.config.sub_configs if getattr(model.config, name, None) is config]
        model.set_attn_implementation(dict.fromkeys(parts, implementation))
    if config._attn_implementation != implementation:
        raise ValueError(
            f"model must go through transformers' attention interface, which {type(model).__name__} does not: "
            f"its attn_implementation stays {config._attn_implementation!r}"
        )
    if block_size is not None:
        config.moba_block_size = block_size
    if top_k is not None:
        config.moba_top_k = top_k
    if dense_layers is not None:
        config.moba_dense_layers = list(dense_layers)


def make_cache(
    model: PreTrainedModel, max_seq_len: int | None = None, *, paged: bool = False, num_pages: int | None = None
) -> Cache:
    """A cache for ``model.generate(..., past_key_values=...)`` that holds :class:`topgather.MobaCache` layers.

    ``generate`` needs none given: it gets one that doubles when full. One of a known size never does, and a paged one
    lets beams share their prompt.

    Args:
        model: a transformers model.
        max_seq_len: tokens of a sequence to make room for, prompt and new ones; None: as many as come first.
        paged: whether layers hold :class:`topgather.PagedMobaCache`; needs ``max_seq_len``, and never grows.
        num_pages: pages of a paged layer, of ``block_size`` tokens; enough for ``max_seq_len`` everywhere if None.

    Returns:
        A ``transformers.Cache``. It takes batch size, dtype and device from the first tokens.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a size below 1, ``paged`` without ``max_seq_len``, ``num_pages`` without ``paged``, or a model with
            layers of another kind, such as sliding windows.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel, got {type(model).__name__}")
    checks.check_flag("paged", paged)
    if max_seq_len is not None:
        checks.check_count("max_seq_len", max_seq_len)
    elif paged:
        raise ValueError("max_seq_len must be given for a paged cache, got None")
    if num_pages is not None:
        checks.check_count("num_pages", num_pages)
        if not paged:
            raise ValueError(f"num_pages must be None unless paged is True, got {num_pages}")
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(f"model must have layers of full attention alone, got layer_types {sorted(kinds)}")
    return Cache(layers=[MobaLayer(max_seq_len, paged, num_pages) for _ in range(config.num_hidden_layers)])


# ---------------------------------------------------------------------------------------------------------- settings


def _check_layers(name: str, layers: Any) -> tuple[int, ...]:
    if isinstance(layers, (str, bytes)) or not isinstance(layers, (Sequence, set, frozenset)):
        raise TypeError(f"{name} must be a sequence of ints, got {type(layers).__name__}")
    for layer_idx in layers:
        if isinstance(layer_idx, bool) or not isinstance(layer_idx, int):
            raise TypeError(f"{name} must hold ints, got {layer_idx!r} of type {type(layer_idx).__name__}")
    return tuple(layers)


def _settings_of(module: nn.Module) -> Settings:
    """What ``module``, one layer's attention, goes by: its config, else what was registered."""
    config = getattr(module, "config", None)

    def setting(name: str) -> Any:
        found = getattr(config, f"moba_{name}", None)
        return getattr(_registered, name) if found is None else found

    block_size, top_k = setting("block_size"), setting("top_k")
    checks.check_count("config.moba_block_size", block_size)
    checks.check_count("config.moba_top_k", top_k)
    dense_layers = _check_layers("config.moba_dense_layers", setting("dense_layers"))
    if dense_layers:
        layer_idx, num_layers = getattr(module, "layer_idx", None), getattr(config, "num_hidden_layers", 0)
        if layer_idx in [idx + num_layers if idx < 0 else idx for idx in dense_layers]:
            return Settings(block_size, None)
    return Settings(block_size, top_k)


# -------------------------------------------------------------------------------------------------- masks and packing


def _mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor | None = None,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    cache_position: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask as transformers hands it to the attention: bool ``[B, Nk]``, or None where all tokens are real.

    In older versions ``cache_position`` stands for ``q_length`` and ``q_offset``.
    """
    bidirectional = getattr(masking_utils, "bidirectional_mask_function", None)  # not in 4.56
    if use_vmap or (mask_function is bidirectional and bidirectional is not None):
        raise ValueError(
            f'attn_implementation="{IMPLEMENTATION}" is causal attention with padding; it cannot apply '
            "or_mask_function, and_mask_function or is_causal=False"
        )
    if q_length is None:
        assert cache_position is not None
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    num_keys = int(q_offset or 0) + q_length - kv_offset
    if attention_mask is None:
        if kv_length <= num_keys:
            return None
        # A static cache's keys come with unused room behind them, which the mask's width cuts off.
        return torch.ones(batch_size, num_keys, dtype=torch.bool, device=device)
    if attention_mask.shape[1] < num_keys:
        raise ValueError(
            f"attention_mask must cover cached and new tokens, [{batch_size}, {num_keys}], "
            f"got shape {tuple(attention_mask.shape)}"
        )
    mask = attention_mask[:, kv_offset : kv_offset + num_keys].bool()
    return None if kv_length <= num_keys and bool(mask.all()) else mask


def _rows_of_mask(mask: Tensor, num_queries: int) -> tuple[PackedRows, PackedRows]:
    """Queries' and keys' rows; the queries are the last columns."""
    keys = PackedRows.of_mask(mask)
    return (keys if num_queries == mask.shape[1] else PackedRows.of_mask(mask[:, -num_queries:])), keys


def _rows_of_positions(position_ids: Tensor, batch_size: int) -> PackedRows | None:
    """Sequences packed side by side in ``position_ids [B or 1, N]``: one starts where numbers do not go on."""
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=1) != 1
    if not bool(starts[:, 1:].any()):
        return None
    flat = starts.expand(batch_size, -1).flatten()
    return PackedRows.of_boundaries(torch.nn.functional.pad(flat.nonzero().squeeze(1).int(), (0, 1), value=len(flat)))


_rows_of_last_mask = LastOne(_rows_of_mask)
_rows_of_last_positions = LastOne(_rows_of_positions)
_rows_of_last_queries, _rows_of_last_keys = LastOne(PackedRows.of_boundaries), LastOne(PackedRows.of_boundaries)


# ----------------------------------------------------------------------------------------------- the attention function


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: ``query [B, Hq, Nq, D]``, ``key, value [B, Hkv, Nk, D]`` to ``[B, Nq, Hq, Dv]``."""
    _check_supported(module, attention_mask, dropout, kwargs)
    settings = _settings_of(module)
    layer = MobaLayer.of_keys(key)
    query, key, value = as_autocast(query, key, value)
    num_queries = query.shape[2]
    _watch_cache(module)
    if attention_mask is not None and layer is None:
        key, value = key[:, :, : attention_mask.shape[1]], value[:, :, : attention_mask.shape[1]]

    def attend_to_keys() -> Tensor:
        rows = _packed_rows(query, key, attention_mask, kwargs)
        if rows is None:
            return attend(query, key, value, settings, scaling)
        return attend_packed(query, key, value, *rows, settings, scaling)

    if layer is None:
        out = attend_to_keys()
    else:
        if attention_mask is not None and attention_mask.shape[1] != layer.num_columns + num_queries:
            raise ValueError(
                f"attention_mask must cover cached and new tokens, {layer.num_columns} + {num_queries}, "
                f"got shape {tuple(attention_mask.shape)}"
            )
        out = layer.attend(query, attention_mask, settings, scaling, attend_to_keys)
    return out.transpose(1, 2), None


def _packed_rows(
    query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> tuple[PackedRows, PackedRows] | None:
    """Where the sequences of a padded or packed batch lie; None for a plain one."""
    batch_size, _, num_queries, _ = query.shape
    if mask is not None:
        rows: tuple[PackedRows, PackedRows] = _rows_of_last_mask(mask, num_queries)
        return rows
    boundaries = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if boundaries[0] is not None and boundaries[1] is not None:
        if batch_size != 1:
            raise ValueError(f"cu_seq_lens_q needs a batch of one row that holds all sequences, got {batch_size} rows")
        return _rows_of_last_queries(boundaries[0]), _rows_of_last_keys(boundaries[1])
    position_ids = kwargs.get("position_ids")
    if position_ids is None or position_ids.ndim != 2 or num_queries == 1:
        return None
    if num_queries != key.shape[2] or position_ids.shape[1] != num_queries:
        return None
    packed = _rows_of_last_positions(position_ids, batch_size)
    return None if packed is None else (packed, packed)


# Arguments of transformers' attention functions that change what is computed, and that block attention cannot heed.
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias", "head_mask", "block_table", "output_attentions")


def _check_supported(module: nn.Module, mask: Any, dropout: float, kwargs: dict[str, Any]) -> None:
    where = f'by attn_implementation="{IMPLEMENTATION}"'
    if dropout:
        raise ValueError(f"dropout must be 0 {where}, got {dropout}: set config.attention_dropout to 0")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            shown = kwargs[name] if isinstance(kwargs[name], (int, float)) else type(kwargs[name]).__name__
            raise ValueError(f"{name} is not supported {where}, got {shown}")
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"is_causal must be True {where}, got False")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must have 2 dimensions, [batch, tokens], {where}, got {shape}")


# ------------------------------------------------------------------------------------------------ the cache of generate


def _watch_cache(module: nn.Module) -> None:
    """From its next forward on, look at the cache that ``module`` is given.

    The attention function sees keys but not the cache they came from; a hook on the module does.
    """
    if not getattr(module, "_topgather_watches_cache", False) and not torch.compiler.is_compiling():
        module.register_forward_pre_hook(_replace_cache_layer, with_kwargs=True)
        module.__dict__["_topgather_watches_cache"] = True


def _replace_cache_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Put a MoBA layer, with what is cached so far, in the place of a plain one."""
    cache = next((value for value in kwargs.values() if type(value) is DynamicCache), None)
    if cache is None or cache.offloading or torch.is_grad_enabled() or not _registered.replace_cache:
        return
    layer_idx = getattr(module, "layer_idx", None)
    if layer_idx is None or getattr(module.config, "_attn_implementation", None) != IMPLEMENTATION:
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.extend(DynamicLayer() for _ in range(layer_idx + 1 - len(cache.layers)))
    if layer_idx < len(cache.layers) and type(cache.layers[layer_idx]) is DynamicLayer:
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            return  # the attention function will refuse it
        layer = cache.layers[layer_idx]
        cache.layers[layer_idx] = MobaLayer.taking_over(layer, mask, _settings_of(module))
