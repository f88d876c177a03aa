"""Texts over a line: token for token those of plain decoding, whatever the draft and whatever becomes of the line."""

import asyncio
import contextlib
import dataclasses

import pytest

pytest.importorskip("msgpack", reason="the extra remote has it")

from specdec_ops import drafts
from specdec_ops.decode import Sampling
from specdec_ops.remote import Cut, Limits, Link, Server
from specdec_ops.remote.clock import run
from tests.harness.tiny_models import Characters, make_decoder
from tests.remote.talks import DRAFTS, PROMPT, TARGET, client, converse, local, server, states_for

GREEDY = Sampling(max_tokens=30, eos=())
SAMPLED = Sampling(max_tokens=30, eos=(), temperature=0.9, top_k=20, top_p=0.9, seed=7)
SAMPLINGS = {"greedy": GREEDY, "sampled": SAMPLED}
LINES = {
    "plain": {},
    "jitter, loss and a low rate": {"jitter": 0.05, "loss": 0.05, "rate": 2000.0},
    "cut": {"cuts": (Cut(at=0.7, seconds=3.0),)},
    "cut silently": {"cuts": (Cut(at=0.7, seconds=3.0, silent=True),)},
    "cut again and again": {"cuts": tuple(Cut(at=0.3 * n, seconds=0.1) for n in range(1, 12))},
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
@pytest.mark.parametrize("draft", DRAFTS.values(), ids=DRAFTS)
def test_text_is_that_of_plain_decoding(draft, line, sampling):
    result, seconds, there = converse(sampling, draft, Link(rtt=0.1, **line))
    assert result.tokens == local(PROMPT, sampling).tokens
    assert result.finish_reason == "length" and not result.unverified and not result.kept
    assert there.sessions == 0, "the client has said that it is done"
    cuts = line.get("cuts", ())
    assert seconds > (cuts[0].seconds if cuts else 0) and result.stats.reconnections >= (len(cuts) == 1)


def test_the_same_conversation_goes_the_same_way():
    line = {"rtt": 0.1, "jitter": 0.05, "loss": 0.05, "cuts": (Cut(at=0.7, seconds=3.0),)}
    first, second = (converse(SAMPLED, DRAFTS["chain"], Link(**line, seed=3))[:2] for _ in range(2))
    assert first == second


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_logprobs_are_those_of_plain_decoding(sampling):
    asked = dataclasses.replace(sampling, logprobs=True)
    link = Link(rtt=0.1, cuts=(Cut(at=0.7, seconds=3.0),))
    result, _, _ = converse(asked, DRAFTS["tree"], link)
    assert result.logprobs == pytest.approx(local(PROMPT, asked).logprobs, abs=1e-6)


def test_an_eos_a_stop_string_and_the_longest_text_end_an_answer():
    plain = local(PROMPT, GREEDY).tokens
    eos = Sampling(max_tokens=30, eos=(plain[9],))
    result, _, there = converse(eos, DRAFTS["own chain"])
    assert result.tokens == local(PROMPT, eos).tokens and result.finish_reason == "eos" and there.sessions == 0
    target = dataclasses.replace(TARGET, tokenizer=Characters())
    stop = Sampling(max_tokens=30, eos=(), stop=Characters().decode(plain[8:10]))
    result, _, there = converse(stop, DRAFTS["own chain"], tokenizer=Characters())
    expected = local(PROMPT, stop, target)
    assert (result.tokens, result.text, result.finish_reason) == (expected.tokens, expected.text, "stop")
    assert there.sessions == 0
    long = Sampling(max_tokens=1000, eos=())
    result, _, _ = converse(long, DRAFTS["own chain"], of={"max_length": 40})
    assert len(result.tokens) == 40 - len(PROMPT) and result.finish_reason == "length"
    assert result.tokens == local(PROMPT, Sampling(max_tokens=32, eos=())).tokens


def test_a_target_that_gives_nan_ends_an_answer():
    broken = make_decoder(1)
    broken.layers[0].mlp.up.weight.fill_(float("nan"))

    async def talk():
        async with server(broken) as there:
            return await client(Link(rtt=0.1), there, DRAFTS["n-gram"]).generate(PROMPT, GREEDY)

    assert run(talk()).finish_reason == "invalid"


# Many clients.


def test_64_clients_share_the_rounds():
    """Each with a text, settings and a line of its own; more than fit into a round, and than have pages at once."""
    count, kinds = 64, [draft for draft in DRAFTS.values() if not states_for(draft)]
    prompts = [[n % 40, *PROMPT[: n % 7], n % 11] for n in range(count)]
    samplings = [dataclasses.replace(GREEDY if n % 2 else SAMPLED, seed=n, max_tokens=6 + n % 9) for n in range(count)]

    async def talk():
        async with server(max_batch=16, pages=40) as there:
            steps, step = [], there._engine.step
            there._engine.step = lambda: steps.append(0) or step()
            clients = [
                client(Link(rtt=0.02 + 0.003 * n, jitter=0.01, seed=n), there, kinds[n % len(kinds)], deadline=60.0)
                for n in range(count)
            ]
            asked = (c.generate(p, s) for c, p, s in zip(clients, prompts, samplings, strict=True))
            results = await asyncio.gather(*asked)
            await asyncio.sleep(1.0)
            return results, len(steps), there

    results, steps, there = run(talk())
    for result, prompt, sampling in zip(results, prompts, samplings, strict=True):
        assert result.tokens == local(prompt, sampling).tokens
    calls = sum(result.stats.calls for result in results)
    assert steps < calls / 3, "many trees share a round"
    assert there.sessions == there.connections == 0
    pool = there._engine.cache.pool
    assert pool.free == pool.pages


# A cut at every byte.


def frame_places(draft, sampling) -> tuple[list[int], list[int]]:
    """Where the frames of an undisturbed conversation end, in bytes: those of the client, and of the server."""
    ends: tuple[list[int], list[int]] = ([0], [0])

    class Noted(Link):
        async def connect(self, accept):
            def noted(place, end):
                write = end.write
                end.write = lambda data: (ends[place].append(ends[place][-1] + len(data)), write(data))
                return end

            return noted(0, await super().connect(lambda end: accept(noted(1, end))))

    converse(sampling, draft, Noted(rtt=0.1))
    return ends


SHORT = Sampling(max_tokens=8, eos=(), temperature=0.9, seed=7)
UP, DOWN = frame_places(DRAFTS["n-gram"], SHORT)
# Frames of the client: hello, open, verify, verify ...; of the server: hello, result, result ...
VERIFY, RESULT = range(UP[3], UP[4] + 1), range(DOWN[1], DOWN[2] + 1)


@pytest.fixture(scope="module")
def short():
    return local(PROMPT, SHORT).tokens


@pytest.mark.parametrize("silent", [False, True], ids=["broken", "silent"])
@pytest.mark.parametrize("what", ["verify", "result"])
def test_a_cut_at_every_byte(what, silent, short):
    """Also before the first and after the last one."""
    for place in (VERIFY if what == "verify" else RESULT)[:: 3 if silent else 1]:
        cut = Cut(**{"after_up" if what == "verify" else "after_down": place}, seconds=1.0, silent=silent)
        result, _, there = converse(SHORT, DRAFTS["n-gram"], Link(rtt=0.1, cuts=(cut,)), silence=2.0)
        assert result.tokens == short, place
        assert result.stats.reconnections == 1 and there.sessions == 0, place


def test_a_cut_at_every_seventh_byte_of_the_whole_conversation(short):
    for place in range(0, max(UP[-1], DOWN[-1]), 7):
        for direction in ("after_up", "after_down"):
            link = Link(rtt=0.1, cuts=(Cut(**{direction: place}, seconds=0.3),))
            result, _, _ = converse(SHORT, DRAFTS["n-gram"], link)
            assert result.tokens == short, (direction, place)


@pytest.mark.parametrize("name", ["eagle", "mixture"])
def test_states_that_were_lost_are_sent_again(name):
    """A cut at places all over the conversation of a draft that goes on from what the target knows."""
    expected = local(PROMPT, SHORT).tokens
    _, down = frame_places(DRAFTS[name], SHORT)
    undisturbed, _, _ = converse(SHORT, DRAFTS[name])
    assert undisturbed.stats.drafted > 0
    for place in range(down[1], down[-1], 97):
        result, _, _ = converse(SHORT, DRAFTS[name], Link(rtt=0.1, cuts=(Cut(after_down=place, seconds=0.3),)))
        assert result.tokens == expected, place
        assert name == "mixture" or result.stats.drafted == undisturbed.stats.drafted, (
            "the draft has seen the same rows"
        )


# The server goes, and comes back.


@contextlib.asynccontextmanager
async def two_servers(at: float, **options):
    """Calls `accept` reach the first server until `at`, then another one that knows nothing of it."""
    async with server(**options) as first, server(**options) as second:
        loop = asyncio.get_running_loop()

        class Both(Server):
            def __init__(self) -> None:
                pass

            def accept(self, stream) -> None:
                (first if loop.time() < at else second).accept(stream)

        yield Both()


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("draft", DRAFTS.values(), ids=DRAFTS)
def test_a_server_that_was_restarted_goes_on(draft, sampling):
    async def talk():
        async with two_servers(0.7, states=states_for(draft)) as both:
            link = Link(rtt=0.1, cuts=(Cut(at=0.7, seconds=1.0),))
            return await client(link, both, draft).generate(PROMPT, sampling)

    result = run(talk())
    assert result.tokens == local(PROMPT, sampling).tokens and result.stats.reconnections == 1


@pytest.mark.parametrize("draft", DRAFTS.values(), ids=DRAFTS)
def test_a_session_that_has_expired_is_opened_again(draft):
    link = Link(rtt=0.1, cuts=(Cut(at=0.7, seconds=50.0),))
    of = {"limits": Limits(session_seconds=5.0)}
    result, _, _ = converse(SAMPLED, draft, link, of=of)
    assert result.tokens == local(PROMPT, SAMPLED).tokens and result.stats.reconnections == 1


def test_a_session_that_is_not_used_is_forgotten():
    async def talk():
        async with server(limits=Limits(session_seconds=5.0)) as there:
            pieces = client(Link(), there, drafts.Ngram()).stream(PROMPT, GREEDY)
            await anext(pieces)
            assert there.sessions == 1
            await asyncio.sleep(4.0)
            assert there.sessions == 1
            await asyncio.sleep(2.0)
            assert there.sessions == 0
            rest = [piece async for piece in pieces]
            return rest[-1].result

    assert run(talk()).tokens == local(PROMPT, GREEDY).tokens
