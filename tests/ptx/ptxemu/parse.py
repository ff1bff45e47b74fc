"""PTX text to a list of instructions over numbered registers."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

from . import native

_WIDTHS = {"pred": 1, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "b32": 32, "u32": 32, "s32": 32, "f32": 32,
           "b64": 64, "u64": 64, "s64": 64, "f64": 64}  # fmt: skip
_LETTERS = {"p": 1, "h": 16, "w": 32, "d": 64}
_SPECIAL = ("%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z",
            "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid")  # fmt: skip
# What a cache may do with an access changes no value.
_HINTS = re.compile(r"\.(L1::[a-z_]+|L2::[A-Za-z0-9_]+|nc|level::[a-z_]+|uni)\b")
_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_MEMORY = re.compile(r"(ld|st)\.(global|shared|param)(?:\.v([248]))?\.[busf](8|16|32|64)")
# Accesses by which blocks may wait for each other; those of a narrower scope than the grid are not known.
_STRONG = re.compile(
    r"(ld|st)\.(?:volatile|(relaxed|acquire|release)\.(?:gpu|sys))(?:\.global)?(?:\.v([248]))?\.[busf](8|16|32|64)"
)
_ATOMIC = re.compile(
    r"(atom|red)(?:\.(relaxed|acquire|release|acq_rel))?(?:\.(?:gpu|sys))?(?:\.global)?\.(\w+\.[busf](?:32|64))"
)
_FENCE = re.compile(r"(?:membar|fence(?:\.sc|\.acq_rel)?)(?:\.(?:(gl|gpu|sys)|(cta)))?")
_ORDERS = {None: 0, "relaxed": 0, "acquire": 1, "release": 2, "acq_rel": 3}
_MATRICES = re.compile(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16")
_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global")


class UnknownOpcode(NotImplementedError):
    """An opcode, or a form of one, that the executor does not know."""


@dataclass
class Instruction:
    """One instruction: table index, line of the text, guard, operands (register numbers, results first), numbers.

    ``source`` is the line of the source that it was compiled from, as ``file.py:12``, where the text says so.
    """

    name: str
    opcode: int
    line: int
    guard: int = -1
    negated: bool = False
    operands: list[int] = field(default_factory=list)
    results: int = 1
    numbers: tuple[int, ...] = ()
    target: str | None = None
    source: str = ""


@dataclass
class Program:
    """A kernel: its parameters as (offset, bytes), threads of a block, instructions, registers, constants."""

    name: str
    parameters: list[tuple[int, int]]
    threads: int
    code: list[Instruction]
    widths: list[int]
    constants: dict[int, int]
    special: list[int]
    has_shared: bool


def parse(ptx: str) -> Program:
    """The one kernel of ``ptx``.

    Raises:
        UnknownOpcode: an instruction that is not in the table; names it and its line.
        ValueError: the text is not what a PTX compiler emits.
    """
    return _Parser(ptx).program


class _Parser:
    def __init__(self, ptx: str) -> None:
        self.table = native.opcodes()
        self.numbers: dict[str, int] = {}
        self.widths: list[int] = []
        self.values: dict[tuple[int, int], int] = {}
        self.constants: dict[int, int] = {}
        self.labels: dict[str, int] = {}
        self.code: list[Instruction] = []
        self.shared: set[str] = set()
        self.scopes: list[dict[str, int]] = []
        self.line = 0
        self.source = ""
        self.files = {
            number: path.rsplit("/", 1)[-1] for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', ptx)
        }
        header, body, first = self._split(ptx)
        self.offsets: dict[str, int] = {}
        parameters = self._parameters(header)
        self._body(body, first)
        for instruction in self.code:
            if instruction.target is not None:
                if instruction.target not in self.labels:
                    raise ValueError(f"line {instruction.line}: no label {instruction.target}")
                instruction.numbers = (self.labels[instruction.target],)
        # NVRTC knows an upper bound alone (__launch_bounds__): a launch has as many.
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", header)
        if threads is None:
            raise ValueError(".reqntid or .maxntid: expected the threads of a block, which the executor needs")
        name = re.search(r"\.entry\s+([\w$]+)", header)
        assert name is not None
        special = [self.numbers.get(register, -1) for register in _SPECIAL]
        self.program = Program(name[1], parameters, int(threads[1]), self.code, self.widths, self.constants, special,
                               bool(self.shared))  # fmt: skip

    def _split(self, ptx: str) -> tuple[str, list[str], int]:
        lines = ptx.splitlines()
        entries = [n for n, line in enumerate(lines) if ".entry" in line]
        if len(entries) != 1:
            raise ValueError(f"ptx: expected one .entry, got {len(entries)}")
        opening = next(n for n in range(entries[0], len(lines)) if lines[n].strip() == "{")
        closing = next(n for n in range(opening, len(lines)) if lines[n].startswith("}"))
        for line in lines[: entries[0]]:
            if found := re.search(r"\.extern\s+\.shared\s+.*?([\w$]+)\[\]", line):
                self.shared.add(found[1])
        return "\n".join(lines[entries[0] : opening]), lines[opening + 1 : closing], opening + 2

    def _parameters(self, header: str) -> list[tuple[int, int]]:
        found, offset = [], 0
        form = r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.ptr[^,\n)]*?)?\s+([\w$]+)(?:\[(\d+)\])?\s*[,\n)]"
        for alignment, kind, name, count in re.findall(form, header):
            item = _WIDTHS["b" + kind[1:]] // 8 if kind[1:] != "8" else 1
            size = item * int(count or 1)  # an array is a struct that is passed by value
            whole = int(alignment or item)
            offset = -(-offset // whole) * whole
            self.offsets[name] = offset
            found.append((offset, size))
            offset += size
        return found

    def _body(self, lines: list[str], first: int) -> None:
        pending = ""
        for number, text in enumerate(lines, first):
            text = text.split("//")[0].strip()
            if text.startswith(".loc"):
                _, file, line, *_ = text.replace(",", " ").split()
                self.source = f"{self.files.get(file, file)}:{line}"
                continue
            if not pending:
                self.line = number
                if not text or text.startswith((".file", ".pragma")):
                    continue
                if found := re.fullmatch(r"([$\w]+):", text):
                    self.labels[found[1]] = len(self.code)
                    continue
            pending = f"{pending} {text}".strip()
            while pending:
                if pending[0] in "{}":
                    self.scopes.append({}) if pending[0] == "{" else self.scopes.pop()
                    pending = pending[1:].strip()
                elif ";" in pending:
                    statement, pending = (part.strip() for part in pending.split(";", 1))
                    self._statement(statement)
                    self.line = number
                else:
                    break

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()  # type: ignore[union-attr]
            for name in (part.strip() for part in names.split(",")):
                if found := re.fullmatch(r"(%\w+)<(\d+)>", name):
                    for k in range(int(found[2])):
                        self.numbers[f"{found[1]}{k}"] = self._register(_WIDTHS[kind])
                elif self.scopes:
                    self.scopes[-1][name] = self._register(_WIDTHS[kind])
                else:
                    self.numbers[name] = self._register(_WIDTHS[kind])
            return
        found = _STATEMENT.fullmatch(text)
        if found is None:
            raise ValueError(f"line {self.line}: cannot read {text!r}")
        negated, guard, name, rest = found.groups()
        name = _HINTS.sub("", name).replace("shared::cta", "shared").removesuffix(".uni")
        name = name.replace("cvta.to.global.", "mov.")  # a generic address of global memory is that address
        instruction = self._instruction(name, _operands(rest))
        if guard is not None:
            instruction.guard, instruction.negated = self._lookup(guard), negated == "!"
        instruction.source = self.source
        self.code.append(instruction)
        if found := re.fullmatch(r"ld\..*\.s(8|16|32)", name):
            self._extend_sign(instruction, int(found[1]))

    def _extend_sign(self, load: Instruction, bits: int) -> None:
        """A signed load into a wider register, which fills it, is a load and a conversion."""
        for register in load.operands[: load.results]:
            width = self.widths[register]
            if width > bits:
                opcode, source = f"cvt.s{width}.s{bits}", register
                size = _LETTERS[self.table[opcode].registers[1]]
                if size < width:  # the conversion takes a register of its own width
                    source = self._register(size)
                    self._follow(load, f"cvt.u{size}.u{width}", [source, register])
                self._follow(load, opcode, [register, source])

    def _follow(self, load: Instruction, opcode: str, operands: list[int]) -> None:
        index = self.table[opcode].index
        self.code.append(Instruction(opcode, index, load.line, load.guard, load.negated, operands, source=load.source))

    def _register(self, width: int) -> int:
        self.widths.append(width)
        return len(self.widths) - 1

    def _lookup(self, name: str) -> int:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        if name not in self.numbers:
            if name not in _SPECIAL:
                raise ValueError(f"line {self.line}: no register {name}")
            self.numbers[name] = self._register(32)
        return self.numbers[name]

    def _constant(self, bits: int, width: int) -> int:
        bits &= (1 << width) - 1
        if (bits, width) not in self.values:
            self.values[bits, width] = self._register(width)
            self.constants[self.values[bits, width]] = bits
        return self.values[bits, width]

    def _operand(self, text: str, width: int | None = None) -> int:
        """A register, or one that holds a constant of ``width`` bits."""
        if text.startswith("%") or any(text in scope for scope in self.scopes):
            register = self._lookup(text)
            if width is not None and self.widths[register] != width:
                raise UnknownOpcode(f"line {self.line}: {text} has {self.widths[register]} bits, not {width}")
            return register
        if text == "_":
            return self._register(width or 64)
        assert width is not None, text
        if text in self.shared:
            return self._constant(0, width)
        if text in self.offsets:  # an address among the parameters is where it stands there
            return self._constant(self.offsets[text], width)
        return self._constant(_number(text, self.line), width)

    def _address(self, text: str) -> tuple[int, int]:
        """Register and offset of ``[%rd1+8]``, ``[ %rd1 + 0 ]`` or ``[global_smem+16]``."""
        found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if found is None:
            raise ValueError(f"line {self.line}: cannot read the address {text}")
        offset = _number(found[2], self.line) if found[2] else 0
        return self._operand(found[1], 32 if not found[1].startswith("%") else None), offset

    def _instruction(self, name: str, operands: list[str]) -> Instruction:
        make = lambda opcode, *rest, **more: Instruction(name, self.table[opcode].index, self.line, *rest, **more)  # noqa: E731
        if found := _MEMORY.fullmatch(name):
            return self._memory(found, make, operands)
        if ordered := self._ordered(name, make, operands):
            return ordered
        if found := _MATRICES.fullmatch(name):
            values = [self._operand(part, 32) for part in _vector(operands[0])]
            register, offset = self._address(operands[1])
            return make("ldmatrix", operands=[*values, register], results=len(values),
                        numbers=(int(found[1]), int(found[2] is not None), offset))  # fmt: skip
        if _COPY.fullmatch(name):
            (to, to_offset), (source, offset) = self._address(operands[0]), self._address(operands[1])
            size = _number(operands[2], self.line)
            given = self._operand(operands[3] if len(operands) > 3 else str(size), 32)
            return make("cp.async", operands=[to, source, given], results=0, numbers=(size, 0, offset, to_offset))
        if name in ("cp.async.commit_group", "cp.async.wait_all", "ret", "exit"):
            return make(name, results=0)
        if name == "cp.async.wait_group":
            return make(name, results=0, numbers=(_number(operands[0], self.line),))
        if name == "bra":
            return make(name, results=0, target=operands[0])
        if name == "bar.sync" and len(operands) == 1:
            return make(name, results=0, numbers=(_number(operands[0], self.line),))
        if name == "bar.warp.sync" and _number(operands[0], self.line) in (-1, 0xFFFFFFFF):
            return make(name, results=0)
        if name.startswith("mov.") and any(part.startswith("{") for part in operands):
            return self._pack(name, make, operands)
        opcode = self.table.get(name)
        if opcode is None or not opcode.registers:
            raise UnknownOpcode(f"line {self.line}: the executor does not know {name} {', '.join(operands)}")
        flat = [part for operand in operands for part in _vector(operand)]
        second = None
        if name.startswith("shfl.") and "|" in flat[0]:
            flat[0], second = (part.strip() for part in flat[0].split("|"))
        if len(flat) != len(opcode.registers):
            raise UnknownOpcode(f"line {self.line}: {name} with {len(flat)} operands, not {len(opcode.registers)}")
        if name.startswith("cvt."):
            flat[1] = self._low_bits(flat[1], _LETTERS[opcode.registers[1]], make)
        numbers = [self._operand(part, _LETTERS[letter]) for part, letter in zip(flat, opcode.registers, strict=True)]
        if second is not None:
            numbers.append(self._operand(second, 1))
        return make(name, operands=numbers, results=len(_vector(operands[0])))

    def _ordered(self, name: str, make: object, operands: list[str]) -> Instruction | None:
        """Loads, stores and changes of global memory with an order among blocks, and fences."""
        if found := _STRONG.fullmatch(name):
            kind, order, count, bits = found[1], found[2], int(found[3] or 1), int(found[4])
            values, address = operands if kind == "ld" else operands[::-1]
            registers = [
                self._operand(part, None if part.startswith("%") else max(bits, 16)) for part in _vector(values)
            ]
            register, offset = self._address(address)
            return make(f"{kind}.strong", operands=[*registers, register], results=count if kind == "ld" else 0,
                        numbers=(bits // 8, count, offset, _ORDERS[order]))  # type: ignore[operator]  # fmt: skip
        if (found := _ATOMIC.fullmatch(name)) and f"atom.{found[3]}" in self.table:
            width = int(found[3][-2:])
            old, address, *values = operands if found[1] == "atom" else ["_", *operands]
            if len(values) != 1 + found[3].startswith("cas"):
                raise UnknownOpcode(f"line {self.line}: {name} with {len(operands)} operands")
            register, offset = self._address(address)
            registers = [self._operand(old, width), register, *(self._operand(value, width) for value in values)]
            return make(f"atom.{found[3]}", operands=registers, numbers=(width // 8, 1, offset, _ORDERS[found[2]]))  # type: ignore[operator]  # fmt: skip
        if (found := _FENCE.fullmatch(name)) and (found[1] or found[2]):
            return make("fence" if found[1] else "fence.cta", results=0)  # type: ignore[operator]
        if name == "nanosleep.u32":
            return make(name, operands=[self._operand(operands[0], 32)], results=0)  # type: ignore[operator]
        return None

    def _low_bits(self, text: str, width: int, make: object) -> str:
        """A conversion takes the low bits of a wider register: they are put into one of their own first."""
        if not text.startswith("%") or self.widths[self._lookup(text)] <= width:
            return text
        name, wide = f"{text}.low{width}", self._lookup(text)
        self.numbers.setdefault(name, self._register(width))
        opcode = f"cvt.u{width}.u{self.widths[wide]}"
        self.code.append(make(opcode, operands=[self.numbers[name], wide]))  # type: ignore[operator]
        return name

    def _memory(self, found: re.Match[str], make: object, operands: list[str]) -> Instruction:
        kind, space, count, bits = found[1], found[2], int(found[3] or 1), int(found[4])
        values, address = (operands[0], operands[1]) if kind == "ld" else (operands[1], operands[0])
        registers = [self._operand(part, None if part.startswith("%") else max(bits, 16)) for part in _vector(values)]
        if len(registers) != count or any(self.widths[register] < bits for register in registers):
            raise UnknownOpcode(f"line {self.line}: {found[0]} of {values}")
        if space == "param":
            name = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", address)
            if kind != "ld" or count != 1 or name is None:
                raise UnknownOpcode(f"line {self.line}: {found[0]} {address}")
            offset = int(name[2] or 0)
            if name[1] in self.offsets:
                offset += self.offsets[name[1]]
            else:
                registers.append(self._operand(name[1]))
            return make("ld.param", operands=registers, numbers=(bits // 8, 1, offset))  # type: ignore[operator]
        register, offset = self._address(address)
        return make(f"{kind}.{space}", operands=[*registers, register], results=count if kind == "ld" else 0,
                    numbers=(bits // 8, count, offset))  # type: ignore[operator]  # fmt: skip

    def _pack(self, name: str, make: object, operands: list[str]) -> Instruction:
        width = _WIDTHS[name[4:]]
        left, right = (_vector(part) for part in operands)
        part = width // max(len(left), len(right))
        if len(left) == 1:
            registers = [self._operand(left[0], width), *(self._operand(text, part) for text in right)]
            return make("mov.pack", operands=registers)  # type: ignore[operator]
        registers = [*(self._operand(text, part) for text in left), self._operand(right[0], width)]
        return make("mov.unpack", operands=registers, results=len(left))  # type: ignore[operator]


def _vector(text: str) -> list[str]:
    """``{a, b}`` or ``a`` as a list."""
    return [part.strip() for part in text.strip("{} ").split(",")]


def _operands(text: str) -> list[str]:
    """Split at the commas outside of braces."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|[^,{])+", text) if part.strip()]


def _number(text: str, line: int) -> int:
    """The bits of a constant: ``12``, ``-1``, ``0x1FU``, ``0f3F800000``, ``0d3FF0000000000000``, ``1.5``."""
    if re.fullmatch(r"0[fFdD][0-9a-fA-F]{8,16}", text):
        return int(text[2:], 16)
    try:
        return int(text.rstrip("U"), 0)
    except ValueError:
        pass
    try:
        return int.from_bytes(struct.pack("<d", float(text)), "little")
    except ValueError:
        raise ValueError(f"line {line}: cannot read the number {text!r}") from None
