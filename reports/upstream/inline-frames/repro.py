"""Every use of a ``T.inline`` function makes the parser read the source lines of all its frames.

    python repro.py

``ScriptMacro._find_parser_def`` calls ``inspect.getouterframes``, which builds a record with source
context for each of the frames, and looks at their globals from the innermost outward. The kernel
below uses a function of one line 10 times; it is parsed with that method and with one that walks
``frame.f_back`` and stops at the same frame.
"""

import sys
import time

import tvm
from tvm.script import tirx as T
from tvm.script.parser.core.parser import ScriptMacro


def parse():
    """Parse a kernel with 10 uses of one inline function, three loops deep."""

    @T.inline
    def nothing(A, i):
        A[i] = T.float32(0)

    @T.prim_func(s_tir=True)
    def kernel(A: T.Buffer((16,), "float32")):
        for i in T.unroll(2):
            for j in T.unroll(2):
                for k in T.unroll(2):
                    nothing(A, i * 4 + j * 2 + k + 0)
                    nothing(A, i * 4 + j * 2 + k + 1)
                    nothing(A, i * 4 + j * 2 + k + 2)
                    nothing(A, i * 4 + j * 2 + k + 3)
                    nothing(A, i * 4 + j * 2 + k + 4)
                    nothing(A, i * 4 + j * 2 + k + 5)
                    nothing(A, i * 4 + j * 2 + k + 6)
                    nothing(A, i * 4 + j * 2 + k + 7)
                    nothing(A, i * 4 + j * 2 + k + 0)
                    nothing(A, i * 4 + j * 2 + k + 1)

    return kernel


def nearest(self):
    """Find the frame that getouterframes would find, without the others."""
    frame = sys._getframe()
    while frame is not None:
        parser = frame.f_globals.get(ScriptMacro.parser_object_name)
        if parser is not None:
            return parser
        frame = frame.f_back
    raise RuntimeError("no parser")


def seconds():
    """Best of five."""
    parse()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        parse()
        times.append(time.perf_counter() - start)
    return min(times)


print("TVM", tvm.__version__)
before = parse()
print(f"inspect.getouterframes: {seconds() * 1e3:7.1f} ms for 10 uses")
ScriptMacro._find_parser_def = nearest
print(f"frame.f_back:           {seconds() * 1e3:7.1f} ms for 10 uses")
tvm.ir.assert_structural_equal(before, parse())
