"""One description of an op, and everything that follows from it.

An :class:`Op` says once what an op takes and returns, what is checked, what its native entry point is and how it is
differentiated. :func:`register` generates from it, as source, the kernels of the CPU and of CUDA, the fake kernel, the
``autograd.Function`` and the rules for autocast, vmap and forward mode, and hands them to the dispatcher. Functions of
a description name what they need in their signatures: arguments, results and ``locals`` of the op. The fields of the
native parameter struct are filled by name as well, in the order that the native module tells. A name that nobody
gives is an ``ImportError``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad

from .. import _native
from . import checks, cuda, direct, foreign, sparse, tensors, transforms
from .library import AUTOCAST_KEYS, below_autograd, describe, in_forward_mode, library, reads_tensors, refuse_onnx

Function = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Op:
    """What an op is.

    Args:
        schema: as the dispatcher takes it, every result with a name.
        check: raises for what shapes, strides, dtypes, devices and options can say, and looks at nothing else: a call
            that differs from an earlier one in none of them is not checked again. Runs in fake kernels too, after the
            checks that ``checks.OPTIONS`` has for arguments of the op.
        results: makes the results, not filled in; a tensor, a tuple of them, or None for an op that returns nothing.
        native: name of the native entry points, ``<native>_cpu`` and ``<native>_cuda``; the op's if None.
        fake_results: the same for the fake kernel, where what ``locals`` hold shapes the results.
        check_content: raises for what tensors hold; on the CPU alone.
        cuda_check: raises for what the CUDA kernels do not take.
        composed_on_cuda: returns the results by torch's own ops for sizes that the CUDA kernel does not take, else
            None. One of an op that returns nothing says so by anything that is not None.
        composed: returns the results by torch's own ops on every device: there is no native entry point. ``results``
            then says what they look like.
        locals: further values by name, in order.
        inputs: by argument, the tensor as the native side takes it, made of the argument (a parameter ``tensor``) and
            of whatever else the function names.
        zeroed: results that the CPU kernel adds to.
        backward: name of the op, or a function, that makes the gradients. Of its parameters, ``grad_<result>`` is the
            gradient of a result (where nothing depends on it zeros, or None if allowed), ``needs_grad_<argument>``
            whether a gradient is asked for, ``<argument>_meta`` shape, dtype and device alone. One with the name of an
            op is that op, which takes by name what is to differ from what is at hand under its arguments' names. A
            result without a ``grad_<result>`` is not differentiable.
        gradients: the arguments whose gradients ``backward`` returns, in order; an op says it by its results' names.
        forward_mode: makes the tangents of the results, of arguments and ``tangent_<argument>`` (None where zero).
        derivative_of: for an op that makes gradients, whose: it cannot be differentiated again, and says so. An op's
            name, or the argument that says it.
        not_differentiable: for an op without gradients, what is said where one would be recorded, after the name of
            the argument that requires it.
        autocast: by argument, in order, what it becomes where autocast is on: a function of ``tensor``,
            ``device_type`` and of arguments.
        batch: dimension, by argument and result, along which problems do not depend on each other: vmap folds its own
            dimension into it.
        folds: whether ``batch`` holds for a call, from its arguments.
        shared: the argument whose gradient is sparse where ``sparse_grad`` is set: several calls may have it in common.
    """

    schema: str
    check: Function
    results: Function
    native: str | None = None
    fake_results: Function | None = None
    check_content: Function | None = None
    cuda_check: Function | None = None
    composed_on_cuda: Function | None = None
    composed: Function | None = None
    locals: Mapping[str, Function] = field(default_factory=dict)
    inputs: Mapping[str, Function] = field(default_factory=dict)
    zeroed: tuple[str, ...] = ()
    backward: str | Function | None = None
    gradients: tuple[str, ...] = ()
    forward_mode: Function | None = None
    derivative_of: str | None = None
    not_differentiable: str | None = None
    autocast: Mapping[str, Function] = field(default_factory=dict)
    batch: Mapping[str, int] = field(default_factory=dict)
    folds: Function | None = None
    shared: str | None = None


# What generated functions ask torch about its state, by the names that they use.
_STATE: dict[str, Function] = {
    "below_autograd": below_autograd,
    "in_forward_mode": in_forward_mode,
    "is_compiling": torch.compiler.is_compiling,
    "is_grad_enabled": torch.is_grad_enabled,
    "transforms_active": torch._C._are_functorch_transforms_active,
}

# Signatures of calls that an op's kernel remembers as checked.
MAX_ACCEPTED = 1024


class Meta(NamedTuple):
    """What a backward may want to know of a tensor without keeping it."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def meta_of(tensor: Tensor | None) -> Meta | None:
    return None if tensor is None else Meta(tensor.shape, tensor.dtype, tensor.device)


NO_SECOND_DERIVATIVE = " has no double backward; its gradients cannot be differentiated"
NOR_FORWARD = " in forward mode either (jvp, linearize, jacfwd, hessian)"
NO_FORWARD_MODE = (
    " has no derivative in forward mode (jvp, linearize, jacfwd, dual numbers); reverse mode has one (backward, grad, "
    "vjp, jacrev)"
)


def refuse_none(**tensors: Tensor | None) -> None:
    """Raise ``TypeError`` for the first that is None."""
    for name, tensor in tensors.items():
        if tensor is None:
            raise TypeError(f"{name} must be a torch.Tensor, got NoneType")


# Every op that was registered, by name: tests go through them.
OPS: dict[str, Op] = {}
# Every kernel of the dispatcher's CPU key, by op: the benchmark of call overhead registers them in other ways.
CPU_KERNELS: dict[str, Function] = {}
# What the package calls every op by.
CALLERS: dict[str, Function] = {}


def register(op: Op) -> Function:
    """Declare the op, generate its kernels and hand them to the dispatcher.

    Returns the function that the package calls it by.
    """
    library.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    generator = _Generator(op)
    name = generator.name
    OPS[name] = op
    CPU_KERNELS[name] = generator.kernel("cpu")
    library.impl(name, CPU_KERNELS[name], "CPU")
    cuda_kernel = generator.kernel("cuda")
    library.impl(name, cuda_kernel, "CUDA")
    cuda.KERNELS[name] = cuda_kernel
    torch.library.register_fake(f"topgather::{name}", generator.fake(), lib=library)
    autograd = generator.autograd()
    library.impl(
        name, autograd if op.shared is None else sparse.sharing(autograd, op.shared, generator.arguments), "Autograd"
    )
    torch.library.register_vmap(f"topgather::{name}", transforms.batching_rule(generator.overload, op), lib=library)
    if generator.written:
        library.impl(name, generator.count_versions(), "ADInplaceOrView")
    if op.autocast:
        for device_type, key in AUTOCAST_KEYS.items():
            library.impl(name, generator.autocast(device_type, key), key)
    foreign.refuse(library, name, generator.arguments)
    CALLERS[name] = generator.caller()
    return CALLERS[name]


class _Source:
    """Lines of a function, and what its names stand for."""

    def __init__(self, op_name: str) -> None:
        self.op_name = op_name
        self.lines: list[str] = []
        self.globals: dict[str, Any] = {}

    def line(self, text: str, indent: int = 1) -> None:
        self.lines.append("    " * indent + text)

    def bound(self, value: Any, name: str) -> str:
        """A name for ``value`` in the function's globals."""
        unique = f"_{name}_{len(self.globals)}"
        self.globals[unique] = value
        return unique

    def call(self, function: Function, names: Mapping[str, str]) -> str:
        """A call that gives ``function`` what its parameters ask for; ``names`` says what each name is here."""
        arguments = []
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name in names:
                arguments.append(f"{parameter.name}={names[parameter.name]}")
            elif parameter.default is inspect.Parameter.empty:
                raise ImportError(
                    f"topgather: {self.op_name}: {function.__name__} asks for {parameter.name!r}, which is none of "
                    + ", ".join(names)
                )
        return f"{self.bound(function, function.__name__.strip('<>'))}({', '.join(arguments)})"

    def compiled(self, name: str) -> Function:
        source = "\n".join(self.lines)
        namespace = dict(self.globals)
        exec(compile(source, f"<topgather::{self.op_name} {name}>", "exec"), namespace)
        function: Function = namespace[name]
        function.__module__, function.__doc__ = __name__, f"Generated: {name} of topgather::{self.op_name}."
        return function


def _tuple_of(names: Iterable[str]) -> str:
    return "(" + "".join(f"{name}, " for name in names) + ")"


def _may_be_none(op_name: str) -> dict[str, bool]:
    """The arguments of an op, and whether each may be None."""
    schema = getattr(torch.ops.topgather, op_name).default._schema
    return {argument.name: isinstance(argument.type, torch.OptionalType) for argument in schema.arguments}


class _Generator:
    def __init__(self, op: Op) -> None:
        self.op = op
        self.name = op.schema.partition("(")[0]
        self.overload = getattr(torch.ops.topgather, self.name).default
        schema = self.overload._schema
        self.arguments: list[str] = [argument.name for argument in schema.arguments]
        self.num_keyword_only = sum(argument.kwarg_only for argument in schema.arguments)
        self.results: list[str] = [result.name for result in schema.returns]
        self.tensors = [a.name for a in schema.arguments if str(a.type) in ("Tensor", "Optional[Tensor]")]
        self.written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        self.here = {name: name for name in self.arguments}
        positional = self.arguments[: len(self.arguments) - self.num_keyword_only]
        # How one calls the op with names of these arguments.
        self.passed = ", ".join([*positional, *(f"{name}={name}" for name in self.arguments[len(positional) :])])
        self._check_names()

    def _check_names(self) -> None:
        """What a description says of an argument or a result is said of one that there is."""
        op, tensors, results = self.op, set(self.tensors), set(self.results)
        for part, names, known in (
            ("inputs", op.inputs, {*tensors, *results, *op.locals}),
            ("zeroed", op.zeroed, results),
            ("gradients", op.gradients, tensors),
            ("autocast", op.autocast, tensors),
            ("folds", () if op.folds is None else inspect.signature(op.folds).parameters, set(self.arguments)),
        ):
            for name in names:
                if name not in known:
                    raise ImportError(f"topgather: {self.name}: {part} names {name!r}, which the op does not have")

    def _signature(self, source: _Source, first: str = "") -> str:
        parts = [first] if first else []
        for argument in self.overload._schema.arguments:
            if argument.kwarg_only and "*" not in parts:
                parts.append("*")
            text = argument.name
            if argument.has_default_value():
                text += f"={source.bound(argument.default_value, 'default')}"
            parts.append(text)
        return ", ".join(parts)

    def _returned(self) -> str:
        return self.results[0] if len(self.results) == 1 else _tuple_of(self.results) if self.results else "None"

    def _refuse_none(self, source: _Source) -> None:
        """Torch hands on None for any tensor. Whatever it calls first says that a tensor is needed."""
        needed = [name for name in self.tensors if not self._is_optional(name)]
        source.globals["refuse_none"] = refuse_none
        is_none = " or ".join(f"{name} is None" for name in needed)
        source.line(f"if {is_none}: refuse_none({', '.join(f'{name}={name}' for name in needed)})")

    # --- kernels ----------------------------------------------------------------------------------------------------

    def kernel(self, device: str) -> Function:
        """The kernel of the dispatcher's CPU or CUDA key."""
        op, source = self.op, _Source(self.name)
        source.line(f"def {device}_kernel({self._signature(source)}):", 0)
        names = dict(self.here)
        self._refuse_none(source)
        self._check_once(source)
        extra_check = op.check_content if device == "cpu" else op.cuda_check
        if extra_check is not None:
            source.line(source.call(extra_check, names))
        self._keep_apart(source)
        if device == "cuda" and op.composed_on_cuda is not None:
            source.line(f"composed = {source.call(op.composed_on_cuda, names)}")
            source.line(f"if composed is not None: return{' composed' if self.results else ''}")
        for name, function in op.locals.items():
            source.line(f"{name} = {source.call(function, names)}")
            names[name] = name
        if op.composed is not None:
            source.line(f"return {source.call(op.composed, names)}")
            return source.compiled(f"{device}_kernel")
        if self.results:
            source.line(f"{self._returned()} = {source.call(op.results, names)}")
        for name in op.zeroed if device == "cpu" else ():
            source.line(f"{name}.zero_()")
        given = {**names, **{name: name for name in self.results}}
        for name, function in op.inputs.items():
            is_optional = name in self.arguments and self._is_optional(name)
            made = source.call(function, {**names, "tensor": name, "on_cuda": str(device == "cuda")})
            source.line(f"native_{name} = {f'None if {name} is None else ' if is_optional else ''}{made}")
            given[name] = f"native_{name}"
        native = op.native or self.name
        try:
            fields = _native.argument_names[f"{native}_cpu"]
            aligned = _native.aligned_arguments[native]
        except KeyError:
            raise ImportError(f"topgather: {self.name}: the native module has no entry point {native}") from None
        given["num_threads"] = f"{source.bound(torch.get_num_threads, 'num_threads')}()" if device == "cpu" else "1"
        for name in fields:
            if name not in given:
                raise ImportError(
                    f"topgather: {self.name}: the native entry point {native} has a field {name!r}, which is no "
                    f"argument, result or local of the op"
                )
        if device == "cuda":
            align = source.bound(cuda.aligned, "aligned")
            for name in aligned:
                source.line(f"native_{name} = {align}({given[name]})")
                given[name] = f"native_{name}"
        passed = [given[name] for name in fields]
        if not reads_tensors:
            view = source.bound(describe, "describe")
            passed = [f"{view}({argument})" for argument in passed]
        fields_text = ", ".join(passed)
        if device == "cpu":
            source.line(f"{source.bound(getattr(_native, f'{native}_cpu'), native)}({fields_text})")
        else:
            run = source.bound(cuda.runner(native), "run")
            source.line(f"{run}({self.tensors[0]}, {fields_text})")
        source.line(f"return {self._returned()}")
        return source.compiled(f"{device}_kernel")

    def _keep_apart(self, source: _Source) -> None:
        """Copy what shares memory with an argument that the op writes: it would change while it is read."""
        if not self.written:
            return
        source.line(f"memory = {source.bound(tensors.memory_of, 'memory_of')}({', '.join(self.written)})")
        apart = source.bound(tensors.apart, "apart")
        for name in self.tensors:
            if name not in self.written:
                condition = f"if {name} is not None: " if self._is_optional(name) else ""
                source.line(f"{condition}{name} = {apart}({name}, memory)")

    def _check_once(self, source: _Source) -> None:
        """Check what shapes, strides, dtypes, devices and options say, unless a call with the same was checked."""
        parts = []
        for name in self.arguments:
            if name in self.tensors:
                part = f"{name}.shape, {name}.stride(), {name}.dtype, {name}.device"
                parts.append(f"None if {name} is None else ({part})" if self._is_optional(name) else part)
            else:
                parts.append(name)
        accepted: set[Any] = set()
        source.globals["accepted"] = accepted
        source.line(f"signature = ({', '.join(parts)},)")
        source.line("if signature not in accepted:")
        self._checks(source, 2)
        source.line(f"if len(accepted) >= {MAX_ACCEPTED}: accepted.clear()", 2)
        source.line("accepted.add(signature)", 2)

    def _checks(self, source: _Source, indent: int) -> None:
        for name in self.arguments:
            if name in checks.OPTIONS:
                source.line(f"{source.bound(checks.OPTIONS[name], f'check_{name}')}({name})", indent)
        source.line(source.call(self.op.check, self.here), indent)

    def _is_optional(self, name: str) -> bool:
        return name in self.tensors and _may_be_none(self.name)[name]

    def fake(self) -> Function:
        """What shapes, dtypes and strides the op returns, for tracing and the meta device."""
        source = _Source(self.name)
        source.line(f"def fake_kernel({self._signature(source)}):", 0)
        self._refuse_none(source)
        source.line(f"{source.bound(refuse_onnx, 'refuse_onnx')}({self.name!r})")
        self._checks(source, 1)
        if self.results:
            source.line(f"return {source.call(self.op.fake_results or self.op.results, self.here)}")
        return source.compiled("fake_kernel")

    def caller(self) -> Function:
        """The op: its CPU kernel where nothing stands between, else past its autograd registration or through it.

        That registration is Python: some microseconds a call, and tens of them where its code has left the caches.
        Under transforms of torch.func a wrapped tensor does not tell what the tensor inside requires.
        """
        source = _Source(self.name)
        source.globals |= {"op": self.overload, **_STATE}
        conditions = ["is_compiling()", "transforms_active()", "in_forward_mode()"]
        op = self.op
        if op.backward is not None or op.derivative_of is not None or op.not_differentiable is not None:
            conditions.append(self._records())
        source.line(f"def {self.name}({self._signature(source)}):", 0)
        source.line(f"if {' or '.join(conditions)}: return op({self.passed})")
        is_direct = None if self.written else direct.condition(self.overload._schema.arguments, self.tensors)
        if is_direct is not None:
            source.globals |= {"kernel": CPU_KERNELS[self.name], **direct.NAMES}
            source.line(f"if {is_direct}: return kernel({self.passed})")
        source.line("with below_autograd():")
        source.line(f"return op({self.passed})", 2)
        return source.compiled(self.name)

    def _records(self) -> str:
        """Whether a call is to be differentiated in reverse mode."""
        needs = [
            f"({name} is not None and {name}.requires_grad)" if self._is_optional(name) else f"{name}.requires_grad"
            for name in self.tensors
        ]
        return f"(is_grad_enabled() and ({' or '.join(needs)}))"

    # --- differentiation --------------------------------------------------------------------------------------------

    def autograd(self) -> Function:
        """The kernel of the dispatcher's Autograd key."""
        op, source = self.op, _Source(self.name)
        source.globals |= {"op": self.overload, "one_level": enable_single_level_autograd_function, **_STATE}
        source.line(f"def autograd_kernel({self._signature(source)}):", 0)
        self._refuse_none(source)
        arguments = ", ".join(self.arguments)
        if op.not_differentiable is not None:
            source.globals |= {
                "advice": op.not_differentiable,
                "refuse_gradient": transforms.refuse_gradient,
                "refuse_tangent": transforms.refuse_tangent,
            }
            named = ", ".join(f"{name}={name}" for name in self.tensors)
            source.line(f"if {self._records()}: refuse_gradient(advice, {named})")
            source.line(f"if in_forward_mode(): refuse_tangent(advice, {named})")
        if op.backward is not None or op.derivative_of is not None:
            source.globals |= dict(zip(("Plain", "OneLevel"), self._functions(), strict=True))
            source.line("if transforms_active():")
            source.line("with one_level():", 2)
            source.line(f"return OneLevel.apply({arguments})", 3)
            source.line(f"if in_forward_mode() or {self._records()}:")
            source.line(f"return Plain.apply({arguments})", 2)
        source.line("with below_autograd():")
        source.line(f"return op({self.passed})", 2)
        return source.compiled("autograd_kernel")

    def count_versions(self) -> Function:
        """The kernel that counts up the versions of what the op writes, as torch's own in-place ops do."""
        source = _Source(self.name)
        source.globals |= {
            "op": self.overload,
            "below": torch._C._AutoDispatchBelowADInplaceOrView,
            "increment_version": torch.autograd.graph.increment_version,
        }
        source.line(f"def count_versions({self._signature(source)}):", 0)
        source.line("with below():")
        source.line(f"result = op({self.passed})", 2)
        for name in self.written:
            condition = f"if {name} is not None: " if self._is_optional(name) else ""
            source.line(f"{condition}increment_version({name})")
        source.line("return result")
        return source.compiled("count_versions")

    def _functions(self) -> tuple[type, type]:
        """Two ``autograd.Function``: one for plain calls, one for a level of torch.func's transforms.

        The dispatcher calls an Autograd kernel once a level, as it calls torch's own, and what the kernel calls in turn
        goes to the levels below.
        """
        forward, backward, forward_mode = self._forward(), self._backward(), self._forward_mode()

        def forward_of_level(ctx: Any, *inputs: Any) -> Any:
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return forward(ctx, *inputs)

        methods = {"backward": staticmethod(backward), "jvp": staticmethod(forward_mode)}
        make: Any = type(torch.autograd.Function)
        return (
            make(self.name, (torch.autograd.Function,), {"forward": staticmethod(forward), **methods}),
            make(
                f"{self.name}_level",
                (torch.autograd.function._SingleLevelFunction,),
                {"forward": staticmethod(forward_of_level), **methods},
            ),
        )

    def _backward_parameters(self) -> tuple[list[str], dict[str, bool], Function]:
        """The parameters of the backward, the names it asks for with whether each may be None, and what to call."""
        backward = self.op.backward
        if isinstance(backward, str):
            optional = _may_be_none(backward)
            return list(optional), optional, getattr(torch.ops.topgather, backward).default
        if backward is None:
            owner = self.op.derivative_of

            def refuse(name: str | None = owner) -> None:
                raise RuntimeError(f"topgather: {name}{NO_SECOND_DERIVATIVE}")

            parameters = [owner] if owner in self.arguments else []
            return parameters, dict.fromkeys(parameters, False), refuse
        optional = {}
        signature = inspect.signature(backward).parameters
        for name, parameter in signature.items():
            optional |= _may_be_none(name) if name in OPS else {name: "None" in str(parameter.annotation)}
        return list(signature), optional, backward

    def _saved(self) -> tuple[list[str], list[str]]:
        """Tensors, and other values, that the backward and the forward mode ask for."""
        asked = list(self._backward_parameters()[1])
        if self.op.forward_mode is not None:
            asked = [*asked, *inspect.signature(self.op.forward_mode).parameters]
        known = [*self.arguments, *self.results]
        tensors = [name for name in dict.fromkeys(asked) if name in self.tensors or name in self.results]
        options = [
            name
            for name in dict.fromkeys(asked)
            if (name in known and name not in tensors)
            or (name.removesuffix("_meta") in self.tensors and name not in tensors)
        ]
        return tensors, options

    def _may_save_nothing(self, tensors: list[str]) -> bool:
        """Whether a call may leave out all of them: then its backward may be repeated."""
        return bool(tensors) and all(name in self.arguments and self._is_optional(name) for name in tensors)

    def _saved_tensors(self, tensors: list[str]) -> str:
        if not self._may_save_nothing(tensors):
            return "ctx.saved_tensors"
        return f"ctx.saved_tensors if ctx.has_saved else {_tuple_of(['None'] * len(tensors))}"

    def _differentiable_results(self) -> list[str]:
        asked = self._backward_parameters()[1]
        return [name for name in self.results if f"grad_{name}" in asked]

    def _forward(self) -> Function:
        """The op, and what its backward and its forward mode ask for, kept."""
        source = _Source(self.name)
        tensors, options = self._saved()
        source.globals |= {"op": self.overload, "below_autograd": below_autograd, "meta_of": meta_of}
        source.line(f"def forward(ctx, {', '.join(self.arguments)}):", 0)
        source.line("with below_autograd():")
        source.line(f"output = op({self.passed})", 2)
        if self.results:
            source.line(f"{self._returned()} = output")
        saving = [f"ctx.save_for_backward({', '.join(tensors)})"]
        if self.op.forward_mode is not None:
            saving.append(f"ctx.save_for_forward({', '.join(tensors)})")
        if self._may_save_nothing(tensors):
            source.line(f"ctx.has_saved = {' or '.join(f'{name} is not None' for name in tensors)}")
            saving = [f"if ctx.has_saved: {line}" for line in saving]
        for line in saving:
            source.line(line)
        values = [f"meta_of({name.removesuffix('_meta')})" if name.endswith("_meta") else name for name in options]
        source.line(f"ctx.options = {_tuple_of(values)}")
        fixed = [name for name in self.results if name not in self._differentiable_results()]
        if fixed and self.op.derivative_of is None:
            source.line(f"ctx.mark_non_differentiable({', '.join(fixed)})")
        source.line("ctx.set_materialize_grads(False)")
        source.line("return output")
        return source.compiled("forward")

    def _backward(self) -> Function:
        op, source = self.op, _Source(self.name)
        parameters, optional, function = self._backward_parameters()
        saved, options = self._saved()
        source.globals |= {"zeros_like": torch.zeros_like, "function": function}
        source.line(f"def backward(ctx, {', '.join(f'grad_{name}' for name in self.results)}):", 0)
        nothing = "return " + _tuple_of(["None"] * len(self.arguments))
        differentiable = self._differentiable_results()
        if differentiable:
            source.line(f"if {' and '.join(f'grad_{name} is None' for name in differentiable)}: {nothing}")
        if saved:
            source.line(f"{_tuple_of(saved)} = {self._saved_tensors(saved)}")
            # Hooks of saved tensors may have laid them out anew, which is not the caller's affair.
            source.globals |= {"contiguous_rows": tensors.contiguous_rows, "is_compiling": torch.compiler.is_compiling}
            source.line("if not is_compiling():")
            for name in saved:
                source.line(f"if {name} is not None and {name}.stride(-1) != 1: {name} = contiguous_rows({name})", 2)
        if options:
            source.line(f"{_tuple_of(options)} = ctx.options")
        position = {name: index for index, name in enumerate(self.arguments)}
        values = {name: name for name in optional}
        for name in optional:
            if name.startswith("needs_grad_"):
                values[name] = f"ctx.needs_input_grad[{position[name.removeprefix('needs_grad_')]}]"
                continue
            result = name.removeprefix("grad_")
            if result in differentiable and result != name and len(differentiable) > 1 and not optional[name]:
                source.line(f"if grad_{result} is None: grad_{result} = zeros_like({result})")
            elif not (result in differentiable and result != name) and name not in (*saved, *options):
                raise ImportError(f"topgather: {self.name}: its backward asks for {name!r}, which nothing gives")
        for name in parameters:
            if name not in values:
                takes = list(_may_be_none(name))
                op_called = source.bound(getattr(torch.ops.topgather, name).default, name)
                defaults = ", ".join(f"{argument}={values[argument]}" for argument in takes)
                source.line(f"{name} = lambda {defaults}: {op_called}({', '.join(takes)})")
                values[name] = name
        given = list(op.gradients)
        if isinstance(op.backward, str):
            schema = getattr(torch.ops.topgather, op.backward).default._schema
            given = [result.name.removeprefix("grad_") for result in schema.returns]
        call = f"function({', '.join(values[name] for name in parameters)})"
        if not given:
            source.line(call)
            source.line(nothing)
            return source.compiled("backward")
        source.line(f"{_tuple_of(f'gradient_{name}' for name in given)} = {call}")
        for name in given:
            dtype = f"{name}_meta.dtype" if f"{name}_meta" in options else f"{name}.dtype"
            unknown = f"not ctx.needs_input_grad[{position[name]}]"
            source.line(f"if {unknown} or gradient_{name} is None: gradient_{name} = None")
            if name in saved or f"{name}_meta" in options:
                source.line(f"elif gradient_{name}.dtype != {dtype}: gradient_{name} = gradient_{name}.to({dtype})")
        source.line("return " + _tuple_of(f"gradient_{name}" if name in given else "None" for name in self.arguments))
        return source.compiled("backward")

    def _forward_mode(self) -> Function:
        op, source = self.op, _Source(self.name)
        saved, options = self._saved()
        tangents = [f"tangent_{name}" if name in self.tensors else "_" + name for name in self.arguments]
        if op.forward_mode is None:
            owner = op.derivative_of or self.name
            message = NO_FORWARD_MODE if op.derivative_of is None else NO_SECOND_DERIVATIVE + NOR_FORWARD
            source.line(f"def forward_mode(ctx, {', '.join(tangents)}):", 0)
            if owner in options:
                source.line(f"{_tuple_of(options)} = ctx.options")
            name = owner if owner in options else repr(owner)
            source.line(f"raise NotImplementedError('topgather: ' + {name} + {source.bound(message, 'message')})")
            return source.compiled("forward_mode")
        source.line(f"def forward_mode(ctx, {', '.join(tangents)}):", 0)
        source.line(f"{_tuple_of(saved)} = {self._saved_tensors(saved)}")
        if options:
            source.line(f"{_tuple_of(options)} = ctx.options")
        names = {name: name for name in (*saved, *options, *tangents)}
        source.line(f"return {source.call(op.forward_mode, names)}")
        return source.compiled("forward_mode")

    def autocast(self, device_type: str, key: str) -> Function:
        """The kernel of an autocast key: the op on what the rules make of its arguments."""
        source = _Source(self.name)
        excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        source.globals |= {
            "op": self.overload,
            "without": torch._C._ExcludeDispatchKeyGuard,
            "excluded": excluded,
            "device_type": device_type,
        }
        source.line(f"def autocast_kernel({self._signature(source)}):", 0)
        self._refuse_none(source)
        for name, rule in self.op.autocast.items():
            made = source.call(rule, {**self.here, "tensor": name, "device_type": "device_type"})
            source.line(f"if {name} is not None: {name} = {made}")
        source.line("with without(excluded):")
        source.line(f"return op({self.passed})", 2)
        return source.compiled("autocast_kernel")
