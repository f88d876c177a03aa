"""TextStream: text as it comes, characters of several tokens, stop strings, and PagePool: pages and prefixes."""

import random

import pytest

from specdec_ops.decode.pages import PagePool
from specdec_ops.decode.text import TextStream


class Bytes:
    """A tokenizer of bytes, which split characters."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids, *, skip_special_tokens: bool = False) -> str:
        return bytes(ids).decode(errors="replace")


class LeadingSpace:
    """Words, of which the first of a text loses its space, as SentencePiece has it."""

    words = (" one", " two", " three")

    def decode(self, ids, *, skip_special_tokens: bool = False) -> str:
        return "".join(self.words[token] for token in ids).removeprefix(" ")


def test_characters_of_several_tokens_are_shown_whole():
    text = "aß€😀b"
    stream, pieces = TextStream(Bytes()), []
    for token in Bytes().encode(text):
        stream.push([token])
        pieces.append(stream.release(final=False))
    assert "".join(pieces) == text and "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_what_is_no_character_is_shown_in_the_end():
    stream = TextStream(Bytes())
    stream.push([0x61, 0xE2, 0x82])
    assert stream.release(final=False) == "a"
    stream.close()
    assert stream.release(final=True) == "\N{REPLACEMENT CHARACTER}"


def test_garbage_does_not_hold_the_text_back_forever():
    stream = TextStream(Bytes())
    stream.push([0xFF] * 20 + [0x61])
    assert stream.text.endswith("a")


def test_spaces_between_tokens_stay():
    stream = TextStream(LeadingSpace())
    for token in (0, 1, 2, 0):
        stream.push([token])
    assert stream.text == "one two three one"


@pytest.mark.parametrize("seed", range(20))
def test_stop_strings_in_any_pieces(seed):
    """Released text never holds a part of the stop string, however tokens are grouped."""
    generator = random.Random(seed)
    text = "".join(generator.choice("ab") for _ in range(40))
    stop = "".join(generator.choice("ab") for _ in range(generator.randint(1, 5)))
    stream, released, taken = TextStream(Bytes(), (stop, "zz")), "", 0
    ids = Bytes().encode(text)
    while taken < len(ids):
        count = generator.randint(1, 4)
        ended = stream.push(ids[taken : taken + count])
        taken += count
        released += stream.release(final=False)
        if ended:
            break
    else:
        stream.close()
    released += stream.release(final=True)
    place = text.find(stop)
    assert released == (text if place < 0 else text[:place])
    assert stream.stopped_at == (None if place < 0 else place + len(stop))


@pytest.mark.parametrize("seed", range(10))
def test_pages_are_counted_and_prefixes_are_what_they_say(seed):
    """Random requests against a plain record of which text each page holds."""
    generator = random.Random(seed)
    pool, running, holds = PagePool(12, 2), [], {}
    for _ in range(400):
        if running and generator.random() < 0.5:
            tokens, pages = running.pop(generator.randrange(len(running)))
            pool.register(tokens, pages)
            pool.drop(pages)
        else:
            tokens = [generator.randrange(2) for _ in range(generator.randint(1, 9))]
            pages = pool.find_prefix(tokens[:-1])
            for index, page in enumerate(pages):
                assert holds[page] == tuple(tokens[: 2 * index + 2]), "a page of another text"
            more = pool.take(-(-len(tokens) // 2) - len(pages))
            if more is None:
                pool.drop(pages)
                continue
            for index, page in enumerate(more, len(pages)):
                holds[page] = tuple(tokens[: 2 * index + 2])
            pages += more
            running.append((tokens, pages))
        users = [page for _, pages in running for page in pages]
        assert all(pool.users(page) == users.count(page) for page in range(12))
        assert pool.free == 12 - len(set(users))
    for _, pages in running:
        pool.drop(pages)
    assert pool.free == 12
