"""Drop-in forms of sgl-kernel's acceptance: its published cases, rewritten, exact laws, and where ours differ."""

import pytest
import torch

from specdec_ops import Tree, build_topology
from specdec_ops.compat import sgl_kernel
from specdec_ops.compat.sgl_kernel import tree_speculative_sampling_target_only, verify_tree_greedy

UNTOUCHED = -7


def links_of(*trees):
    """next_token and next_sibling [batch, nodes] of trees of one size."""
    assert all(len(tree) == len(trees[0]) for tree in trees)
    built = build_topology(torch.tensor([tree.parents.tolist() for tree in trees], dtype=torch.int32))
    return built.first_child.long(), built.next_sibling.long()


def run(
    candidates,
    next_token,
    next_sibling,
    *,
    steps,
    predict=None,
    probs=None,
    coins=None,
    final=None,
    slots=None,
    **options,
):
    """Call the greedy function (`predict`) or the sampling one on fresh outputs; return what they hold afterwards."""
    batch, nodes = candidates.shape
    slots = torch.arange(batch * nodes).view(batch, nodes) if slots is None else slots
    outputs = {
        "predicts": torch.full((batch * nodes,), UNTOUCHED, dtype=torch.int32),
        "accept_index": torch.full((batch, steps), UNTOUCHED, dtype=torch.int32),
        "accept_token_num": torch.full((batch,), UNTOUCHED, dtype=torch.int32),
    }
    tree = {
        "candidates": candidates,
        "retrieve_index": slots,
        "retrieve_next_token": next_token,
        "retrieve_next_sibling": next_sibling,
    }
    if predict is not None:
        verify_tree_greedy(**outputs, **tree, target_predict=predict)
    else:
        numbers = {
            "uniform_samples": torch.rand(batch, nodes) if coins is None else coins,
            "uniform_samples_for_final_sampling": torch.rand(batch) if final is None else final,
        }
        tree_speculative_sampling_target_only(**outputs, **tree, **numbers, target_probs=probs, **options)
    return [output.tolist() for output in outputs.values()]


# ---- the published cases


def published():
    """Two trees of six nodes, the second with its root's children listed as 4, 1; and what the target says."""
    candidates = torch.tensor([[0, 1, 2, 3, 4, 5], [7, 8, 9, 10, 11, 12]])
    next_token = torch.tensor([[1, 2, -1, 4, 5, -1], [4, 2, 3, -1, 5, -1]])
    next_sibling = torch.tensor([[-1, 3, -1, -1, -1, -1], [-1, -1, -1, -1, 1, -1]])
    choices = torch.full((2, 6), 18)
    for request, node, token in ((0, 0, 3), (0, 3, 4), (0, 4, 5), (1, 0, 11), (1, 4, 12)):
        choices[request, node] = token
    return candidates, next_token, next_sibling, choices


def filled(expected):
    return [UNTOUCHED if value is None else value for value in expected]


def test_published_greedy_case():
    *tree, choices = published()
    predicts, index, count = run(*tree, steps=4, predict=choices)
    assert predicts == filled([3, None, None, 4, 5, 18, 11, None, None, None, 12, 18])
    assert index == [[0, 3, 4, 5], filled([6, 10, 11, None])]
    assert count == [3, 2]


@pytest.mark.parametrize(
    "threshold, expected_predicts, expected_index, expected_count",
    [
        (1, [3, None, None, 4, 5, 18, 11, None, None, None, 12, 18], [[0, 3, 4, 5], [6, 10, 11, None]], [3, 2]),
        (0, [3, None, None, 4, 5, 18, 11, None, None, None, 12, 18], [[0, 3, 4, 5], [6, 10, 11, None]], [3, 2]),
    ],
)
def test_published_sampling_cases(threshold, expected_predicts, expected_index, expected_count):
    """A threshold of 0 takes no token of probability 0, since SGLang 0.5.23."""
    *tree, choices = published()
    probs = (900 * torch.nn.functional.one_hot(choices, 20).float()).softmax(-1)
    assert (probs == 0).any()
    given = {"threshold_single": threshold, "threshold_acc": threshold, "draft_probs": torch.zeros_like(probs)}
    predicts, index, count = run(*tree, steps=4, probs=probs, **given)
    assert predicts == filled(expected_predicts)
    assert index == [filled(row) for row in expected_index]
    assert count == expected_count


@pytest.mark.parametrize("single, accumulated", [(0, 1), (1, 0), (0, 0), (0.0, 0.5)])
@pytest.mark.parametrize("coin", [0.0, 0.5])
def test_thresholds_of_0_take_whatever_is_possible(single, accumulated, coin):
    """Of four children two have no probability, the third has little, which is enough. None possible: the walk ends."""
    probs = torch.zeros(1, 5, 6)
    probs[0, 0, [2, 3, 4]] = torch.tensor([1e-3, 0.5, 0.499])
    probs[0, 1:, 5] = 1
    candidates, tree = torch.tensor([[0, 0, 1, 2, 3]]), links_of(Tree([-1, 0, 0, 0, 0]))
    options = {"steps": 2, "probs": probs, "coins": torch.full((1, 5), coin)}
    options |= {"threshold_single": single, "threshold_acc": accumulated}
    predicts, index, count = run(candidates, *tree, **options)
    assert (predicts[0], index, count) == (2, [[0, 3]], [1])
    candidates[0, 3:] = torch.tensor([0, 1])
    predicts, _, count = run(candidates, *tree, **options)
    assert count == [0] and predicts[0] in (2, 3, 4)


def test_a_threshold_takes_a_probability_that_equals_it_in_float32():
    """0.7 is less in float32 than in float64."""
    probs = torch.tensor([[[0.3, 0.7], [1.0, 0.0]]])
    options = {"steps": 2, "probs": probs, "coins": torch.full((1, 2), 0.99)}
    tree = links_of(Tree.chain(2))
    assert run(torch.tensor([[0, 1]]), *tree, **options, threshold_single=0.7)[2] == [1]
    assert run(torch.tensor([[0, 1]]), *tree, **options, threshold_single=0.71)[2] == [0]


def test_what_siblings_sum_to_is_not_lost_beside_others():
    """Node 3 hangs below node 1, whose row gives it 1e-20; node 0's children have all the mass. A coin of 0 takes it.

    A running sum over all nodes minus where a list of siblings starts gives 0 there.
    """
    probs = torch.zeros(1, 4, 5, dtype=torch.float32)
    probs[0, 0, :2] = torch.tensor([0.7, 0.3])
    probs[0, 1, 2:4] = torch.tensor([1e-20, 1.0])
    probs[0, 2:, 4] = 1
    tree = links_of(Tree([-1, 0, 0, 1]))
    coins = torch.zeros(1, 4)
    assert run(torch.tensor([[0, 0, 1, 2]]), *tree, steps=3, probs=probs, coins=coins)[2] == [2]
    probs[0, 0, 1] = torch.inf  # beyond what is accepted; it must not reach node 1's children
    assert run(torch.tensor([[0, 0, 1, 2]]), *tree, steps=3, probs=probs, coins=coins)[2] == [2]


# ---- against a walk of one request after another


def walk(candidates, next_token, next_sibling, probs, coins, final, steps, single, accumulated, repeats=False):
    """The rule, told for one request in float64. Returns the path, and the tokens after its nodes."""
    path, emitted = [0], []
    weights = probs[0].double().clone()
    while len(path) < steps:
        node, total, weights = path[-1], 0.0, probs[path[-1]].double().clone()
        child, tried = int(next_token[node]), []
        while child != -1:
            token = int(candidates[child])
            if repeats or token not in tried:
                mass = float(probs[node, token])
                total += mass
                if float(coins[node]) * max(accumulated, 1e-9) < total or mass >= single:
                    break
                tried.append(token)
            child = int(next_sibling[child])
        if child == -1:
            weights[tried] = 0
            break
        path.append(child)
        emitted.append(int(candidates[child]))
        weights = probs[child].double().clone()
    below = weights.cumsum(0)
    return path, [*emitted, int((below <= float(final) * below[-1]).sum())]


@pytest.mark.parametrize("single, accumulated", [(1.0, 1.0), (0.5, 0.7), (0.1, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize("vocab", [3, 17, 257])
def test_sampling_against_a_plain_walk(single, accumulated, vocab):
    """Random trees and tokens, repeated ones too; siblings in both orders; slots that are no running numbers."""
    batch, nodes, steps = 24, 19, 5
    generator = torch.Generator().manual_seed(vocab)
    parents = torch.stack(
        [torch.randint(0, 4, (batch,), generator=generator).clamp(max=n) + max(0, n - 4) for n in range(nodes - 1)], 1
    )
    parents = torch.minimum(parents, torch.arange(nodes - 1))
    trees = [Tree([-1, *row]) for row in parents.tolist()]
    next_token, next_sibling = links_of(*trees)
    for row in range(0, batch, 2):  # every other request lists its children from the last to the first
        next_token[row], next_sibling[row] = reversed_links(trees[row])
    candidates = torch.randint(0, vocab, (batch, nodes), generator=generator)
    probs = torch.randn(batch, nodes, vocab, generator=generator).softmax(-1)
    coins, final = torch.rand(batch, nodes, generator=generator), torch.rand(batch, generator=generator)
    slots = torch.randperm(batch * nodes, generator=generator).view(batch, nodes)
    given = {"threshold_single": single, "threshold_acc": accumulated, "slots": slots}
    predicts, index, count = run(
        candidates, next_token, next_sibling, steps=steps, probs=probs, coins=coins, final=final, **given
    )
    expected = [UNTOUCHED] * (batch * nodes)
    for row in range(batch):
        one = (candidates[row], next_token[row], next_sibling[row], probs[row], coins[row], final[row])
        path, tokens = walk(*one, steps, single, accumulated)
        assert count[row] == len(path) - 1
        assert index[row] == slots[row, path].tolist() + [UNTOUCHED] * (steps - len(path))
        for node, token in zip(path, tokens, strict=True):
            expected[slots[row, node]] = token
    assert predicts == expected


def reversed_links(tree):
    next_token, next_sibling = torch.full((len(tree),), -1), torch.full((len(tree),), -1)
    for node, parent in enumerate(tree.parents.tolist()):
        if parent >= 0:
            next_sibling[node], next_token[parent] = next_token[parent].item(), node
    return next_token, next_sibling


def test_greedy_takes_the_first_listed_of_equal_children():
    tree = Tree([-1, 0, 0, 1, 2])
    candidates, predict = torch.tensor([[0, 5, 5, 6, 7]]), torch.tensor([[5, 7, 7, 1, 2]])
    ascending = run(candidates, *links_of(tree), steps=3, predict=predict)
    assert ascending == [[5, 7, UNTOUCHED, UNTOUCHED, UNTOUCHED], [[0, 1, UNTOUCHED]], [1]]
    descending = [link[None] for link in reversed_links(tree)]
    assert run(candidates, *descending, steps=3, predict=predict)[1:] == [[[0, 2, 4]], [2]]


def test_no_more_than_steps_are_accepted():
    chain = Tree.chain(5)
    candidates, predict = torch.arange(5)[None], torch.tensor([[1, 2, 3, 4, 9]])
    for steps in range(1, 8):
        predicts, index, count = run(candidates, *links_of(chain), steps=steps, predict=predict)
        assert count == [min(steps - 1, 4)]
        assert predicts == [1, 2, 3, 4, 9][:steps] + [UNTOUCHED] * (5 - steps)
        probs = torch.nn.functional.one_hot(predict, 10).float()
        assert run(candidates, *links_of(chain), steps=steps, probs=probs) == [predicts, index, count]
    probs = torch.full((1, 5, 10), 0.1)
    drawn = {
        run(candidates, *links_of(chain), steps=1, probs=probs, final=torch.tensor([i / 10 + 0.05]))[0][0]
        for i in range(10)
    }
    assert drawn == set(range(10)), "a child that was not tried may be drawn"


# ---- exact laws


@pytest.mark.parametrize("children", [(0, 2), (2, 0), (1,), (3, 1, 0), (0, 0), (2, 2, 0), (1, 3, 1, 3)])
def test_the_law_is_exact(children):
    """All coins on a grid that every probability is a multiple of: the joint law of two tokens, to the last count.

    With repeated children, as in the last three, the original's law is off; see test_the_original_is_biased below.
    """
    root = torch.tensor([6, 4, 3, 3])  # sixteenths
    after = torch.tensor([[4, 4, 4, 4], [1, 7, 0, 8], [16, 0, 0, 0], [5, 5, 5, 1]])
    counts = joint_counts(children, root, after)
    total = counts.sum()
    assert torch.equal(counts.sum(1) * 16, root * total), "first token"
    known = sorted(set(children))
    for token in known:
        assert (counts[token] > 0).any()


def joint_counts(children, root, after):
    """How often each first token, and whether accepted or drawn, over a grid of the level's coin and the final one."""
    tree = Tree([-1] + [0] * len(children))
    left = 16 - sum(int(root[token]) for token in set(children))
    finals = 16 * max(left, 1)
    coin, final = torch.meshgrid((torch.arange(16) + 0.5) / 16, (torch.arange(finals) + 0.5) / finals, indexing="ij")
    coin, final = coin.flatten(), final.flatten()
    batch, nodes = len(coin), len(tree)
    candidates = torch.tensor([9, *children]).expand(batch, nodes).contiguous()
    rows = torch.stack([root, *(after[token] for token in children)]) / 16
    next_token, next_sibling = (link.expand(batch, nodes).contiguous() for link in links_of(tree))
    coins = coin[:, None].expand(batch, nodes).contiguous()
    options = {"probs": rows.expand(batch, *rows.shape), "coins": coins, "final": final}
    predicts, _, count = run(candidates, next_token, next_sibling, steps=2, **options)
    first = torch.tensor(predicts).view(batch, nodes)[:, 0]
    counts = torch.zeros(4, 2, dtype=torch.int64)
    counts.index_put_((first, torch.tensor(count)), torch.ones(batch, dtype=torch.int64), accumulate=True)
    # What follows an accepted child is drawn from that child's row, whatever the coin before was.
    for child in range(1, nodes):
        second = torch.tensor(predicts).view(batch, nodes)[:, child]
        second = second[second != UNTOUCHED]
        if len(second):
            assert torch.equal(torch.bincount(second, minlength=4) * 16, after[children[child - 1]] * len(second))
    return counts


def test_the_original_is_biased_by_repeated_children():
    """Why they are skipped: counting both of (0, 0), as the original does, accepts token 0 twice as often as it is."""
    next_token, next_sibling = (link[0] for link in links_of(Tree([-1, 0, 0])))
    probs = torch.tensor([[6, 4, 3, 3]] * 3) / 16
    counts = {False: [0] * 4, True: [0] * 4}
    for repeats, counted in counts.items():
        for coin in range(16):
            for final in range(10):  # what is left is 10 sixteenths
                coins, last = torch.full((3,), (coin + 0.5) / 16), (final + 0.5) / 10
                one = (torch.tensor([9, 0, 0]), next_token, next_sibling, probs, coins, last)
                counted[walk(*one, 2, 1.0, 1.0, repeats)[1][0]] += 1
    assert counts == {False: [60, 40, 30, 30], True: [120, 16, 12, 12]}


def test_chains_keep_the_law_whatever_was_drafted():
    """Every node's row is the same, drafts come from its reverse: all emitted tokens together follow the row."""
    law = torch.tensor([0.35, 0.25, 0.20, 0.10, 0.05, 0.03, 0.015, 0.005])
    batch, nodes = 8192, 6
    candidates = torch.multinomial(law.flip(0).expand(batch, 8), nodes, replacement=True)
    next_token, next_sibling = (link.expand(batch, nodes).contiguous() for link in links_of(Tree.chain(nodes)))
    probs = law.expand(batch, nodes, 8)
    predicts, *_ = run(candidates, next_token, next_sibling, steps=nodes, probs=probs)
    predicts = torch.tensor(predicts)
    emitted = predicts[predicts != UNTOUCHED]
    observed, expected = torch.bincount(emitted, minlength=8).double(), law.double() * len(emitted)
    statistic = ((observed - expected).square() / expected).sum()
    assert torch.special.gammaincc(torch.tensor(3.5).double(), statistic / 2) > 1e-6


# ---- what harms the original


def test_a_coin_of_zero_accepts_nothing_impossible():
    probs = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
    coins, tree = torch.zeros(1, 2), links_of(Tree.chain(2))
    predicts, _, count = run(torch.tensor([[0, 0]]), *tree, steps=2, probs=probs, coins=coins)
    assert (count, predicts[0]) == ([0], 1)


def test_a_final_number_of_zero_draws_nothing_impossible():
    probs = torch.tensor([[[0.0, 0.0, 0.5, 0.5, 0.0]]])
    for number, token in ((0.0, 2), (0.49, 2), (0.5, 3), (1.0, 3)):
        tree = links_of(Tree.chain(1))
        predicts, *_ = run(torch.tensor([[0]]), *tree, steps=1, probs=probs, final=torch.tensor([number]))
        assert predicts == [token]


def test_an_exhausted_row_gives_a_likely_token():
    """Rounding may leave no residual, and a uniform number may round to 1."""
    probs = torch.tensor([[[0.25, 0.75, 0.0, 0.0], [1, 0, 0, 0], [1, 0, 0, 0]]])
    one = torch.ones(1, 3)
    options = {"steps": 2, "probs": probs, "coins": one, "final": one[:, 0]}
    predicts, _, count = run(torch.tensor([[0, 0, 1]]), *links_of(Tree([-1, 0, 0])), **options)
    assert (count, predicts[0]) == ([0], 1), "the last token that is possible at all, not the last id"


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), 0.0, -1.0])
def test_rows_of_rubbish(rubbish):
    probs = torch.rand(3, 4, 9).softmax(-1)
    candidates = torch.randint(0, 9, (3, 4))
    tree = [link.expand(3, 4).contiguous() for link in links_of(Tree([-1, 0, 0, 1]))]
    numbers = {"coins": torch.rand(3, 4), "final": torch.rand(3), "steps": 3}
    clean = run(candidates, *tree, probs=probs, **numbers)
    probs[1] = rubbish
    predicts, index, _ = run(candidates, *tree, probs=probs, **numbers)
    assert [index[0], index[2]] == [clean[1][0], clean[1][2]]
    assert predicts[:4] + predicts[8:] == clean[0][:4] + clean[0][8:]
    assert 0 <= predicts[4] < 9 and all(token == UNTOUCHED or 0 <= token < 9 for token in predicts[4:8])


def test_tokens_out_of_the_vocabulary_and_broken_links():
    probs = torch.full((1, 4, 5), 0.2)
    tree = links_of(Tree([-1, 0, 0, 0]))
    predicts, _, count = run(torch.tensor([[0, -1, 5, 1 << 40]]), *tree, steps=3, probs=probs, threshold_single=0.0)
    assert count == [0] and 0 <= predicts[0] < 5
    circle = torch.tensor([[1, -1, -1, -1]]), torch.tensor([[-1, 2, 3, 2]])
    outside = torch.tensor([[7, -1, -1, -1]]), torch.tensor([[-1, -9, 4, 99]])
    for broken in (circle, outside):
        predicts, index, count = run(torch.tensor([[0, 1, 2, 3]]), *broken, steps=3, probs=probs)
        assert 0 <= count[0] <= 2 and index[0][0] == 0 and 0 <= predicts[0] < 5


def test_draft_probs_are_neither_read_nor_written():
    probs, candidates = torch.rand(2, 3, 8).softmax(-1), torch.randint(0, 8, (2, 3))
    tree = [link.expand(2, 3).contiguous() for link in links_of(Tree([-1, 0, 0]))]
    numbers = {"coins": torch.full((2, 3), 0.99), "final": torch.rand(2), "steps": 2, "probs": probs}
    stale = torch.rand(2, 3, 8)
    kept, before = stale.clone(), probs.clone()
    assert run(candidates, *tree, **numbers, draft_probs=stale) == run(candidates, *tree, **numbers)
    assert torch.equal(stale, kept) and torch.equal(probs, before)


def test_more_than_2_to_the_32_probabilities():
    """One row in memory, seen 2^12 times: offsets of the original wrap around."""
    vocab = (1 << 20) + 3
    row = torch.zeros(vocab)
    row[vocab - 1] = 1.0
    batch, nodes = 4, 1024
    assert batch * nodes * vocab > 1 << 32
    candidates = torch.full((batch, nodes), vocab - 1)
    tree = [link.expand(batch, nodes).contiguous() for link in links_of(Tree.chain(nodes))]
    predicts, _, count = run(candidates, *tree, steps=nodes, probs=row.expand(batch, nodes, vocab))
    assert count == [nodes - 1] * batch and set(predicts) == {vocab - 1}


def test_errors_name_the_argument():
    candidates = torch.zeros(2, 3, dtype=torch.int64)
    outputs = (
        torch.zeros(6, dtype=torch.int32),
        torch.zeros(2, 2, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
    )
    with pytest.raises(TypeError, match=r"verify_tree_greedy: predicts must be an int32 tensor, got int64 \[6\]"):
        verify_tree_greedy(outputs[0].long(), *outputs[1:], *[candidates] * 5)
    with pytest.raises(ValueError, match=r"target_predict must be \[2, 3\], got int64 \[2, 4\]"):
        verify_tree_greedy(*outputs, *[candidates] * 4, torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"uniform_samples must be \[2, 3\], got float32 \[2\]"):
        sgl_kernel.tree_speculative_sampling_target_only(
            *outputs, *[candidates] * 4, torch.zeros(2), torch.zeros(2), torch.zeros(2, 3, 4)
        )
    outside = [torch.tensor([[0, 6, 2], [3, 4, 5]]), torch.tensor([[1, -1, -1]] * 2), torch.tensor([[-1, -1, -1]] * 2)]
    with pytest.raises(ValueError, match=r"verify_tree_greedy: retrive_index must be from 0 to 5, got 0 to 6"):
        verify_tree_greedy(*outputs, candidates, *outside, candidates)
    given = (*outputs, *[candidates] * 4, torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 3, 4))
    for name in ("threshold_single", "threshold_acc"):
        for number in (-0.1, 1.5, float("nan")):
            with pytest.raises(ValueError, match=f"target_only: {name} must be a number from 0 to 1, got {number}"):
                sgl_kernel.tree_speculative_sampling_target_only(*given, **{name: number})
        with pytest.raises(TypeError, match=f"{name} must be a number from 0 to 1, got float32"):
            sgl_kernel.tree_speculative_sampling_target_only(*given, **{name: torch.tensor(0.5)})
    with pytest.raises(ValueError, match=r"target_probs must be \[2, 3, vocab\], got float32 \[2, 4\]"):
        sgl_kernel.tree_speculative_sampling_target_only(*given[:-1], torch.zeros(2, 4))


def test_tokens_beyond_int32_are_no_other_tokens():
    """2**32 + 5 must not be written as token 5."""
    predicts, accept_index, count = (torch.zeros(size, dtype=torch.int32) for size in ((3,), (1, 3), (1,)))
    tokens = torch.tensor([[7, 2**32 + 5, 9]])
    slots, children = torch.arange(3)[None], torch.tensor([[1, 2, -1]])
    choices = torch.tensor([[2**32 + 5, 9, 3]])
    verify_tree_greedy(predicts, accept_index, count, tokens, slots, children, torch.full((1, 3), -1), choices)
    assert predicts.tolist() == [2**31 - 1, 9, 3] and count.tolist() == [2]
