"""Runs the CUDA kernels of csrc on the CPU, with no GPU and no CUDA toolkit, and shows what they do wrong.

- emulator.h: what is emulated, and what is not; emulated_device.h: its side of csrc/common/cuda/device.cuh
- build.py: compiles the kernels with the C++ compiler, plainly or with a sanitizer
- kernels.py: the launchers from Python, as a backend that only tests know, and the same launches under a sanitizer
- planted_bugs.cpp: what must be caught
"""
