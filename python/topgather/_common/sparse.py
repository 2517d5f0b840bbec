"""Sparse gradients of tables that several calls share, inside torch's compilers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .library import library

# The branch of a traced table that the next call is to have.
_NEXT = "_topgather_next_branch"


def keep_coalesced(rows: Tensor) -> None:
    """Inside a backward: where the gradient of just these rows becomes a leaf's, mark it as coalesced there.

    torch stores a sparse gradient without its mark, and an optimizer would sort and copy all of it again. The mark is
    set at the end of this backward, and nothing of it is left afterwards. Holding on to ``rows`` until then makes sure
    that no other gradient's indices can lie at their address.

    The end is behind what others have queued for the end: DistributedDataParallel, whose threads coalesce the gradient
    meanwhile, and assert that nobody else does, waits for them there.
    """
    node = torch._C._current_autograd_node()
    if node is None:
        return
    accumulators = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]
    leaves = [following.variable for following, _ in node.next_functions if isinstance(following, accumulators)]

    def mark() -> None:
        for leaf in leaves:
            grad = leaf.grad
            if grad is None or not grad.is_sparse or grad._nnz() != rows.numel():
                continue
            if grad._indices().data_ptr() == rows.data_ptr():
                grad._coalesced_(True)

    queue_callback = torch.autograd.Variable._execution_engine.queue_callback
    queue_callback(lambda: queue_callback(mark))


def let_compiler_compare() -> None:
    """Have inductor compare sparse tensors while it traces, of which it would ask the storage, which they have none of.

    ``torch._inductor.fx_utils`` asks whether a node's tensor is still the same after a pass changed what it is made of.
    Nothing where inductor is not at work.
    """
    fx_utils: Any = sys.modules.get("torch._inductor.fx_utils")
    original = getattr(fx_utils, "get_storage", None)
    if original is None or hasattr(original, "_topgather"):
        return

    def get_storage(tensor: Tensor) -> int:
        storage: int = id(tensor) if tensor.layout != torch.strided else original(tensor)
        return storage

    setattr(get_storage, "_topgather", True)  # noqa: B010  a function
    fx_utils.get_storage = get_storage


# --- the sum of two gradients ---------------------------------------------------------------------------------------

# Two results: of an op with one, inductor asserts strides. The second is empty.
library.define(
    "sum_sparse(Tensor first, Tensor second) -> (Tensor total, Tensor empty)", tags=(torch.Tag.pt2_compliant_tag,)
)


def _sum(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    if first.is_coalesced() and second.is_coalesced():
        total = (first + second).coalesce()
        keep_coalesced(total._indices())
    else:
        # Padded ones stand one behind the other: how many rows they touch is not waited for.
        rows = torch.cat((first._indices(), second._indices()), dim=1)
        values = torch.cat((first._values(), second._values()))
        total = torch.sparse_coo_tensor(rows, values, first.shape, check_invariants=False)
    return total, total._values().new_empty(0)


def _fake_sum(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    let_compiler_compare()
    # Where inductor makes code of it, it makes strided tensors of the arguments.
    num_entries = sum(tensor._nnz() for tensor in (first, second) if tensor.is_sparse)
    rows = torch.empty((1, num_entries), dtype=torch.int64, device=first.device)
    values = torch.empty((num_entries, first.size(1)), dtype=first.dtype, device=first.device)
    is_coalesced = all(tensor.is_sparse and tensor.is_coalesced() for tensor in (first, second))
    total = torch.sparse_coo_tensor(rows, values, first.shape, is_coalesced=is_coalesced, check_invariants=False)
    return total, values.new_empty(0)


library.impl("sum_sparse", _sum, "CompositeExplicitAutograd")
torch.library.register_fake("topgather::sum_sparse", _fake_sum, lib=library)


class _Branch(torch.autograd.Function):
    """A tensor twice: for this call, and for those that come after. The sum of sparse gradients is made by an op.

    torch adds the gradients of a tensor that several calls have by ``aten::add``, which inductor compiles for strided
    tensors alone.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return tensor.view_as(tensor), tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, of_this: Tensor | None, of_later: Tensor | None) -> Tensor | None:  # type: ignore[override]
        if of_this is None or of_later is None:
            return of_this if of_later is None else of_later
        if of_this.is_sparse and of_later.is_sparse:
            total: Tensor = torch.ops.topgather.sum_sparse.default(of_this, of_later)[0]
            return total
        return of_this + of_later


def sharing(kernel: Callable[..., Any], name: str, arguments: list[str]) -> Callable[..., Any]:
    """An op's kernel for autograd that, while AOTAutograd traces, gives each call a branch of the argument ``name``."""
    position, flag = arguments.index(name), arguments.index("sparse_grad")

    def sharing_kernel(*args: Any) -> Any:
        if len(args) > flag and args[flag]:
            tensor = args[position]
            if isinstance(tensor, FunctionalTensor) and tensor.requires_grad and torch.is_grad_enabled():
                branch, following = _Branch.apply(getattr(tensor, _NEXT, tensor))  # type: ignore[no-untyped-call]
                setattr(tensor, _NEXT, following)
                args = (*args[:position], branch, *args[position + 1 :])
        return kernel(*args)

    return sharing_kernel
