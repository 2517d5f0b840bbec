"""What models go by: their config, else what ``register`` was called with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .._common import checks
from ._attend import Settings
from ._indexed import has_indexed_layers


@dataclass(frozen=True)
class Registered:
    """What models whose config says nothing go by."""

    block_size: int = 128
    top_k: int = 8
    dense_layers: tuple[int, ...] = ()
    replace_cache: bool = True
    force_first: int = 0
    force_last: int = 1
    window: int | None = None


_registered = Registered()


def registered() -> Registered:
    """What ``register`` was called with last."""
    return _registered


def set_registered(settings: Registered) -> None:
    """From now on models go by ``settings``."""
    global _registered
    _registered = settings


def check_layers(name: str, layers: Any) -> tuple[int, ...]:
    """``layers`` as a tuple; raises ``TypeError`` unless it holds ints."""
    if isinstance(layers, (str, bytes)) or not isinstance(layers, (Sequence, set, frozenset)):
        raise TypeError(f"{name} must be a sequence of ints, got {type(layers).__name__}")
    for layer_idx in layers:
        if isinstance(layer_idx, bool) or not isinstance(layer_idx, int):
            raise TypeError(f"{name} must hold ints, got {layer_idx!r} of type {type(layer_idx).__name__}")
    return tuple(layers)


def check_layers_exist(name: str, layers: Sequence[int], num_layers: int) -> None:
    """Raise ``ValueError`` for a layer that a model of so many has not."""
    for layer_idx in layers:
        if not -num_layers <= layer_idx < num_layers:
            raise ValueError(f"{name} must be from {-num_layers} to {num_layers - 1}, got {layer_idx}")


def settings_of_config(config: Any) -> tuple[Settings, tuple[int, ...]]:
    """What a model of ``config`` goes by, its config, else what was registered: of sparse layers, and the dense layers.

    Raises:
        TypeError: a setting of the wrong type.
        ValueError: a size below 1, more forced blocks than ``top_k``, or a layer that the model has not.
    """

    def setting(name: str) -> Any:
        found = getattr(config, f"moba_{name}", None)
        return getattr(_registered, name) if found is None else found

    block_size, top_k, window = setting("block_size"), setting("top_k"), setting("window")
    checks.check_count("config.moba_block_size", block_size)
    checks.check_count("config.moba_top_k", top_k)
    if window is not None:
        checks.check_count("config.moba_window", window, least=0)
    force_first, force_last = setting("force_first"), setting("force_last")
    checks.check_forced(force_first, force_last, top_k)
    dense_layers = check_layers("config.moba_dense_layers", setting("dense_layers"))
    num_layers = getattr(config, "num_hidden_layers", None)
    if dense_layers and num_layers is not None:
        check_layers_exist("dense_layers", dense_layers, num_layers)
    return Settings(block_size, top_k, force_first, force_last, window or None), dense_layers


def settings_of(module: nn.Module) -> Settings:
    """What ``module``, one layer's attention, goes by."""
    config = getattr(module, "config", None)
    settings, dense_layers = settings_of_config(config)
    layer_idx, num_layers = getattr(module, "layer_idx", None), getattr(config, "num_hidden_layers", None)
    is_dense = bool(dense_layers) and layer_idx in [idx + (num_layers or 0) if idx < 0 else idx for idx in dense_layers]
    # Beside layers that choose by an indexer the others are dense, as the model was trained.
    if is_dense or has_indexed_layers(config):
        return Settings(settings.block_size, None)
    return settings
