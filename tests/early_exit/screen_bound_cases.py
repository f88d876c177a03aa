"""Bounds of a screened row's statistics: the function of csrc/early_exit/screen_bounds.h, and cases for it."""

import ctypes
import functools
import subprocess

import torch

from tests.emulator import build

CPP = build.ROOT / "tests" / "early_exit" / "bounded_stats.cpp"
HEADER = "early_exit/screen_bounds.h"
KNOWN = ("first", "second", "sum", "fall")
TAIL = (
    *("upper", "lower", "weight", "squares", "peak", "error", "noise"),
    *("upper_fall", "lower_fall", "tail_fall", "turn_squares", "peak_fall"),
)
NUMBERS = (*KNOWN, *TAIL, "reference", "temperature", "spread")  # of a case, as bounded_stats.cpp reads them
STATS = tuple(f"{stat} {end}" for stat in ("max_prob", "margin", "entropy") for end in ("value", "low", "high"))
INFINITY = float("inf")


def library(folder, old="", new=""):
    """The header's function, compiled in a folder, with `new` for `old` in the header. It maps cases to statistics."""
    text = (build.ROOT / "csrc" / HEADER).read_text()
    assert old in text, f"{HEADER} no longer has {old!r}"
    (folder / HEADER).parent.mkdir(parents=True, exist_ok=True)
    (folder / HEADER).write_text(text.replace(old, new))
    target = folder / "bounded_stats.so"
    flags = ["-std=c++17", "-O1", "-w", "-fPIC", "-shared", f"-I{folder}", f"-I{build.ROOT}/csrc"]
    subprocess.run([*build.compiler(), *flags, CPP, "-o", target], check=True)
    return functools.partial(stats_of, ctypes.CDLL(target))


def stats_of(library, cases):
    """[cases, STATS] of float64 [cases, NUMBERS]."""
    stats = torch.empty(len(cases), len(STATS), dtype=torch.float64)
    library.bounded_stats_of(ctypes.c_void_p(cases.data_ptr()), ctypes.c_void_p(stats.data_ptr()), len(cases))
    return stats


def row(generator, entries=200, rechecked=6, most_error=0.3, temperature=1.0, depth=4.0):
    """A row of true logits of which the greatest are known: the numbers of its case, and its true statistics."""
    approximate = torch.randn(entries, generator=generator, dtype=torch.float64) * 2
    approximate[:rechecked] += depth
    error = torch.rand(entries, generator=generator, dtype=torch.float64) * most_error
    off = error * (2 * torch.rand(entries, generator=generator, dtype=torch.float64) - 1)
    z = (approximate + off).float().double()
    z, order = z.sort(descending=True)  # what is rechecked are the greatest
    approximate, error, off = approximate[order], error[order], off[order]
    first, second = z[:rechecked].topk(2).values
    rest, rest_error = approximate[rechecked:], error[rechecked:]
    reference = max(float((rest + rest_error).max()), float(z[rechecked:].max()))
    reference = float(torch.tensor(reference).float().nextafter(torch.tensor(INFINITY)))
    of_known = (z[:rechecked] - first) / temperature
    s, e = (rest - reference) / temperature, rest_error / temperature
    w, high, low = s.exp(), (s + e).exp(), (s - e).exp()
    numbers = {
        "first": first,
        "second": second,
        "sum": of_known.exp().sum(),
        "fall": -(of_known.exp() * of_known).sum(),
        "upper": high.sum(),
        "lower": low.sum(),
        "weight": w.sum(),
        "squares": (w * w).sum(),
        "peak": w.max(),
        "error": e.max(),
        "noise": 0.0,
        "upper_fall": -(high * (s - e)).sum(),
        "lower_fall": -(low * (s + e)).sum(),
        "tail_fall": -(w * s).sum(),
        "turn_squares": ((w * (1 + s)) ** 2).sum(),
        "peak_fall": -(w * s).min(),
        "reference": reference,
        "temperature": temperature,
        "spread": off[rechecked:].norm() / temperature,
    }
    p = (z / temperature).softmax(0)
    best = p.topk(2).values
    true = [best[0], best[0] - best[1], torch.special.entr(p).sum()]
    return [float(numbers[name]) for name in NUMBERS], [float(number) for number in true]


def rows(count=300):
    generator = torch.Generator().manual_seed(3)
    ways = [
        dict(most_error=error, temperature=temperature, depth=depth)
        for error in (0.0, 1e-5, 0.3, 4.0)
        for temperature in (0.05, 1.0, 7.0)
        for depth in (2.0, 12.0, 40.0)
    ]
    made = [row(generator, **ways[i % len(ways)]) for i in range(count)]
    return tuple(torch.tensor(of, dtype=torch.float64) for of in zip(*made, strict=True))


# Numbers that are put in the place of a row's own. The tail of the last ones lies so far below that it adds nothing,
# and what is known of its falls is nothing.
FAR_BELOW = {"first": 900.0, "second": 899.0, "reference": 0.0, "temperature": 1.0}
EDGES = (
    {},
    {"second": -INFINITY},
    {"error": 0.0, "noise": 0.0, "spread": 0.0},
    {"error": 1e-4, "noise": 1e-4},
    {"error": 19.9, "noise": 0.5},
    {"error": 20.0},
    {"error": 299.0, "upper_fall": 1e30, "lower_fall": 0.0},
    {"error": 300.0, "upper_fall": INFINITY, "lower_fall": 0.0},
    {"spread": 0.0},
    {"spread": 1e6},
    {name: 0.0 for name in TAIL},
    {"temperature": 1e-20},
    {"temperature": 1e20},
    FAR_BELOW,
    {**FAR_BELOW, "error": 500.0},
    {**FAR_BELOW, "error": 500.0, "upper_fall": INFINITY},
    {**FAR_BELOW, "error": 500.0, "upper_fall": INFINITY, "tail_fall": INFINITY},
    {**FAR_BELOW, "error": 500.0, "temperature": 1e-20, "tail_fall": INFINITY},
)


def edges():
    cases, _ = rows(2 * len(EDGES))
    for case, edge in zip(cases, (*EDGES, *EDGES), strict=True):
        for name, number in edge.items():
            case[NUMBERS.index(name)] = number
    return cases


def far_below_is_nothing(stats_of):
    """A tail that adds nothing leaves the statistics of the logits that are known."""
    cases = torch.stack([case for case, edge in zip(edges(), (*EDGES, *EDGES), strict=True) if "first" in edge])
    stats = stats_of(cases).view(-1, 3, 3)
    size, fall = cases[:, NUMBERS.index("sum")], cases[:, NUMBERS.index("fall")]
    lead = -torch.expm1((cases[:, 1] - cases[:, 0]) / cases[:, NUMBERS.index("temperature")])
    want = torch.stack([1 / size, lead / size, size.log() + fall / size], 1)
    close = [
        torch.allclose(number, want, rtol=rtol)
        for number, rtol in zip(stats.unbind(2), (1e-9, 1e-3, 1e-3), strict=True)
    ]
    return all(close) and bool(stats.isfinite().all())
