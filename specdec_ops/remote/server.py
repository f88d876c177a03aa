"""A server that verifies what clients draft: `python -m specdec_ops.remote.server --model FOLDER`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import ssl
import sys

from specdec_ops.decode.model import Model
from specdec_ops.drafts import load as load_draft

from .hashes import draft_hash
from .limits import Limits
from .service import PORT, Server


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser("python -m specdec_ops.remote.server", description=__doc__)
    made.add_argument("--model", required=True, help="a folder with a Hugging Face model, or a GGUF file")
    made.add_argument("--weights", choices=("int8", "bfloat16"), help="quantise the weights of the model")
    made.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1, this machine alone)")
    made.add_argument("--port", type=int, default=PORT, help=f"0 takes a free one (default: {PORT})")
    made.add_argument("--token-file", help="a file with the shared token; else SPECDEC_OPS_TOKEN of the environment")
    made.add_argument("--certificate", help="a PEM file with the certificate and its chain: connections use TLS")
    made.add_argument("--key", help="a PEM file with its private key, if it is not in the same one")
    made.add_argument(
        "--states",
        nargs="?",
        const=True,
        default=False,
        metavar="FOLDER",
        help="send the target's rows to drafts that need them; with a folder, what the draft saved there makes of the "
        "target's keys and values",
    )
    made.add_argument("--max-batch", type=int, default=8, help="texts of a round (default: 8)")
    made.add_argument("--max-length", type=int, help="tokens of a text (default: what the model allows, 4096 at most)")
    made.add_argument("--sessions", type=int, default=256, help="texts that are known at once (default: 256)")
    made.add_argument("--nodes", type=int, default=64, help="nodes of a tree (default: 64)")
    return made


def token_of(path: str | None) -> str | None:
    """The shared token: a file's content, or that of SPECDEC_OPS_TOKEN."""
    if path is None:
        return os.environ.get("SPECDEC_OPS_TOKEN") or None
    with open(path) as file:
        return file.read().strip()


async def serve(asked, target: Model) -> None:
    """Take connections until the end."""
    tls = None
    if asked.certificate is not None:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(asked.certificate, asked.key)
    limits = Limits(sessions=asked.sessions, nodes=asked.nodes)
    states, known = asked.states, ""
    if isinstance(states, str):
        states, known = load_draft(states, target), draft_hash(states)
    options = {"max_batch": asked.max_batch, "max_length": asked.max_length}
    async with Server(
        target, token=token_of(asked.token_file), limits=limits, states=states, draft_hash=known, **options
    ) as server:
        port = await server.listen(asked.host, asked.port, tls)
        print(f"listening on {asked.host} port {port}", flush=True)
        await server.serve()


def main(arguments: list[str] | None = None) -> int:
    """Serves until it is interrupted."""
    from specdec_ops.integrations.transformers import load

    asked = parser().parse_args(arguments)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(serve(asked, load(asked.model, weights=asked.weights)))
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
