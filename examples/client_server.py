"""A client that drafts and a server that verifies, in one process; the line between them is cut in the middle.

python examples/client_server.py

Needs the package msgpack. Nothing is downloaded: the models are small Llamas of random weights, the draft being the
target's first layer. While the server is gone the draft goes on alone, and what it says stands in brackets; when the
server is back it verifies that first. The text is the one that the target says by itself, token for token.
"""

import asyncio
import dataclasses

import torch

from specdec_ops import drafts
from specdec_ops.decode import Decoder, Engine, Sampling, Shape
from specdec_ops.decode.decoder import Attention, Layer, Mlp, Norm, Projection
from specdec_ops.remote import Client, Cut, Link, Server
from specdec_ops.rope import Rope

DIM, HEADS, KV_HEADS, HEAD_DIM, LETTERS = 32, 4, 2, 16, "abcdefghijklmnopqrstuvwxyz .,"


class Letters:
    """A tokenizer of single letters."""

    def encode(self, text):
        return [LETTERS.index(letter) for letter in text]

    def decode(self, ids, *, skip_special_tokens=False):
        return "".join(LETTERS[token] for token in ids)


def llama(layers: int) -> Decoder:
    generator = torch.Generator().manual_seed(1)

    def weight(out, dim):
        return Projection(torch.randn(out, dim, generator=generator) / dim**0.5)

    norm, rope = Norm(torch.ones(DIM), None, 1e-6), Rope(1e4, HEAD_DIM // 2, 512)
    made = []
    for _ in range(layers):
        qkv, out = weight((HEADS + 2 * KV_HEADS) * HEAD_DIM, DIM), weight(DIM, HEADS * HEAD_DIM)
        mlp = Mlp(weight(96, DIM), weight(DIM, 48), "swiglu")
        made.append(Layer(norm, Attention(qkv, out, HEADS, KV_HEADS, HEAD_DIM, rope), norm, mlp))
    shape = Shape(layers, KV_HEADS, HEAD_DIM, DIM, len(LETTERS), 512, torch.float32, torch.device("cpu"))
    embedding = torch.randn(len(LETTERS), DIM, generator=generator)
    head = Projection(3 * torch.randn(len(LETTERS), DIM, generator=generator) / DIM**0.5)
    return Decoder(shape, embedding, made, norm, head, tokenizer=Letters())


target = llama(2)
draft = dataclasses.replace(target, shape=target.shape._replace(layers=1), layers=target.layers[:1])
sampling = Sampling(temperature=0.7, seed=5, max_tokens=60, eos=())
link = Link(rtt=0.02, cuts=(Cut(after_down=1500, seconds=0.5),))  # a round trip of 20 ms; cut after 1500 bytes


async def talk():
    shown = ""
    async with Server(target) as server:
        line = {"connect": lambda: link.connect(server.accept), "deadline": 0.1}  # in place of a host and a port
        async with Client(draft=drafts.Chain(draft, 6), tokenizer=Letters(), **line) as client:
            async for piece in client.stream("once upon a time", sampling):
                shown += piece.text
                print(f"{shown}[{piece.unverified_text}]" if piece.unverified else shown)
            return piece.result


result = asyncio.run(talk())
plain = Engine(target).generate("once upon a time", sampling)[0]
stats = result.stats
print(f"{stats.calls} calls for {stats.tokens} tokens, {stats.alone} said alone, {stats.withdrawn} taken back")
print(f"the line was cut {stats.reconnections} time; the text is the target's: {result.tokens == plain.tokens}")
