"""Triton's interpreter with half of its work left out, and with products whose rounding is the same everywhere.

The interpreter runs a kernel as Python, for which it replaces every builtin of triton.language. It does so again at
each call of a function that is itself @triton.jit, where all is replaced already; that takes longer than most of what
such a function does. So names are replaced once per launch.

It leaves tl.dot to NumPy's BLAS. On some processors that sums up a row or a column at the edge of a matrix in another
order than one in the middle, so that equal rows give different results, which a GPU's do not. So products are summed in
float64 and rounded once.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def replace_names_once():
    """Make every launch replace the names of a module once, when the first function that uses that module is called."""
    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced = set()

    def replace_once(function):
        modules = tuple(module for module in (tl, tl.core) if any(v is module for v in function.__globals__.values()))
        if modules in replaced:
            return None  # who asks for names a second time does not put them back
        replaced.add(modules)
        return replace(function)

    def launch_with_fresh_names(self, *arguments, **keywords):
        replaced.clear()
        return launch(self, *arguments, **keywords)

    interpreter._patch_lang = replace_once
    interpreter.GridExecutor.__call__ = launch_with_fresh_names


def round_products_once():
    """Let tl.dot of floating-point matrices sum in float64."""
    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def create_dot(self, a, b, d, *options):
        if a.data.dtype.kind != "f" or b.data.dtype.kind != "f":  # integers are exact, small floats are stored as such
            return dot(self, a, b, d, *options)
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    builder.create_dot = create_dot
