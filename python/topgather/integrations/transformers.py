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

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._common import checks, over_ranks
from ._version import raise_unless_too_old

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, __version__, masking_utils
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
except ImportError as error:
    raise_unless_too_old(error)

from . import _forward
from ._arguments import IMPLEMENTATION, OF_OTHER_PARTS, USED, Scores, by_us, check_causal, check_dropout, check_names
from ._attend import PackedRows, Settings, as_autocast, attend, attend_packed, sequence_starts
from ._cache import IndexedMobaLayer, MobaLayer
from ._indexed import choice_of, choice_within_sequences, keeps_index, of_columns
from ._models import hook_attention, is_local, layer_of, watch_models
from ._ngram import add_ngram_memory
from ._over_ranks import attend_over_ranks, check_mask_over_ranks, check_over_ranks
from ._settings import Registered, check_layers, check_layers_exist, set_registered, settings_of, settings_of_config

__all__ = ["add_ngram_memory", "make_cache", "register", "set_moba"]


def register(
    block_size: int = 128,
    top_k: int = 8,
    dense_layers: Sequence[int] = (),
    *,
    replace_cache: bool = True,
    force_first: int = 0,
    force_last: int = 1,
    window: int | None = None,
) -> None:
    """Add ``attn_implementation="moba"`` (MoBA, arXiv 2502.13189) to transformers.

    Works for decoders that go through transformers' attention interface, such as Llama and Qwen3. May be called again
    to change the settings, which a model's ``config.moba_block_size``, ``config.moba_top_k`` and so on override where
    it has them; they are read at every forward.

    Args:
        block_size: keys per block, at least 1.
        top_k: blocks per query, the own one included, at least 1.
        dense_layers: numbers of the layers that attend to everything, from 0; negative ones count from the last layer.
            A model that has not so many is refused when it is made or switched.
        replace_cache: whether a plain ``DynamicCache``, which ``generate`` makes for itself, gets layers that hold
            :class:`topgather.MobaCache` in a forward without gradients. Otherwise it stays as it is, and every new
            token costs time that grows with all tokens before it.
        force_first, force_last: how many of the first and of the newest blocks are in every choice, within ``top_k``,
            as in :func:`topgather.moba_route`.
        window: if given, a query sees the newest ``window`` tokens as well as those of its blocks, as in
            :func:`topgather.moba_attention`. Layers that attend to a window of the model's own keep that.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: ``block_size``, ``top_k`` or ``window`` below 1, or more forced blocks than ``top_k``.
        ImportError: from the import of this module, where transformers is missing or too old.
    """
    checks.check_count("block_size", block_size)
    checks.check_count("top_k", top_k)
    checks.check_forced(force_first, force_last, top_k)
    checks.check_window(window)
    checks.check_flag("replace_cache", replace_cache)
    layers = check_layers("dense_layers", dense_layers)
    set_registered(Registered(block_size, top_k, layers, replace_cache, force_first, force_last, window))
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    watch_models()


def set_moba(
    model: PreTrainedModel,
    enabled: bool = True,
    *,
    block_size: int | None = None,
    top_k: int | None = None,
    dense_layers: Sequence[int] | None = None,
    dense_implementation: str = "sdpa",
    force_first: int | None = None,
    force_last: int | None = None,
    window: int | None = None,
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
        force_first, force_last, window: as in :func:`register`, as ``config.moba_force_first`` and so on; a ``window``
            of 0 is none.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a size below 1, more forced blocks than ``top_k``, a layer that the model has not, or a model that
            does not go through transformers' attention interface.
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
        dense_layers = check_layers("dense_layers", dense_layers)
        check_layers_exist("dense_layers", dense_layers, config.num_hidden_layers)
    for name, count in (("force_first", force_first), ("force_last", force_last), ("window", window)):
        if count is not None:
            checks.check_count(name, count, least=0)

    if IMPLEMENTATION not in AttentionInterface().valid_keys():
        register()
    # Written first, for they are looked at when a model is switched.
    given = {
        "block_size": block_size,
        "top_k": top_k,
        "dense_layers": None if dense_layers is None else [*dense_layers],
        "force_first": force_first,
        "force_last": force_last,
        "window": window,
    }
    before = dict(vars(config))
    vars(config).update({f"moba_{name}": value for name, value in given.items() if value is not None})
    try:
        settings_of_config(config)  # together, which a model that is switched already is not asked again
        _switch(model, config, IMPLEMENTATION if enabled else dense_implementation)
    except BaseException:
        for name in given:
            vars(config).pop(f"moba_{name}", None)
        vars(config).update({name: value for name, value in before.items() if name.startswith("moba_")})
        raise


def _switch(model: PreTrainedModel, config: Any, implementation: str) -> None:
    """Give ``model`` another implementation; ``config`` is that of its text decoder."""
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


def make_cache(
    model: PreTrainedModel, max_seq_len: int | None = None, *, paged: bool = False, num_pages: int | None = None
) -> Cache:
    """A cache for ``model.generate(..., past_key_values=...)`` that holds :class:`topgather.MobaCache` layers
    (MoBA, arXiv 2502.13189; pages as in arXiv 2309.06180).

    ``generate`` needs none given: it gets one that doubles when full. One of a known size never does, and a paged one
    lets beams share their prompt.

    Args:
        model: a transformers model.
        max_seq_len: tokens of a sequence to make room for, prompt and new ones; None: as many as come first.
        paged: whether layers hold :class:`topgather.PagedMobaCache`; needs ``max_seq_len``, and never grows.
        num_pages: pages of a paged layer, of ``block_size`` tokens; enough for ``max_seq_len`` everywhere if None.

    Returns:
        A ``transformers.Cache``. It takes batch size, dtype and device from the first tokens. Layers that attend to a
        sliding window or have a state instead get transformers' own.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a size below 1, ``paged`` without ``max_seq_len``, or ``num_pages`` without ``paged``.
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
    layers = DynamicCache(config=config).layers or [DynamicLayer() for _ in range(config.num_hidden_layers)]
    for layer_idx, layer in enumerate(layers):
        kind = MobaLayer if type(layer) is DynamicLayer else IndexedMobaLayer if keeps_index(layer) else None
        if kind is not None:
            layers[layer_idx] = kind(max_seq_len, paged, num_pages)
    return Cache(layers=layers)


# ------------------------------------------------------------------------------------------------------------- masks


def _mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor | None = None,
    kv_offset: int = 0,
    mask_function: Any = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    cache_position: Tensor | None = None,
    device: torch.device | str = "cpu",
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask as transformers hands it to the attention: bool ``[B, Nk]``, or None where all tokens are real.

    In older versions ``cache_position`` stands for ``q_length`` and ``q_offset``. Two other forms: bool
    ``[B, 1, Nq, Nk]`` for layers that attend to a window or chunk, and, under torch.compile, bool ``[B, Nq + Nk]``,
    which queries and which keys are real, where the place of the queries among the keys is on the device. Models of
    ``config.num_kv_shared_layers`` get ``[B, 1, 1, Nk]`` for ``[B, Nk]``.
    """
    ranks = over_ranks.active()
    if ranks is not None:
        check_mask_over_ranks(attention_mask, local_size)
        return None
    if local_size is not None:
        positions: dict[str, Any] = (
            {"q_length": q_length, "q_offset": q_offset}
            if cache_position is None
            else {"cache_position": cache_position}
        )
        mask: Any = masking_utils.sdpa_mask(
            batch_size=batch_size,
            kv_length=kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            use_vmap=use_vmap,
            device=device,
            local_size=local_size,
            **positions,
            **{**kwargs, "allow_is_causal_skip": False},
        )
        return mask
    made = _key_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        use_vmap,
        cache_position,
        device,
    )
    # Models whose last layers attend to keys of others cut the rows of masks off that they need no more.
    return made[:, None, None] if made is not None and _shares_keys(kwargs.get("config")) else made


def _shares_keys(config: Any) -> bool:
    return bool(getattr(config, "num_kv_shared_layers", 0))


def _key_mask(
    batch_size: int,
    q_length: int | None,
    kv_length: int,
    q_offset: int | Tensor | None,
    kv_offset: int,
    mask_function: Any,
    attention_mask: Tensor | None,
    use_vmap: bool,
    cache_position: Tensor | None,
    device: torch.device | str,
) -> Tensor | None:
    """The mask of :func:`_mask` for a layer that attends to everything."""
    if torch.compiler.is_compiling() and not use_vmap and mask_function is not masking_utils.causal_mask_function:
        _assert_causal(mask_function, batch_size, kv_length, device)
    elif use_vmap or not _is_causal(mask_function):
        raise ValueError(
            f'attn_implementation="{IMPLEMENTATION}" is causal attention with padding; in {_forward.name_of_model()} '
            "it cannot apply or_mask_function, and_mask_function, block_sequence_ids or is_causal=False"
        )
    if q_length is None:
        assert cache_position is not None
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    if kv_length == q_length:  # nothing is cached; older versions give a tensor here all the same
        q_offset = kv_offset
    if torch.compiler.is_compiling() and isinstance(q_offset, Tensor):
        return _mask_of_static_cache(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, device)
    num_keys = int(q_offset if q_offset is not None else 0) + q_length - kv_offset
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
    if torch.compiler.is_compiling():  # whether all are real is on the device
        return mask
    return None if kv_length <= num_keys and bool(mask.all()) else mask


def _mask_of_static_cache(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Tensor,
    kv_offset: int,
    attention_mask: Tensor | None,
    device: torch.device | str,
) -> Tensor:
    columns = torch.arange(kv_length, device=device) + kv_offset
    keys = (columns < q_offset + q_length).expand(batch_size, -1)
    if attention_mask is not None:
        missing = max(kv_offset + kv_length - attention_mask.shape[1], 0)
        given = torch.nn.functional.pad(attention_mask.bool(), (0, missing))
        keys = keys & given[:, kv_offset : kv_offset + kv_length]
    newest = (q_offset - kv_offset + torch.arange(q_length, device=device)).expand(batch_size, -1)
    return torch.cat([keys.gather(1, newest), keys], dim=1)


# What transformers composes mask functions of where they say no more than that attention is causal, that some tokens
# are padding, or that position_ids start several sequences in a row, all of which is known from elsewhere.
_CAUSAL_PARTS = frozenset(
    {
        "causal_mask_function",
        "and_masks",
        "packed_sequence_mask_function",
        "padding_mask_function",
        "remap_positions_for_packed_sequence",
    }
)


def _is_causal(mask_function: Any) -> bool:
    if mask_function is masking_utils.causal_mask_function:
        return True
    if mask_function.__qualname__.split(".")[0] not in _CAUSAL_PARTS:
        return False
    for cell in mask_function.__closure__ or ():
        parts = cell.cell_contents if isinstance(cell.cell_contents, (tuple, list)) else (cell.cell_contents,)
        if not all(_is_causal(part) for part in parts if callable(part) and not isinstance(part, Tensor)):
            return False
    return True


_IN_COMPILED = "is not seen under torch.compile: pass cu_seq_lens_q and cu_seq_lens_k"


def _assert_causal(mask_function: Any, batch_size: int, num_tokens: int, device: torch.device | str) -> None:
    """Where a mask function cannot be looked into: that a token sees the one before it, and not the one after."""
    batch, head = torch.arange(batch_size, device=device)[:, None], torch.zeros((), dtype=torch.int64, device=device)
    earlier = torch.arange(num_tokens - 1, device=device)[None]
    is_causal = mask_function(batch, head, earlier + 1, earlier) & ~mask_function(batch, head, earlier, earlier + 1)
    torch._assert_async(
        is_causal.all(), f"a mask that is not causal, or position_ids of several sequences in a row, {_IN_COMPILED}"
    )


# ------------------------------------------------------------------------------------------------ sequences in a row


def _segments(mask: Tensor | None, batch_size: int, num_tokens: int, arguments: dict[str, Any]) -> Any:
    """Which of the sequences packed side by side a token is of: int64 ``[B * N]`` and their number; None without.

    They are told by ``cu_seq_lens_q``, by ``seq_idx``, or by ``position_ids``.
    """
    boundaries, seq_idx, position_ids = (arguments.get(name) for name in ("cu_seq_lens_q", "seq_idx", "position_ids"))
    if boundaries is not None:
        _check_one_row(batch_size)
        _check_boundaries(boundaries, arguments.get("cu_seq_lens_k"), num_tokens)
        rows = torch.arange(num_tokens, device=boundaries.device)
        return torch.bucketize(rows, boundaries[1:].contiguous(), right=True), len(boundaries) - 1
    if seq_idx is not None and seq_idx.shape[-1] == num_tokens:
        starts = torch.nn.functional.pad(seq_idx.diff(dim=-1) != 0, (1, 0))
    elif position_ids is not None and position_ids.ndim == 2 and position_ids.shape[1] == num_tokens:
        starts = sequence_starts(position_ids.expand(batch_size if mask is not None else -1, -1), mask)
        if torch.compiler.is_compiling():
            torch._assert_async(
                starts.logical_not().all(),
                f"position_ids that start several sequences in a row: that {_IN_COMPILED}",
            )
            return None
    else:
        return None
    if not bool(starts.any()):
        return None
    starts = starts.expand(batch_size, -1).clone()
    starts[:, 0] = True
    segments = starts.flatten().cumsum(0) - 1
    return segments, int(segments[-1]) + 1


def _check_one_row(batch_size: int) -> None:
    if batch_size != 1:
        raise ValueError(f"cu_seq_lens_q needs a batch of one row that holds all sequences, got {batch_size} rows")


def _check_boundaries(queries: Tensor, keys: Tensor | None, num_tokens: int) -> None:
    """Raise ``ValueError`` unless queries and keys are cut alike, to the last token."""
    is_same = keys is None or keys is queries or keys.shape == queries.shape
    if torch.compiler.is_compiling():
        torch._assert_async(queries[-1] == num_tokens, "cu_seq_lens_q must end with the number of tokens")
        if is_same and keys is not None:
            torch._assert_async((keys == queries).all(), "cu_seq_lens_k must be cu_seq_lens_q beside a mask")
    elif int(queries[-1]) != num_tokens:
        raise ValueError(f"cu_seq_lens_q must end with the number of tokens, {num_tokens}, got {int(queries[-1])}")
    elif is_same and keys is not None:
        is_same = bool((keys == queries).all())
    if not is_same:
        raise ValueError(
            "cu_seq_lens_k must be cu_seq_lens_q where attention_mask leaves tokens out or layers attend to a window, "
            "got another"
        )


def _packed_rows(
    query: Tensor, key: Tensor, mask: Tensor | None, arguments: dict[str, Any]
) -> tuple[PackedRows, PackedRows] | None:
    """Where the sequences of a padded or packed batch lie; None for a plain one."""
    batch_size, _, num_queries, _ = query.shape
    num_keys = key.shape[2]
    if mask is None and arguments.get("cu_seq_lens_q") is not None:
        _check_one_row(batch_size)
        queries, keys = arguments["cu_seq_lens_q"], arguments.get("cu_seq_lens_k")
        of_queries = _forward.remembered(PackedRows.of_boundaries, queries, num_queries)
        return of_queries, of_queries if keys is None else _forward.remembered(PackedRows.of_boundaries, keys, num_keys)
    segments = None
    if num_queries > 1 and num_queries == num_keys:
        segments = _segments_once(mask, batch_size, num_queries, arguments)
    if mask is None and segments is None:
        return None
    if mask is None:
        mask = torch.ones(batch_size, num_queries, dtype=torch.bool, device=query.device)
    if segments is not None:
        rows = _forward.remembered(PackedRows.of_segments, *segments, mask.flatten())
        return rows, rows
    if mask.shape[1] == num_queries + num_keys:  # of a static cache under torch.compile
        return PackedRows.of_mask(mask[:, :num_queries]), PackedRows.of_mask(mask[:, num_queries:])
    keys_rows: PackedRows = _forward.remembered(PackedRows.of_mask, mask)
    if num_queries == mask.shape[1]:
        return keys_rows, keys_rows
    return _forward.remembered(_rows_of_newest, mask, num_queries), keys_rows


def _rows_of_newest(mask: Tensor, num_queries: int) -> PackedRows:
    return PackedRows.of_mask(mask[:, -num_queries:])


def _segments_once(mask: Tensor | None, batch_size: int, num_tokens: int, arguments: dict[str, Any]) -> Any:
    """:func:`_segments`, once in a forward."""
    named = [(name, arguments[name]) for name in _PACKING if isinstance(arguments.get(name), Tensor)]
    if not named:
        return None

    def make(_: Tensor, *__: Any) -> Any:
        return _segments(mask, batch_size, num_tokens, dict(named))

    return make(named[0][1])


_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "position_ids")


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
    if not torch.compiler.is_compiling():
        _forward.count_call()
        hook_attention(module)
    if kwargs.get("cu_seq_lens_k") is not None and kwargs.get("cu_seq_lens_q") is None:
        raise ValueError(f"cu_seq_lens_k needs cu_seq_lens_q beside it {by_us(module)}, got None")
    if over_ranks.active() is None and is_local(module, kwargs.get("sliding_window")):
        return _attend_locally(module, query, key, value, attention_mask, dropout, scaling, kwargs), None
    check_dropout(module, dropout)
    check_names(module, kwargs)
    check_causal(module, kwargs.get("is_causal"), query.shape[2], attention_mask)
    if attention_mask is not None and _shares_keys(getattr(module, "config", None)) and attention_mask.ndim == 4:
        attention_mask = _forward.remembered(_of_keys, attention_mask)
    _check_mask(module, attention_mask)
    scores = Scores.of_arguments(module, scaling, kwargs)
    settings = settings_of(module)
    layer = None if torch.compiler.is_compiling() else layer_of(module, key)
    ranks = over_ranks.active()
    if ranks is not None:
        check_over_ranks(module, ranks, query, key, attention_mask, layer, kwargs)
        query, key, value = as_autocast(query, key, value)
        out = attend_over_ranks(ranks, query, key, value, settings, scores, kwargs.get("cu_seq_lens_q"))
        return out.transpose(1, 2), None
    given = key, value
    query, key, value = as_autocast(query, key, value)
    num_queries = query.shape[2]
    if attention_mask is not None and layer is None and attention_mask.shape[1] != num_queries + key.shape[2]:
        key, value = key[:, :, : attention_mask.shape[1]], value[:, :, : attention_mask.shape[1]]
    if layer is not None and attention_mask is not None and attention_mask.shape[1] != layer.num_columns:
        raise ValueError(
            f"attention_mask must cover cached and new tokens, {layer.num_columns - num_queries} + {num_queries}, "
            f"got shape {tuple(attention_mask.shape)}"
        )
    newest = attention_mask
    if layer is not None and attention_mask is not None and key.shape[2] < attention_mask.shape[1]:
        newest = attention_mask[:, -key.shape[2] :]
    rows = _packed_rows(query, key, newest, kwargs)
    routing = routing_of_new = None
    if kwargs.get("block_indices") is not None:
        routing = routing_of_new = choice_of(module, kwargs["block_indices"])
        settings = Settings(routing.block_size, routing.top_k)
        if rows is not None:
            of_all, num_columns = rows, key.shape[2]
            if attention_mask is not None and newest is not attention_mask:
                num_columns = attention_mask.shape[1]
                of_all = _rows_of_newest(attention_mask, num_queries), PackedRows.of_mask(attention_mask)
            routing = choice_within_sequences(module, *of_all, num_columns)
            routing_of_new = of_columns(routing, of_all[0], query.shape[0], num_queries)

    def attend_to_keys() -> Tensor:
        if rows is None:
            return attend(query, key, value, settings, scores, routing)
        return attend_packed(query, key, value, *rows, settings, scores, routing)

    if layer is None:
        out = attend_to_keys()
    else:
        is_packed = rows is not None and len(rows[0].cu_seqlens) > query.shape[0] + 1
        out = layer.attend(query, *given, attention_mask, settings, scores, attend_to_keys, is_packed, routing_of_new)
    return out.transpose(1, 2), None


def _of_keys(mask: Tensor) -> Tensor:
    """``[B, 1, 1, Nk]`` as :func:`_mask` makes it for some models to ``[B, Nk]``; any other as it is."""
    return mask[:, 0, 0] if mask.dtype == torch.bool and mask.shape[1:3] == (1, 1) else mask


def _check_mask(module: nn.Module, mask: Any) -> None:
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must have 2 dimensions, [batch, tokens], to be read {by_us(module)}, got {shape} "
            f"(transformers {__version__})"
        )


# What torch's own attention knows, besides what it need not.
_OF_SDPA = (USED - {"softcap", "s_aux", "sinks"}) | OF_OTHER_PARTS


def _attend_locally(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """A layer that attends to a window or chunk, as the model does without us: ``[B, Nq, Hq, Dv]``.

    ``mask`` is bool ``[B, 1, Nq, Nk]``. Arguments that torch's attention does not know go to the model's eager one.
    """
    if mask is None or mask.ndim != 4:
        raise ValueError(
            f"sliding_window and chunks need an attention_mask [batch, 1, queries, keys], which transformers' "
            f"masking_utils make for causal models, {by_us(module)}, got {None if mask is None else tuple(mask.shape)}"
        )
    batch_size, num_queries, num_keys = query.shape[0], query.shape[2], key.shape[2]
    if mask.dtype == torch.bool and num_queries > 1 and num_queries == num_keys:
        is_real = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        segments = _segments_once(is_real, batch_size, num_queries, kwargs)
        if segments is not None:
            of_token = segments[0].view(batch_size, num_queries)
            mask = mask & (of_token[:, None, :, None] == of_token[:, None, None, :])
    own = {name: given for name, given in kwargs.items() if given is not None}
    if own.keys() <= _OF_SDPA:
        out, _ = sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **own)
        return out
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        check_names(module, kwargs)
        raise ValueError(f"{sorted(own.keys() - _OF_SDPA)} need an attention that is not to be found {by_us(module)}")
    if mask.dtype == torch.bool:
        hidden = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask.logical_not(), hidden)
    out, _ = eager(module, query, key, value, mask, dropout=dropout, scaling=scaling, **own)
    return out
