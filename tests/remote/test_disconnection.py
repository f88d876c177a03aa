"""A client without its server: it goes on alone, and nothing that was accepted is lost or doubled afterwards."""

import asyncio
import dataclasses
import itertools
import json

import pytest

pytest.importorskip("msgpack", reason="the extra remote has it")

from specdec_ops.decode import Engine, Sampling
from specdec_ops.remote import Cut, Limits, Link, RemoteError
from specdec_ops.remote.clock import Inline, run
from tests.harness.tiny_models import Characters, make_decoder
from tests.remote.talks import DRAFT, DRAFTS, PROMPT, TARGET, client, converse, local, server, states_for

GREEDY = Sampling(max_tokens=30, eos=())
SAMPLED = Sampling(max_tokens=30, eos=(), temperature=0.9, seed=7)
SAMPLINGS = {"greedy": GREEDY, "sampled": SAMPLED}
LONG_CUT = (Cut(at=0.7, seconds=1e6),)


def pieces_of(draft, sampling, link, **options):
    async def talk():
        async with server(states=True) as there:
            return [piece async for piece in client(link, there, draft, **options).stream(PROMPT, sampling)]

    return run(talk())


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_alone_a_client_says_what_its_draft_says(sampling):
    """After the last verified token, with the noise of the request: what plain decoding of the draft says."""
    pieces = pieces_of(DRAFTS["chain"], sampling, Link(rtt=0.1, cuts=LONG_CUT), give_up=20.0)
    result = pieces[-1].result
    verified = len(result.tokens) - result.unverified
    assert result.finish_reason == "disconnected" and 0 < verified < 30 and len(result.tokens) == 30
    assert result.tokens[:verified] == local(PROMPT, sampling).tokens[:verified]
    rest = dataclasses.replace(sampling, max_tokens=result.unverified)
    alone = local([*PROMPT, *result.tokens[:verified]], rest, DRAFT)
    assert result.tokens[verified:] == alone.tokens
    assert sum((piece.tokens for piece in pieces), ()) == tuple(result.tokens[:verified])
    growing = [piece.unverified for piece in pieces if piece.unverified]
    assert all(b[: len(a)] == a for a, b in itertools.pairwise(growing)) and len(growing) > 3


def test_an_eos_of_the_draft_ends_it():
    undisturbed = pieces_of(DRAFTS["chain"], GREEDY, Link(rtt=0.1, cuts=LONG_CUT), give_up=20.0)[-1].result
    verified = len(undisturbed.tokens) - undisturbed.unverified
    eos = next(token for token in undisturbed.tokens[verified + 2 :] if token not in undisturbed.tokens[:verified])
    ends = undisturbed.tokens.index(eos) + 1
    asked = dataclasses.replace(GREEDY, eos=(eos,))
    result = pieces_of(DRAFTS["chain"], asked, Link(rtt=0.1, cuts=LONG_CUT), give_up=20.0)[-1].result
    assert result.tokens == undisturbed.tokens[:ends] and result.finish_reason == "disconnected"


@pytest.mark.parametrize("name", ["none", "n-gram", "eagle"])
def test_who_knows_nothing_more_waits(name):
    """Eagle has one tree without the target's rows, n-grams what they find."""
    result, seconds, _ = converse(GREEDY, DRAFTS[name], Link(rtt=0.1, cuts=LONG_CUT), give_up=20.0)
    assert result.finish_reason == "disconnected" and 20 < seconds < 23
    assert result.unverified <= {"none": 0, "n-gram": 30, "eagle": 4}[name]
    verified = len(result.tokens) - result.unverified
    assert result.tokens[:verified] == local(PROMPT, GREEDY).tokens[:verified]


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("at", [0.3, 0.55, 0.7, 1.1])
def test_on_return_the_text_is_the_targets_again(at, sampling):
    """Unverified tokens that the target agrees with stay, and the others are taken back."""
    pieces = pieces_of(DRAFTS["own chain"], sampling, Link(rtt=0.1, cuts=(Cut(at=at, seconds=5.0),)))
    result = pieces[-1].result
    assert result.tokens == local(PROMPT, sampling).tokens and not result.unverified
    assert result.stats.withdrawn == 0, "the draft is the target"
    assert result.stats.calls <= 8, "what was said alone is verified in long pieces"
    pieces = pieces_of(DRAFTS["chain"], sampling, Link(rtt=0.1, cuts=(Cut(at=at, seconds=5.0),)))
    result = pieces[-1].result
    assert result.tokens == local(PROMPT, sampling).tokens and result.stats.withdrawn > 0
    assert sum((piece.tokens for piece in pieces), ()) == tuple(result.tokens), "verified tokens come once each"


def test_a_long_absence_is_verified_in_trees_that_the_server_allows():
    of = {"limits": Limits(nodes=4)}
    result, _, _ = converse(GREEDY, DRAFTS["own chain"], Link(rtt=0.1, cuts=(Cut(at=0.5, seconds=9.0),)), of=of)
    assert result.tokens == local(PROMPT, GREEDY).tokens and result.stats.withdrawn == 0


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_kept_tokens_stay_and_are_reported(sampling):
    asked = dataclasses.replace(sampling, logprobs=True)
    link = Link(rtt=0.1, cuts=(Cut(at=0.7, seconds=2.0),))
    pieces = pieces_of(DRAFTS["chain"], asked, link, on_return="keep")
    result = pieces[-1].result
    shown = max((piece.unverified for piece in pieces), key=len)
    (start, end), *more = result.kept
    assert not more and 0 < start < end == len(result.tokens) == 30, "all of the answer was said alone"
    assert len(result.tokens) == len(result.logprobs)
    assert all(value == value for value in result.logprobs[:start]) and result.logprobs[-1] != result.logprobs[-1]
    assert result.tokens[:start] == local(PROMPT, sampling).tokens[:start]
    assert tuple(result.tokens[end - len(shown) : end]) == shown
    assert result.tokens != local(PROMPT, sampling).tokens and result.finish_reason == "length"


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_after_kept_tokens_the_target_goes_on(sampling):
    """A short absence: what follows the kept tokens is what the target says after them."""
    asked = dataclasses.replace(sampling, max_tokens=60)
    link = Link(rtt=0.1, cuts=(Cut(at=0.7, seconds=0.45),))
    pieces = pieces_of(DRAFTS["chain"], asked, link, on_return="keep", deadline=0.2, work=Inline(0.15))
    result = pieces[-1].result
    assert len(result.kept) >= 1 and len(result.tokens) == 60
    _, end = result.kept[-1]
    assert end < 60
    rest = dataclasses.replace(asked, max_tokens=60 - end)
    assert result.tokens[end:] == local([*PROMPT, *result.tokens[:end]], rest).tokens


def test_text_of_unverified_tokens_is_replaced_by_the_next_piece():
    link = Link(rtt=0.1, cuts=(Cut(at=0.7, seconds=3.0),))
    pieces = pieces_of(DRAFTS["chain"], GREEDY, link, tokenizer=Characters())
    assert any(piece.unverified_text for piece in pieces)
    for piece in pieces:
        assert piece.unverified_text == Characters().decode(piece.unverified)
    assert "".join(piece.text for piece in pieces) == pieces[-1].result.text


# Clients that are started anew.


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("name", ["n-gram", "chain", "eagle", "mixture"])
def test_a_client_that_was_restarted_goes_on(name, sampling, tmp_path):
    """It stops after each number of pieces in turn, and another one goes on from what the first has written."""
    asked = dataclasses.replace(sampling, max_tokens=16, logprobs=True)
    expected = local(PROMPT, asked)
    for stop in range(1, 9):
        saved = tmp_path / f"{stop}.json"

        async def talk(stop=stop, saved=saved):
            async with server(states=states_for(DRAFTS[name])) as there:
                first, seen = client(Link(rtt=0.1), there, DRAFTS[name]).stream(PROMPT, asked, save=saved), 0
                async for _ in first:
                    seen += 1
                    if seen == stop:
                        break
                await first.aclose()
                second = client(Link(rtt=0.1), there, DRAFTS[name], tokenizer=Characters()).resume(saved)
                pieces = [piece async for piece in second]
                await asyncio.sleep(1.0)
                return pieces, there

        pieces, there = run(talk())
        result = pieces[-1].result
        assert result.tokens == expected.tokens and result.finish_reason == expected.finish_reason
        assert result.logprobs == pytest.approx(expected.logprobs, abs=1e-6)
        assert sum((piece.tokens for piece in pieces), ()) == tuple(expected.tokens), "from the start, each once"
        assert there.sessions == 0


def test_a_client_that_was_restarted_from_an_old_state_goes_on(tmp_path):
    """The server is several rounds further: the text is opened again, and says the same."""
    saved, old = tmp_path / "now.json", tmp_path / "old.json"

    async def talk():
        async with server() as there:
            pieces = client(Link(rtt=0.1), there, DRAFTS["n-gram"]).stream(PROMPT, SAMPLED, save=saved)
            for count in range(6):
                await anext(pieces)
                if count == 1:
                    old.write_bytes(saved.read_bytes())
            await pieces.aclose()
            rest = [piece async for piece in client(Link(rtt=0.1), there, DRAFTS["n-gram"]).resume(old)]
            await asyncio.sleep(1.0)
            return rest[-1].result, there.sessions

    result, sessions = run(talk())
    assert result.tokens == local(PROMPT, SAMPLED).tokens and sessions == 0


@pytest.mark.parametrize("on_return", ["rollback", "keep"])
def test_a_client_that_was_restarted_while_it_was_alone_goes_on(on_return, tmp_path):
    saved = tmp_path / "state.json"

    async def talk():
        async with server() as there:
            link = Link(rtt=0.1, cuts=LONG_CUT)
            pieces = client(link, there, DRAFTS["chain"], give_up=5.0).stream(PROMPT, GREEDY, save=saved)
            alone = [piece async for piece in pieces][-1].result
            options = {"on_return": on_return}
            rest = [piece async for piece in client(Link(rtt=0.1), there, DRAFTS["chain"], **options).resume(saved)]
            return alone, rest

    alone, rest = run(talk())
    assert alone.unverified and alone.finish_reason == "disconnected"
    assert rest[0].unverified == tuple(alone.tokens[-alone.unverified :])
    result = rest[-1].result
    if on_return == "rollback":
        assert result.tokens == local(PROMPT, GREEDY).tokens and not result.kept
    else:
        assert result.tokens == alone.tokens and result.kept and not result.unverified


def test_an_answer_that_has_ended_stays_as_it_is(tmp_path):
    saved = tmp_path / "state.json"

    async def talk():
        async with server() as there:
            pieces = client(Link(), there, DRAFTS["n-gram"]).stream(PROMPT, GREEDY, save=saved)
            first = [piece async for piece in pieces][-1].result
            link = Link()
            again = [piece async for piece in client(link, there, DRAFTS["n-gram"]).resume(saved)][-1].result
            return first, again, link.connections

    first, again, connections = run(talk())
    assert (first.tokens, first.finish_reason) == (again.tokens, again.finish_reason) and connections == 0


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 2}', "nonsense"])
def test_a_file_that_holds_no_answer_is_refused(content, tmp_path):
    path = tmp_path / "state.json"
    path.write_text(content)

    async def talk():
        async with server() as there:
            await anext(client(Link(), there).resume(path))

    with pytest.raises(ValueError, match="saved must be a file that a client has written"):
        run(talk())


def test_what_is_saved_names_no_token(tmp_path):
    path = tmp_path / "state.json"

    async def talk():
        async with server(token="a secret") as there:
            async for _ in client(Link(), there, token="a secret").stream(PROMPT, GREEDY, save=path):
                pass

    run(talk())
    assert "a secret" not in path.read_text() and json.loads(path.read_text())["finish_reason"] == "length"


# Servers that are not there, or not the same.


def test_without_a_server_there_is_no_answer():
    async def talk():
        async with server() as there:
            link = Link(rtt=0.1, cuts=(Cut(at=0.0, seconds=1e6),))
            await client(link, there, DRAFTS["n-gram"], give_up=7.0).generate(PROMPT, GREEDY)

    with pytest.raises(ConnectionError, match="no server answered for 7 seconds"):
        run(talk())


def test_another_model_does_not_go_on_with_an_answer():
    async def talk():
        async with server() as first, server(make_decoder(2)) as second:
            loop = asyncio.get_running_loop()
            link = Link(rtt=0.1, cuts=(Cut(at=0.7, seconds=1.0),))

            async def connect():
                there = first if loop.time() < 0.7 else second
                return await link.connect(there.accept)

            await client(link, first, DRAFTS["n-gram"], connect=connect).generate(PROMPT, GREEDY)

    with pytest.raises(RemoteError, match="the server's model must be that of hash") as caught:
        run(talk())
    assert caught.value.code == "model"


def test_texts_of_the_engine_and_over_a_line_have_one_definition():
    """The draft that goes on alone is itself a target: of the same text, token for token, wherever it runs."""
    result, _, _ = converse(SAMPLED, DRAFTS["own chain"], Link(rtt=0.1, cuts=(Cut(at=0.3, seconds=3.0),)))
    assert result.tokens == Engine(TARGET, DRAFTS["tree"], "match").generate([PROMPT], SAMPLED)[0].tokens
