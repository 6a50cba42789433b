"""What the sources of all Triton kernels say, read without running them: which there are, and where they branch.

A new op is found by its file, kdfast/ops/<op>/triton_kernels.py, and everything the tests demand follows from it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from triton_support import Build

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {path.parent.name: path for path in sorted((ROOT / "kdfast" / "ops").glob("*/triton_kernels.py"))}
OPS = tuple(SOURCES)
# Only a GPU can run it; what it computes elsewhere is another branch.
ASSEMBLY = "inline_asm_elementwise"


@dataclass(frozen=True)
class Function:
    """A function under @triton.jit."""

    node: ast.FunctionDef
    launched: bool  # from Python, as ``name[grid](...)``; else other kernels call it

    @property
    def parameters(self) -> list[str]:
        return [argument.arg for argument in self.node.args.args]

    @property
    def constexprs(self) -> list[str]:
        return [a.arg for a in self.node.args.args if a.annotation and ast.unparse(a.annotation).endswith("constexpr")]


@cache
def functions(op: str) -> dict[str, Function]:
    """All functions of ``op`` under @triton.jit."""
    tree = ast.parse(SOURCES[op].read_text())
    launched = {
        node.func.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Name)
    }
    return {
        node.name: Function(node, node.name in launched)
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
    }


def seen_from(op: str) -> dict[str, tuple[str, Function]]:
    """Name -> op and function, of all that a kernel of ``op`` may mean: its own first, then what others lend."""
    found = {name: (other, function) for other in OPS for name, function in functions(other).items()}
    return found | {name: (op, function) for name, function in functions(op).items()}


def op_of(kernel: str) -> str:
    """Where a kernel that is launched stands."""
    (op,) = [op for op in OPS if kernel in functions(op) and functions(op)[kernel].launched]
    return op


def called(node: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
            yield call.func.id, call


def outcomes(op: str) -> dict[tuple[int, bool], str]:
    """(line, outcome) -> text of every ``if`` in the kernels of ``op``, every conditional expression, every loop.

    A loop has one outcome, that its body runs. Left out is what only a GPU can run.
    """
    found = {}
    for function in functions(op).values():
        for node in ast.walk(function.node):
            if isinstance(node, (ast.For, ast.While)):
                found[node.lineno, True] = f"{function.node.name}: {first_line(node)}"
            elif isinstance(node, (ast.If, ast.IfExp)):
                for outcome, branch in ((True, node.body), (False, node.orelse)):
                    if ASSEMBLY not in text(branch):
                        name = f"{function.node.name}: {first_line(node)} is {outcome}"
                        found[node.test.lineno, outcome] = name
    return found


def text(branch: ast.AST | list[ast.stmt]) -> str:
    return "\n".join(map(ast.unparse, branch if isinstance(branch, list) else [branch]))


def first_line(node: ast.AST) -> str:
    return f"line {node.lineno}, {ast.unparse(node).splitlines()[0]}"


def deciding(op: str, name: str, seen: frozenset[str] = frozenset()) -> set[str]:
    """The constexpr parameters of function ``name`` of ``op`` that an ``if`` in it, or in what it calls, looks at.

    The others are sizes. Not among them is what asks whether there are instructions that only a GPU has.
    """
    known = seen_from(op)
    function, decides = functions(op)[name], set()
    for node in ast.walk(function.node):
        if isinstance(node, (ast.If, ast.IfExp)) and ASSEMBLY not in text(node.body):
            decides |= names_in(node.test)
    for other, call in called(function.node):
        if other in known and other not in seen:
            home, callee = known[other]
            wanted = deciding(home, other, seen | {name})
            pairs = [*zip(callee.parameters, call.args, strict=False), *((k.arg, k.value) for k in call.keywords)]
            for parameter, value in pairs:
                if parameter in wanted:
                    decides |= names_in(value)
    return decides & set(function.constexprs)


def names_in(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def choice(kernel: str, constants: Mapping[str, object]) -> tuple[tuple[str, object], ...]:
    """Which of its branches a launch with ``constants`` compiles: the values of what decides."""
    # True == 1, and both stand for the same choice.
    return tuple((name, constants[name]) for name in sorted(deciding(op_of(kernel), kernel)))


def builds_of(op: str) -> ModuleType:
    """tests/ops/test_<op>_triton.py, which says with which arguments the kernels of ``op`` are compiled."""
    return import_module(f"test_{op}_triton")


def default_builds(op: str) -> list[Build]:
    """What `make test` compiles."""
    module = builds_of(op)
    assert hasattr(module, "default_builds"), f"tests/ops/test_{op}_triton.py has no default_builds() -> list[Build]"
    return module.default_builds()


def every_build(op: str) -> list[Build]:
    """Every kernel in every default configuration for every target: what `make test-long` compiles."""
    module = builds_of(op)
    return module.every_build() if hasattr(module, "every_build") else default_builds(op)
