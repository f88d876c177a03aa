"""Conversations of a client and a server on a virtual clock."""

import asyncio
import contextlib

import torch

from specdec_ops import drafts
from specdec_ops.decode import Engine, Sampling
from specdec_ops.decode.decoder import Attention, Layer, Mlp, Norm, Projection
from specdec_ops.remote import Client, Link, Server, wire
from specdec_ops.remote.clock import Inline, run
from specdec_ops.remote.connection import Connection
from tests.harness.tiny_models import DIM, HEAD_DIM, HEADS, INNER, KV_HEADS, first_layers, make_decoder, noisy_mixture

TARGET = make_decoder(1)
DRAFT = first_layers(TARGET, 1)
PROMPT = [1, 2, 3, 4, 5, 1, 2, 3]
PASS, STEP = 0.02, 0.005  # seconds of a step of the server's engine, and of a draft


def eagle() -> drafts.Eagle:
    """A layer of random weights."""
    generator = torch.Generator().manual_seed(3)

    def projection(out, dim):
        return Projection(torch.randn(out, dim, generator=generator) / dim**0.5)

    norms = [Norm(torch.ones(DIM), None, 1e-6) for _ in range(2)]
    of_target = TARGET.layers[-1].attention
    attention = Attention(
        projection((HEADS + 2 * KV_HEADS) * HEAD_DIM, DIM),
        projection(DIM, HEADS * HEAD_DIM),
        HEADS,
        KV_HEADS,
        HEAD_DIM,
        of_target.rope,
    )
    mlp = Mlp(projection(2 * INNER, DIM), projection(DIM, INNER), "swiglu")
    return drafts.Eagle(projection(DIM, 2 * DIM), Layer(norms[0], attention, norms[1], mlp))


DRAFTS = {
    "none": None,
    "n-gram": drafts.Ngram(),
    "chain": drafts.Chain(DRAFT, 5),
    "own chain": drafts.Chain(TARGET, 5),
    "tree": drafts.MultiCandidate(DRAFT, (3, 2, 1)),
    "tree with repeats": drafts.MultiCandidate(DRAFT, (2, 2), replacement=True),
    "eagle": eagle(),
    "mixture": noisy_mixture(TARGET),
    "mixture on the target's last layer": noisy_mixture(TARGET, 1),
}


def states_for(draft) -> bool | drafts.Draft:
    """What a server has to be told so that a client can have this draft."""
    return draft if draft is not None and draft.wants_layers else isinstance(draft, drafts.Eagle)


def local(prompt: list[int], sampling: Sampling, target=TARGET):
    """What plain decoding says here."""
    return Engine(target, max_batch=1).generate([prompt], sampling)[0]


def server(target=TARGET, **options) -> Server:
    """On the loop's clock."""
    return Server(target, work=Inline(PASS), **{"max_batch": 4, "max_length": 128} | options)


def client(link: Link, of: Server, draft=None, **options) -> Client:
    """On the loop's clock, over a line."""
    target = TARGET if states_for(draft) else None
    there = {"deadline": 0.5, "target": target, "connect": lambda: link.connect(of.accept), "work": Inline(STEP)}
    return Client(draft=draft, **there | options)


def converse(sampling: Sampling, draft=None, link: Link | None = None, prompt=PROMPT, of=None, **options):
    """The result of an answer, the virtual seconds that it took, and the server as it was left."""
    link = Link(rtt=0.1) if link is None else link

    async def talk():
        async with server(**{"states": states_for(draft)} | (of or {})) as there:
            result = await client(link, there, draft, **options).generate(prompt, sampling)
            seconds = asyncio.get_running_loop().time()
            await asyncio.sleep(1.0)  # what was sent last arrives
            return result, seconds, there

    return run(talk())


@contextlib.asynccontextmanager
async def by_hand(there: Server, link: Link | None = None, hello: wire.Hello | None = None):
    """A connection on which a test says frame by frame what it likes. None: without a hello."""
    link = Link() if link is None else link
    connection = Connection(await link.connect(there.accept), max_body=1 << 20, max_unsent=1 << 24)
    try:
        if hello is not None:
            connection.send(hello)
            assert isinstance(await connection.receive(), wire.Hello)
        yield connection
    finally:
        connection.close()


def opened(key: bytes = b"k" * 16, tokens=tuple(PROMPT), **changes) -> wire.Open:
    """A session of greedy text."""
    settings = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "max_tokens": 20, "eos": ()}
    return wire.Open(key, **settings | {"logprobs": False, "states_from": -1, "tokens": tokens} | changes)


def verify(number: int, ids, *more: int) -> wire.Verify:
    """A chain after a text."""
    tokens = (ids[-1], *more)
    return wire.Verify(number, len(ids), tokens, tuple(range(-1, len(tokens) - 1)))
