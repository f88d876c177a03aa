"""Triton's interpreter with half of its work left out: names of triton.language are replaced once per launch.

The interpreter runs a kernel as Python, for which it replaces every builtin of triton.language. It does so again at
each call of a function that is itself @triton.jit, where all is replaced already; that takes longer than most of what
such a function does.
"""

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
