"""The counters of CUDA calls: who gets which, and that nobody shares what he must not. No GPU is needed."""

import itertools
import threading

import pytest
import torch

from specdec_ops._core import native


class Memory:
    """Slabs far from each other, and how many there have been."""

    def __init__(self):
        self.slabs = []

    def zeroed(self, size):
        self.slabs.append((len(self.slabs) + 1 << 40, size))
        return self.slabs[-1][0]


@pytest.fixture
def memory():
    return Memory()


@pytest.fixture
def counters(memory):
    return native.Counters(memory.zeroed)


def overlap(calls):
    """Whether two of some (address, count) have a byte in common."""
    spans = sorted((address, address + 4 * count) for address, count in calls)
    return any(end > begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_calls_of_a_stream_share_their_counters(counters, memory):
    first = counters.of_call(5, 1, False)
    assert counters.of_call(1000, 1, False) == first
    assert len(memory.slabs) == 1


def test_streams_and_captured_calls_share_nothing(counters):
    """A captured call gets counters of its own each time: two graphs of one stream may be replayed side by side."""
    calls = [(counters.of_call(40, stream, False), native.Counters.LEAST) for stream in (1, 2, 3)]
    calls += [(counters.of_call(count, 1, True), count) for count in (1, 40, 33, 64, 5000)]
    calls += [(counters.of_call(9000, 1, False), 16384)]
    assert not overlap(calls)


def test_captured_calls_take_from_one_slab(counters, memory):
    """So a graph has no node that writes zeros; a slab has room for thousands of calls."""
    for _ in range(4000):
        counters.of_call(64, 7, True)
    assert len(memory.slabs) == 1


def test_a_slab_that_is_full_or_too_small_is_followed_by_another(counters, memory):
    slab = native.Counters.SLAB
    calls = [(counters.of_call(count, 7, True), count) for count in (slab - 32, 33, slab * 3, 1)]
    assert not overlap(calls)
    assert [size for _, size in memory.slabs] == [4 * slab, 4 * slab, 12 * slab, 4 * slab]
    inside = [any(begin <= a and a + 4 * count <= begin + size for begin, size in memory.slabs) for a, count in calls]
    assert all(inside)


def test_a_stream_that_needs_more_gets_more(counters):
    small, large = counters.of_call(10, 1, False), counters.of_call(1025, 1, False)
    assert small != large
    assert counters.of_call(2048, 1, False) == large


def test_threads_that_capture_at_once_share_nothing(counters):
    calls = []

    def capture():
        for _ in range(2000):
            calls.append((counters.of_call(32, 1, True), 32))

    threads = [threading.Thread(target=capture) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 8000 and not overlap(calls)


def test_a_recreated_stream_is_another_one(monkeypatch):
    """It has the old one's address, and a number of its own: an implementation passes on what the launcher says."""
    given = []

    class Module:
        @staticmethod
        def sample_cuda(arguments, outputs, memory, index, stream):
            given.append(
                [memory(16, 3, number, captured)[1] for number, captured in ((1, False), (2, False), (1, True))]
            )

    class Device(native.Device):
        def stream(self, device):
            return 0, 0xABC

        def zeroed(self, index, size):
            return Memory().zeroed(size)

    implementation = native.cuda("sample", Module, Device())
    implementation((torch.empty(1),), ())
    implementation((torch.empty(1),), ())
    first, second = given
    assert len(set(first)) == 3 and second[:2] == first[:2] and second[2] not in first
