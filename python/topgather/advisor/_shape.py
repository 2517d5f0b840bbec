"""What is measured: sizes of an attention layer, given as such or read from a model's config."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch

from .._common import checks

DEFAULT_SEQ_LEN = 16384


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one layer's attention.

    Args:
        heads: query heads.
        kv_heads: key heads, which divide them.
        head_dim: channels of a head.
        dtype: of queries, keys and values.
        batch_size: sequences at a time.
        train: whether the gradients are measured too.
        model: the model that the sizes were read from, or None.
        num_layers: layers of that model, or 1.
        max_seq_len: the longest sequence that the model says it takes, or None.
    """

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    batch_size: int = 1
    train: bool = False
    model: str | None = None
    num_layers: int = 1
    max_seq_len: int | None = None

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_dim", "batch_size", "num_layers"):
            checks.check_count(name, getattr(self, name))
        checks.check_heads("heads", self.heads, "kv_heads", self.kv_heads)
        checks.check_flag("train", self.train)
        check_dtype(self.dtype)

    def __str__(self) -> str:
        groups = f"{self.heads} heads" + ("" if self.heads == self.kv_heads else f" on {self.kv_heads} key heads")
        what = "forward and backward" if self.train else "forward"
        batch = "" if self.batch_size == 1 else f"batch of {self.batch_size}, "
        return f"{batch}{groups} of {self.head_dim} channels, {str(self.dtype).removeprefix('torch.')}, {what}"


def check_dtype(dtype: Any) -> None:
    """Raise unless ``dtype`` is one that the kernels take."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {type(dtype).__name__}")
    if dtype not in checks.FLOATING_DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, checks.FLOATING_DTYPES))}, got {dtype}")


def shape_of_model(model: str, **given: Any) -> AttentionShape:
    """The attention of ``model``; what is ``given`` and not None takes precedence over its config."""
    config = _config_of(model)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = _first(config, "num_attention_heads", "n_head", "n_heads", "num_heads")
    if heads is None:
        raise ValueError(f"model must have attention heads, got {model!r}, whose config names none")
    width = _first(config, "hidden_size", "n_embd", "d_model")
    head_dim = _first(config, "head_dim") or (width // heads if width else None)
    sizes = {
        "heads": heads,
        "kv_heads": _first(config, "num_key_value_heads", "num_kv_heads") or heads,
        "head_dim": head_dim,
        "dtype": _dtype_of(config),
        "num_layers": _first(config, "num_hidden_layers", "n_layer", "num_layers") or 1,
        "max_seq_len": _first(config, "max_position_embeddings", "n_positions"),
    }
    sizes |= {name: value for name, value in given.items() if value is not None}
    if sizes["head_dim"] is None:
        raise ValueError(f"head_dim must be given for {model!r}: its config has neither head_dim nor hidden_size")
    return AttentionShape(**sizes, model=model)


def _first(config: Any, *names: str) -> Any:
    """The first of these that the config has, and not None."""
    return next((found for name in names if (found := getattr(config, name, None)) is not None), None)


def _dtype_of(config: Any) -> torch.dtype:
    dtype = _first(config, "dtype", "torch_dtype")
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
    return dtype if dtype in checks.FLOATING_DTYPES else torch.float32


def _config_of(model: str) -> Any:
    """A transformers config: of a class named by its path, or by a name or folder of from_pretrained."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"model needs the package transformers: {error}") from error
    module_name, colon, name = model.partition(":") if ":" in model else model.rpartition(".")
    found: Any = None
    if colon and name.isidentifier() and "/" not in module_name and not module_name.startswith("."):
        try:
            found = getattr(importlib.import_module(module_name), name, None)
        except ImportError as error:
            if ":" in model:
                raise ValueError(f"model must name a class that can be imported, got {model!r}: {error}") from error
    if found is not None:
        found = getattr(found, "config_class", None) or found
        if isinstance(found, type) and issubclass(found, transformers.PretrainedConfig):
            return found()
        raise ValueError(
            f"model must name a config or a model of transformers, got {model!r}; of another model give heads, "
            "kv_heads and head_dim"
        )
    if ":" in model:
        raise ValueError(f"model must name a class, got {model!r}: {module_name} has no {name}")
    try:
        return transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"model must be known to transformers.AutoConfig, got {model!r}: {error}") from error
