"""`bar`: a progress bar of prompts, if one is wanted."""

from __future__ import annotations

import contextlib


class _NoBar:
    def update(self, count: int) -> None:
        pass


@contextlib.contextmanager
def bar(total: int, wanted: bool):
    """Something with `update(count)`, which shows a bar or does nothing."""
    if not wanted:
        yield _NoBar()
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise RuntimeError("specdec_ops.Engine: progress=True needs the package tqdm (pip install tqdm)") from error
    with tqdm(total=total, unit="prompt") as shown:
        yield shown
