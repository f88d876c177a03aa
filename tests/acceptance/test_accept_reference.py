"""The definition of `accept` and `sample` on edges: rows, links, noise and ends."""

import pytest
import torch

from specdec_ops.ops.acceptance import reference_philox
from specdec_ops.ops.acceptance.contract import AcceptArguments, AcceptOutputs, SampleArguments, SampleOutputs
from specdec_ops.ops.acceptance.reference_accept import accept, margins
from specdec_ops.ops.acceptance.reference_sample import sample
from specdec_ops.topology import Topology
from specdec_ops.tree import Tree

RULES = ["greedy", "match", "recursive", "traversal", "target_only", "kseq", "typical", "longest"]
LOSSLESS = RULES[:6]
NAN, INF = float("nan"), float("inf")
TARGET_INVALID, DRAFT_INVALID, IMPOSSIBLE, EMPTY, TREE_INVALID = 1, 2, 4, 8, 16
PER_REQUEST = ("temperature", "top_k", "top_p")


def arguments(
    rule, target, tokens, parents=None, draft=None, *, links=None, num_nodes=None, width=1, depth=None, **given
):
    """Arguments and outputs of `accept` by name. Without parents and links: a chain, whose tokens start at node 1."""
    batch, nodes = target.shape[:2]
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 5, "position": 7}
    call = {"rule": rule, "target": target, "draft_logits": draft, "target_to_draft": None, "eos": ()}
    call |= {"replacement": rule == "kseq", "child_rows": False}
    call["thresholds"] = (0.3, 0.09) if rule == "typical" else (1.0, 1.0)
    for name, value in defaults.items():
        call |= {name: value, name + "s": None}
    for name in PER_REQUEST:
        call |= {f"draft_{name}": given.get(name, defaults[name]), f"draft_{name}s": given.get(name + "s")}
    call["draft_tokens"] = torch.as_tensor(tokens, dtype=torch.int32).expand(batch, -1)
    if parents is not None:
        tree = Topology.from_trees([Tree(parents)])
        links = (tree.first_child, tree.next_sibling)
    call["first_child"], call["next_sibling"] = links or (None, None)
    call["num_nodes"] = torch.tensor([nodes] if num_nodes is None else num_nodes, dtype=torch.int32)
    depth = nodes - 1 if depth is None else depth
    shapes = {"tokens": (depth + 1,), "nodes": (depth + 1,), "num_accepted": (), "next_tokens": (width,), "status": ()}
    call |= {name: torch.full((batch, *shape), -99, dtype=torch.int32) for name, shape in shapes.items()}
    call["finished"] = torch.zeros(batch, dtype=torch.bool)
    return call | given


def run(*args, **options):
    call = arguments(*args, **options)
    accept(*contract_of(call))
    return call


def contract_of(call):
    """The arguments and the outputs."""
    return tuple(kind(*(call[name] for name in kind._fields)) for kind in (AcceptArguments, AcceptOutputs))


def race(weights, domain, detail, *, seed=5, position=7):
    """The token that a draw must be, straight from the noise."""
    drawn = reference_philox.exponentials(len(weights), seed, position, domain, detail)
    return int((weights.double() / drawn).argmax())


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- noise and outputs


@pytest.mark.parametrize("rule", ["recursive", "traversal", "target_only", "kseq"])
@pytest.mark.parametrize("position", [0, 7])
def test_next_tokens_use_their_domain(rule, position):
    """BONUS where nothing was rejected at the end of the accepted path, else RESIDUAL, without the rejected token."""
    target = logits(1, 3, 9)
    target[0, :2] = -INF
    target[0, 0, 4] = target[0, 1, 2] = 0  # certain: the path 4, 2 is accepted, any other child is not
    draft = torch.zeros(1, 3, 9)
    bonus = run(rule, target, [4, 2], draft=draft, position=position)
    expected = race(target[0, 2].softmax(0), reference_philox.BONUS, 2, position=position)
    assert bonus["tokens"].tolist() == [[4, 2, expected]]
    assert bonus["nodes"].tolist() == [[0, 1, 2]]
    assert bonus["num_accepted"].tolist() == [2]
    assert bonus["next_tokens"].tolist() == [[expected]]

    target = logits(1, 2, 9)
    target[0, 0, 3] = -INF  # never accepted
    if rule != "kseq":  # which needs a draft row
        residual = run(rule, target, [3], position=position)
        expected = race(target[0, 0].softmax(0), reference_philox.RESIDUAL, 0, position=position)
        assert residual["tokens"].tolist() == [[expected, -1]]
        assert residual["nodes"].tolist() == [[0, -1]]


def test_coins_belong_to_the_node():
    """A child is accepted exactly when its own coin says so; under "target_only", when its parent's does."""
    for seed in range(20):
        target = logits(1, 2, 2, seed=seed)
        p = target[0, 0].double().softmax(0)[1]
        found = {
            rule: run(rule, target, [1], seed=seed)["num_accepted"].item() for rule in ("recursive", "target_only")
        }
        assert found["recursive"] == (reference_philox.coin(seed, 7, 1) < p)
        assert found["target_only"] == (reference_philox.coin(seed, 7, 0, level=True) < p)


def test_match_is_plain_sampling():
    """Drafts that plain sampling would draw are accepted, and the text is that of plain sampling whatever they are."""
    target, text = logits(1, 6, 30), torch.empty(6, 1, 1, dtype=torch.int32)
    places = torch.arange(8, 14, dtype=torch.int32)
    rows = (target.transpose(0, 1), None, 1, False, None, 0, "sample")
    sample(
        SampleArguments(*rows, 1.0, None, 0, None, 0.9, None, 5, None, 0, places),
        SampleOutputs(text, None, None, status=torch.zeros(6, dtype=torch.int32)),
    )
    text = text.flatten().tolist()
    assert run("match", target, text[:5], top_p=0.9)["tokens"].tolist() == [text]
    wrong = [*text[:2], (text[2] + 1) % 30, *text[3:5]]
    found = run("match", target, wrong, top_p=0.9)
    assert found["tokens"].tolist() == [[*text[:3], -1, -1, -1]]


@pytest.mark.parametrize("rule", LOSSLESS)
def test_temperature_0_is_the_greedy_path(rule):
    """Whatever was drafted and however; mixed with requests of another temperature in one batch."""
    parents = [-1, 0, 0, 0, 1, 1, 2, 4, 4, 6]
    target = logits(40, 10, 3, seed=2)
    tokens = torch.randint(0, 3, (40, 10), generator=torch.Generator().manual_seed(3))
    temperatures = torch.tensor([0.0, 0.8] * 20)
    for draft in (None, logits(40, 10, 3, seed=4)) if rule != "kseq" else (logits(40, 10, 3, seed=4),):
        mixed = run(rule, target, tokens, parents, draft, temperatures=temperatures, draft_temperatures=temperatures)
        for request in range(0, 40, 2):
            expected, node = [], 0
            while node is not None:
                expected.append(int(target[request, node].argmax()))
                children = [child for child in range(10) if parents[child] == node]
                node = next((child for child in children if int(tokens[request, child]) == expected[-1]), None)
            assert mixed["tokens"][request].tolist() == expected + [-1] * (10 - len(expected))


@pytest.mark.parametrize("rule", RULES)
def test_requests_are_independent_and_inputs_are_kept(rule):
    parents, draft = [-1, 0, 0, 1, 1, 2], logits(6, 6, 8, seed=1)
    target, tokens = logits(6, 6, 8), torch.randint(0, 8, (6, 6), generator=torch.Generator().manual_seed(3))
    seeds, positions = torch.arange(6), torch.arange(10, 16, dtype=torch.int32)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    inputs = [target.clone(), draft.clone(), tokens.clone()]
    plain = run(rule, target, tokens, parents, draft, seeds=seeds, positions=positions, width=2)
    mixed = run(
        rule,
        target[order],
        tokens[order],
        parents,
        draft[order],
        seeds=seeds[order],
        positions=positions[order],
        width=2,
    )
    for name in ("tokens", "nodes", "num_accepted", "next_tokens", "status"):
        assert torch.equal(plain[name][order], mixed[name]), name
        assert -99 not in plain[name]
    assert all(torch.equal(before, after) for before, after in zip(inputs, (target, draft, tokens), strict=True))
    if rule not in ("greedy", "typical"):
        other = [run(rule, target, tokens, parents, draft, seeds=seeds, position=at)["tokens"] for at in range(4)]
        assert any(not torch.equal(other[0], found) for found in other[1:]), "noise must change with the position"


def test_siblings_with_rows_of_their_own():
    """If all rows of siblings are the same, they are draws with replacement from one row."""
    parents, target = [-1, 0, 0, 0, 1], logits(30, 5, 4)
    row = logits(30, 1, 4, seed=1).expand(30, 5, 4)
    tokens = torch.randint(0, 4, (30, 5), generator=torch.Generator().manual_seed(3))
    for rule in ("recursive", "traversal"):
        own = run(rule, target, tokens, parents, row, child_rows=True)
        shared = run(rule, target, tokens, parents, row, replacement=True)
        assert torch.equal(own["tokens"], shared["tokens"])


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
def test_rows_of_their_own_belong_to_the_child(rule):
    """Row n is what node n was drawn from, and that of node 0 is not read."""
    target, draft, tokens = logits(1, 3, 4), logits(1, 3, 4, seed=1), [0, 2, 1]
    draft[0, 0] = NAN
    p, first, second = target[0, 0].double().softmax(0), *draft[0, 1:].double().softmax(-1)
    accepted = set()
    for seed in range(30):
        left = (p - first).clamp(min=0)
        expected = next(
            (
                child
                for child, q, weights in ((1, first, p), (2, second, left / left.sum()))
                if reference_philox.coin(seed, 7, child) * q[tokens[child]] < weights[tokens[child]]
            ),
            -1,
        )
        found = run(rule, target, tokens, [-1, 0, 0], draft, child_rows=True, seed=seed)
        assert (found["nodes"][0, 1].item(), found["status"].item()) == (expected, 0)
        accepted.add(expected)
    assert accepted >= {1, -1}


def test_reduced_vocabulary():
    """q is 0 outside of the draft's vocabulary; target ids are looked up, and given back."""
    target, narrow = logits(1, 3, 6), logits(1, 2, 3, seed=1)
    inverse = torch.tensor([-1, 2, -1, 0, 1, -1], dtype=torch.int32)
    wide = torch.full((1, 2, 6), -INF)
    wide[..., [3, 4, 1]] = narrow
    for seed in range(30):
        mapped = run("recursive", target, [3, 1], draft=narrow, target_to_draft=inverse, seed=seed)
        assert torch.equal(mapped["tokens"], run("recursive", target, [3, 1], draft=wide, seed=seed)["tokens"])
    outside = run("recursive", target, [0, 1], draft=narrow, target_to_draft=inverse)
    assert outside["status"].tolist() == [IMPOSSIBLE]
    assert outside["num_accepted"].tolist() == [0]
    tokens = torch.empty(1, 2, 3, dtype=torch.int32)
    draw_children(narrow, tokens, to_target=torch.tensor([3, 4, 1], dtype=torch.int32))
    assert [sorted(row) for row in tokens[0].tolist()] == [[1, 3, 4]] * 2


# ---- odd rows


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value, token", [(NAN, 2), (INF, 4)])
def test_invalid_target_rows(rule, value, token):
    """One defined token instead, the status says so, and neighbours know nothing of it."""
    target = logits(3, 2, 6)
    target[:, :, 2] = 9.0
    clean = run(rule, target, [-1, -1], [-1, 0], torch.zeros(3, 2, 6))
    target[1, :, 4] = value
    found = run(rule, target, [-1, -1], [-1, 0], torch.zeros(3, 2, 6))
    assert found["status"].tolist() == [0, TARGET_INVALID, 0]
    assert found["next_tokens"][1].tolist() == [token]
    assert torch.equal(found["next_tokens"][::2], clean["next_tokens"][::2])


@pytest.mark.parametrize("rule", RULES)
def test_rows_of_minus_infinity(rule):
    target = torch.full((1, 2, 5), -INF)
    found = run(rule, target, [0, -1], [-1, 0], torch.zeros(1, 2, 5))
    assert found["status"].tolist() == [TARGET_INVALID]
    assert found["next_tokens"].tolist() == [[0]]
    target[0, :, 3] = -50.0
    found = run(rule, target, [0, -1], [-1, 0], torch.zeros(1, 2, 5))
    assert found["status"].tolist() == [0]
    assert found["next_tokens"].tolist() == [[3]]


@pytest.mark.parametrize("rule", ["recursive", "traversal", "kseq", "longest"])
def test_invalid_draft_rows(rule):
    """Their children are not tried; the next token is the target's."""
    draft = torch.full((1, 3, 6), NAN)
    target = logits(1, 3, 6)
    found = run(rule, target, [0, 1, 2], [-1, 0, 0], draft)
    assert found["status"].tolist() == [DRAFT_INVALID]
    assert found["num_accepted"].tolist() == [1 if rule == "longest" else 0]
    assert found["next_tokens"].tolist() == [[race(target[0, 0].softmax(0), reference_philox.BONUS, 0)]]


@pytest.mark.parametrize("rule", ["recursive", "traversal", "kseq"])
@pytest.mark.parametrize("lie", ["zero probability", "outside", "negative"])
def test_impossible_drafts_change_nothing(rule, lie):
    """They are rejected, the sibling after them is tested as if they were not there, and the status tells."""
    target, draft = logits(1, 3, 6), logits(1, 3, 6, seed=1)
    draft[0, 0, 5] = -INF
    token = {"zero probability": 5, "outside": 6, "negative": -7}[lie]
    for seed in range(20):
        found = run(rule, target, [0, token, 2], [-1, 0, 0], draft, seed=seed)
        assert found["status"].tolist() == [IMPOSSIBLE]
        p, q = (row[0, 0].double().softmax(0)[2] for row in (target, draft))
        if rule != "kseq":
            assert found["num_accepted"].item() == (reference_philox.coin(seed, 7, 2) * q < p)


# ---- odd trees


@pytest.mark.parametrize("rule", RULES)
def test_the_end_of_a_sequence(rule):
    """Nothing is tried and nothing is drawn behind it."""
    target = torch.full((1, 4, 5), -INF)
    target[0, [0, 1, 2, 3], [1, 2, 3, 4]] = 0.0
    draft = torch.zeros(1, 4, 5)
    tokens, parents = [0, 1, 2, 3], [-1, 0, 1, 2]
    root = [0] if rule == "longest" else []
    found = run(rule, target, tokens, parents, draft, eos=(2,), replacement=True)
    expected = [*root, 1, 2]
    assert found["tokens"][0, : len(expected) + 1].tolist() == [*expected, -1]
    assert found["next_tokens"].tolist() == [[-1]]
    assert found["num_accepted"].tolist() == [len(expected)]
    drawn = run(rule, target, tokens, parents, draft, eos=(4,), replacement=True)
    assert drawn["next_tokens"].tolist() == [[4]], "an end of sequence that was not drafted is a token like others"


@pytest.mark.parametrize("rule", RULES)
def test_slices_padding_and_depth(rule):
    """Links that lead past num_nodes are no error; -1 ends siblings; max_depth ends paths."""
    target = torch.full((1, 4, 5), -INF)
    target[0, [0, 1, 2, 3], [1, 2, 3, 4]] = 0.0
    draft, parents, first = torch.zeros(1, 4, 5), [-1, 0, 1, 2], int(rule == "longest")
    for found in (
        run(rule, target, [0, 1, 2, 3], parents, draft, num_nodes=[2]),
        run(rule, target, [0, 1, -1, 3], parents, draft),
        run(rule, target, [0, 1, 2, 3], parents, draft, depth=1),
    ):
        assert found["num_accepted"].tolist() == [1 + first]
        assert found["next_tokens"].tolist() == [[2]]
        assert found["status"].tolist() == [0]
    found = run(rule, target, [0, 1, 2, 3], parents, draft, num_nodes=[0])
    assert (found["num_accepted"].tolist(), found["status"].tolist()) == ([first], [TREE_INVALID])


@pytest.mark.parametrize("rule", RULES)
def test_malformed_input_never_hangs(rule):
    """Random links, counts, tokens and rows: sound outputs, and every token of the vocabulary."""
    generator = torch.Generator().manual_seed(1)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    for _ in range(15):
        target, draft = logits(4, 8, 6), logits(4, 8, 6, seed=1)
        target[integers(0, 4, 2).long(), integers(0, 8, 2).long(), 3] = NAN
        draft[0, integers(0, 8, 2).long()] = -INF
        found = run(
            rule, target, integers(-2, 8, 4, 8), None, draft,
            links=(integers(-3, 10, 4, 8), integers(-3, 10, 4, 8)), num_nodes=integers(-1, 10, 4).tolist(), width=2,
        )  # fmt: skip
        path = found["nodes"]
        assert (path < 8).all() and (path[:, 1:] >= -1).all() and (path[:, 1:].diff() != 0)[path[:, 2:] >= 0].all()
        assert (found["next_tokens"] >= -1).all() and (found["next_tokens"] < 6).all()
        assert (found["next_tokens"][:, 0] >= 0).all()


@pytest.mark.parametrize("rule", ["traversal", "typical", "longest"])
def test_a_node_with_two_parents_is_visited_once(rule):
    """Else the 2^30 paths of this one would take a while."""
    links = torch.arange(1, 61, dtype=torch.int32)[None].clone()
    links[0, -1] = -1
    target = torch.zeros(1, 60, 4)
    found = run(rule, target, torch.arange(60) % 4, links=(links, links))
    assert found["status"].item() & TREE_INVALID


# ---- the forest of longest_path


def test_forest():
    """The winner's root comes first, or node 0 if nothing passed. Next tokens are distinct, then -1."""
    parents, draft = [-1, -1, 0, 1, 1, 3], torch.zeros(1, 6, 5)
    target = torch.full((1, 6, 5), -INF)
    target[0, 1, 4] = target[0, 3, 2] = 0.0
    target[0, [0, 5], :2] = 0.0
    found = run("longest", target, [0, 1, 3, 4, 3, 2], parents, draft, width=3)
    assert found["nodes"].tolist() == [[1, 3, 5, -1, -1, -1]]
    assert found["tokens"].tolist() == [[1, 4, 2, -1, -1, -1]]
    assert sorted(found["next_tokens"][0].tolist()) == [-1, 0, 1]
    found = run("longest", target, [0, 1, 3, 3, 3, 2], parents, draft, width=3)
    assert (found["nodes"][0, 0].item(), found["num_accepted"].item()) == (0, 1)
    greedy = run("longest", logits(1, 6, 5), [0, 1, 3, 3, 3, 2], parents, draft, width=3, temperature=0.0)
    end = greedy["nodes"][0, greedy["num_accepted"].item() - 1]
    assert greedy["next_tokens"][0].tolist() == logits(1, 6, 5)[0, end].topk(3).indices.tolist()


# ---- sampling


def draw_children(
    rows, tokens, *, to_target=None, replacement=False, temperature=1.0, top_k=0, parents=None, **outputs
):
    drawing = (rows, to_target, tokens.shape[-1], replacement, parents, 2, "draft")
    settings = (temperature, None, top_k, None, 1.0, None, 5, None, 7, None)
    status = outputs.get("status", torch.zeros(len(rows), dtype=torch.int32))
    sample(
        SampleArguments(*drawing, *settings),
        SampleOutputs(tokens, outputs.get("logprobs"), outputs.get("logsumexp"), status),
    )


def test_children():
    """The race of their parent's noise, in the order of the race, and what is known of their distribution."""
    rows, tokens = logits(1, 2, 12), torch.empty(1, 2, 12, dtype=torch.int32)
    known, total = torch.empty(1, 2, 12), torch.empty(1, 2)
    draw_children(rows, tokens, logprobs=known, logsumexp=total)
    for row in range(2):
        p = rows[0, row].double().softmax(0)
        assert tokens[0, row, 0] == race(p, reference_philox.DRAFT, 2 + row)
        assert (
            tokens[0, row].tolist()
            == (p / reference_philox.exponentials(12, 5, 7, reference_philox.DRAFT, 2 + row))
            .argsort(descending=True)
            .tolist()
        )
        torch.testing.assert_close(known[0, row].double(), p.log()[tokens[0, row].long()], rtol=0, atol=1e-6)
    torch.testing.assert_close(total, rows.logsumexp(-1))
    draw_children(rows, tokens, replacement=True, parents=torch.tensor([[9, 4]]))
    assert tokens[0, 0].tolist() == [
        race(rows[0, 0].softmax(0), reference_philox.DRAFT, 9 + (number << 16)) for number in range(12)
    ]


def test_children_at_temperature_0_and_where_there_are_few():
    rows, tokens = logits(1, 1, 6), torch.empty(1, 1, 4, dtype=torch.int32)
    known, status = torch.empty(1, 1, 4), torch.empty(1, dtype=torch.int32)
    draw_children(rows, tokens, temperature=0.0, logprobs=known)
    assert tokens[0, 0].tolist() == rows[0, 0].topk(4).indices.tolist()
    torch.testing.assert_close(known[0, 0], rows[0, 0].log_softmax(0).topk(4).values)
    draw_children(rows, tokens, temperature=0.0, replacement=True)
    assert tokens[0, 0].tolist() == [int(rows[0, 0].argmax())] * 4
    draw_children(rows, tokens, top_k=2, logprobs=known, status=status)
    assert sorted(tokens[0, 0, :2].tolist()) == sorted(rows[0, 0].topk(2).indices.tolist())
    assert (tokens[0, 0, 2:].tolist(), known[0, 0, 2:].tolist(), status.tolist()) == ([-1, -1], [-INF, -INF], [0])
    rows[0, 0, 1] = NAN
    draw_children(rows, tokens, status=status)
    assert (tokens.flatten().tolist(), status.tolist()) == ([-1] * 4, [DRAFT_INVALID])


# ---- margins


def test_margins_find_what_rounding_could_turn():
    """A coin at its threshold to a part in 10^5, and one far from it."""
    target = torch.zeros(2, 2, 2, dtype=torch.float64)
    u = reference_philox.coin(5, 7, 1)
    for request, p in enumerate((u * (1 + 2e-5), (1 + u) / 2)):
        target[request, 0] = torch.tensor([1 - p, p], dtype=torch.float64).log()
        target[request, 1, 0] = 50.0
    found = margins(*contract_of(arguments("recursive", target, [1])), trials=20)
    assert found[0] in (1e-5, 1e-4) and found[1] > 1e-3


def test_margins_of_a_cut():
    """top-p ends between two tokens, 10^-5 from taking one more."""
    target = torch.tensor([0.5 - 1e-5, 0.25, 0.25 + 1e-5], dtype=torch.float64).log()[None, None]
    # The sum up to the second token: 0.75 - 1e-5 + 1e-5, at top_p = 0.75.
    found = [
        margins(*contract_of(arguments("match", target, [], top_p=0.75, seed=seed)), trials=20).item()
        for seed in range(20)
    ]
    assert min(found) <= 1e-5
