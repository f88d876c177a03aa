"""Every message of the acceptance and sampling ops: the op, the argument, what it must be, what it was."""

import dataclasses
import re
import warnings

import pytest
import torch

import specdec_ops
from specdec_ops import Acceptance, Children, LongestPath, Topology, Tree, VocabMap, dlpack

META = torch.device("meta")
TREE = Tree.from_branching((2, 1), root=True)  # 5 nodes
TARGET, DRAFT = torch.zeros(2, 5, 9), torch.zeros(2, 5, 9)
TOKENS, IDS = torch.zeros(2, 5, dtype=torch.int32), torch.zeros(2, 5, dtype=torch.int64)
TOPOLOGY = TREE.to("cpu")
SEEDS, POSITIONS = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
ONES = torch.ones(2)
MAP = VocabMap([0, 3, 7], 9)
LAYOUT = "[batch, nodes, vocab]"
NOISE = {"seeds": SEEDS, "positions": POSITIONS}
TREE_ARGUMENTS = {"target_logits": TARGET, "draft_tokens": TOKENS, "topology": TOPOLOGY, **NOISE}
CALLS = {
    "greedy_accept": {"target": TARGET, "draft_tokens": TOKENS, "topology": TOPOLOGY},
    "match_accept": TREE_ARGUMENTS,
    "chain_accept": {"target_logits": TARGET, "draft_tokens": TOKENS[:, 1:], "draft_logits": DRAFT[:, 1:], **NOISE},
    "tree_accept": {**TREE_ARGUMENTS, "draft_logits": DRAFT},
    "typical_accept": TREE_ARGUMENTS,
    "longest_path_accept": {**TREE_ARGUMENTS, "draft_logits": DRAFT, "width": 2},
    "sample_tokens": {"logits": TARGET[:, 0], **NOISE},
    "sample_children": {"draft_logits": DRAFT, "count": 2, **NOISE},
}
ACCEPTS = [op for op in CALLS if op.endswith("accept")]
DRAWING = [op for op in CALLS if op != "greedy_accept"]
DRAFTED = ["chain_accept", "tree_accept", "longest_path_accept"]


def strided(tensor):
    """The same shape with a last dimension that is not contiguous."""
    return torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)[..., 0]


def fails(op, kind, message, **changes):
    """The call with these changes raises exactly this."""
    with pytest.raises(kind, match=re.escape(f"specdec_ops.{op}: {message}")):
        getattr(specdec_ops, op)(**{**CALLS[op], **changes})


@pytest.mark.parametrize("op", CALLS)
def test_the_unchanged_calls_work(op):
    """So that each message below is of its one change."""
    getattr(specdec_ops, op)(**CALLS[op])


@pytest.mark.parametrize("op", CALLS)
def test_logits(op):
    """Type, dtype, dimensions, layout, gradient."""
    name = next(iter(CALLS[op]))
    logits = CALLS[op][name]
    layout = {"chain_accept": "[batch, steps + 1, vocab]", "sample_tokens": "[rows, vocab]"}.get(op, LAYOUT)
    layout = "[batch, rows, vocab]" if op == "sample_children" else layout
    shape = list(logits.shape)
    must = f"{name} must be float32, bfloat16 or float16 {layout}"
    fails(op, TypeError, f"{must}, got int16 {shape}", **{name: logits.to(torch.int16)})
    fails(op, TypeError, f"{must}, got list", **{name: [0.0]})
    some = f"{name} must be {layout} with a vocab of at least 1"
    fails(op, ValueError, f"{some}, got float32 {shape[1:]}", **{name: logits[0]})
    fails(op, ValueError, f"{some}, got float32 {[*shape[:-1], 0]}", **{name: logits[..., :0]})
    fails(op, ValueError, f"{name} must be contiguous in its last dimension, got float32", **{name: strided(logits)})
    fails(op, RuntimeError, "an input requires grad, but this op", **{name: logits.clone().requires_grad_()})
    with torch.no_grad():
        getattr(specdec_ops, op)(**{**CALLS[op], name: logits.clone().requires_grad_()})


@pytest.mark.parametrize("op", ACCEPTS)
def test_nodes(op):
    """At least one row per request, and not more than noise can tell apart."""
    name = next(iter(CALLS[op]))
    fails(op, ValueError, f"{name} must be [batch, ", **{name: TARGET[:, :0]})
    many = torch.zeros(1, 1, 9).expand(1, 65_536, 9)
    fails(op, ValueError, f"{name} must be [batch, ", **{name: many})


def test_greedy_target():
    """Ids have two dimensions."""
    must = "target must be ids [batch, nodes] or logits [batch, nodes, vocab]"
    fails("greedy_accept", ValueError, f"{must}, got int64 [2]", target=IDS[:, 0])
    fails("greedy_accept", ValueError, f"{must}, got int32 [2, 0]", target=TOKENS[:, :0])
    assert specdec_ops.greedy_accept(IDS, TOKENS, TOPOLOGY).num_accepted.tolist() == [2, 2]


@pytest.mark.parametrize("op", ACCEPTS)
def test_draft_tokens(op):
    """Type, dtype, shape, device."""
    columns = 4 if op == "chain_accept" else 5
    tokens = CALLS[op]["draft_tokens"]
    must = f"draft_tokens must be int32 or int64 [2, {columns}]"
    fails(op, TypeError, f"{must}, got float32 [2, {columns}]", draft_tokens=tokens.float())
    fails(op, TypeError, f"{must}, got list", draft_tokens=tokens.tolist())
    fails(op, ValueError, f"{must}, got int32 [1, {columns}]", draft_tokens=tokens[:1])
    fails(op, ValueError, f"{must}, got int32 [2, {columns - 1}]", draft_tokens=tokens[:, 1:])
    fails(op, ValueError, "draft_tokens must be on cpu, got a tensor on meta", draft_tokens=tokens.to(META))


@pytest.mark.parametrize("op", [op for op in ACCEPTS if op != "chain_accept"])
def test_topology(op):
    """Type, batch, room, device."""
    fails(op, TypeError, "topology must be a specdec_ops.Topology, got Tree; tree.to(device) makes one", topology=TREE)
    fails(op, TypeError, "topology must be a specdec_ops.Topology, got None", topology=None)
    three = Topology.from_trees([TREE] * 3)
    fails(op, ValueError, "topology must have a batch of 2 or 1, got 3", topology=three)
    small = Tree.chain(4).to("cpu")
    fails(op, ValueError, "topology must have room for the 5 nodes of a request, got 4", topology=small)
    fails(op, ValueError, "topology must be on cpu, got a tensor on meta", topology=TOPOLOGY.to(META))


@pytest.mark.parametrize("op", DRAWING)
def test_law(op):
    """temperature, top_k, top_p: numbers and tensors."""
    number = "temperature must be a number or float32 [batch]"
    fails(op, TypeError, f"{number}, got '1'", temperature="1")
    fails(op, TypeError, f"{number}, got True", temperature=True)
    for value in (-0.1, float("nan"), float("inf")):
        fails(op, ValueError, f"temperature must be a finite number of at least 0, got {value}", temperature=value)
    tensor = "temperature must be float32 [2] if it is a tensor"
    fails(op, TypeError, f"{tensor}, got float64 [2]", temperature=ONES.double())
    fails(op, ValueError, f"{tensor}, got float32 [1]", temperature=ONES[:1])
    fails(op, ValueError, "temperature must be on cpu, got a tensor on meta", temperature=ONES.to(META))
    fails(op, TypeError, "top_k must be an int, or int32 or int64 [batch], got 2.0", top_k=2.0)
    fails(op, ValueError, "top_k must be an int from 0 (off) to 2**31 - 1, got -1", top_k=-1)
    fails(op, ValueError, "top_k must be an int from 0 (off) to 2**31 - 1, got 2147483648", top_k=2**31)
    fails(op, TypeError, "top_k must be int32 or int64 [2] if it is a tensor, got float32 [2]", top_k=ONES)
    fails(op, TypeError, "top_p must be a number or float32 [batch], got None", top_p=None)
    fails(op, ValueError, "top_p must be a number from 0 to 1 (off), got 1.5", top_p=1.5)
    fails(op, ValueError, "top_p must be float32 [2] if it is a tensor, got float32 [1]", top_p=ONES[:1])


@pytest.mark.parametrize("op", DRAWING)
def test_noise(op):
    """seeds and positions."""
    fails(op, TypeError, "seeds must be an int or int64 [batch], got 1.0", seeds=1.0)
    fails(op, TypeError, "seeds must be an int or int64 [batch], got None", seeds=None)
    fails(op, ValueError, f"seeds must be an int of 64 bits, got {2**64}", seeds=2**64)
    integers = "int64, uint64, int32 or uint32"
    fails(op, TypeError, f"seeds must be {integers} [2] if it is a tensor, got float32 [2]", seeds=ONES)
    fails(op, ValueError, "seeds must be int64 [2] if it is a tensor, got int64 [1]", seeds=SEEDS[:1])
    fails(op, ValueError, "seeds must be on cpu, got a tensor on meta", seeds=SEEDS.to(META))
    fails(op, TypeError, "positions must be an int, or int32 or int64 [batch], got True", positions=True)
    fails(op, ValueError, "positions must be an int from 0 to 2**31 - 1, got -1", positions=-1)
    fails(op, TypeError, "positions must be int32 or int64 [2] if it is a tensor, got float32 [2]", positions=ONES)
    with pytest.raises(TypeError, match="seeds"):
        getattr(specdec_ops, op)(**{name: value for name, value in CALLS[op].items() if name != "seeds"})


@pytest.mark.parametrize("op", ACCEPTS)
def test_eos_and_depth(op):
    """Options that most acceptance ops share."""
    fails(op, TypeError, "eos must be None, an int or up to 8 ints, got float32 []", eos=torch.tensor(1.0))
    fails(op, TypeError, "eos must be None, an int or up to 8 ints, got tuple", eos=(1, 2.0))
    fails(op, TypeError, "eos must be None, an int or up to 8 ints, got True", eos=True)
    must = "eos must be None, an int or up to 8 ints, each from 0 to 2**31 - 1"
    fails(op, ValueError, f"{must}, got -1", eos=-1)
    fails(op, ValueError, f"{must}, got [0, 1, 2, 3, 4, 5, 6, 7, 8]", eos=list(range(9)))
    if op != "chain_accept":
        fails(op, TypeError, "max_depth must be an int from 0 to 65535, got 2.0", max_depth=2.0)
        fails(op, ValueError, "max_depth must be an int from 0 to 65535, got -1", max_depth=-1)


@pytest.mark.parametrize("op", DRAFTED)
def test_draft_logits(op):
    """What they share with the target, and the map between vocabularies."""
    rows = 4 if op == "chain_accept" else 5
    draft = CALLS[op]["draft_logits"]
    fails(
        op, TypeError, f"draft_logits must be float32, bfloat16 or float16 {LAYOUT}, got int", draft_logits=draft.int()
    )
    fails(
        op, TypeError, "draft_logits must be float64 if and only if target_logits is, got", draft_logits=draft.double()
    )
    fails(op, ValueError, f"draft_logits must be [2, {rows}, 9], got float32", draft_logits=draft[:1])
    fails(op, ValueError, f"draft_logits must be [2, {rows}, 9], got float32", draft_logits=draft[:, 1:])
    fails(op, ValueError, f"draft_logits must be [2, {rows}, 9], got float32", draft_logits=draft[..., :3])
    fails(op, ValueError, f"draft_logits must be [2, {rows}, 3], got float32", vocab_map=MAP)
    fails(op, ValueError, "draft_logits must be contiguous in its last", draft_logits=strided(draft))
    fails(op, ValueError, "draft_logits must be on cpu, got a tensor on meta", draft_logits=draft.to(META))
    fails(op, TypeError, "vocab_map must be a specdec_ops.VocabMap or None, got int32", vocab_map=MAP.draft_to_target)
    fails(op, ValueError, "vocab_map must be on cpu, got a tensor on meta", vocab_map=MAP.to(META))
    fails(op, ValueError, "vocab_map must be for a target vocab of 9, got 10", vocab_map=VocabMap([1], 10))
    fails(op, RuntimeError, "an input requires grad", draft_logits=draft.clone().requires_grad_())
    fails(op, TypeError, "draft_temperature must be a number or float32 [batch], got '1'", draft_temperature="1")
    fails(op, ValueError, "draft_top_k must be an int from 0 (off) to 2**31 - 1, got -1", draft_top_k=-1)
    fails(op, TypeError, "draft_top_p must be float32 [2] if it is a tensor, got int64 [2]", draft_top_p=SEEDS)
    getattr(specdec_ops, op)(**{**CALLS[op], "draft_logits": draft[..., :3], "vocab_map": MAP})


@pytest.mark.parametrize("op", ["chain_accept", "tree_accept"])
def test_no_draft_logits(op):
    """Options that would say what they are."""
    for name, value in (("draft_temperature", 1.0), ("draft_top_k", 3), ("draft_top_p", 0.5)):
        must = f"{name} must be None without draft_logits, got {value}"
        fails(op, ValueError, must, draft_logits=None, **{name: value})
    fails(op, ValueError, "vocab_map must be None without draft_logits, got VocabMap", draft_logits=None, vocab_map=MAP)


def test_chain():
    """Its rule and its lengths."""
    op = "chain_accept"
    fails(op, ValueError, "rule must be 'token' or 'block', got 'recursive'", rule="recursive")
    fails(op, TypeError, "num_steps must be None, an int, or int32 or int64 [batch], got 2.0", num_steps=2.0)
    fails(op, ValueError, "num_steps must be an int from 0 to 4, got 5", num_steps=5)
    fails(op, ValueError, "num_steps must be an int from 0 to 4, got -1", num_steps=-1)
    fails(op, TypeError, "num_steps must be int32 or int64 [2] if it is a tensor, got float32 [2]", num_steps=ONES)


def test_tree():
    """Its rule, and options that contradict it or each other."""
    op = "tree_accept"
    fails(op, ValueError, "rule must be 'recursive', 'traversal', 'target_only' or 'kseq', got 'block'", rule="block")
    fails(op, TypeError, "replacement must be a bool, got 1", replacement=1)
    fails(op, ValueError, "draft_rows must be 'parent' or 'child', got 'node'", draft_rows="node")
    fails(op, ValueError, "draft_logits must be given with rule='kseq', got None", draft_logits=None, rule="kseq")
    fails(op, ValueError, "replacement must be False without draft_logits", draft_logits=None, replacement=True)
    fails(op, ValueError, "draft_rows must be 'parent' without draft_logits", draft_logits=None, draft_rows="child")
    fails(op, ValueError, "draft_logits must be None with rule='target_only'", rule="target_only")
    fails(op, ValueError, "draft_rows must be 'parent' with rule='kseq'", rule="kseq", draft_rows="child")
    numbers = "thresholds must be two numbers (single, accumulated)"
    options = {"rule": "target_only", "draft_logits": None}
    fails(op, TypeError, f"{numbers}, got 0.5", thresholds=0.5, **options)
    fails(op, TypeError, f"{numbers}, got tuple", thresholds=(1.0,), **options)
    fails(op, TypeError, "thresholds must be a number from 0 to 1, got None", thresholds=(1.0, None), **options)
    fails(op, ValueError, "thresholds must be a number from 0 to 1, got 1.1", thresholds=(1.1, 1.0), **options)
    only = "thresholds must be (1.0, 1.0) but with rule='target_only'"
    fails(op, ValueError, f"{only}, got (0.5, 1.0)", thresholds=(0.5, 1.0))


@pytest.mark.parametrize("where", [specdec_ops, dlpack], ids=["torch", "dlpack"])
def test_the_old_name_of_a_rule(where):
    """It warns the line that calls, and gives the same result; torch.compile takes it without a break."""
    given = {**CALLS["tree_accept"], "draft_logits": None, "target_logits": torch.eye(9)[:5].expand(2, 5, 9) * 3}
    first = given.pop("target_logits")
    with pytest.warns(DeprecationWarning, match="tree_accept: rule='coin' is now called 'target_only'") as caught:
        old = where.tree_accept(first, **given, rule="coin")
    assert len(caught) == 1 and caught[0].filename == (__file__ if where is specdec_ops else dlpack.__file__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = where.tree_accept(first, **given, rule="target_only")
    compiled = torch.compile(specdec_ops.tree_accept, fullgraph=True, backend="eager")(first, **given, rule="coin")
    for field in dataclasses.fields(Acceptance):
        assert torch.equal(getattr(old, field.name), getattr(new, field.name))
        assert torch.equal(getattr(compiled, field.name), getattr(new, field.name))


def test_lossy():
    """Thresholds and width."""
    fails("typical_accept", TypeError, "epsilon must be a number from 0 to 1, got '0'", epsilon="0")
    fails("typical_accept", ValueError, "delta must be a number from 0 to 1, got -0.1", delta=-0.1)
    fails("longest_path_accept", TypeError, "width must be an int from 1 to 65535, got 1.0", width=1.0)
    fails("longest_path_accept", ValueError, "width must be an int from 1 to 65535, got 0", width=0)
    must = f"draft_logits must be float32, bfloat16 or float16 {LAYOUT}, got None"
    fails("longest_path_accept", TypeError, must, draft_logits=None)


def test_children():
    """What only sample_children takes."""
    op = "sample_children"
    fails(op, TypeError, "count must be an int from 1 to 65535, got True", count=True)
    fails(op, ValueError, "count must be an int from 1 to 65535, got 0", count=0)
    fails(op, TypeError, "replacement must be a bool, got 0", replacement=0)
    fails(op, TypeError, "parents must be int32 or int64 [2, 5], got float32 [2, 5]", parents=IDS.float())
    fails(op, ValueError, "parents must be int32 or int64 [2, 5], got int32 [2, 4]", parents=TOKENS[:, 1:])
    fails(op, ValueError, "parents must be on cpu, got a tensor on meta", parents=TOKENS.to(META))
    fails(op, ValueError, "first_parent must be an int from 0 to 65535, got -1", first_parent=-1)
    fails(op, ValueError, "vocab_map must be of 9 draft entries like draft_logits, got 3", vocab_map=MAP)
    fails(op, TypeError, "vocab_map must be a specdec_ops.VocabMap or None, got list", vocab_map=[0])


@pytest.mark.parametrize("op", CALLS)
def test_out(op):
    """Type, and dtype, shape, device and layout of every tensor in it."""
    good = getattr(specdec_ops, op)(**CALLS[op])
    if op == "sample_tokens":
        fails(op, TypeError, "out must be int32 [2], got int64 [2]", out=SEEDS)
        fails(op, ValueError, "out must be int32 [2], got int32 [1]", out=good[:1])
        fails(op, ValueError, "out must be on cpu", out=good.to(META))
        fails(op, ValueError, "out must be contiguous, got int32 [2] with strides [2]", out=strided(good))
        return
    assert isinstance(good, Acceptance | LongestPath | Children)
    fails(op, TypeError, f"out must be a specdec_ops.{type(good).__name__}, got int32 [2, 5]", out=TOKENS)
    for field in dataclasses.fields(good):
        tensor = getattr(good, field.name)
        dtype, shape = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
        must = f"out.{field.name} must be {dtype} {shape}"
        wrong = {
            (TypeError, f"{must}, got int64 {shape}"): tensor.long(),
            (ValueError, f"{must}, got {dtype} {[1, *shape[1:]]}"): tensor[:1],
            (ValueError, f"out.{field.name} must be on cpu, got a tensor on meta"): tensor.to(META),
            (ValueError, f"out.{field.name} must be contiguous, got {dtype} {shape} with"): strided(tensor),
        }
        for (error, message), value in wrong.items():
            fails(op, error, message, out=dataclasses.replace(good, **{field.name: value}))


@pytest.mark.parametrize("op", CALLS)
def test_backend(op):
    """Unknown, or not available; float64 only where it is taken."""
    kind = "sample" if op.startswith("sample") else "accept"
    names = "auto, cuda, triton, cpu, torch"
    with pytest.raises(ValueError, match=f"specdec_ops.{kind}: backend must be one of {names}, got 'gpu'"):
        getattr(specdec_ops, op)(**CALLS[op], backend="gpu")
    with pytest.raises(RuntimeError, match=f"specdec_ops.{kind}: backend='cuda' is unavailable: "):
        getattr(specdec_ops, op)(**CALLS[op], backend="cuda")
    doubles = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in CALLS[op].items()
    }
    getattr(specdec_ops, op)(**doubles)
    if specdec_ops.backends(kind)["cpu"] is None:
        with pytest.raises(RuntimeError, match="its kernels take float32, bfloat16 and float16, not float64"):
            getattr(specdec_ops, op)(**doubles, backend="cpu")


def test_vocab_map():
    """Made of different ids in range."""

    def refused(kind, message, ids, vocab=9):
        with pytest.raises(kind, match=re.escape(f"specdec_ops.VocabMap: {message}")):
            VocabMap(ids, vocab)

    refused(TypeError, "draft_to_target must be int32 or int64 [draft_vocab], got float32 [2]", torch.ones(2))
    refused(ValueError, "draft_to_target must be int32 or int64 [draft_vocab], got int64 [1, 1]", [[1]])
    refused(ValueError, "draft_to_target must be int32 or int64 [draft_vocab], got int64 [0]", SEEDS[:0])
    refused(TypeError, "vocab must be an int, got 9.0", [1], 9.0)
    refused(ValueError, "draft_to_target must be of ids from 0 to 8, got ids from -1 to 3", [3, -1])
    refused(ValueError, "draft_to_target must be of ids from 0 to 8, got ids from 2 to 9", [2, 9])
    refused(ValueError, "draft_to_target must be of different ids, got 2 of 3", [2, 4, 2])
    assert MAP.target_to_draft.tolist() == [0, -1, -1, 1, -1, -1, -1, 2, -1]
    assert (MAP.vocab, MAP.draft_vocab) == (9, 3)
    assert repr(MAP) == "<VocabMap of 3 draft entries into 9 tokens on cpu>"
    with pytest.raises(dataclasses.FrozenInstanceError):
        MAP.draft_to_target = SEEDS
