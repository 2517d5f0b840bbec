"""What follows from an op's description: names checked at import, tensors described in Python."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.common.ops import CASES
from tests.common.runs import assert_all_equal
from topgather._common import cuda as _cuda
from topgather._common import library as _library
from topgather._common import spec as _spec
from topgather._common.spec import OPS, Op

ops = torch.ops.topgather

# --- tensors described in Python --------------------------------------------------------------------------------------


def bits_of_all() -> dict[str, Tensor]:
    """Results and gradients of every case, in rows as they lie and in rows of swapped dimensions."""
    bits = {}
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for is_swapped in (False, True):
                inputs = case.inputs(dtype, torch.device("cpu"))
                for name, value in inputs.items() if is_swapped else ():
                    if isinstance(value, Tensor) and value.dim() > 2 and name not in case.written:
                        inputs[name] = value.transpose(0, 1).contiguous().transpose(0, 1)
                for name in case.differentiable:
                    inputs[name].requires_grad_()
                for part, tensor in case.everything(inputs).items():
                    bits[f"{case} {dtype} {is_swapped} {part}"] = tensor
    return bits


def test_tensors_described_in_python_give_the_same_bits(tmp_path: Path) -> None:
    """As on a torch without DLPack's C interface."""
    path = tmp_path / "bits.pt"
    imports = os.pathsep.join(filter(None, (str(Path(__file__).resolve().parents[2]), *sys.path)))
    environment = os.environ | {"TOPGATHER_DESCRIBE_TENSORS": "1", "PYTHONPATH": imports}
    subprocess.run([sys.executable, __file__, path], env=environment, check=True)
    assert_all_equal(torch.load(path), bits_of_all())
    assert _library.reads_tensors == hasattr(Tensor, "__dlpack_c_exchange_api__")


# --- descriptions that ask for what nobody gives ----------------------------------------------------------------------


def _check(x: Tensor) -> None:
    pass


def _results(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _backward(grad_out: Tensor, x: Tensor) -> tuple[Tensor]:
    return (grad_out * x,)


def _asks_for_more(nothing: Any) -> Any:
    return nothing


DOUBLED = Op(
    schema="doubled(Tensor x, int factor) -> Tensor out",
    check=_check,
    results=_results,
    backward=_backward,
    gradients=("x",),
)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A native module with the entry point of ``DOUBLED``; what is registered is forgotten afterwards."""

    def doubled_cpu(x: Any, factor: int, out: Any) -> None:
        out.copy_(x * factor)

    module = SimpleNamespace(
        argument_names={"doubled_cpu": ["x", "factor", "out"]},
        aligned_arguments={"doubled": []},
        doubled_cpu=doubled_cpu,
    )
    monkeypatch.setattr(_spec, "_native", module)
    monkeypatch.setattr(_spec, "reads_tensors", True)
    for registry in (_spec.OPS, _spec.CPU_KERNELS, _spec.CALLERS, _cuda.KERNELS):
        for name in ("doubled", "again"):
            monkeypatch.setitem(registry, name, None)  # taken out again afterwards
    with torch.library._scoped_library("topgather", "FRAGMENT") as library:
        monkeypatch.setattr(_spec, "library", library)
        yield module


def test_a_whole_description_works(native: Any) -> None:
    _spec.register(DOUBLED)
    x = torch.arange(3.0, requires_grad=True)
    out = ops.doubled(x, 2)
    assert torch.equal(out, 2 * x)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], x)
    assert OPS["doubled"] is DOUBLED


def test_what_registering_returns_is_the_op(native: Any) -> None:
    """As the package calls it: by place or name, with and without gradients, compiled, under transforms."""
    doubled = _spec.register(DOUBLED)
    x = torch.arange(3.0, requires_grad=True)
    assert torch.equal(torch.autograd.grad(doubled(x, factor=3).sum(), x)[0], x)
    with torch.no_grad():
        assert not doubled(x, 3).requires_grad
    assert not doubled(x.detach(), 3).requires_grad
    assert torch.equal(torch.compile(doubled, fullgraph=True, backend="eager")(x, 3), 3 * x)
    assert torch.equal(torch.func.vmap(lambda row: doubled(row, 3))(x.expand(2, 3)), (3 * x).expand(2, 3))
    assert torch.equal(torch.func.grad(lambda x: doubled(x, 3).sum())(x.detach()), x)
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got NoneType"):
        ops.doubled(None, 3)


def _backward_by_op(doubled: Any, grad_out: Tensor) -> tuple[Tensor]:
    return (doubled(x=grad_out),)


def test_a_backward_gets_an_op_with_the_arguments_at_hand(native: Any) -> None:
    """The one it names: what it does not change is what the forward was called with."""
    _spec.register(DOUBLED)
    native.argument_names["again_cpu"], native.aligned_arguments["again"] = ["x", "factor", "out"], []
    native.again_cpu = native.doubled_cpu
    schema = "again(Tensor x, int factor) -> Tensor out"
    again = _spec.register(replace(DOUBLED, schema=schema, backward=_backward_by_op))
    x = torch.arange(3.0, requires_grad=True)
    assert torch.equal(torch.autograd.grad(again(x, 5).sum(), x)[0], torch.full((3,), 5.0))


@pytest.mark.parametrize(
    ("name", "kind", "wrong"),
    [
        ("block_size", "SymInt", 0),
        ("top_k", "SymInt", 2**31),
        ("max_seqlen_k", "SymInt", -1),
        ("scale", "float", float("nan")),
        ("softcap", "float?", -1.0),
    ],
)
def test_an_option_is_checked_by_its_name(native: Any, name: str, kind: str, wrong: Any) -> None:
    """No check of the op asks for it. On the CPU and in fake kernels, every time."""
    native.argument_names["doubled_cpu"] = ["x", "factor", "out"]
    _spec.register(replace(DOUBLED, schema=f"doubled(Tensor x, int factor, {kind} {name}) -> Tensor out"))
    for x in (torch.arange(3.0), torch.arange(3.0), torch.arange(3.0, device="meta")):
        with pytest.raises(ValueError, match=f"^{name} must be "):
            ops.doubled(x, 2, wrong)


def test_nothing_is_left_of_it() -> None:
    assert not hasattr(ops, "doubled") and not {"doubled", "again"} & set(OPS)


@pytest.mark.parametrize("is_aligned", [False, True])
def test_a_field_that_nobody_gives(native: Any, is_aligned: bool) -> None:
    native.argument_names["doubled_cpu"].append("stride")
    if is_aligned:
        native.aligned_arguments["doubled"].append("stride")
    with pytest.raises(ImportError, match=r"topgather: doubled: .* has a field 'stride'"):
        _spec.register(DOUBLED)


def test_no_entry_point(native: Any) -> None:
    with pytest.raises(ImportError, match="topgather: doubled: the native module has no entry point halved"):
        _spec.register(replace(DOUBLED, native="halved"))


ASKS: dict[str, Any] = {
    "check": _asks_for_more,
    "results": _asks_for_more,
    "fake_results": _asks_for_more,
    "check_content": _asks_for_more,
    "cuda_check": _asks_for_more,
    "composed_on_cuda": _asks_for_more,
    "locals": {"factor_squared": _asks_for_more},
    "inputs": {"x": _asks_for_more},
    "backward": _asks_for_more,
    "forward_mode": _asks_for_more,
    "autocast": {"x": _asks_for_more},
    "folds": _asks_for_more,
}
NAMES: dict[str, Any] = {
    "inputs": {"nothing": _results},
    "zeroed": ("nothing",),
    "gradients": ("nothing",),
    "autocast": {"nothing": _results},
}


@pytest.mark.parametrize("part", ASKS)
def test_a_function_that_asks_for_an_unknown_name(native: Any, part: str) -> None:
    with pytest.raises(ImportError, match=r"topgather: doubled: .*'nothing'"):
        _spec.register(replace(DOUBLED, **{part: ASKS[part]}))


@pytest.mark.parametrize("part", NAMES)
def test_an_unknown_name(native: Any, part: str) -> None:
    with pytest.raises(ImportError, match=f"topgather: doubled: {part} names 'nothing'"):
        _spec.register(replace(DOUBLED, **{part: NAMES[part]}))


if __name__ == "__main__":
    assert not _library.reads_tensors
    torch.save(bits_of_all(), sys.argv[1])
