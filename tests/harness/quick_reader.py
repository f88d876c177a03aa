"""For tests of the benchmarks: the ways to read are tried on a small buffer, in no time."""

import pytest

from benchmarks.harness import reading


@pytest.fixture(autouse=True, scope="module")
def quick_reader():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "MOST_BUFFER", 1 << 20)
        patch.setattr(reading, "SEARCH_SECONDS", 0.0)
        patch.setattr(reading, "SMALL_SEARCH_SECONDS", 0.0)
        reading.reader.cache_clear()
        yield
    reading.reader.cache_clear()
