"""For the files Triton's interpreter runs (interpreter_<op>.py): what it does not do as a GPU does is set right, and
what ran is written down: each launch's compile-time arguments, and each outcome of each branch of the kernels.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime.interpreter import FunctionRewriter, InterpretedFunction, InterpreterBuilder, TensorHandle

    def rounded_once(self, x, y, z):
        """x * y + z as the hardware's fma: the interpreter's own rounds the product too.

        A product of two float32 is exact in float64.
        """
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    def dot_of_any_type(self, a, b, d, input_precision, max_num_imprecise_acc):
        """a @ b + d. The interpreter's own multiplies the bits of bfloat16 as integers, and sums equal columns in
        orders of numpy's choice; in float64 those orders do not show.
        """
        wide = []
        for x in (a, b):
            data = x.data
            if x.dtype.scalar.is_bf16():
                data = (data.astype(np.uint32) << 16).view(np.float32)
            wide.append(data.astype(np.float64))
        return TensorHandle((wide[0] @ wide[1] + d.data).astype(d.data.dtype), d.dtype.scalar)

    def sorted_at_once(x, dim=None, descending=False):
        """tl.sort in one step; the interpreter would take hundreds, one for each layer of a sorting network."""
        data = np.sort(x.handle.data, axis=-1)
        data = np.ascontiguousarray(np.flip(data, axis=-1)) if descending else data
        return tl.tensor(TensorHandle(data, x.dtype.scalar), x.type)

    InterpreterBuilder.create_fma = rounded_once
    tl.sort = sorted_at_once

    launches: dict[str, set[str]] = defaultdict(set)  # kernel -> compile-time arguments, as JSON
    outcomes: dict[str, set[tuple[int, bool]]] = defaultdict(set)  # file -> line and outcome

    def outcome(file: str, line: int, value: Any) -> bool:
        outcomes[file].add((line, bool(value)))
        return bool(value)

    class Watched(ast.NodeTransformer):
        """Every condition and every loop's body reports."""

        def __init__(self, file: str):
            self.file = file

        def report(self, line: int, value: ast.expr) -> ast.expr:
            arguments = [ast.Constant(self.file), ast.Constant(line), value]
            return ast.Call(ast.Name("__kdfast_outcome", ast.Load()), arguments, [])

        def visit_If(self, node: ast.If | ast.IfExp) -> ast.AST:
            self.generic_visit(node)
            node.test = self.report(node.test.lineno, node.test)
            return node

        visit_IfExp = visit_If  # noqa: N815

        def visit_For(self, node: ast.For | ast.While) -> ast.AST:
            self.generic_visit(node)
            node.body.insert(0, ast.Expr(self.report(node.lineno, ast.Constant(True))))
            return node

        visit_While = visit_For  # noqa: N815

    transform = FunctionRewriter._transform_ast

    def watched(self: FunctionRewriter, source: str) -> ast.AST:
        self.fn.__globals__["__kdfast_outcome"] = outcome
        tree = Watched(self.filename).visit(transform(self, source))
        return ast.fix_missing_locations(tree)

    FunctionRewriter._transform_ast = watched

    launch = InterpretedFunction.run

    def noted(self: InterpretedFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        parameters = inspect.signature(self.fn).parameters
        given = dict(zip(parameters, arguments, strict=False)) | named  # and the compiler's options
        constants = [p.name for p in parameters.values() if str(p.annotation).endswith("constexpr")]
        launches[self.fn.__name__].add(json.dumps({name: given[name] for name in constants}, sort_keys=True))
        launch(self, *arguments, grid=grid, warmup=warmup, **named)

    InterpretedFunction.run = noted

    def pytest_sessionfinish() -> None:
        if "KDFAST_RECORD" in os.environ:
            record = {
                "launches": {kernel: sorted(constants) for kernel, constants in launches.items()},
                "outcomes": {file: sorted(seen) for file, seen in outcomes.items()},
            }
            Path(os.environ["KDFAST_RECORD"]).write_text(json.dumps(record))

    InterpreterBuilder.create_dot = dot_of_any_type
