"""Pitfalls of acceptance in what it reads and writes: logits, ids, trees, strides. See test_accept_pitfalls."""

import dataclasses

import pytest
import torch

from specdec_ops import Topology, Tree, greedy_accept, match_accept, sample_tokens, tree_accept
from specdec_ops._core import dispatch
from tests.acceptance.accept_cases import (
    CHAINS,
    RULES,
    AcceptCase,
    Bands,
    assert_same,
    chain,
    fields_of,
    make_case,
    one,
    random_parents,
    request_of,
    star,
)
from tests.acceptance.pitfall_cases import (
    INF,
    NAN,
    STATUS_DRAFT,
    STATUS_TARGET,
    STATUS_TREE,
    extra,
    forest_roots,
    log,
    noise,
    perfect,
    slow,
)

OP = "accept"
INTERPRETED_SHARE, EMULATED_SHARE = 17, 3
STOCHASTIC = [rule for rule in RULES if rule != "greedy"]


@pytest.mark.parametrize("rule", RULES)
def test_04_masked_tokens_and_rows(rule, target):
    """-inf is never emitted; a row of nothing else has a defined token, a status, and progress."""
    case = make_case(rule, [star(3)] * 10 if rule not in CHAINS else [chain(3)] * 10, 30, **extra(rule))
    case.target[..., 10:] = -INF
    result = case.to(target.device).run(target.backend)
    emitted = result.next_tokens if rule == "longest" else result.next_token[:, None]
    assert ((emitted >= 0) & (emitted < 10)).all()
    if rule != "longest":
        case.target[0] = -INF
        result = case.to(target.device).run(target.backend)
        assert result.status[0] & STATUS_TARGET
        assert result.tokens[0, 0] == 0
        assert not (result.status[1:] & STATUS_TARGET).any()


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("rule", RULES)
def test_05_nan_and_infinity(rule, value, target):
    """A status, an id of the vocabulary, progress, and untouched neighbours."""
    vocab, bad = 45, 2
    case = make_case(rule, [random_parents(7, 3, forest_roots(rule))] * 4, vocab, **extra(rule))
    want = case.to(target.device).run(target.backend)
    case.target[bad, :, 40] = value
    result = case.to(target.device).run(target.backend)
    Bands().check(case, result)
    assert result.status[bad] & STATUS_TARGET
    emitted = result.next_tokens[bad, 0] if rule == "longest" else result.next_token[bad]
    assert 0 <= emitted < vocab
    others = [0, 1, 3]
    assert all(request_of(result, index) == request_of(want, index) for index in others)
    if case.draft is not None:
        case = make_case(rule, [random_parents(7, 3, forest_roots(rule))] * 4, vocab, **extra(rule))
        case.draft[bad, :, 0] = value
        result = case.to(target.device).run(target.backend)
        assert result.status[bad] == STATUS_DRAFT
        assert result.num_accepted[bad] == (1 if rule == "longest" else 0)
        assert all(request_of(result, index) == request_of(want, index) for index in others)


@pytest.mark.parametrize("vocab", [1, 3, 31, 65, 257, 1023])
def test_11_the_tail_of_the_vocabulary(vocab, target):
    """The last token wins if it should; what lies behind a row is not read."""
    memory = torch.full((2, 3, vocab + 16), INF, device=target.device)
    logits = memory[..., :vocab]
    logits[:] = -INF
    logits[..., -1] = -5.0
    tokens = torch.full((2, 3), vocab - 1, dtype=torch.int32, device=target.device)
    topology = Tree.chain(3).to(target.device)
    noisy = {"backend": target.backend, **noise(target, 2)}
    for result in (
        greedy_accept(logits, tokens, topology, backend=target.backend),
        match_accept(logits, tokens, topology, **noisy),
        tree_accept(logits, tokens, topology, logits, **noisy),
        tree_accept(logits, tokens, topology, rule="target_only", top_p=0.9, **noisy),
    ):
        assert result.tokens.tolist() == [[vocab - 1] * 3] * 2
        assert result.status.tolist() == [0, 0]


def test_12_ids_beyond_24_bits(target):
    """Where float32 can't tell neighbouring ids apart."""
    if slow(target):
        pytest.skip("interpreted: 16 million tokens")
    vocab = 2**24 + 5
    logits = torch.full((1, 1, vocab), -INF, dtype=torch.bfloat16, device=target.device)
    logits[..., 2**24 + 3] = 1.0
    logits[..., 2**24 + 1] = 1.0
    logits[..., 7] = 0.5
    tokens, topology = torch.zeros(1, 1, dtype=torch.int32, device=target.device), Tree([-1]).to(target.device)
    assert greedy_accept(logits, tokens, topology, backend=target.backend).next_token.item() == 2**24 + 1
    if target.backend == "torch":
        return  # the definition sorts 16 million tokens for what follows
    options = {"positions": 0, "top_k": 2, "backend": target.backend}
    drawn = {match_accept(logits, tokens, topology, seeds=seed, **options).next_token.item() for seed in range(8)}
    assert drawn == {2**24 + 1, 2**24 + 3}


@pytest.mark.parametrize("rule", ["match", "recursive", "target_only", "typical"])
def test_15_no_scan_runs_over_the_end(rule, target):
    """All mass on the first tokens, none on a thousand behind them."""
    count = 10 if slow(target) else 300
    row = torch.full((1003,), -INF)
    row[:3] = log(0.2, 0.3, 0.5)
    tokens = torch.zeros(count, 1, dtype=torch.int32)
    options = {"seeds": torch.arange(count), "positions": 1}
    case = AcceptCase(rule, row.expand(count, 1, -1), tokens, Tree([-1]).to("cpu"), None, options)
    result = case.to(target.device).run(target.backend)
    assert (result.next_token < 3).all()


def test_19_expanded_logits(target):
    """One row for all requests and nodes, by strides of 0: more than 2^31 elements that nobody stores."""
    if slow(target):
        pytest.skip("interpreted: the batch is too large")
    batch, nodes, vocab = 9, 2000, 128_257
    assert batch * nodes * vocab > 2**31
    row = torch.randn(1, 1, vocab, device=target.device)
    tokens = row[0, 0].topk(nodes).indices.int().expand(batch, nodes)
    topology = Tree(random_parents(nodes, 1, wide=0.9)).to(target.device)
    noise = {"seeds": torch.arange(batch), "positions": 4, "temperature": 0.25}
    case = AcceptCase("target_only", row.expand(batch, nodes, vocab), tokens, topology, None, noise)
    got = case.to(target.device).run(target.backend)
    assert got.num_accepted.sum() > 0
    last = one(case, batch - 1)
    Bands().check(last, last.to(target.device).run(target.backend))
    assert request_of(last.to(target.device).run(target.backend), 0) == request_of(got, batch - 1)


def test_19_offsets_beyond_32_bits(target):
    """The last request's rows lie more than 2^31 elements behind the first's. Memory in between is never touched."""
    if target.device != "cpu" or slow(target):
        pytest.skip("needs 4 GB of address space that is not backed by memory")
    vocab, nodes = 1000, 3
    try:
        memory = torch.empty(2**31 + nodes * vocab, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    logits = memory.as_strided((2, nodes, vocab), (2**31, vocab, 1))
    case = make_case("token", [chain(nodes)] * 2, vocab, dtype=torch.bfloat16, one_hot=True)
    logits.copy_(case.target)
    assert_same(case.changed(target=logits).run(target.backend), case.run(target.backend))


@pytest.mark.parametrize("rule", RULES)
def test_20_a_permuted_batch_permutes_the_result(rule, target):
    """And a request alone gets the same as in company."""
    trees = [random_parents(size, size, forest_roots(rule), 0.6) for size in (9, 3, 1, 12, 7)]
    options = {} if rule == "greedy" else {"temperature": torch.tensor([0.0, 1.0, 0.5, 0.9, 1.3]), "top_p": 0.95}
    case = make_case(rule, trees, 33, **extra(rule), **options)
    want = case.to(target.device).run(target.backend)
    order = torch.tensor([3, 0, 4, 1, 2])
    requests = [one(case, index) for index in order.tolist()]
    options = {
        name: torch.cat([part.options[name] for part in requests])
        if isinstance(value, torch.Tensor) and value.dim()
        else value
        for name, value in case.options.items()
    }
    topology = case.topology and Topology(
        *(
            None if field.name == "offsets" else torch.cat([getattr(part.topology, field.name) for part in requests])
            for field in dataclasses.fields(Topology)
        )
    )
    permuted = AcceptCase(
        rule,
        case.target[order],
        case.tokens[order],
        topology,
        None if case.draft is None else case.draft[order],
        options,
    )
    got = permuted.to(target.device).run(target.backend)
    assert [request_of(got, index) for index in range(5)] == [request_of(want, index) for index in order.tolist()]
    assert request_of(requests[0].to(target.device).run(target.backend), 0) == request_of(want, 3)


@pytest.mark.parametrize("rule", STOCHASTIC)
def test_21_replays_with_changed_seeds(rule, target):
    """Seeds and positions are read when the op runs: changed in place, as between replays of a graph, they count."""
    case = make_case(rule, [random_parents(6, 1, forest_roots(rule))] * 8, 400, scale=0.5, **extra(rule)).to(
        target.device
    )
    result = case.run(target.backend)
    assert_same(case.run(target.backend), result)
    before = {name: tensor.clone() for name, tensor in fields_of(result).items()}
    seeds, positions = case.options["seeds"], case.options["positions"]
    for tensor, change in ((seeds, 1), (seeds, 2**32), (positions, 1)):
        tensor += change
        case.run(target.backend, out=result)
        assert any(not torch.equal(before[name], tensor) for name, tensor in fields_of(result).items())
        tensor -= change
    case.run(target.backend, out=result)
    assert all(torch.equal(before[name], tensor) for name, tensor in fields_of(result).items())


@pytest.mark.parametrize("rule", RULES)
def test_25_inputs_are_not_written_and_outputs_all_are(rule, target):
    """Outputs start poisoned in every test of this suite; here they also start from another call's results."""
    trees = [random_parents(size, size, forest_roots(rule)) for size in (8, 2, 5)]
    case = make_case(rule, trees, 33, **extra(rule)).to(target.device)
    tensors = [value for value in vars(case).values() if isinstance(value, torch.Tensor)]
    tensors += [value for value in case.options.values() if isinstance(value, torch.Tensor)]
    if case.topology is not None:
        tensors += [case.topology.first_child, case.topology.next_sibling, case.topology.num_nodes]
    before = [tensor.clone() for tensor in tensors]
    result = case.run(target.backend)
    want = {name: tensor.clone() for name, tensor in fields_of(result).items()}
    case.run(target.backend, out=result)
    assert all(torch.equal(want[name], tensor) for name, tensor in fields_of(result).items())
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor.nan_to_num(77.0), copy.nan_to_num(77.0))
    assert all(((tensor >= -1) & (tensor < 2**20)).all() for tensor in want.values())


MALFORMED = {
    "a child that is its parent": {"first_child": [0, -1, -1, -1]},
    "siblings in a circle": {"next_sibling": [-1, 2, 1, -1]},
    "a sibling that is itself": {"next_sibling": [-1, 1, -1, -1]},
    "a child out of the tree": {"first_child": [99, -1, -1, -1]},
    "a sibling out of the tree": {"next_sibling": [-1, 2**31 - 1, -1, -1]},
    "a negative link": {"first_child": [-(2**31), -1, -1, -1]},
    "no node": {"num_nodes": [0]},
    "fewer than no node": {"num_nodes": [-5]},
    "more nodes than there are": {"num_nodes": [2**31 - 1]},
}


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in CHAINS])
def test_26_malformed_trees(rule, kind, target):
    """A status, never a hang or a wild read; the other request is untouched."""
    sound = Topology.from_trees([Tree([-1, 0, 0, 1])] * 2)
    broken = dataclasses.replace(sound)
    for name, values in MALFORMED[kind].items():
        tensor = getattr(sound, name).clone()
        tensor[0] = (
            torch.tensor(values, dtype=torch.int64).to(torch.int32).squeeze(0)
            if name == "num_nodes"
            else (torch.tensor(values, dtype=torch.int64).to(torch.int32))
        )
        broken = dataclasses.replace(broken, **{name: tensor})
    # Nothing is accepted, so that every sibling is looked at. The tree is then seen to be broken at its root.
    case = make_case(rule, [[-1, 0, 0, 1]] * 2, 9, **extra(rule))
    case.target[..., :8] = -INF
    case.tokens[:] = case.tokens.clamp(0, 7)
    if case.draft is not None:
        case.draft[..., 8:] = -INF
    want = case.to(target.device).run(target.backend)
    case = case.changed(topology=broken)
    result = case.to(target.device).run(target.backend)
    assert request_of(result, 1) == request_of(want, 1)
    Bands().check(case, result)
    assert result.status[0] & STATUS_TREE


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in CHAINS])
def test_26_a_circle_on_the_accepted_path(rule, target):
    """A child of the last accepted node that leads back to the first."""
    case = perfect(rule)
    first_child = case.topology.first_child.clone()
    first_child[0, 2] = 1
    want = case.to(target.device).run(target.backend)
    circle = case.changed(topology=dataclasses.replace(case.topology, first_child=first_child))
    result = circle.to(target.device).run(target.backend)
    assert result.status.tolist() == [STATUS_TREE, 0, 0]
    assert (result.num_accepted - want.num_accepted).tolist() == [-1, 0, 0]
    assert torch.equal(result.nodes[0, :3], want.nodes[0, :3])
    assert torch.equal(result.tokens[1:], want.tokens[1:])


@pytest.mark.parametrize("rule", ["recursive", "traversal", "target_only", "kseq", "match", "greedy", "typical"])
def test_26_more_than_64_siblings(rule, target):
    """The last of 90 is the one to accept."""
    vocab = 120
    case = make_case(rule, [star(90)] * 2, vocab, gap=0.0)
    case.target[:] = -INF
    case.tokens[:] = torch.arange(91, dtype=torch.int32)
    case.target[:, :, 90] = 0.0
    if case.draft is not None:
        case.draft[:] = 0.0
    result = case.to(target.device).run(target.backend)
    assert result.tokens[:, 0].tolist() == [90, 90]
    if rule != "kseq":
        assert result.nodes[:, 1].tolist() == [90, 90]


@pytest.mark.parametrize("rule", RULES)
def test_27_the_end_of_a_sequence_inside_the_path(rule, target):
    """Nothing after it, no next token; whatever lies below it is not looked at."""
    case = perfect(rule, nodes=5, vocab=12)
    drafted = case.tokens if rule in CHAINS else case.tokens[:, 1:]
    drafted[:] = torch.tensor([3, 7, 4, 5])
    case.target[:] = -INF
    case.target[:, torch.arange(4), drafted[0].long()] = 0.0
    case.target[:, 2:] = NAN  # rows behind the end
    if case.draft is not None:
        case.draft[:] = case.target[:, : case.draft.shape[1]]
    result = case.to(target.device).run(target.backend, eos=(9, 7))
    if rule == "longest":
        assert result.num_accepted.tolist() == [3] * 3
        assert (result.next_tokens == -1).all()
        return
    assert result.tokens.tolist() == [[3, 7, -1, -1, -1]] * 3
    assert result.nodes.tolist() == [[0, 1, 2, -1, -1]] * 3
    assert result.next_token.tolist() == [-1] * 3
    assert result.status.tolist() == [0] * 3


@pytest.mark.parametrize("rule", RULES)
def test_30_strides_are_honoured_or_refused(rule, target):
    """Every second row of a larger tensor; a last dimension with gaps."""
    case = make_case(rule, [random_parents(6, 2, forest_roots(rule))] * 2, 21, **extra(rule)).to(target.device)
    want = case.run(target.backend)
    memory = torch.full((4, 12, 21), NAN, device=target.device)
    memory[::2, ::2] = case.target
    assert_same(case.changed(target=memory[::2, ::2]).run(target.backend), want)
    gaps = torch.zeros(*case.target.shape, 2, device=target.device)[..., 0]
    with pytest.raises(ValueError, match="must be contiguous in its last dimension"):
        case.changed(target=gaps).run(target.backend)


@pytest.mark.parametrize("op", ["accept", "sample"])
def test_31_triton_is_no_silent_no_op_on_a_cpu(op, monkeypatch):
    """Without its interpreter, a kernel on CPU tensors is refused."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    dispatch.forget()
    try:
        with pytest.raises(RuntimeError, match="backend='triton' is unavailable"):
            if op == "sample":
                sample_tokens(torch.zeros(1, 4), seeds=0, positions=0, backend="triton")
            else:
                greedy_accept(torch.zeros(1, 1, 4), torch.zeros(1, 1).int(), Tree([-1]).to("cpu"), backend="triton")
    finally:
        dispatch.forget()
