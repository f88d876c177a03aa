"""What surrounds a call must not change its result: the one context in which PyTorch code of this package computes.

Compiled and Triton kernels get addresses and numbers, so nothing around a call reaches them. The definitions
(backend="torch") are PyTorch code, and PyTorch lets a program change what such code means: autocast multiplies in 16
bits, matmul precision does so inside of a float32 product, the default dtype decides what a float is, the default
device where a tensor is made, a function mode anything, and torch.set_flush_denormal makes zeros of the numbers next to
0. `dispatch` shields each definition when it loads it; calls of
other backends pay nothing. So is what makes the tensors of a head, once.

Two of these are the process's, not the thread's: the default dtype, and the precision of matrix products. Where they
are not what PyTorch starts with, a shielded call sets them back and the last one to end restores them.
"""

import contextlib
import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ParamSpec, TypeVar

import torch

_PRODUCTS = ("mkldnn", "cuda")  # whose float32 products may be told to use 16 or 19 bits
_AUTOCAST = ("cpu", "cuda")
_SMALLEST = 2.0**-30  # / 2**1022 is subnormal
_P = ParamSpec("_P")
_T = TypeVar("_T")


def shielded(
    function: Callable[_P, _T], without_gradients: Callable[[], AbstractContextManager] = torch.inference_mode
) -> Callable[_P, _T]:
    """`function` with the same result whatever surrounds the call.

    Args:
        function: what to call.
        without_gradients: how it records none. In inference mode it may write to the caller's inference tensors; what
            makes tensors that stay takes `torch.no_grad`, since an inference tensor refuses later uses.
    """

    @functools.wraps(function)
    def call(*arguments, **options):
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch._C.DisableTorchFunction())  # the default device is a function mode
            stack.enter_context(without_gradients())
            for device in _AUTOCAST:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            stack.enter_context(_PROCESS)
            if _SMALLEST / 2**1022 == 0:  # Python's own floats are flushed, too: PyTorch has no other way to ask
                stack.callback(torch.set_flush_denormal, True)
                torch.set_flush_denormal(False)
            return function(*arguments, **options)

    return call


def shielded_maker(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """`shielded` for what makes tensors that stay. As a decorator: type checkers lose a `functools.partial`'s types."""
    return shielded(function, torch.no_grad)


class _Process:
    """The process's settings while at least one shielded call runs, in whichever thread."""

    def __init__(self):
        self._lock, self._calls = threading.Lock(), 0
        self._default_dtype, self._restore_products = None, None  # what the program wants, where it is not in force

    def __enter__(self):
        with self._lock:
            self._calls += 1
            if torch.get_default_dtype() != torch.float32:  # also where it was set while another call runs
                self._default_dtype = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            if not _exact_products():
                self._restore_products = _make_products_exact()

    def __exit__(self, *_):
        with self._lock:
            self._calls -= 1
            if self._calls:
                return
            # What the program has set in the meantime stays.
            if self._default_dtype is not None and torch.get_default_dtype() == torch.float32:
                torch.set_default_dtype(self._default_dtype)
            if self._restore_products is not None and _exact_products():
                self._restore_products()
            self._default_dtype, self._restore_products = None, None


_PROCESS = _Process()


if hasattr(torch._C, "_get_fp32_precision_getter"):  # PyTorch 2.9: a setting per library, which may be inherited

    def _exact_products() -> bool:
        return all(_precision(library) in ("ieee", "none") for library in _PRODUCTS)

    def _precision(library: str) -> str:
        return torch._C._get_fp32_precision_getter(library, "matmul")

    def _make_products_exact():
        before = [_precision(library) for library in _PRODUCTS]
        for library in _PRODUCTS:
            torch._C._set_fp32_precision_setter(library, "matmul", "ieee")

        def restore():
            for library, precision in zip(_PRODUCTS, before, strict=True):
                torch._C._set_fp32_precision_setter(library, "matmul", "none")
                if _precision(library) != precision:  # it was set here, not inherited
                    torch._C._set_fp32_precision_setter(library, "matmul", precision)

        return restore

else:

    def _exact_products() -> bool:
        return torch.get_float32_matmul_precision() == "highest"

    def _make_products_exact():
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        return functools.partial(torch.set_float32_matmul_precision, before)
