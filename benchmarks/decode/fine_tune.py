"""A short fine-tune of a model on Python's standard library: a second target of one tokenizer, for sorted drafts.

`python -m benchmarks.decode.fine_tune FOLDER` trains the last layers of SmolLM2-135M-Instruct and writes the model.
"""

from __future__ import annotations

import argparse
import random
import sysconfig
import time
from pathlib import Path

import torch

from .demo import hugging_face, model_file


def texts(tokenizer, length: int, seed: int = 0):
    """Endless pieces of sources, int64 [1, length]."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    rng = random.Random(seed)
    while True:
        ids = tokenizer(rng.choice(files).read_text(errors="replace")[:20000]).input_ids
        if len(ids) > length:
            start = rng.randrange(len(ids) - length)
            yield torch.tensor([ids[start : start + length]])


def fine_tune(model, tokenizer, *, steps: int, layers: int, batch: int = 2, length: int = 192, rate: float = 1e-4):
    """Train the last `layers` layers; yields the loss of each step."""
    model.requires_grad_(False)
    learned = [p for layer in model.model.layers[-layers:] for p in layer.parameters()]
    for parameter in learned:
        parameter.requires_grad_(True)
    optimizer, source = torch.optim.AdamW(learned, lr=rate), texts(tokenizer, length)
    for _ in range(steps):
        ids = torch.cat([next(source) for _ in range(batch)])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-4)
    asked = parser.parse_args()
    from transformers import AutoTokenizer

    path = model_file()
    model, tokenizer = hugging_face(path), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    start = time.perf_counter()
    tuning = fine_tune(model, tokenizer, steps=asked.steps, layers=asked.layers, rate=asked.rate)
    for step, loss in enumerate(tuning):
        if step % 10 == 0 or step == asked.steps - 1:
            print(f"step {step}, {time.perf_counter() - start:.0f} s, loss {loss:.3f}", flush=True)
    model.save_pretrained(asked.folder)
    tokenizer.save_pretrained(asked.folder)


if __name__ == "__main__":
    main()
