"""Calls of early exit that are hard to decide without reading all of the head: each makes an ExitCase of a dtype."""

import torch

from tests.early_exit.exit_cases import ExitCase, make_case


def near_ties(generator, dtype):
    """The best entries of each row differ by the least that the dtype can hold, in either order."""
    head = torch.randn(500, 64, generator=generator).to(dtype)
    head[100:200] = head[:100]
    nudged = head[100:200].view(torch.int16 if dtype != torch.float32 else torch.int32)
    nudged[:, 0] += torch.tensor([1, -1] * 50, dtype=nudged.dtype)
    return ExitCase((head[:40].float() * 2).to(dtype), head)


def huge_norms(generator, dtype):
    head = torch.randn(500, 64, generator=generator)
    head[::50] *= 3000
    return ExitCase((torch.randn(40, 64, generator=generator) * 0.3).to(dtype), head.to(dtype))


def overflowing(generator, dtype):
    head = torch.randn(300, 64, generator=generator).to(dtype)
    head[7] = torch.finfo(dtype).max / 4
    return ExitCase((torch.randn(20, 64, generator=generator) * 5).to(dtype), head)


def duplicated_rows(generator, dtype):
    head = torch.randn(8, 64, generator=generator).repeat(100, 1)
    return ExitCase((head[:20] * 1.5).to(dtype), head.to(dtype))


def all_equal(generator, dtype):
    head = torch.randn(1, 64, generator=generator).expand(1000, 64).contiguous()
    return ExitCase(torch.randn(9, 64, generator=generator).to(dtype), head.to(dtype))


def zero_rows(generator, dtype):
    head = torch.randn(300, 64, generator=generator)
    head[::3] = 0
    hidden = torch.randn(12, 64, generator=generator)
    hidden[::4] = 0
    return ExitCase(hidden.to(dtype), head.to(dtype))


def masked(generator, dtype):
    case = make_case(12, 64, 300, dtype)
    case.options["bias"] = torch.where(torch.arange(300) % 3 == 0, 0.0, float("-inf"))
    return case


def masked_but_one(generator, dtype):
    case = make_case(5, 64, 300, dtype)
    case.options["bias"] = torch.full((300,), float("-inf"))
    case.options["bias"][123] = 1.0
    return case


def masked_by_large_numbers(generator, dtype):
    case = make_case(12, 64, 300, dtype)
    case.options["bias"] = torch.where(torch.arange(300) % 100 == 0, 0.0, torch.finfo(torch.float32).min)
    return case


def everything_masked(generator, dtype):
    case = make_case(5, 64, 300, dtype)
    case.options["bias"] = torch.full((300,), float("-inf"))
    return case


def invalid_rows(generator, dtype):
    case = make_case(7, 64, 300, dtype)
    case.hidden[1] = float("nan")
    case.hidden[3, 5] = float("inf")
    case.options["bias"] = torch.zeros(300)
    return case


def invalid_bias(generator, dtype):
    case = make_case(4, 64, 300, dtype)
    case.options["bias"] = torch.zeros(300)
    case.options["bias"][17] = float("nan")
    return case


def one_entry(generator, dtype):
    return make_case(3, 64, 1, dtype)


def two_entries(generator, dtype):
    return make_case(3, 1, 2, dtype)


def tiny_numbers(generator, dtype):
    """Rows and weights that some processors' dot products take for zero."""
    head = torch.randn(200, 64, generator=generator) * 1e-39
    hidden = torch.randn(10, 64, generator=generator) * 1e-39
    head[::2] = torch.randn(100, 64, generator=generator)
    hidden[::2] = torch.randn(5, 64, generator=generator)
    return ExitCase(hidden.to(dtype), head.to(dtype))


def cold(generator, dtype):
    return make_case(21, 64, 500, dtype, temperature=0.01)


def hot(generator, dtype):
    return make_case(21, 64, 500, dtype, temperature=50.0)


def outliers(generator, dtype):
    """Hidden rows with one large dim, as trained models have them, and a head whose scales it spoils."""
    case = make_case(21, 64, 500, dtype)
    case.hidden[:, 3] *= 60
    case.head[:, 3] *= 20
    return case


ADVERSARIAL = (
    *(near_ties, huge_norms, overflowing, duplicated_rows, all_equal, zero_rows, masked, masked_but_one),
    *(masked_by_large_numbers, everything_masked, invalid_rows, invalid_bias, one_entry, two_entries, tiny_numbers),
    *(cold, hot, outliers),
)
