"""The same over real sockets of this machine, with TLS too, through a proxy that cuts, and from the command line."""

import asyncio
import dataclasses
import shutil
import ssl
import subprocess

import pytest

pytest.importorskip("msgpack", reason="the extra remote has it")

from specdec_ops.decode import Sampling
from specdec_ops.remote import Client, Cut, Link, RemoteError, Server
from specdec_ops.remote import client as client_program
from specdec_ops.remote import server as server_program
from specdec_ops.remote.link import proxy
from tests.harness.tiny_models import Characters
from tests.remote.talks import DRAFTS, PROMPT, TARGET, local, states_for

SAMPLED = Sampling(max_tokens=30, eos=(), temperature=0.9, seed=7)
TEXT = local(PROMPT, SAMPLED).tokens


@pytest.mark.parametrize("name", ["none", "chain", "eagle", "mixture"])
def test_texts_over_sockets(name):
    draft = DRAFTS[name]

    async def talk():
        async with Server(TARGET, token="secret", states=states_for(draft)) as there:
            port = await there.listen(port=0)
            target = TARGET if states_for(draft) else None
            async with Client(port=port, draft=draft, target=target, token="secret", deadline=60.0) as one:
                return await asyncio.gather(*(one.generate(PROMPT, SAMPLED) for _ in range(3)))

    assert [result.tokens for result in asyncio.run(talk())] == [TEXT] * 3


def test_a_proxy_that_cuts():
    link = Link(rtt=0.002, jitter=0.001, loss=0.01, rate=1e6, cuts=(Cut(after_down=900, seconds=0.2),))

    async def talk():
        async with Server(TARGET) as there:
            port = await there.listen(port=0)
            async with proxy(link, "127.0.0.1", port) as near, Client(port=near, draft=DRAFTS["chain"]) as one:
                return await one.generate(PROMPT, SAMPLED)

    result = asyncio.run(talk())
    assert result.tokens == TEXT and result.stats.reconnections == 1 and link.connections >= 2


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("certificate")
    key, made = folder / "key.pem", folder / "certificate.pem"
    options = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = ["openssl", "req", *options, *names, "-keyout", str(key), "-out", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    return str(made), str(key)


def test_tls(certificate):
    made, key = certificate
    of_server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    of_server.load_cert_chain(made, key)

    async def talk(tls, **options):
        async with Server(TARGET, token="secret") as there:
            port = await there.listen(port=0, tls=of_server)
            async with Client("localhost", port, DRAFTS["n-gram"], tls=tls, token="secret", **options) as one:
                return await one.generate(PROMPT, SAMPLED)

    assert asyncio.run(talk(ssl.create_default_context(cafile=made))).tokens == TEXT
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        asyncio.run(talk(ssl.create_default_context()))
    with pytest.raises(ConnectionError, match=r"no server answered for 0.3 seconds"):
        asyncio.run(talk(None, give_up=0.3))


def test_the_command_lines(monkeypatch, capsys, tmp_path):
    """Both ends as they are started, but for the loading of models."""
    target = dataclasses.replace(TARGET, tokenizer=Characters())
    token = tmp_path / "token"
    token.write_text("secret\n")
    asked = server_program.parser().parse_args(["--model", "folder", "--port", "0", "--token-file", str(token)])
    started: asyncio.Queue = asyncio.Queue()
    listen = Server.listen

    async def noted(self, *arguments):
        port = await listen(self, *arguments)
        started.put_nowait(port)
        return port

    monkeypatch.setattr(Server, "listen", noted)
    saved = tmp_path / "saved.json"

    async def talk():
        serving = asyncio.ensure_future(server_program.serve(asked, target))
        port = await started.get()
        arguments = ["--server", f"127.0.0.1:{port}", "--token-file", str(token), "--max-tokens", "12", "123412"]
        options = client_program.parser().parse_args(arguments)
        one = client_program.client_of(options)
        one._tokenizer = Characters()
        sampling = Sampling(max_tokens=12)
        assert await client_program.show(one, one.stream("123412", sampling, save=saved)) == 0
        wrong = client_program.client_of(client_program.parser().parse_args(["--server", f"127.0.0.1:{port}", "x"]))
        with pytest.raises(RemoteError, match="the token is not the server's"):
            await wrong.generate([1])
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)

    asyncio.run(talk())
    printed = capsys.readouterr()
    expected = local(Characters().encode("123412"), Sampling(max_tokens=12), target)
    assert printed.out.startswith("listening on 127.0.0.1 port ") and expected.text in printed.out
    assert "12 tokens" in printed.err and "ended by length" in printed.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "a prompt must be given, or --resume, and not both"),
        (["text", "--resume", "file"], "a prompt must be given, or --resume, and not both"),
        (["text", "--server", "somewhere"], "--server must be HOST:PORT, got somewhere"),
        (["--resume", "/nowhere/file"], "No such file"),
    ],
    ids=["no prompt", "prompt and resume", "no port", "no file"],
)
def test_wrong_command_lines(arguments, sentence, capsys):
    assert client_program.main(arguments) == 2
    assert sentence in capsys.readouterr().err
