"""Decoders of a few thousand random weights, drafts for them, and a tokenizer of single characters."""

import dataclasses
import random

import torch

from specdec_ops import drafts
from specdec_ops.decode import Decoder, Sampling, Shape
from specdec_ops.decode.decoder import Attention, Layer, Mlp, Norm, Projection
from specdec_ops.drafts.mixture_of_attentions_parts import Sizes
from specdec_ops.rope import Rope
from specdec_ops.train.mixture_of_attentions_net import Net

HEADS, KV_HEADS, HEAD_DIM, DIM, INNER, POSITIONS = 4, 2, 16, 32, 48, 512


def make_decoder(seed: int, *, layers: int = 2, vocab: int = 40, sharpness: float = 3.0, **changes) -> Decoder:
    """A Llama. The greater the sharpness, the surer it is of its next token."""
    generator = torch.Generator().manual_seed(seed)

    def weight(out: int, dim: int) -> torch.Tensor:
        return torch.randn(out, dim, generator=generator) / dim**0.5

    rope = Rope(1e4, HEAD_DIM // 2, POSITIONS)

    def norm() -> Norm:
        return Norm(1 + 0.1 * torch.randn(DIM, generator=generator), None, 1e-6)

    made = [
        Layer(
            norm(),
            Attention(
                Projection(weight((HEADS + 2 * KV_HEADS) * HEAD_DIM, DIM)),
                Projection(weight(DIM, HEADS * HEAD_DIM)),
                HEADS,
                KV_HEADS,
                HEAD_DIM,
                rope,
            ),
            norm(),
            Mlp(Projection(weight(2 * INNER, DIM)), Projection(weight(DIM, INNER)), "swiglu"),
        )
        for _ in range(layers)
    ]
    shape = Shape(layers, KV_HEADS, HEAD_DIM, DIM, vocab, POSITIONS, torch.float32, torch.device("cpu"))
    decoder = Decoder(shape, weight(vocab, DIM) * DIM**0.5, made, norm(), Projection(sharpness * weight(vocab, DIM)))
    return dataclasses.replace(decoder, **changes)


def first_layers(decoder: Decoder, count: int) -> Decoder:
    """A draft that agrees with its target now and then: the target's leading layers, with its norm and head."""
    shape = decoder.shape._replace(layers=count)
    return dataclasses.replace(decoder, shape=shape, layers=decoder.layers[:count])


def from_embedding(dim: int = DIM) -> Projection:
    """An fc of Eagle that passes the embedding on and leaves the feature out."""
    return Projection(torch.cat((torch.eye(dim), torch.zeros(dim, dim)), dim=1))


def noisy_eagle(target: Decoder, hot: bool = True, **options) -> drafts.Eagle:
    """A draft for a target that is right now and then, and that looks at its features."""
    generator = torch.Generator().manual_seed(0)
    fc = from_embedding().weight + 0.1 * torch.randn(DIM, 2 * DIM, generator=generator)
    hot_vocab = torch.randperm(40, generator=generator)[:25] if hot else None
    return drafts.Eagle(Projection(fc), target.layers[0], hot_vocab, **options)


def mixture_net(target: Decoder, target_layers: int = 0, layer_inner: int | None = None, seed: int = 0) -> Net:
    """A network of Mixture of Attentions all of whose parts matter."""
    torch.manual_seed(seed)
    net = Net(target, Sizes.of(target, inner=24, layer_inner=layer_inner, target_layers=target_layers))
    for name, parameter in net.named_parameters():
        if parameter.requires_grad and name.endswith(("out", "down", "bias")):
            torch.nn.init.normal_(parameter, std=0.5 * parameter.shape[-1] ** -0.5)
        if parameter.requires_grad and name.endswith("_norm"):
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return net


def noisy_mixture(target: Decoder, target_layers: int = 0, hot: bool = True, **options) -> drafts.MixtureOfAttentions:
    """A draft for a target that looks at its keys and values. What it says is right by chance."""
    hot_vocab = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:25] if hot else None
    return mixture_net(target, target_layers).draft(target, hot_vocab, **options)


class Characters:
    """A tokenizer for texts of the characters from "0" on: token i is `chr(48 + i)`."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) - 48 for character in text]

    def decode(self, ids, *, skip_special_tokens: bool = False) -> str:
        return "".join(chr(48 + token) for token in ids)


def watch_sent_back(engine) -> list:
    """A list that gets each request that has to give its pages back and wait."""
    sent_back, send_back = [], engine.scheduler.send_back

    def watched(request) -> None:
        sent_back.append(request)
        send_back(request)

    engine.scheduler.send_back = watched
    return sent_back


def joined_late(engine, prompts: list[list[int]], asked: list) -> list:
    """Results of requests that join one by one between rounds, in another order, beside one that doesn't speculate."""
    order = list(range(len(prompts)))
    random.Random(0).shuffle(order)
    places, results = {}, {}
    while order or not engine.is_idle:
        if order:
            place = order.pop()
            places[engine.submit(prompts[place], asked[place])] = place
            if len(order) == 2:
                engine.submit([9, 9], Sampling(max_tokens=9, speculate=False))
        for chunk in engine.step():
            if chunk.result is not None and chunk.request in places:
                results[places[chunk.request]] = chunk.result
    return [results[place] for place in range(len(prompts))]
