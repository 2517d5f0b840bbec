"""Choices of blocks as objects: one call's, and those of a whole forward. :mod:`topgather.ops.replay` makes them.

Sources: MoBA, arXiv 2502.13189, section 2.2 (the choice); Rollout Routing Replay, arXiv 2510.11370 (choices kept for
training, of experts there).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree

from .._common import checks


@dataclass(frozen=True, eq=False)
class BlockRouting:
    """Which key blocks each query attends to (MoBA, arXiv 2502.13189, section 2.2).

    Made by :func:`moba_route`, or by hand to bring another pattern. A pytree of its tensor, so that compiled, exported
    and mapped functions take and return it; ``==`` says whether it is the same object.

    Args:
        block_indices: int32 ``[B, H, Nq, top_k]`` (packed: ``[H, total_q, top_k]``, blocks counted from each
            sequence's first key). ``H`` is the number of query heads, of key heads, where the query heads of a key head
            share a choice, or 1, where all do; nothing is expanded. ``-1`` marks an unused slot. :func:`moba_route`
            returns one choice a query head, rows in ascending order and padded at the end; attention takes any order,
            but no block twice in a row.
        block_size: keys per block, the one the numbers refer to.

    Raises:
        TypeError: ``block_indices`` is not an int32 tensor, or ``block_size`` not an int.
        ValueError: ``block_indices`` has not 3 or 4 dimensions, or ``block_size`` is below 1.
    """

    block_indices: Tensor
    block_size: int

    def __post_init__(self) -> None:
        checks.check_tensor("block_indices", self.block_indices)
        checks.check_dtype("block_indices", self.block_indices, torch.int32)
        if self.block_indices.ndim not in (3, 4):
            raise ValueError(
                "block_indices must have 4 dimensions [B, heads, Nq, top_k], or 3 for packed sequences, "
                f"got shape {tuple(self.block_indices.shape)}"
            )
        checks.check_count("block_size", self.block_size)

    @property
    def top_k(self) -> int:
        """Slots per query."""
        return self.block_indices.size(-1)


def _flatten_routing(routing: BlockRouting) -> tuple[list[Any], int]:
    return [routing.block_indices], routing.block_size


def _unflatten_routing(leaves: Iterable[Any], block_size: int) -> BlockRouting:
    """Nothing is checked: transforms put in other things than tensors."""
    routing = object.__new__(BlockRouting)
    (block_indices,) = leaves
    object.__setattr__(routing, "block_indices", block_indices)
    object.__setattr__(routing, "block_size", block_size)
    return routing


pytree.register_pytree_node(
    BlockRouting,
    _flatten_routing,
    _unflatten_routing,
    serialized_type_name="topgather.BlockRouting",
    flatten_with_keys_fn=lambda routing: (
        [(pytree.GetAttrKey("block_indices"), routing.block_indices)],
        routing.block_size,
    ),
)
# What unpacks the arguments of an exported program; newer torch versions make it of the above.
fx_pytree.register_pytree_flatten_spec(BlockRouting, lambda routing, spec: [routing.block_indices])
# As an example input of an exported program that is loaded.
torch.serialization.add_safe_globals([BlockRouting])


_FORMAT = "topgather.RoutingRecord"
_VERSION = 1


class RoutingRecord(Sequence[BlockRouting]):
    """The choices of blocks of a forward, in the order in which they were made.

    Comes from :class:`record_routing`, from a file, or is made by hand, for layers that are to go by a pattern. A
    sequence of :class:`BlockRouting`, one for each ``share_every`` calls.

    Args:
        choices: the choices, in order.
        share_every: how many calls one after the other go by one choice, at least 1.
        num_calls: how many calls there are in all; ``share_every`` for each choice if None. The last choice may be of
            fewer.

    Raises:
        TypeError: ``choices`` holds something else than :class:`BlockRouting`, or a count is not an int.
        ValueError: a count is out of range, or ``num_calls`` does not fit the choices.
    """

    def __init__(
        self, choices: Iterable[BlockRouting] = (), share_every: int = 1, num_calls: int | None = None
    ) -> None:
        self._choices = list(choices)
        for choice in self._choices:
            if not isinstance(choice, BlockRouting):
                raise TypeError(f"choices must be of topgather.BlockRouting, got {type(choice).__name__}")
        checks.check_count("share_every", share_every)
        self._share_every = share_every
        if num_calls is None:
            num_calls = len(self._choices) * share_every
        checks.check_count("num_calls", num_calls, least=0)
        if -(-num_calls // share_every) != len(self._choices):
            raise ValueError(
                f"num_calls must fit {len(self._choices)} choices of {share_every} calls each, got {num_calls}"
            )
        self._num_calls = num_calls

    @overload
    def __getitem__(self, index: int) -> BlockRouting: ...
    @overload
    def __getitem__(self, index: slice) -> list[BlockRouting]: ...
    def __getitem__(self, index: int | slice) -> BlockRouting | list[BlockRouting]:
        """The choice number ``index``, or those of a slice."""
        return self._choices[index]

    def __len__(self) -> int:
        """How many choices there are."""
        return len(self._choices)

    def __copy__(self) -> RoutingRecord:
        """A record of the same choices, which does not grow with this one."""
        return RoutingRecord(self._choices, self.share_every, self.num_calls)

    def __repr__(self) -> str:
        """Counts alone."""
        return f"RoutingRecord(choices={len(self)}, share_every={self.share_every}, num_calls={self.num_calls})"

    @property
    def share_every(self) -> int:
        """How many calls one after the other go by one choice."""
        return self._share_every

    @property
    def num_calls(self) -> int:
        """How many calls went by these choices."""
        return self._num_calls

    def to(self, device: torch.device | str) -> RoutingRecord:
        """The same record with its choices on ``device``."""
        moved = (BlockRouting(choice.block_indices.to(device), choice.block_size) for choice in self)
        return RoutingRecord(moved, self.share_every, self.num_calls)

    def by_layer(self, num_layers: int) -> RoutingRecord:
        """Choices of several forwards, such as those of a generation, as those of one forward over all their tokens.

        Forwards followed one another with the same sequences, each with the tokens behind those of the one before:
        a prefill, perhaps in chunks, and single steps. What each layer chose is put together along the tokens, so that
        a forward of all tokens at once can replay it.

        Args:
            num_layers: calls of one forward, a multiple of ``share_every``.

        Returns:
            A record of ``num_layers`` calls, ``block_indices [B, H, N, k]`` with ``N`` the tokens of all forwards and
            ``k`` the most slots of any; those that a forward had not are -1.

        Raises:
            TypeError: ``num_layers`` is not an int.
            ValueError: ``num_layers`` does not divide ``num_calls`` or is no multiple of ``share_every``; choices of a
                layer that differ in batch, heads or block_size, or are of packed sequences.
        """
        checks.check_count("num_layers", num_layers)
        if num_layers % self.share_every != 0 or self.num_calls % num_layers != 0:
            raise ValueError(
                f"num_layers must be a multiple of share_every, {self.share_every}, and divide the calls of the "
                f"record, {self.num_calls}, got {num_layers}"
            )
        per_forward = num_layers // self.share_every
        return RoutingRecord([_joined(self._choices[i::per_forward]) for i in range(per_forward)], self.share_every)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record to ``path``, in the format of safetensors.

        Raises:
            ImportError: the package safetensors is not installed.
        """
        tensors = {f"choice.{i}": choice.block_indices.contiguous() for i, choice in enumerate(self)}
        # Memory that choices share is written twice, which safetensors would refuse to do by itself.
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        described = {
            "format": _FORMAT,
            "version": str(_VERSION),
            "share_every": str(self.share_every),
            "num_calls": str(self.num_calls),
            "block_sizes": json.dumps([choice.block_size for choice in self]),
        }
        _safetensors().save_file(tensors, path, metadata=described)

    @staticmethod
    def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> RoutingRecord:
        """Read a record from ``path``, with its choices on ``device``.

        Raises:
            FileNotFoundError: there is no such file.
            ImportError: the package safetensors is not installed.
            ValueError: the file holds something else, or comes from a later version of topgather.
        """
        package = _safetensors()
        if not os.path.isfile(path):
            raise FileNotFoundError(f"path must name a file, got {os.fspath(path)!r}")
        try:
            with package.safe_open(path, framework="pt", device=str(device)) as file:
                described = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        except package.SafetensorError as error:
            raise ValueError(f"path must name a file of safetensors, got {os.fspath(path)!r}: {error}") from error
        if described.get("format") != _FORMAT:
            raise ValueError(f"path must name a file that RoutingRecord.save wrote, got {os.fspath(path)!r}")
        version = described.get("version", "")
        if not version.isdecimal():
            raise ValueError(f"path must name a record with a version, got {os.fspath(path)!r} of version {version!r}")
        if int(version) > _VERSION:
            raise ValueError(
                f"path must name a record of version {_VERSION} at most, got {os.fspath(path)!r} of version "
                f"{version}: a later version of topgather wrote it"
            )
        try:
            sizes = json.loads(described["block_sizes"])
            choices = [BlockRouting(tensors[f"choice.{i}"], block_size) for i, block_size in enumerate(sizes)]
            return RoutingRecord(choices, int(described["share_every"]), int(described["num_calls"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"path must name a whole and consistent record, got {os.fspath(path)!r}: {error}"
            ) from error


class _Safetensors:
    def __init__(self) -> None:
        import safetensors
        import safetensors.torch

        self.safe_open = safetensors.safe_open
        self.SafetensorError = safetensors.SafetensorError
        self.save_file = safetensors.torch.save_file


def _safetensors() -> _Safetensors:
    try:
        return _Safetensors()
    except ImportError as error:
        raise ImportError(f"RoutingRecord.save and load need the package safetensors: {error}") from error


def _joined(choices: list[BlockRouting]) -> BlockRouting:
    first = choices[0]
    batch_and_heads = first.block_indices.shape[:2]
    for choice in choices:
        shape = choice.block_indices.shape
        if len(shape) != 4 or shape[:2] != batch_and_heads or choice.block_size != first.block_size:
            raise ValueError(
                f"the choices of a layer must all be [{', '.join(map(str, batch_and_heads))}, tokens, top_k] for a "
                f"block_size of {first.block_size}, got {tuple(shape)} for {choice.block_size}"
            )
    most = max(choice.top_k for choice in choices)
    padded = (torch.nn.functional.pad(choice.block_indices, (0, most - choice.top_k), value=-1) for choice in choices)
    return BlockRouting(torch.cat(list(padded), dim=2), first.block_size)


# A record is tensors and numbers: torch.load takes it as it takes those.
torch.serialization.add_safe_globals([RoutingRecord])
