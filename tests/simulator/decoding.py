"""PTX as text -> instructions."""
import re

from .values import TYPE

# What an instruction keeps busy; the others are integer arithmetic.
KINDS = {
    "float": "fma mul add sub max min neg abs", "special": "ex2 lg2 rcp rsqrt sqrt div sin cos tanh",
    "mma": "mma wgmma", "shared": "ldmatrix stmatrix", "shuffle": "shfl", "barrier": "bar", "global": "cp",
    "convert": "cvt", "branch": "bra ret exit", "move": "mov selp", "compare": "setp"}
KIND = {base: kind for kind, bases in KINDS.items() for base in bases.split()}
DIRECTIVE = re.compile(r"^\s*\.[a-z][^\n;]*;?\s*$", re.M)  # a line of its own, .reg or .loc for example


class Program:
    """A compiled kernel.

    name: the kernel's; parameters: [(type, name)]; code: its instructions; labels: {name: index of an instruction}.
    """

    def __init__(self, ptx):
        ptx = re.sub(r"//.*", "", ptx)
        self.name = re.search(r"\.entry (\w+)", ptx)[1]
        self.parameters = re.findall(r"\.param \.(\w+) [^,)]*?(\w+_param_\d+)", ptx)
        body = ptx[ptx.index("{", ptx.index(".entry")) + 1:]
        body = DIRECTIVE.sub("", body[:re.search(r"^\}", body, re.M).start()])
        self.code, self.labels = [], {}
        for statement in re.sub(r"(\$\w+):", r"label \1;", body).split(";"):
            statement = " ".join(statement.lstrip("{} \t\n").split())  # braces are blocks of inline assembly
            if statement.startswith("label "):
                self.labels[statement[6:]] = len(self.code)
            elif statement and not statement.startswith("."):  # a directive among inline assembly
                self._append(Instruction(statement))

    def _append(self, i):
        """Triton sets registers before it loads them; where no guard may skip the load, the assembler drops that."""
        if i.base == "ld" and not i.guard:
            loaded = set(names(i.operands[0])) - set(names(i.operands[1].strip("[]").partition("+")[0]))
            while self.code and self.code[-1].base == "mov" and self.code[-1].operands[0] in loaded:
                self.code.pop()
        self.code.append(i)


class Instruction:
    """guard: (predicate, whether negated) or None. base: its name; parts: its name and what follows; modifiers and
    types: of these, and type the last one. operands: as text. kind: what it keeps busy.
    """

    def __init__(self, text):
        self.text = text
        guard = re.match(r"@(!?)(%\w+) ", text)
        self.guard = (guard[2], bool(guard[1])) if guard else None
        opcode, _, rest = (text[guard.end():] if guard else text).partition(" ")
        self.parts = opcode.replace("::", "_").split(".")
        self.base = self.parts[0]
        self.operands = [operand.strip() for operand in re.split(r",(?![^{\[]*[}\]])", rest)] if rest else []
        self.types = [part for part in self.parts[1:] if TYPE.fullmatch(part)]
        self.type = self.types[-1] if self.types else None
        self.modifiers = [part for part in self.parts[1:] if not TYPE.fullmatch(part)]
        self.kind = KIND.get(self.base, "integer")
        if self.kind == "float" and self.type and self.type[0] in "us":
            self.kind = "integer"
        if self.base in ("ld", "st"):
            self.kind = "global" if "global" in self.parts else "move" if "param" in self.parts else "shared"


def names(operand):
    """"{%r1, %r2}" -> ["%r1", "%r2"]"""
    return [name.strip() for name in operand.strip("{} ").split(",")]
