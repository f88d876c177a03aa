"""A client that drafts, and goes on when its server is gone: `python -m specdec_ops.remote.client "Once upon"`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ssl
import sys
from collections.abc import AsyncIterator

from specdec_ops.decode.sampling import Sampling
from specdec_ops.drafts import Chain, Ngram
from specdec_ops.drafts import load as load_draft
from specdec_ops.drafts.base import Draft
from specdec_ops.drafts.checkpoint import is_draft

from .answer import Piece
from .decoding import ON_RETURN, Client
from .hashes import draft_hash
from .server import token_of
from .service import PORT

_OP = "remote.client"


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser("python -m specdec_ops.remote.client", description=__doc__)
    made.add_argument("prompt", nargs="?", help="the text to go on with; - reads it from the input")
    made.add_argument("--server", default=f"127.0.0.1:{PORT}", help=f"HOST:PORT (default: 127.0.0.1:{PORT})")
    made.add_argument("--tokenizer", help="a folder with the target's tokenizer (default: that of --draft or --target)")
    made.add_argument("--draft", default="ngram", help="ngram, none, or a folder with a smaller model or a saved draft")
    made.add_argument("--target", help="the target's folder or GGUF file, for saved drafts that use parts of it")
    made.add_argument("--steps", type=int, default=12, help="the most tokens that a model drafts (default: 12)")
    made.add_argument("--token-file", help="a file with the shared token; else SPECDEC_OPS_TOKEN of the environment")
    made.add_argument("--tls", action="store_true", help="connect with TLS")
    made.add_argument("--authority", help="a PEM file with the certificate to trust, for --tls")
    made.add_argument("--max-tokens", type=int, default=128)
    made.add_argument("--temperature", type=float, default=0.0)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--deadline", type=float, default=2.0, help="seconds until the draft goes on alone (default: 2)")
    made.add_argument("--give-up", type=float, default=60.0, help="seconds to wait for a server (default: 60)")
    made.add_argument("--on-return", choices=ON_RETURN, default="rollback", help="what becomes of unverified tokens")
    made.add_argument("--save", help="a file to keep the state of the answer in")
    made.add_argument("--resume", help="go on with the answer in such a file")
    return made


def client_of(asked) -> Client:
    """A client as the command line asks for it."""
    target = tokenizer = None
    host, _, port = asked.server.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit():
        raise ValueError(f"specdec_ops.{_OP}: --server must be HOST:PORT, got {asked.server}")
    draft: Draft | None = None
    if asked.target is not None or asked.draft not in ("ngram", "none"):
        from specdec_ops.integrations.transformers import load

        target = None if asked.target is None else load(asked.target)
        tokenizer = None if target is None else target.tokenizer
    if asked.draft == "ngram":
        draft = Ngram(16)
    elif asked.draft != "none" and is_draft(asked.draft):
        draft = load_draft(asked.draft, target)
    elif asked.draft != "none":
        model = load(asked.draft)
        draft, tokenizer = Chain(model, asked.steps), tokenizer or model.tokenizer
    if asked.tokenizer is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(asked.tokenizer)
    tls = ssl.create_default_context(cafile=asked.authority) if asked.tls else None
    return Client(
        host,
        int(port),
        draft,
        target=target,
        tokenizer=tokenizer,
        token=token_of(asked.token_file),
        tls=tls,
        deadline=asked.deadline,
        give_up=asked.give_up,
        on_return=asked.on_return,
        draft_hash=draft_hash(asked.draft) if draft is not None and is_draft(asked.draft) else "",
    )


async def show(client: Client, pieces: AsyncIterator[Piece]) -> int:
    """Print an answer while it grows; what is unverified stands in brackets until it is verified or taken back."""
    result, shown = None, ""
    async with client, contextlib.aclosing(pieces):
        async for piece in pieces:
            if shown:
                print("\b \b" * len(shown), end="")
            shown = f"[{piece.unverified_text}]" if piece.unverified and piece.result is None else ""
            print(piece.text + shown, end="", flush=True)
            result = piece.result
    if result.unverified:
        print(f"[{result.text[-1:]}]", end="")
    stats = result.stats
    per_call = stats.tokens / max(stats.calls, 1)
    print(
        f"\n\n[{stats.tokens} tokens, {per_call:.2f} per call of the server; {result.unverified} of them unverified; "
        f"ended by {result.finish_reason}]",
        file=sys.stderr,
    )
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Prints the answer as it comes, and below it what it cost."""
    asked = parser().parse_args(arguments)
    try:
        if (asked.prompt is None) == (asked.resume is None):
            raise ValueError(f"specdec_ops.{_OP}: a prompt must be given, or --resume, and not both")
        client = client_of(asked)
        if asked.resume is not None:
            return asyncio.run(show(client, client.resume(asked.resume)))
        prompt = sys.stdin.read() if asked.prompt == "-" else asked.prompt
        sampling = Sampling(temperature=asked.temperature, seed=asked.seed, max_tokens=asked.max_tokens)
        return asyncio.run(show(client, client.stream(prompt, sampling, save=asked.save)))
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
