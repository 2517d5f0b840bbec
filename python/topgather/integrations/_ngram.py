"""N-gram memories in the decoder layers of transformers' models, with their states beside a cache's keys."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .._common import checks
from ..nn import NgramMemory
from ..nn.ngram import NgramState

_NAME = "ngram_memory"
_CALL = "topgather_ngram_call"  # the argument by which a decoder's layers get to know its tokens
_STATES = "_topgather_ngram_states"


def add_ngram_memory(model: PreTrainedModel, memories: Mapping[int, NgramMemory]) -> None:
    """Put n-gram memories (Engram, arXiv 2601.07372) before layers of a model: what a layer is given becomes ``x +
    memory(x, tokens)``.

    Each is the submodule ``ngram_memory`` of its layer from then on, so that it is trained, moved and saved with the
    model; a model that loads what was saved needs the same call first. ``generate()`` goes on token by token: states
    stand beside the keys in its cache, follow its beams, and a new cache, or one that was reset, starts from nothing.

    Args:
        model: a decoder with ``input_ids``, of those that hand keyword arguments on to their layers, such as Llama and
            Qwen3. Padding before prompts is what its ``attention_mask [B, N]`` says.
        memories: by the number of the layer, from 0; with ``dim`` channels of the model and one stream.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: the model has no such layer, or one already has a memory; ``dim`` or the number of streams is
            another. In a forward: there are no ``input_ids``, a mask of another shape, or a cache that does not hold
            what the memories have seen, having been filled without them or cut.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    if not isinstance(memories, Mapping):
        raise TypeError(f"memories must be a mapping of numbers of layers, got {type(memories).__name__}")
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"model must have a decoder with layers, got {type(model).__name__}")
    for number, memory in memories.items():
        checks.check_count("memories", number, least=0)
        if not isinstance(memory, NgramMemory):
            raise TypeError(f"memories must be of topgather.nn.NgramMemory, got {type(memory).__name__}")
        if number >= len(layers):
            raise ValueError(f"memories must be of layers below {len(layers)}, got {number}")
        if hasattr(layers[number], _NAME):
            raise ValueError(f"memories must be of layers that have none yet, got {number}")
        if (memory.dim, memory.num_streams) != (decoder.config.hidden_size, 1):
            raise ValueError(
                f"memories must have dim={decoder.config.hidden_size}, as the model, and 1 stream, "
                f"got dim={memory.dim} and {memory.num_streams}"
            )
    is_hooked = any(hasattr(layer, _NAME) for layer in layers)
    for number, memory in memories.items():
        setattr(layers[number], _NAME, memory)
    if not is_hooked:
        decoder.register_forward_pre_hook(_before_decoder, with_kwargs=True)
        decoder.register_forward_hook(_after_decoder, with_kwargs=True)
        for layer in layers:
            layer.register_forward_pre_hook(_before_layer, with_kwargs=True)


class _Call:
    """A forward of a decoder: its tokens, and the states of its memories before and after."""

    def __init__(self, tokens: Tensor, mask: Tensor | None, cache: Cache | None) -> None:
        self.tokens, self.mask = tokens, mask
        self.next_states: dict[NgramMemory, NgramState] = {}
        self.states: dict[NgramMemory, NgramState] = {}
        self.take(cache)

    def take(self, cache: Cache | None) -> None:
        """Go by the states of ``cache``, which has none of this forward's tokens yet."""
        self.cache = cache
        if cache is None:
            return
        num_before = int(cache.get_seq_length())
        num_seen, states = getattr(cache, _STATES, (0, {}))
        if num_before != 0:
            if num_before != num_seen:
                raise ValueError(
                    f"the cache must be one that the model with its n-gram memories filled from the first "
                    f"token on, and that was not cut: it has {num_before} tokens, of which they have seen {num_seen}"
                )
            self.states = states

    def run(self, memory: NgramMemory, x: Tensor) -> Tensor:
        if self.cache is None:
            return memory(x, self.tokens, mask=self.mask)
        state = self.states.get(memory)
        if state is None:
            state = memory.make_state(x.size(0))
        out, self.next_states[memory] = memory(x, self.tokens, state=state, mask=self.mask)
        return out

    def end(self) -> None:
        """The forward has come to its end: what it made of the states holds, as the keys in the cache do."""
        if self.cache is not None:
            setattr(self.cache, _STATES, (int(self.cache.get_seq_length()), self.next_states))
            for name in _ROWS:
                setattr(self.cache, name, types.MethodType(partial(_move_rows, name), self.cache))


# Methods of a cache that change which row is whose, and what they do to a tensor of rows.
_ROWS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "reorder_cache": lambda rows, order: rows.index_select(0, order.to(rows.device)),
    "batch_select_indices": lambda rows, order: rows[order],
    "batch_repeat_interleave": lambda rows, repeats: rows.repeat_interleave(repeats, dim=0),
}


def _move_rows(name: str, cache: Cache, order: Any) -> None:
    getattr(type(cache), name)(cache, order)
    num_seen, states = getattr(cache, _STATES)
    moved = {memory: NgramState(*(_ROWS[name](rows, order) for rows in state)) for memory, state in states.items()}
    setattr(cache, _STATES, (num_seen, moved))


def _before_decoder(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tokens = args[0] if args else kwargs.get("input_ids")
    if tokens is None:
        raise ValueError("input_ids must be given, for n-gram memories go by them; inputs_embeds do not say them")
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise ValueError("attention_mask must have shape [batch, tokens], or be None, where n-gram memories are")
        mask = mask[:, mask.size(1) - tokens.size(1) :].to(torch.bool)
    return args, {**kwargs, _CALL: _Call(tokens, mask, _cache_of(args, kwargs))}


def _cache_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def _after_decoder(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    kwargs[_CALL].end()


def _before_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    kwargs = dict(kwargs)
    call = kwargs.pop(_CALL, None)
    if call is not None and call.cache is None and not torch.is_grad_enabled():
        call.take(_cache_of(args, kwargs))  # one that the decoder made, as it does for generate() of transformers 5.0
    memory = getattr(layer, _NAME, None)
    if memory is None:
        return args, kwargs
    if call is None:
        raise ValueError(
            f"model must hand keyword arguments on to its layers for n-gram memories, {type(layer).__name__} got none"
        )
    if args:
        return (args[0] + call.run(memory, args[0]), *args[1:]), kwargs
    x = kwargs["hidden_states"]
    return args, {**kwargs, "hidden_states": x + call.run(memory, x)}
