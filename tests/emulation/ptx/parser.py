"""Text to functions, and a kernel to one flat list of instructions.

Calls are inlined: the callee's body stands in the list once per call, with names of its own, so that a thread's place
is one number. Every variable gets an address in its state space, and operands that name a variable become
that address.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from .scalar_types import TYPES, PtxError, collecting_no_garbage

# Where the state spaces begin. Shared memory starts neither at 0 nor on a rounder address than asked for, so that a
# kernel that assumes so fails. In the generic space the upper four bits tell the spaces apart; addresses of the host's
# memory have none of them set.
SHARED_START = 1040
LOCAL_START = 256
PARAM_START = 1 << 24
SHARED_WINDOW = 1 << 60
LOCAL_WINDOW = 2 << 60
PARAM_WINDOW = 3 << 60
MODULE_START = 4 << 60
MAX_CALL_DEPTH = 32


@dataclass(frozen=True)
class Register:
    name: str
    is_negated: bool = False


@dataclass(frozen=True)
class Immediate:
    text: str


@dataclass(frozen=True)
class Address:
    """``[base+offset]``; without a base, a fixed address."""

    base: Register | None
    offset: int


@dataclass(frozen=True)
class Vector:
    """``{a, b}``; None stands for ``_``, a result nobody wants."""

    elements: tuple["Register | Immediate | None", ...]


@dataclass(frozen=True)
class Pair:
    """``a|b``, two results of one instruction."""

    first: Register | None
    second: Register | None


@dataclass(frozen=True)
class Label:
    name: str


Operand = Register | Immediate | Address | Vector | Pair | Label


@dataclass
class Instruction:
    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: Register | None
    text: str

    @property
    def root(self) -> str:
        return self.opcode[0]

    @property
    def modifiers(self) -> tuple[str, ...]:
        return self.opcode[1:]


@dataclass(frozen=True)
class Variable:
    name: str
    space: str
    align: int
    num_bytes: int
    initial: bytes = b""


@dataclass(eq=False)
class Function:
    name: str
    is_entry: bool
    results: list[Variable]
    parameters: list[Variable]
    text: str

    @cached_property
    def body(self) -> list[str]:
        """Statements, labels and braces; cut when first asked for, since a file holds more kernels than a run needs."""
        return list(_pieces(self.text))


@dataclass(eq=False)
class Kernel:
    """An entry, ready to be decoded: instructions, where labels point, registers and how much memory it needs."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    branch_targets: dict[str, list[str]] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    param_bytes: int = 0
    local_bytes: int = LOCAL_START
    static_shared_end: int = SHARED_START
    dynamic_shared_start: int = SHARED_START
    module_data: dict[int, bytes] = field(default_factory=dict)


@dataclass
class Module:
    """What one PTX file holds."""

    functions: dict[str, Function]
    variables: dict[str, Variable]
    kernels: dict[str, Kernel] = field(default_factory=dict)

    @property
    def entries(self) -> list[str]:
        return [function.name for function in self.functions.values() if function.is_entry]

    def kernel(self, name: str) -> Kernel:
        """The entry of this name, flattened; kept for the next launch."""
        if name not in self.kernels:
            if name not in self.functions or not self.functions[name].is_entry:
                raise PtxError(f"no entry {name}; there are {', '.join(self.entries) or 'none'}")
            with collecting_no_garbage():
                self.kernels[name] = _Flattener(self, self.functions[name]).flatten()
        return self.kernels[name]


_SPACES = "param|local|shared|global|const"
_HEADING = re.compile(r"(?:\.(?:visible|weak|extern|common)\s+)*\.(entry|func)\b")
_LINE = re.compile(r"\.(?:version|target|address_size|file|loc)\b[^\n]*")
_LABEL = re.compile(r"([$%\w.]+)\s*:(?!:)")
_VARIABLE = re.compile(
    rf"(?:\.(?:visible|weak|extern|common)\s+)*\.({_SPACES})\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    rf"(?:\.ptr\s+(?:\.(?:{_SPACES})\s+)?(?:\.align\s+\d+\s+)?)?([$%\w]+)\s*(?:\[(\d*)\])?\s*(?:=\s*(.*))?$",
    re.DOTALL,
)
_BLANK = re.compile(r"[\s;]*")
_STATEMENT_END = re.compile(r";")
_HEADING_END = re.compile(r"[{;]")
_BRACE = re.compile(r"[{}]")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)$", re.DOTALL)


def _pieces(text: str) -> Iterator[str]:
    """Cut text into statements, labels (``name:``) and the braces that open and close scopes.

    A function is one piece: its heading, which stops before the body, then the body in braces.
    """
    at = 0
    while True:
        at = _BLANK.match(text, at).end()  # type: ignore[union-attr]
        if at == len(text):
            return
        if text[at] in "{}":
            yield text[at]
            at += 1
            continue
        found = _LINE.match(text, at) or _LABEL.match(text, at)
        if found:
            yield found.group().strip()
            at = found.end()
            continue
        # A heading ends where its body begins; in any other statement a brace belongs to an operand or a value.
        end = (_HEADING_END if _HEADING.match(text, at) else _STATEMENT_END).search(text, at)
        stop = end.start() if end else len(text)
        yield " ".join(text[at:stop].split())
        at = stop
        if end and end.group() == "{":
            after = _after_braces(text, at)
            yield text[at:after]
            at = after


def _after_braces(text: str, at: int) -> int:
    """One past the brace that closes the one at ``at``."""
    depth = 0
    for found in _BRACE.finditer(text, at):
        depth += 1 if found.group() == "{" else -1
        if depth == 0:
            return found.end()
    raise PtxError(f"a brace is never closed: {text[at : at + 80]}")


def parse_module(text: str) -> Module:
    """Read the text of a PTX file."""
    text = re.sub(r"/\*.*?\*/", " ", re.sub(r"//[^\n]*", "", text), flags=re.DOTALL)
    module = Module({}, {})
    heading = ""
    for piece in _pieces(text):
        if piece.startswith("{") and heading:
            _add_function(module, heading, piece[1:-1])
            heading = ""
            continue
        if heading:
            _add_function(module, heading, "")  # declared here, defined elsewhere
            heading = ""
        if _LINE.match(piece) or piece.startswith((".alias", ".pragma")):
            continue
        if _HEADING.match(piece):
            heading = piece
        elif _VARIABLE.match(piece):
            variable = _parse_variable(piece)
            module.variables[variable.name] = variable
        else:
            raise PtxError(f"unknown directive: {piece}")
    return module


def _add_function(module: Module, heading: str, body: str) -> None:
    kind, lists, name = _split_heading(heading)
    module.functions[name] = Function(name, kind == "entry", lists[0], lists[1], body)


def _split_heading(heading: str) -> tuple[str, tuple[list[Variable], list[Variable]], str]:
    found = re.match(rf"{_HEADING.pattern}\s*(?:\((.*?)\))?\s*([$%\w]+)\s*(?:\((.*?)\))?", heading)
    if not found:
        raise PtxError(f"not the heading of a function: {heading}")
    kind, results, name, parameters = found.groups()
    lists = tuple(
        [_parse_variable(item.strip()) for item in (items or "").split(",") if item.strip()]
        for items in (results, parameters)
    )
    return kind, (lists[0], lists[1]), name


def _parse_variable(text: str) -> Variable:
    found = _VARIABLE.match(text)
    if not found:
        raise PtxError(f"not a variable: {text}")
    space, align, type_name, name, count, value = found.groups()
    width = TYPES[type_name].num_bytes
    num_elements = 1 if count is None else int(count or 0)
    initial = b"" if value is None else _initial_bytes(value, type_name)
    return Variable(name, space, int(align or width), width * num_elements, initial)


def _initial_bytes(value: str, type_name: str) -> bytes:
    scalar = TYPES[type_name]
    data = b""
    for item in re.findall(r"[^\s,{}]+", value):
        if item[:2] in ("0f", "0F", "0d", "0D"):
            number = int(item[2:], 16)
        elif scalar.is_float:
            number = int.from_bytes(struct.pack({32: "<f", 64: "<d"}[scalar.bits], float(item)), "little")
        elif re.fullmatch(r"-?\w+", item) and item.lstrip("-")[0].isdigit():
            number = int(item.rstrip("U"), 0)
        else:
            raise PtxError(f"the initial value {item} is not a number")
        data += (number & ((1 << scalar.bits) - 1)).to_bytes(scalar.num_bytes, "little")
    return data


@dataclass
class _Scope:
    """What names mean inside one pair of braces."""

    registers: dict[str, str] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    operands: dict[str, Operand] = field(default_factory=dict)  # read before, which most were


def _align(offset: int, align: int) -> int:
    return -(-offset // align) * align


class _Flattener:
    """Turns an entry and what it calls into one list of instructions."""

    def __init__(self, module: Module, entry: Function) -> None:
        self._module = module
        self._entry = entry
        self._kernel = Kernel(entry.name)
        self._num_names = 0
        self._module_addresses: dict[str, int] = {}
        self._module_end = MODULE_START
        self._shared_addresses: dict[tuple[str, str], int] = {}
        self._dynamic_align = 16

    def flatten(self) -> Kernel:
        """The whole kernel."""
        # Dynamic shared memory follows the static variables, so those are placed first.
        self._place_static_shared(self._entry, 0)
        self._kernel.dynamic_shared_start = _align(self._kernel.static_shared_end, self._dynamic_align)
        scope = _Scope()
        offset = 0
        for parameter in self._entry.parameters:
            offset = _align(offset, parameter.align)
            scope.addresses[parameter.name] = PARAM_START + offset
            offset += parameter.num_bytes
        self._kernel.param_bytes = offset
        self._emit_body(self._entry, scope, depth=0, return_label=None)
        return self._kernel

    def _place_static_shared(self, function: Function, depth: int) -> None:
        if depth > MAX_CALL_DEPTH:
            raise PtxError(f"{function.name} calls itself")
        named = set(re.findall(r"[$%\w]+", " ".join(function.body)))
        for name, variable in self._module.variables.items():
            if variable.space == "shared" and variable.num_bytes == 0 and name in named:
                self._dynamic_align = max(self._dynamic_align, variable.align)
            elif variable.space == "shared" and name in named and name not in self._module_addresses:
                self._module_addresses[name] = self._place_shared(variable)
        for piece in function.body:
            if piece.startswith(".shared"):
                variable = _parse_variable(piece)
                if (function.name, variable.name) not in self._shared_addresses:
                    self._shared_addresses[function.name, variable.name] = self._place_shared(variable)
        for name in named & self._module.functions.keys():
            self._place_static_shared(self._module.functions[name], depth + 1)

    def _place_shared(self, variable: Variable) -> int:
        address = _align(self._kernel.static_shared_end, variable.align)
        self._kernel.static_shared_end = address + variable.num_bytes
        return address

    def _place_local(self, variable: Variable) -> int:
        address = _align(self._kernel.local_bytes, variable.align)
        self._kernel.local_bytes = address + variable.num_bytes
        return address

    def _place_in_module(self, name: str) -> int:
        """The address of a variable outside all functions."""
        variable = self._module.variables[name]
        if variable.space == "shared" and variable.num_bytes == 0:
            return self._kernel.dynamic_shared_start
        if name not in self._module_addresses:
            address = _align(self._module_end, max(variable.align, 16))
            self._module_end = address + variable.num_bytes
            self._module_addresses[name] = address
            self._kernel.module_data[address] = variable.initial.ljust(variable.num_bytes, b"\0")
        return self._module_addresses[name]

    def _fresh(self, name: str) -> str:
        self._num_names += 1
        return f"{name}#{self._num_names}"

    def _emit_body(self, function: Function, outer: _Scope, depth: int, return_label: str | None) -> None:
        if depth > MAX_CALL_DEPTH:
            raise PtxError(f"{function.name} calls itself")
        scopes = [outer, _Scope()]
        # Labels are seen before they are declared: every one of the body gets its name first.
        for piece in function.body:
            found = _LABEL.fullmatch(piece)
            if found:
                scopes[1].labels[found.group(1)] = self._fresh(found.group(1))
        last_label = ""
        for piece in function.body:
            label = _LABEL.fullmatch(piece)
            if piece == "{":
                scopes.append(_Scope())
            elif piece == "}":
                scopes.pop()
            elif label:
                last_label = scopes[1].labels[label.group(1)]
                self._kernel.labels[last_label] = len(self._kernel.instructions)
            elif piece.startswith(".reg"):
                self._declare_registers(piece, scopes[-1])
            elif piece.startswith((".local", ".param", ".shared")):
                variable = _parse_variable(piece)
                scopes[-1].operands.clear()
                if variable.space == "shared":
                    scopes[-1].addresses[variable.name] = self._shared_addresses[function.name, variable.name]
                else:
                    scopes[-1].addresses[variable.name] = self._place_local(variable)
            elif piece.startswith(".branchtargets"):
                names = piece.removeprefix(".branchtargets").split(",")
                self._kernel.branch_targets[last_label] = [scopes[1].labels[name.strip()] for name in names]
            elif not piece.startswith((".loc", ".pragma")):
                self._emit(piece, scopes, depth, return_label)

    def _declare_registers(self, text: str, scope: _Scope) -> None:
        found = _REGISTERS.match(text)
        if not found or found.group(1) not in TYPES:
            raise PtxError(f"unknown registers: {text}")
        for item in found.group(2).split(","):
            name, _, count = item.strip().rstrip(">").partition("<")
            names = [f"{name}{i}" for i in range(int(count))] if count else [name]
            for each in names:
                scope.registers[each] = self._fresh(each)
                self._kernel.registers[scope.registers[each]] = found.group(1)
        scope.operands.clear()

    def _emit(self, text: str, scopes: list[_Scope], depth: int, return_label: str | None) -> None:
        predicate = None
        body = text
        guard = re.match(r"@(!?)([$%\w]+)\s+", text)
        if guard:
            predicate = Register(self._register(guard.group(2), scopes, text), bool(guard.group(1)))
            body = text[guard.end() :]
        opcode_text, _, rest = body.partition(" ")
        opcode = tuple(opcode_text.split("."))
        if opcode[0] == "call":
            if predicate:
                raise PtxError(f"a call under a predicate: {text}")
            self._inline(rest, text, scopes, depth)
        elif opcode[0] == "ret" and return_label is not None:
            self._kernel.instructions.append(Instruction(("bra",), (Label(return_label),), predicate, text))
        else:
            items = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+(?:\s*\|\s*[^,\s]+)?", rest)
            known = scopes[-1].operands
            operands = tuple(known.get(item) or self._operand(item, scopes, text) for item in items)
            self._kernel.instructions.append(Instruction(opcode, operands, predicate, text))

    def _inline(self, rest: str, text: str, scopes: list[_Scope], depth: int) -> None:
        found = re.fullmatch(r"(?:\((.*?)\)\s*,\s*)?([$%\w]+)\s*(?:,\s*\((.*?)\)\s*)?", rest.strip())
        if not found:
            raise PtxError(f"an indirect call: {text}")
        function = self._module.functions.get(found.group(2))
        if function is None or not function.text:
            raise PtxError(f"{found.group(2)} is called but not defined: {text}")
        formal = function.results + function.parameters
        given = [name.strip() for group in (1, 3) for name in (found.group(group) or "").split(",") if name.strip()]
        if len(formal) != len(given):
            raise PtxError(f"wrong number of arguments: {text}")
        scope = _Scope()
        for variable, name in zip(formal, given, strict=True):
            address = self._find(name, scopes, "addresses")
            if not isinstance(address, int):
                raise PtxError(f"no variable {name}: {text}")
            scope.addresses[variable.name] = address
        return_label = self._fresh("return")
        self._emit_body(function, scope, depth + 1, return_label)
        self._kernel.labels[return_label] = len(self._kernel.instructions)

    @staticmethod
    def _find(name: str, scopes: list[_Scope], table: str) -> str | int | None:
        for scope in reversed(scopes):
            if name in getattr(scope, table):
                return getattr(scope, table)[name]
        return None

    def _register(self, name: str, scopes: list[_Scope], text: str) -> str:
        found = self._find(name, scopes, "registers")
        if isinstance(found, str):
            return found
        if name.startswith("%"):
            return name  # a special register: the decoder knows it, or refuses
        raise PtxError(f"{name} is not declared: {text}")

    def _operand(self, item: str, scopes: list[_Scope], text: str) -> Operand:
        operand = self._new_operand(item.strip(), scopes, text)
        scopes[-1].operands[item] = operand
        return operand

    def _new_operand(self, item: str, scopes: list[_Scope], text: str) -> Operand:
        if item.startswith("{"):
            names = [name.strip() for name in item.strip("{}").split(",")]
            return Vector(tuple(None if name == "_" else self._simple(name, scopes, text) for name in names))
        if item.startswith("["):
            return self._address(item.strip("[]"), scopes, text)
        if "|" in item:
            first, second = (part.strip() for part in item.split("|"))
            names_or_none = [None if name == "_" else self._register(name, scopes, text) for name in (first, second)]
            return Pair(*(None if name is None else Register(name) for name in names_or_none))
        if self._find(item, scopes, "labels") is not None:
            return Label(str(self._find(item, scopes, "labels")))
        return self._simple(item, scopes, text)

    def _simple(self, item: str, scopes: list[_Scope], text: str) -> Register | Immediate:
        name = item.removeprefix("!")
        if isinstance(self._find(name, scopes, "registers"), str) or name.startswith("%"):
            return Register(self._register(name, scopes, text), item.startswith("!"))
        address = self._symbol(item, scopes)
        if address is not None:
            return Immediate(str(address))
        if not re.match(r"-?\d", item):
            raise PtxError(f"unknown operand {item}: {text}")
        return Immediate(item)

    def _symbol(self, item: str, scopes: list[_Scope]) -> int | None:
        """The address of ``name`` or ``name+offset``."""
        name, _, offset = item.partition("+")
        address = self._find(name.strip(), scopes, "addresses")
        if address is None and name.strip() in self._module.variables:
            address = self._place_in_module(name.strip())
        return None if address is None else int(address) + (int(offset, 0) if offset else 0)

    def _address(self, item: str, scopes: list[_Scope], text: str) -> Address:
        name, _, offset_text = item.partition("+")
        offset = int(offset_text, 0) if offset_text else 0
        base = self._simple(name.strip(), scopes, text)
        if isinstance(base, Register):
            return Address(base, offset)
        return Address(None, int(base.text, 0) + offset)
