"""Measured tolerance: as good as plain PyTorch in the same dtype, judged against float64."""

import torch


def assert_as_good_as_torch(got, exact64, torch_same_dtype, slack: float = 2.0, what: str = "result") -> None:
    """The largest error may be `slack` times that of plain PyTorch, plus one rounding of the largest value.

    Infinities must be the same ones; a NaN is never right.
    """
    assert got.shape == exact64.shape, f"{what}: shape {list(got.shape)}, expected {list(exact64.shape)}"
    got64, exact64 = got.double().cpu(), exact64.cpu()
    assert not got64.isnan().any(), f"{what}: {int(got64.isnan().sum())} of {got64.numel()} values are NaN"
    finite = exact64.isfinite()
    assert torch.equal(got64[~finite], exact64[~finite]), f"{what}: the infinities differ"
    if not finite.any():
        return
    error = (got64 - exact64)[finite].abs()
    theirs = (torch_same_dtype.double().cpu() - exact64)[finite].abs().max()
    allowed = slack * theirs + torch.finfo(got.dtype).eps * exact64[finite].abs().max()
    assert error.max() <= allowed, (
        f"{what}: largest error {error.max():.3e}, allowed {allowed:.3e}; PyTorch in {got.dtype} makes {theirs:.3e}"
    )
