"""How ops take DTensors, sharded over batch or heads, and a style for :class:`topgather.nn.MobaAttention`.

A rule says of one op where its tensors have their batch and their heads. Sharded so, each rank's part is a problem of
its own: nothing is sent, but that gradients of what batch entries share are partial sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from ..nn.moba import MobaAttention

try:
    from torch.distributed.tensor.experimental import register_sharding
except ImportError:  # experimental in torch: where it goes, so do the rules
    register_sharding = None  # type: ignore[assignment]


class _Rule(NamedTuple):
    """Dimensions by name of an argument or result; what is not named is replicated."""

    batch: Mapping[str, int]
    heads: Mapping[str, int]
    packed_heads: Mapping[str, int] | None = None
    """Where sequences are packed; there is no batch then."""
    shared: Sequence[str] = ()
    """Gradients of what batch entries share."""


def _all(names: str, dim: int) -> dict[str, int]:
    return dict.fromkeys(names.split(), dim)


_MOBA = "query key value out grad_out grad_query grad_key grad_value"
_ROWS = "block_indices lse grad_lse softmax_terms"
_ATTENTION = _Rule(
    batch=_all(f"{_MOBA} {_ROWS}", 0),
    heads=_all(f"{_MOBA} {_ROWS}", 1) | _all("sinks", 0),
    packed_heads=_all(_MOBA, 1) | _all(f"{_ROWS} sinks", 0),
)
_KEYS = "key state out grad_out grad_key grad_state"
_CONV = _Rule(
    batch=_all(_KEYS, 0),
    heads=_all(_KEYS, 1) | _all("weight bias grad_weight grad_bias", 0),
    packed_heads=_all("key out grad_out grad_key", 1) | _all("weight bias grad_weight grad_bias", 0),
    shared=("grad_weight", "grad_bias"),
)
_IMAGES = "query key value out lse softmax_terms grad_out grad_query grad_key grad_value"
_GRID = _Rule(batch=_all(_IMAGES, 0), heads=_all(_IMAGES, 1) | _all("bias grad_bias", 0), shared=("grad_bias",))
_RULES = {
    "block_centroids": _Rule(
        batch=_all("key centroids", 0), heads=_all("key centroids", 1), packed_heads=_all("key centroids", 1)
    ),
    "moba_route": _ATTENTION,
    "moba_attention": _ATTENTION,
    "moba_attention_backward": _ATTENTION,
    "key_conv": _CONV,
    "key_conv_backward": _CONV,
    "grid_attention": _GRID,
    "grid_attention_backward": _GRID,
}


def _is_tensor(spec: Any) -> bool:
    return hasattr(spec, "placements")


def _heads_divide(given: Mapping[str, Any], dims: Mapping[str, int]) -> bool:
    """Whether parts of query heads and of key heads go together, over the axes that some tensor's heads are cut by."""
    tensors = [(spec, dims[name]) for name, spec in given.items() if name in dims and _is_tensor(spec)]
    num_parts = 1
    for axis, size in enumerate(tensors[0][0].mesh.shape):
        if any(spec.placements[axis] == Shard(dim) for spec, dim in tensors):
            num_parts *= size
    # A choice for all heads, of which there is one, is one for each part.
    sizes = (
        spec.shape[dims[name]]
        for name, spec in given.items()
        if name in dims and _is_tensor(spec)
        if name != "block_indices" or spec.shape[dims[name]] > 1
    )
    return all(size % num_parts == 0 for size in sizes)


def _sharding(op: Any, rule: _Rule) -> Callable[..., Any]:
    """What torch asks of an op: placements of results and of arguments that need nothing sent."""
    schema = op._schema
    names = [argument.name for argument in schema.arguments]
    results = [result.name for result in schema.returns]

    def sharding(*args: Any, **kwargs: Any) -> list[tuple[list[Any], list[Any]]]:
        given = dict(zip(names, args, strict=False)) | kwargs
        is_packed = any(given.get(name) is not None for name in ("cu_seqlens", "cu_seqlens_q"))
        heads = rule.packed_heads if is_packed else rule.heads

        def placed(dims: Mapping[str, int], *, of_batch: bool) -> tuple[list[Any], list[Any]]:
            def of_result(name: str) -> Any:
                if of_batch and name in rule.shared:
                    return Partial() if _is_asked_for(name, given) else Replicate()
                return Shard(dims[name]) if name in dims and _is_asked_for(name, given) else Replicate()

            def of_argument(name: str, spec: Any) -> Any:
                if not _is_tensor(spec):
                    return None
                if name not in dims:
                    return Replicate()
                is_for_all_heads = name == "block_indices" and not of_batch and spec.shape[dims[name]] == 1
                return Replicate() if is_for_all_heads else Shard(dims[name])

            return [of_result(name) for name in results], [of_argument(*item) for item in given.items()]

        ways = [placed({}, of_batch=False)]
        if not is_packed:
            ways.append(placed(rule.batch, of_batch=True))
        if heads is not None and _heads_divide(given, heads):
            ways.append(placed(heads, of_batch=False))
        return ways

    return sharding


def _is_asked_for(name: str, given: Mapping[str, Any]) -> bool:
    """Whether a result has its size: gradients that nobody asks for are empty."""
    if name == "grad_state":
        return given.get("state") is not None
    if name == "grad_bias" and given.get("bias") is None:
        return False
    return bool(given.get(f"needs_{name}", True))


if register_sharding is not None:
    for _name, _rule in _RULES.items():
        _op = getattr(torch.ops.topgather, _name).default
        register_sharding(_op)(_sharding(_op, _rule))


class MobaHeadwise(ParallelStyle):
    """Shards a :class:`topgather.nn.MobaAttention` by its heads, for ``parallelize_module``.

    Each rank projects to, convolves, attends with and projects from its own heads; one all-reduce sums the outputs.
    Parameters become DTensors: projections as torch's ``ColwiseParallel`` and ``RowwiseParallel`` have them, and
    ``key_conv_weight`` sharded by heads. Input and output are tensors that all ranks of the mesh have whole.
    ``fully_shard`` comes after, over another axis of the same mesh.

    A ``position_embedding`` without parameters is called with the heads of the rank.

    Example::

        mesh = init_device_mesh("cuda", (num_replicas, group_size), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"layers.*.attention": MobaHeadwise()})

    Raises:
        TypeError: from ``parallelize_module``, for another module.
        ValueError: from ``parallelize_module``, for a mesh that is not one-dimensional, or whose size does not divide
            ``num_kv_heads``.
    """

    def __init__(self) -> None:
        super().__init__()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """What ``parallelize_module`` calls."""
        if not isinstance(module, MobaAttention):
            raise TypeError(f"MobaHeadwise shards a topgather.nn.MobaAttention, got {type(module).__name__}")
        if device_mesh.ndim != 1:
            raise ValueError(f"device_mesh must have one dimension, such as mesh['tp'], got {device_mesh}")
        if module.num_kv_heads % device_mesh.size() != 0:
            raise ValueError(
                f"the size of device_mesh must divide num_kv_heads, {module.num_kv_heads}, got {device_mesh.size()}"
            )
        plan: dict[str, ParallelStyle] = {
            f"{name}_proj": ColwiseParallel(use_local_output=False) for name in ("query", "key", "value")
        }
        parallelize_module(module, device_mesh, {**plan, "out_proj": RowwiseParallel()})
        weight = module.key_conv_weight
        if weight is not None:
            sharded = distribute_tensor(weight.detach(), device_mesh, [Shard(0)])
            module.key_conv_weight = nn.Parameter(sharded, requires_grad=weight.requires_grad)
        embedding = module.position_embedding
        has_parameters = isinstance(embedding, nn.Module) and any(True for _ in embedding.parameters())
        if embedding is not None and not has_parameters:
            if isinstance(embedding, nn.Module):
                del module.position_embedding
            module.position_embedding = _OfLocalHeads(embedding)
        return module


class _OfLocalHeads(nn.Module):
    """A function of queries and keys, called with those of a rank's heads."""

    def __init__(self, embedding: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, query: DTensor, key: DTensor) -> tuple[Tensor, ...]:
        made = self.embedding(query.to_local(), key.to_local())
        like = (query, key)
        return tuple(
            DTensor.from_local(part, whole.device_mesh, whole.placements, run_check=False)
            for part, whole in zip(made, like, strict=True)
        )
