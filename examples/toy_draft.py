"""A small sorted draft, trained here: a byte-level transformer each of whose exits can predict the next byte.

The recipe is that of sorted fine-tuning (SoFT) in S2D (Kavehzadeh et al., 2024), from scratch: the sub-models are the
first layers of one network, they share the final norm and the head, and the loss is the mean of their cross-entropies
in one pass. The text is the source code of Python's own standard library, so nothing is downloaded. Weights are kept in
the user's cache folder, under a name that stands for the settings.

python examples/toy_draft.py            a few minutes on two idle cores
python examples/toy_draft.py --quick    seconds; a model that has learnt little
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import random
import sys
import sysconfig
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

VOCAB = 256


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that the weights depend on, besides the versions of Python and PyTorch."""

    dim: int = 256
    heads: int = 4
    exits: tuple[int, ...] = (2, 4, 6)
    context: int = 128
    batch: int = 8
    steps: int = 800
    learning_rate: float = 2e-3
    seed: int = 0


QUICK = Settings(dim=64, heads=2, exits=(1, 2, 4), context=64, batch=16, steps=110, learning_rate=6e-3)


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, halves rotated: x [..., rows, heads, head_dim], positions [rows]."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = positions[:, None, None] * frequencies
    low, high = x[..., :half], x[..., half:]
    return torch.cat([low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()], -1)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention over a whole sequence: [batch, rows, heads, head_dim]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class Layer(nn.Module):
    """One layer of [..., rows, dim]. The caller says how to attend: over a sequence, or through a cache."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        dim, inner = settings.dim, settings.dim * 5 // 2
        self.heads = settings.heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.qkv, self.attention_out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.gate_up, self.down = nn.Linear(dim, 2 * inner, bias=False), nn.Linear(inner, dim, bias=False)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, attend) -> torch.Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.unbind(-3)
        x = x + self.attention_out(attend(rotate(q, positions), rotate(k, positions), v).flatten(-2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)


class SortedDraft(nn.Module):
    """Nested sub-models: the first `exits[i]` layers, then the norm and the head that all of them share."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.embedding = nn.Embedding(VOCAB, settings.dim)
        self.layers = nn.ModuleList(Layer(settings) for _ in range(settings.exits[-1]))
        self.norm = nn.RMSNorm(settings.dim, eps=1e-6)
        self.head = nn.Linear(settings.dim, VOCAB, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)
        for layer in self.layers:
            for out in (layer.attention_out, layer.down):
                out.weight.data /= math.sqrt(2 * len(self.layers))

    def forward(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Logits at each exit, [batch, rows, vocab], of tokens [batch, rows]."""
        x, positions, logits = self.embedding(tokens), torch.arange(tokens.shape[1], device=tokens.device), []
        for depth, layer in enumerate(self.layers, start=1):
            x = layer(x, positions, causal)
            if depth in self.settings.exits:
                logits.append(self.head(self.norm(x)))
        return logits

    def losses(self, text: torch.Tensor) -> torch.Tensor:
        """Cross-entropy per exit, in nats per byte: [exits], of text [batch, rows + 1]."""
        logits = self(text[:, :-1])
        return torch.stack([functional.cross_entropy(part.flatten(0, 1), text[:, 1:].flatten()) for part in logits])


def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """The standard library's sources as bytes, uint8: (for training, held out), split by files."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for pattern in ("*.py", "*/*.py") for path in folder.glob(pattern))
    files = [path for path in files if path.parts[len(folder.parts)] not in ("site-packages", "test", "idlelib")]
    random.Random(0).shuffle(files)
    held_out = len(files) // 20
    parts = (b"".join(path.read_bytes() for path in part) for part in (files[held_out:], files[:held_out]))
    training, held = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return training, held


def windows(text: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Random pieces of the text, int64 [count, length]."""
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16, which halves the time of training."""
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # a private name: without it, float32


def train(settings: Settings, log=print) -> tuple[SortedDraft, list[float]]:
    """A trained draft, and the mean loss of its exits at each step, in nats per byte."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    model, text = SortedDraft(settings), corpus()[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    warm_up = max(1, settings.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.05 + 0.95 * math.cos(math.pi / 2 * step / settings.steps) ** 2),
    )
    history, start = [], time.perf_counter()
    for step in range(settings.steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
            losses = model.losses(windows(text, settings.batch, settings.context + 1, generator))
        losses.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        history.append(losses.mean().item())
        if step % max(1, settings.steps // 10) == 0 or step == settings.steps - 1:
            exits = "  ".join(f"{depth}: {loss:.2f}" for depth, loss in zip(settings.exits, losses, strict=True))
            log(f"step {step:4}, {time.perf_counter() - start:4.0f} s, nats per byte after layer {exits}")
    return model.eval().requires_grad_(False), history


def cache_file(settings: Settings) -> Path:
    """Where weights of these settings are kept: the user's cache folder, never the repository."""
    key = json.dumps([dataclasses.asdict(settings), sys.version_info[:2], torch.__version__, 1])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specdec_ops"
    return folder / f"sorted-draft-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"


def load(settings: Settings, *, retrain: bool = False, log=print) -> tuple[SortedDraft, list[float]]:
    """The draft and its training losses from the cache, trained first if it isn't there."""
    file = cache_file(settings)
    if file.exists() and not retrain:
        stored = torch.load(file, weights_only=True)
        model = SortedDraft(settings)
        model.load_state_dict(stored["weights"])
        log(f"weights from {file}")
        return model.eval().requires_grad_(False), stored["history"]
    model, history = train(settings, log)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    torch.save({"weights": model.state_dict(), "history": history}, unfinished)
    unfinished.replace(file)
    log(f"weights kept in {file}")
    return model, history


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the sorted draft of examples/sorted_exit.py.")
    parser.add_argument("--quick", action="store_true", help="a tiny model, in seconds")
    parser.add_argument("--retrain", action="store_true", help="even if the weights are cached")
    arguments = parser.parse_args()
    settings = QUICK if arguments.quick else Settings()
    if arguments.quick:
        torch.set_num_threads(1)  # too small for two
    model, history = load(settings, retrain=arguments.retrain)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} weights, {settings}")
    print(f"training loss {history[0]:.2f} -> {sum(history[-20:]) / 20:.2f} nats per byte, mean of the exits")
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        held_out = model.losses(windows(corpus()[1], 32, settings.context + 1, generator))
    for depth, loss in zip(settings.exits, held_out, strict=True):
        print(f"held-out loss after {depth} layers: {loss:.2f} nats per byte")


if __name__ == "__main__":
    main()
