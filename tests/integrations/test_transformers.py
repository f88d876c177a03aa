"""Hugging Face models on our ops, against the models' own forward and generate."""

import functools
import itertools
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="an extra: pip install specdec_ops[transformers]")

from transformers import DynamicCache, LogitsProcessor, StaticCache, StoppingCriteria, TextStreamer

from specdec_ops import Tree, drafts, greedy_accept, linear, rms_norm
from specdec_ops.decode import Cache, Engine, Rows, Sampling
from specdec_ops.decode.cache import Sequence
from specdec_ops.integrations.transformers import TreeView, load, patch, register, tree_decode
from tests.harness.tiny_models import Characters
from tests.integrations import hugging_face
from tests.integrations.hugging_face import MODELS, OTHERS, VOCAB, make, prompts, write_gguf

TREE = Tree.from_branching((2, 2, 1), root=True)
CONTEXT = 23


def texts_of(nodes_tokens: torch.Tensor, context: torch.Tensor) -> list[torch.Tensor]:
    """The text that ends with each node, int64 [1, length]."""
    return [torch.cat((context, nodes_tokens[:, list(TREE.path(node))].long()), dim=1) for node in range(len(TREE))]


def tree_logits(decoder, context: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    cache, sequence = Cache(decoder.shape, 8), Sequence()
    cache.reserve(sequence, CONTEXT + len(TREE))
    table, start = cache.page_table([sequence]), torch.zeros(1, dtype=torch.int32)
    decoder.forward(Rows(context.int(), Tree.chain(CONTEXT).to("cpu"), start, table), cache, want=False)
    return decoder.forward(Rows(tokens, TREE.to("cpu"), start + CONTEXT, table), cache).logits


def random_tree() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(6, VOCAB, (1, CONTEXT + len(TREE)), generator=torch.Generator().manual_seed(2))
    return ids[:, :CONTEXT], ids[:, CONTEXT:].int()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_path_of_a_tree_is_a_text(name):
    """Logits of all nodes against the model's own forward over each path; and the model itself is not changed."""
    model, (context, tokens) = make(name), random_tree()
    before = [model(text).logits[0, -1] for text in texts_of(tokens, context)]
    got = tree_logits(load(model), context, tokens)
    for node, (row, expected) in enumerate(zip(got, before, strict=True)):
        torch.testing.assert_close(row, expected, atol=2e-5, rtol=2e-5, msg=f"node {node}")
    after = [model(text).logits[0, -1] for text in texts_of(tokens, context)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(("dtype", "weights", "error"), [
    (torch.bfloat16, None, 0.08),
    (torch.float32, "bfloat16", 0.08),
    (torch.float32, "int8", 0.08),
], ids=str)  # fmt: skip
@torch.no_grad()
def test_other_dtypes(dtype, weights, error):
    model, (context, tokens) = make("qwen3"), random_tree()
    expected = torch.stack([model(text).logits[0, -1] for text in texts_of(tokens, context)])
    got = tree_logits(load(model, dtype=dtype, weights=weights), context, tokens).float()
    assert (got - expected).norm() <= error * expected.norm()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("draft", ["n-gram", "tree"])
def test_engine_says_what_generate_says(name, draft):
    model, (ids, mask) = make(name), prompts()
    decoder = load(model)
    drafter = drafts.Ngram() if draft == "n-gram" else drafts.MultiCandidate(decoder, (2, 1))
    texts = [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]
    results = Engine(decoder, drafter, adapt=False).generate(texts, Sampling(max_tokens=20))
    for text, result in zip(texts, results, strict=True):
        one = model.generate(torch.tensor([text]), do_sample=False, max_new_tokens=20)
        assert result.tokens == one[0, len(text) :].tolist()


class Forbid(LogitsProcessor):
    """A processor of the user's: no token that is in the text already."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids, float("-inf"))


class AtMultiples(StoppingCriteria):
    """Ends when the text's last token is a multiple of 7."""

    def __call__(self, input_ids, scores, **_):
        return input_ids[:, -1] % 7 == 0


OPTIONS = {
    "greedy": {},
    "repetition penalty": {"repetition_penalty": 1.3},
    "no repeated pairs": {"no_repeat_ngram_size": 2},
    "at least": {"min_new_tokens": 10},
    "own processor": {"logits_processor": [Forbid()]},
    "own criterion": {"stopping_criteria": [AtMultiples()]},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("draft", ["n-gram", "tree"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_generate_with_drafts(name, draft, option):
    """A padded batch of three, processors and criteria included."""
    model, (ids, mask) = make(name), prompts()
    asked = {"do_sample": False, "max_new_tokens": 25, "attention_mask": mask, **OPTIONS[option]}
    expected = model.generate(ids, **asked)
    chosen = {} if draft == "n-gram" else {"draft": drafts.MultiCandidate(load(model), (2, 1))}
    assert torch.equal(model.generate(ids, custom_generate=tree_decode, **chosen, **asked), expected)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_generate_draws_the_same_numbers(name):
    model, (ids, _) = make(name), prompts()
    asked = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "max_new_tokens": 40}
    torch.manual_seed(3)
    expected = model.generate(ids[:1], **asked)
    torch.manual_seed(3)
    assert torch.equal(model.generate(ids[:1], custom_generate=tree_decode, **asked), expected)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_caches_go_from_turn_to_turn(name, kind):
    """A cache that our loop has filled serves generate, and the other way round."""
    model, (ids, _) = make(name), prompts()

    def two_turns(first, second):
        cache = kind(config=model.config) if kind is DynamicCache else kind(config=model.config, max_cache_len=100)
        asked = {"do_sample": False, "max_new_tokens": 10, "past_key_values": cache, "eos_token_id": None}
        text = model.generate(ids[:1], **asked, **first)
        lengths = [int(cache.get_seq_length())]
        text = model.generate(torch.cat((text, ids[:1, :3]), dim=1), **asked, **second)
        return text, [*lengths, int(cache.get_seq_length())]

    ours = {"custom_generate": tree_decode}
    expected, lengths = two_turns({}, {})
    for turns in ((ours, ours), (ours, {}), ({}, ours)):
        text, held = two_turns(*turns)
        assert torch.equal(text, expected) and held == lengths


def test_streamers_see_every_token():
    class Collect(TextStreamer):
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen += value.reshape(-1).tolist()

        def end(self):
            self.ended = True

    model, (ids, _) = make("llama"), prompts()
    streamer = Collect()
    asked = {"do_sample": False, "max_new_tokens": 15, "custom_generate": tree_decode}
    text = model.generate(ids[:1], stream_to=streamer, **asked)
    assert streamer.seen == text[0].tolist() and streamer.ended


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams must be 1, got 2"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores must be False, got True"),
        ({"stream_to": "a streamer"}, "stream_to must be None with a batch of 3"),
    ],
    ids=str,
)
def test_generate_refuses(options, message):
    model, (ids, mask) = make("llama"), prompts()
    with pytest.raises(ValueError, match=message):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, custom_generate=tree_decode, **options)


@pytest.mark.parametrize("name", [name for name in (*MODELS, *OTHERS) if name != "gpt2"])
@torch.no_grad()
def test_attention_alone_in_the_models_own_loop(name):
    """generate with a padded batch and with a single prompt, and a tree in a loop by hand: no mask, one keyword."""
    model, (ids, mask) = make(name), prompts()
    asked = {"do_sample": False, "max_new_tokens": 15}
    long = torch.randint(6, VOCAB, (1, 90), generator=torch.Generator().manual_seed(4))
    expected = [
        model.generate(ids, attention_mask=mask, **asked),
        *(model.generate(x, **asked) for x in (ids[:1], long)),
    ]
    context, tokens = random_tree()
    by_path = [model(text).logits[0, -1] for text in texts_of(tokens, context)]
    model.set_attn_implementation(register())
    assert torch.equal(model.generate(ids, attention_mask=mask, **asked), expected[0])
    assert torch.equal(model.generate(ids[:1], **asked), expected[1])
    assert torch.equal(model.generate(long, **asked), expected[2])
    lengths, topology = torch.tensor([CONTEXT], dtype=torch.int32), TREE.to("cpu")
    cache = DynamicCache()  # that keeps all slots, also where the model has windows
    model(context, past_key_values=cache)
    positions = topology.position_ids(lengths).long()
    out = model(tokens.long(), position_ids=positions, past_key_values=cache, specdec=TreeView(topology, lengths))
    for node, (row, right) in enumerate(zip(out.logits[0], by_path, strict=True)):
        torch.testing.assert_close(row, right, atol=2e-5, rtol=2e-5, msg=f"node {node}")


@pytest.mark.parametrize("name", MODELS)
def test_a_patched_model_says_the_same_and_can_be_undone(name):
    """A padded batch, a single prompt and prompt lookup; print lists what is patched; undone, all bits are the same."""
    model, (ids, mask) = make(name), prompts()
    asked = {"do_sample": False, "max_new_tokens": 15}

    def texts():
        yield model.generate(ids, attention_mask=mask, **asked)
        yield model.generate(ids[:1], **asked)
        yield model.generate(ids[:1], prompt_lookup_num_tokens=3, **asked)

    expected, logits, classes = list(texts()), model(ids[:1]).logits, [type(module) for module in model.modules()]
    implementation, state = model.config._attn_implementation, {**model.state_dict()}
    with patch(model) as patched:
        assert all(torch.equal(a, b) for a, b in zip(texts(), expected, strict=True))
        linears = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        norms = [n for n, module in model.named_modules() if "RMSNorm" in type(module).__name__]
        assert set(patched.modules) == {*linears, *norms} and linears
        said = str(model)
        assert said.count("on specdec_ops(") >= 1 and ("(lm_head): Linear on specdec_ops(" in said or "neox" in name)
        assert model.state_dict().keys() == state.keys()
        assert all(value.data_ptr() == state[key].data_ptr() for key, value in model.state_dict().items())
        assert model(ids[:1]).logits.requires_grad, "where gradients are wanted, modules are what they were"
        with pytest.raises(ValueError, match="model must not be patched already"):
            patch(model)
    assert [type(module) for module in model.modules()] == classes
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(ids[:1]).logits, logits)


def test_patched_modules_run_our_ops(monkeypatch):
    """Each product and norm of a pass, once."""
    calls = []
    for name, op in (("linear", linear), ("rms_norm", rms_norm)):
        seen = functools.partial(lambda op, name, *given, **named: calls.append(name) or op(*given, **named), op, name)
        monkeypatch.setattr(sys.modules["specdec_ops.integrations.transformers.patch"], name, seen)
    model, (ids, _) = make("qwen3"), prompts()
    expected = model(ids[:1]).logits
    with torch.no_grad(), patch(model):
        got = model(ids[:1]).logits
    torch.testing.assert_close(got, expected.detach(), atol=2e-5, rtol=2e-5)
    assert calls.count("linear") == 2 * 7 + 1 and calls.count("rms_norm") == 2 * 4 + 1


@torch.no_grad()
def test_the_loop_by_hand_says_what_generate_says():
    """The block of docs/decoding.md, as it stands there, with the text's own pairs as the draft."""
    page = (Path(__file__).parents[2] / "docs" / "decoding.md").read_text()
    loop = page.partition("## A loop by hand")[2].partition("```text\n")[2].partition("```")[0]
    model, (ids, _) = make("llama"), prompts()
    expected = model.generate(ids[:1], do_sample=False, max_new_tokens=30, eos_token_id=None)

    def fill(tokens, tree, text):
        known = dict(itertools.pairwise(text[0].tolist()))
        for node in range(1, len(tree)):
            tokens[0, node] = known.get(int(tokens[0, tree.parents[node]]), node)

    names = {"torch": torch, "Tree": Tree, "register": register, "TreeView": TreeView, "DynamicCache": DynamicCache}
    names |= {"greedy_accept": greedy_accept, "model": model, "fill": fill}
    names |= {"prompt": ids[:1], "length": expected.shape[1]}
    exec(loop, names)
    assert torch.equal(names["text"][:, : expected.shape[1]], expected)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("MambaConfig", {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1}, "recurrent models have a state"),
        ("T5Config", {"vocab_size": 97, "d_model": 32, "num_layers": 1}, "encoder-decoder models"),
        ("DeepseekV3Config", {"vocab_size": 97}, "latent attention"),
    ],
    ids=["recurrent", "encoder-decoder", "latent attention"],
)
def test_other_families_are_refused_by_name(kind, settings, message):
    class Stub(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = getattr(hugging_face.transformers, kind)(**settings)
            self.weight = torch.nn.Parameter(torch.zeros(1))

    with pytest.raises(ValueError, match=message):
        load(Stub())


def test_folders_and_their_tokenizers(tmp_path):
    make("llama").save_pretrained(tmp_path)
    decoder = load(tmp_path)
    assert decoder.shape.layers == 2 and decoder.eos == (5,) and decoder.tokenizer is None
    with pytest.raises(ValueError, match=r"model must be a model, a folder or a \.gguf file that exists, got"):
        load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="weights must be 'int8', 'bfloat16' or None, got 'int4'"):
        load(tmp_path, weights="int4")


@pytest.mark.parametrize("name", MODELS)
def test_what_is_printed_are_the_modules_and_what_runs_in_their_places(name):
    """Every module with parameters once, under its name in the model."""
    model = make(name)
    decoder = load(model)
    listed = [module for replaced in decoder.replaced for module in replaced.modules]
    with_parameters = {name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    assert len(listed) == len(set(listed)) and set(listed) >= with_parameters
    others = set(listed) - with_parameters  # they have the modules of projections in them
    assert others == {name for name, _ in model.named_modules() if name.endswith((".self_attn", ".attention", ".attn"))}
    said = str(decoder)
    assert said.startswith(repr(decoder)) and said.count("tree_attention") in (1, 2)
    assert said.count("\n") < 2 * len(listed)


def test_layers_that_are_alike_are_listed_once():
    said = str(load(make("llama")))
    assert "model.layers.0 to model.layers.1\n" in said
    assert "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj: linear, float32 [128, 32]" in said
    said = str(load(make("gemma2"), weights="int8"))
    assert "model.layers.0\n" in said and "window 5, soft cap 50" in said and "linear, int8 [128, 32]" in said


@pytest.mark.parametrize("name", ["llama", "llama, biases, long rope", "gpt2"])
@torch.no_grad()
def test_a_model_can_have_its_memory_back(name):
    model, (ids, _) = make(name), prompts()
    pointers = {name: parameter.untyped_storage().nbytes() for name, parameter in model.named_parameters()}
    expected = model(ids[:1]).logits
    decoder = load(model)
    text = Engine(decoder).generate([ids[0].tolist()], Sampling(max_tokens=8))[0].tokens
    decoder.restore()
    assert {name: p.untyped_storage().nbytes() for name, p in model.named_parameters()} == pointers
    assert torch.equal(model(ids[:1]).logits, expected)
    if name != "gpt2":
        model.model.layers[0].self_attn.k_proj.weight.zero_()
    assert Engine(decoder).generate([ids[0].tolist()], Sampling(max_tokens=8))[0].tokens == text


@pytest.mark.parametrize(("kind", "error"), [("f32", 1e-5), ("q8_0", 0.02), ("q4_0", 0.02), ("q4_1", 0.02)])
@torch.no_grad()
def test_a_gguf_file_is_the_model_that_it_was_made_of(kind, error, tmp_path):
    """Blocks are multiplied as they lie there, by rows rounded to 8 bits; what is no whole block is float32."""
    pytest.importorskip("gguf")
    model, (context, tokens) = make("llama"), random_tree()
    write_gguf(model, tmp_path / "tiny.gguf", kind)
    expected = torch.stack([model(text).logits[0, -1] for text in texts_of(tokens, context)])
    decoder = load(tmp_path / "tiny.gguf", Characters())
    got = tree_logits(decoder, context, tokens)
    assert (got - expected).norm() <= error * expected.norm()
    assert decoder.eos == (5,) and decoder.shape.layers == 2 and decoder.tokenizer.encode("0") == [0]
    form = "float32" if kind == "f32" else kind
    assert f"attn_q, attn_k, attn_v: linear, {form} [128, 32]" in str(decoder)
    assert "ffn_down: linear, float32 [32, 48]" in str(decoder)
    with pytest.raises(ValueError, match="weights must be None for a GGUF file, got 'int8'"):
        load(tmp_path / "tiny.gguf", Characters(), weights="int8")


def test_a_decoder_reads_the_models_own_memory():
    """Joined weights are the parameters': a change of the model is a change of the decoder."""
    model = make("llama")
    decoder = load(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.zero_()
    heads = decoder.layers[0].attention
    rows = slice(heads.heads * heads.head_dim, (heads.heads + heads.kv_heads) * heads.head_dim)
    assert not heads.qkv.weight[rows].any() and heads.qkv.weight.any()
