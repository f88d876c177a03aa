"""The line and the clock: times as stated, bytes in order, cuts at the very byte; the same every time."""

import asyncio

import pytest

from specdec_ops.remote import Cut, Link
from specdec_ops.remote.clock import Inline, run


def through(link: Link, chunks, *, gap: float = 0.0, pause: float = 0.0):
    """[(seconds, bytes)] as they arrive at the server's end of a line, None for its end."""
    arrived = []

    async def receive(end) -> None:
        loop = asyncio.get_running_loop()
        while data := await end.read():
            arrived.append((round(loop.time(), 6), data))
            await asyncio.sleep(pause)
        arrived.append((round(loop.time(), 6), None))

    async def send() -> None:
        tasks = []
        end = await link.connect(lambda end: tasks.append(asyncio.ensure_future(receive(end))))
        for chunk in chunks:
            end.write(chunk)
            await asyncio.sleep(gap)
        end.close()
        await asyncio.gather(*tasks)

    run(send())
    return arrived


def test_a_round_trip_takes_as_long_as_it_is_said_to():
    assert through(Link(rtt=0.2), [b"one", b"two"], gap=0.05) == [(0.3, b"one"), (0.35, b"two"), (0.4, None)]


def test_a_rate_spreads_bytes_over_time():
    arrived = through(Link(rtt=0.0, rate=1460.0), [b"x" * 1460 * 3])
    assert [when for when, _ in arrived] == [1.0, 2.0, 3.0, 3.0]


def test_jitter_and_losses_delay_and_keep_the_order():
    data = [bytes([n]) * 10 for n in range(200)]
    link = Link(rtt=0.01, jitter=0.05, loss=0.1, seed=4)
    arrived = through(link, data, gap=0.001)
    assert b"".join(chunk for _, chunk in arrived if chunk) == b"".join(data)
    assert arrived[-2][0] > 0.4, "lost segments have cost time"
    assert arrived == through(Link(rtt=0.01, jitter=0.05, loss=0.1, seed=4), data, gap=0.001)
    assert arrived != through(Link(rtt=0.01, jitter=0.05, loss=0.1, seed=5), data, gap=0.001)


@pytest.mark.parametrize("place", range(11))
def test_a_cut_comes_at_the_very_byte(place):
    arrived = through(Link(rtt=0.1, cuts=(Cut(after_up=place),)), [b"0123", b"456789"], gap=0.01)
    assert b"".join(chunk for _, chunk in arrived if chunk) == b"0123456789"[:place]
    assert arrived[-1][1] is None


def test_after_a_silent_cut_nothing_comes_at_all():
    link = Link(rtt=0.1, cuts=(Cut(at=0.105, silent=True, seconds=5.0),))

    async def talk():
        ends = []
        end = await link.connect(ends.append)
        end.write(b"lost")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(ends[0].read(), 100.0)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(end.read(), 100.0)

    run(talk())


@pytest.mark.parametrize("silent", [False, True])
def test_no_connection_while_the_line_is_cut(silent):
    link = Link(rtt=0.1, cuts=(Cut(at=1.0, seconds=3.0, silent=silent),))

    async def talk():
        loop, ends = asyncio.get_running_loop(), []
        await link.connect(ends.append)
        await asyncio.sleep(1.5)
        start = loop.time()
        with pytest.raises(ConnectionError):
            await link.connect(ends.append)
        assert loop.time() - start == pytest.approx(2.4 if silent else 0.1)
        await asyncio.sleep(3.0)
        await link.connect(ends.append)
        assert len(ends) == 2

    run(talk())


def test_who_reads_slowly_holds_the_sender_up():
    link = Link()

    async def talk():
        ends = []
        end = await link.connect(ends.append)
        await asyncio.sleep(0)
        end.write(bytes(1 << 20))
        await asyncio.sleep(1.0)
        assert end.unsent > (1 << 20) - (1 << 17), "no more than a window has arrived"
        got = 0
        while got < 1 << 20:
            got += len(await ends[0].read())
        assert end.unsent == 0

    run(talk())


def test_a_cut_has_one_cause():
    with pytest.raises(ValueError, match="one of at, after_up and after_down"):
        Cut()
    with pytest.raises(ValueError, match="one of at, after_up and after_down"):
        Cut(at=1.0, after_up=3)


def test_the_clock_jumps_and_tells_who_waits_forever():
    async def sleep():
        await asyncio.sleep(1e6)
        return asyncio.get_running_loop().time()

    assert run(sleep()) == pytest.approx(1e6)

    async def wait_for_nothing():
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="nothing is due that could wake them"):
        run(wait_for_nothing())


def test_inline_work_takes_the_time_that_it_is_said_to():
    async def compute():
        work = Inline(0.5)
        values = await asyncio.gather(*(work(pow, 2, n) for n in range(3)))
        return values, asyncio.get_running_loop().time()

    assert run(compute()) == ([1, 2, 4], 1.5), "one call at a time"
