"""Mixture of Attentions in the engine: its rows are those of the paper's equations, whoever joins and leaves."""

import dataclasses

import pytest
import torch

from specdec_ops import drafts
from specdec_ops.decode import Engine, Sampling
from specdec_ops.drafts.mixture_of_attentions_parts import Sizes
from specdec_ops.train.eagle import Teacher
from specdec_ops.train.mixture_of_attentions import Beside
from specdec_ops.train.mixture_of_attentions_net import masks
from tests.decode.mixture_reference import Reference
from tests.decode.test_engine import PROMPTS, TARGET, by_hand
from tests.harness.tiny_models import DIM, joined_late, make_decoder, mixture_net, noisy_mixture

SIZES = {"levels": 3, "width": 3, "branching": 3, "nodes": 9}


def watch(engine: Engine) -> list:
    """Of each node that the draft runs: its request, the text up to it, tokens of the round's text, and its row."""
    noted, proposer = [], engine.proposer
    run, propose = proposer._run, proposer.propose
    now = {}

    def proposing(batch):
        now.update(batch=batch, tokens=[{} for _ in batch.requests], level=0)
        try:
            return propose(batch)
        finally:
            now.clear()

    def running(rows, requests):
        made = run(rows, requests)
        nodes = made.view(*rows.tokens.shape, -1)
        for place, request in enumerate(requests):
            if request.draft_state.length < len(request.ids) - 1:
                continue  # it is catching up with the text
            tokens = now["tokens"][place]
            for row, token in enumerate(rows.tokens[place].tolist()):
                tokens[rows.query_start + row] = token
                if token < 0:
                    continue
                path, node = [], rows.query_start + row
                while node > 0:
                    path.append(tokens[node])
                    node = int(rows.topology.parents[min(place, len(rows.topology.parents) - 1), node])
                noted.append((request, list(request.ids) + path[::-1], len(request.ids), nodes[place, row].clone()))
        return made

    proposer._run, proposer.propose = running, proposing
    return noted


def row_of_network(net, text: list[int], known: int, target) -> torch.Tensor:
    """What `wanted` is, from the network that is trained."""
    tokens = torch.tensor([text], dtype=torch.int32)
    beside = Beside(target, net.sizes.target_layers, torch.float64).run(tokens)
    seen = masks(torch.arange(-1, len(text) - 1).clamp(max=known - 2)[None], torch.zeros(1, dtype=torch.bool))
    embedded = Teacher(target, None).embed(tokens).double()
    return net.double()(embedded, net.states(beside.stacked), seen, beside.stacked).features[0, -1]


def wanted(net, text: list[int], known: int, target) -> torch.Tensor:
    """The row of a text's last token, of which the target has run all but the last of the first `known`."""
    if net.sizes.target_layers:  # the equations below end before those
        return row_of_network(net, text, known, target)
    net = net.double()
    beside = Beside(target, 0, torch.float64).run(torch.tensor([text], dtype=torch.int32))
    reference = Reference(net, target)
    for stacked in beside.stacked[0, : known - 1]:
        reference.verify(stacked)
    return reference.row(text, known - 1)


@pytest.mark.parametrize(
    "target_layers, layer_inner, interleaved", [(0, None, False), (0, 0, True), (1, None, False), (1, None, True)]
)
def test_rows_are_those_of_the_equations(target_layers, layer_inner, interleaved):
    """Ragged requests that join between rounds; the draft is right now and then, so texts grow unevenly."""
    target = make_decoder(1)
    for layer in target.layers:
        layer.attention.interleaved = interleaved
    net = mixture_net(target, target_layers, layer_inner)
    engine = Engine(target, net.draft(target, None, **SIZES), max_batch=3, adapt=False)
    noted = watch(engine)
    asked = [Sampling(max_tokens=9, temperature=0.7 * (place % 2)) for place in range(len(PROMPTS))]
    results = joined_late(engine, PROMPTS, asked)
    assert sum(result.stats.accepted for result in results) > 0
    assert len({len(text) - known for _, text, known, _ in noted}) == 3, "roots, and nodes of two more levels"
    with torch.no_grad():
        for _, text, known, row in noted[::7]:
            want = wanted(net, text, known, target)
            assert (row.double() - want).abs().max() < 2e-4 * want.abs().max()


def test_a_long_prompt_is_run_in_chunks():
    """Of states and of tokens, beside a request that needs none."""
    target = make_decoder(1)
    net = mixture_net(target)
    engine = Engine(target, net.draft(target, None, **SIZES), max_batch=2, adapt=False)
    noted = watch(engine)
    long = torch.randint(40, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    engine.generate([[3, 4], long], Sampling(max_tokens=4))
    with torch.no_grad():
        for _, text, known, row in noted:
            if len(text) == known == 400:
                want = wanted(net, text, known, target)
                assert (row.double() - want).abs().max() < 2e-4 * want.abs().max()
                break
        else:
            pytest.fail("the long prompt's root was never run")


def test_a_text_of_one_token_has_no_states():
    target = make_decoder(1)
    net = mixture_net(target)
    engine = Engine(target, net.draft(target, None, **SIZES), adapt=False)
    noted = watch(engine)
    engine.generate([[7]], Sampling(max_tokens=3))
    _, text, known, row = noted[0]
    assert text == [7] and known == 1
    with torch.no_grad():
        assert torch.allclose(row.double(), wanted(net, text, known, target), atol=1e-4)


def test_prompts_that_begin_alike_share_pages_of_the_target():
    """The draft reads the target's cache, so nothing has to be run again for it."""
    engine = Engine(TARGET, noisy_mixture(TARGET), page_size=4, adapt=False)
    engine.generate([PROMPTS[0]], Sampling(max_tokens=4))
    again = engine.generate([PROMPTS[3]], Sampling(max_tokens=4))[0]
    assert again.stats.cached_prompt_tokens == 16
    assert again.tokens == by_hand(PROMPTS[3], Sampling(max_tokens=4))


def test_states_do_not_depend_on_tokens_beside_them():
    """To the last bit: what a request drafts is a function of its text alone."""
    draft = noisy_mixture(TARGET, 1)
    stacked = torch.randn(70, 2, draft.sizes.stacked)
    together = draft.states(stacked)
    assert together.shape == (70, DIM + draft.sizes.stacked)
    for token in (0, 1, 63, 64, 69):
        assert torch.equal(draft.states(stacked[token : token + 1])[0], together[token])


@pytest.mark.parametrize("weights", ["int8", "bfloat16", "float32"])
@pytest.mark.parametrize("target_layers", [0, 1])
def test_a_saved_draft_is_the_same(tmp_path, weights, target_layers):
    draft = noisy_mixture(TARGET, target_layers, **SIZES)
    draft.save(tmp_path, TARGET, weights=weights, about={"steps": 3})
    loaded = drafts.MixtureOfAttentions.load(tmp_path, TARGET, **SIZES)
    loaded.save(tmp_path / "again", TARGET, weights=weights)
    again = drafts.MixtureOfAttentions.load(tmp_path / "again", TARGET, **SIZES)
    assert loaded.sizes == draft.sizes == again.sizes
    results = [
        Engine(TARGET, one, adapt=False).generate(PROMPTS, Sampling(max_tokens=16)) for one in (draft, loaded, again)
    ]
    counts = [[(r.tokens, r.stats.target_calls) for r in some] for some in results]
    assert counts[1] == counts[2]
    assert [tokens for tokens, _ in counts[0]] == [tokens for tokens, _ in counts[1]]
    if weights == "float32":
        assert counts[0] == counts[1]


def test_what_can_not_be(tmp_path):
    other = make_decoder(2, layers=2)
    with pytest.raises(TypeError, match="parts must be a Parts"):
        drafts.MixtureOfAttentions(TARGET)
    with pytest.raises(ValueError, match="levels must be an int from 1 to 64, got 0"):
        noisy_mixture(TARGET, levels=0)
    noisy_mixture(TARGET).save(tmp_path, TARGET)
    with pytest.raises(ValueError, match="for which the draft was trained"):
        drafts.MixtureOfAttentions.load(tmp_path, other)
    with pytest.raises(ValueError, match="folder must hold a draft of kind eagle"):
        drafts.Eagle.load(tmp_path, TARGET)
    with pytest.raises(ValueError, match="weights must be 'int8', 'bfloat16' or 'float32', got 'int4'"):
        noisy_mixture(TARGET).save(tmp_path, TARGET, weights="int4")
    narrow = dataclasses.replace(TARGET, shape=TARGET.shape._replace(kv_heads=1))
    with pytest.raises(ValueError, match="sizes must be those for a target of 1 heads of 16"):
        Engine(narrow, noisy_mixture(TARGET))
    with pytest.raises(ValueError, match="parts must be those for a target of dim 32 and 1 layers"):
        Engine(dataclasses.replace(TARGET, shape=TARGET.shape._replace(layers=1)), noisy_mixture(TARGET, 1))


def test_sizes_of_the_paper():
    """Of Llama-3-8B's keys and values, 2048 a layer: 32 heads over the layers, 8 of them kv heads, an MLP of 3072."""
    attention = dataclasses.replace(TARGET.layers[0].attention, heads=32, kv_heads=8, head_dim=128)
    target = dataclasses.replace(TARGET, layers=[dataclasses.replace(TARGET.layers[0], attention=attention)])
    sizes = Sizes.of(target, inner=6144)
    assert (sizes.stacked, sizes.layer_heads, sizes.layer_kv_heads, sizes.layer_head_dim) == (2048, 32, 8, 64)
    assert sizes.layer_inner == 3072
