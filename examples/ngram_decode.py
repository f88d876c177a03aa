"""A decode loop: a draft model grows a tree of bytes, the target scores it in one call, a rule decides what stays.

python examples/ngram_decode.py

Nothing is downloaded. The models count bytes in the sources of Python's standard library: the target predicts a byte
from the two before it, the draft from one. Each text is decoded with three rules that keep the target's distribution.
With "match" it is, byte for byte, the text of plain sampling with the same seeds.
"""

import sysconfig
from pathlib import Path

import torch

from specdec_ops import Tree, match_accept, sample_children, sample_tokens, tree_accept

sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
corpus = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8).long()
pairs = torch.bincount(corpus[:-1] * 256 + corpus[1:], minlength=256**2).view(256, 256).float()
triples = torch.bincount((corpus[:-2] * 256 + corpus[1:-1]) * 256 + corpus[2:], minlength=256**3).view(-1, 256).float()
draft_logits = (pairs + 1e-3).log()  # [last byte, next byte]
target_logits = (triples + (pairs / pairs.sum(1, keepdim=True).clamp(min=1)).repeat(256, 1) + 1e-6).log()

WIDTHS = (4, 2, 2, 1)
tree = Tree.from_branching(WIDTHS, root=True)  # node 0 is the last byte of the text
topology = tree.to("cpu")
levels = tree.levels.tolist()  # where each level begins: its nodes lie side by side


def grow(last_two, rule, noise):
    """A tree below each text: bytes [batch, nodes], and for each node the two bytes that end there, as one number."""
    tokens = torch.full((len(last_two), len(tree)), -1, dtype=torch.int32)
    context = last_two[:, None].repeat(1, len(tree))
    for width, start, stop, end in zip(WIDTHS, levels, levels[1:], levels[2:], strict=False):
        rows = draft_logits[context[:, start:stop] % 256]
        temperature = 0.0 if rule == "match" else 1.0  # at 0 the draft's most likely bytes, else drawn ones
        children = sample_children(rows, width, first_parent=start, temperature=temperature, **noise)
        tokens[:, stop:end] = children.tokens.flatten(1)
        context[:, stop:end] = context[:, start:stop].repeat_interleave(width, 1) % 256 * 256 + tokens[:, stop:end]
    return tokens, context


def decode(rule, prompts, length, seeds):
    """Texts of at least `length` more bytes, and how many times the target was called."""
    texts, calls = [bytearray(prompt) for prompt in prompts], 0
    while min(map(len, texts)) < max(map(len, prompts)) + length:
        last_two = torch.tensor([text[-2] * 256 + text[-1] for text in texts])
        positions = torch.tensor([len(text) - 1 for text in texts], dtype=torch.int32)  # of node 0
        noise = {"seeds": seeds, "positions": positions}
        tokens, context = grow(last_two, rule, noise)
        scores = target_logits[context]  # the one call of the target: [batch, nodes, 256]
        if rule == "match":
            accepted = match_accept(scores, tokens, topology, **noise)
        else:
            accepted = tree_accept(scores, tokens, topology, draft_logits[context % 256], rule=rule, **noise)
        for text, new in zip(texts, accepted.tokens.tolist(), strict=True):
            text += bytes(token for token in new if token >= 0)  # accepted bytes, the next one, then -1
        calls += 1
    return texts, calls


def decode_plainly(prompts, length, seeds):
    texts = [bytearray(prompt) for prompt in prompts]
    while len(texts[0]) < len(prompts[0]) + length:
        rows = target_logits[[text[-2] * 256 + text[-1] for text in texts]]
        positions = torch.tensor([len(text) for text in texts], dtype=torch.int32)
        for text, token in zip(texts, sample_tokens(rows, seeds=seeds, positions=positions).tolist(), strict=True):
            text.append(token)
    return texts


prompts, length = (b"import ", b"    def ", b"class ", b"return "), 200
seeds = torch.arange(len(prompts))
plain = decode_plainly(prompts, length, seeds)
for rule in ("match", "recursive", "traversal"):
    texts, calls = decode(rule, prompts, length, seeds)
    given = sum(len(text) - len(prompt) for text, prompt in zip(texts, prompts, strict=True)) / len(prompts)
    print(f"{rule}: {given / calls:.2f} bytes per call of the target; {texts[0][:70].decode('latin-1')!r}")
    if rule == "match":
        assert all(text.startswith(expected) for text, expected in zip(texts, plain, strict=True))
