"""Numbers of a request that come from the device: whatever they are, they mean one thing, on every backend.

`match_accept` documents what; here it is written a second time, as the number that each odd one counts as. An op that
gets the odd numbers must then do, bit for bit, what it does with those; and what the definition does.
"""

import dataclasses

import numpy as np
import pytest
import torch

from specdec_ops import AcceptStatus, sample_children, sample_tokens
from tests.acceptance.accept_cases import RULES, WITH_DRAFT, Bands, assert_same, fields_of, make_case

OP = "accept"
INTERPRETED_SHARE = 2
VOCAB = 40
LEAST, MOST = np.float32(1e-20), np.float32(1e20)
INF, NAN = float("inf"), float("nan")
TEMPERATURES = [
    *(NAN, -NAN, -1.0, -INF, -1e-45, -0.0, 0.0, 1e-45, 1.2e-38, 9e-21),  # none, or the argmax
    *(1e-20, 1e-19, 0.02, 0.7, 1.0, 3.0, 1e9, 1e19),
    *(1e20, 1e21, 3.4e38, INF),  # uniform
]
TOP_KS = [-(2**31), -1, 0, 1, 3, VOCAB - 1, VOCAB, VOCAB + 1, 2**31 - 1]
TOP_PS = [NAN, -INF, -0.5, -0.0, 0.0, 1e-45, 1e-7, 0.5, 0.95, 1.0, 1.5, 3.4e38, INF]
SEEDS = [0, -1, 2**63 - 1, -(2**63), 1 << 32, 12345]
POSITIONS = [0, -1, 2**31 - 1, 2**31 - 2, -(2**31), 77]
SETTING_INVALID = AcceptStatus.SETTING_INVALID
KNOWN_BITS = sum(AcceptStatus)
# The interpreter computes with NumPy, which warns of every infinity.
pytestmark = pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid:RuntimeWarning")


def counted_temperature(given):
    """NumPy float32: what temperatures count as, and whether they are none."""
    none = ~(given >= 0)
    return np.where(given >= LEAST, np.minimum(given, MOST), np.float32(0)).astype(np.float32), none


def counted(options, prefix=""):
    """The same for all settings of a call, and which requests have one that is reported."""
    heat, none = counted_temperature(options[f"{prefix}temperature"].numpy())
    k, p = options[f"{prefix}top_k"].numpy(), options[f"{prefix}top_p"].numpy()
    none |= np.isnan(p)
    k = np.where((k <= 0) | (k >= VOCAB), 0, k).astype(np.int32)
    p = np.where(p < 1, np.maximum(p, np.float32(0)), np.float32(1)).astype(np.float32)
    settings = {"temperature": heat, "top_k": k, "top_p": p}
    return {prefix + name: torch.from_numpy(value) for name, value in settings.items()}, torch.from_numpy(none)


def pick(values, size, rng, dtype):
    """Each value about equally often, in any order."""
    order = torch.cat([torch.randperm(len(values), generator=rng) for _ in range(-(-size // len(values)))])
    return torch.tensor(values, dtype=dtype)[order[:size]]


def odd_settings(size, seed, prefix=""):
    rng = torch.Generator().manual_seed(seed)
    return {
        f"{prefix}temperature": pick(TEMPERATURES, size, rng, torch.float32),
        f"{prefix}top_k": pick(TOP_KS, size, rng, torch.int32),
        f"{prefix}top_p": pick(TOP_PS, size, rng, torch.float32),
    }


def odd_noise(size, seed):
    rng = torch.Generator().manual_seed(seed)
    return {"seeds": pick(SEEDS, size, rng, torch.int64), "positions": pick(POSITIONS, size, rng, torch.int32)}


def random_bits(size, seed, prefix=""):
    """Settings of any bits; every second request is an ordinary one."""
    rng = np.random.default_rng(seed)

    def words(dtype, ordinary):
        bits = rng.integers(-(2**31), 2**31, size, dtype=np.int64).astype(np.int32).view(dtype)
        # Half of all patterns are no numbers of a size that occurs: exponents near 0 are as welcome.
        if dtype == np.float32:
            bits = np.where(rng.random(size) < 0.3, rng.normal(size=size).astype(np.float32), bits)
        return torch.from_numpy(np.where(np.arange(size) % 2, ordinary, bits).astype(dtype))

    settings = {"temperature": words(np.float32, 0.8), "top_k": words(np.int32, 7), "top_p": words(np.float32, 0.9)}
    return {prefix + name: value for name, value in settings.items()}


def on(device, options):
    """Options with their tensors moved."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}


def case_of(rule, size, seed, **options):
    """Small trees, some of whose tokens are accepted."""
    parents = [-1, -1, 0, 0, 1] if rule == "longest" else [-1, 0, 0, 1]
    case = make_case(rule, [parents] * size, VOCAB, seed=seed, scale=1.0, **({"width": 3} if rule == "longest" else {}))
    return case.changed(eos=(int(case.tokens[0, -1].clamp(0)), 3), **options)


def check_sane(case, result):
    """Ids of the vocabulary, padding behind them, bits that have names; `finished` says how the text ends."""
    got = fields_of(result)
    longest = case.rule == "longest"
    following = got["next_tokens"][:, 0] if longest else got["next_token"]
    assert (got["status"] & ~KNOWN_BITS == 0).all()
    for name in ("tokens", "next_tokens" if longest else "next_token"):
        assert ((got[name] >= -1) & (got[name] < VOCAB)).all()
    ends = torch.tensor(case.options["eos"])
    for request, tokens in enumerate(got["tokens"]):
        emitted = tokens[tokens >= 0]
        count = int(got["num_accepted"][request])
        ended = len(emitted) > 0 and bool(torch.isin(emitted[-1], ends))
        assert (tokens[len(emitted) :] == -1).all()
        assert bool(got["finished"][request]) == ended
        assert len(emitted) == count + (0 if longest or following[request] < 0 else 1)
        assert (following[request] >= 0) or ended


def without_rounding(result):
    """Whether rounding has left a residual of a sharp law is no part of the definition."""
    return dataclasses.replace(result, status=result.status & ~AcceptStatus.RESIDUAL_EMPTY)


def settings_of(rule, size, seed, make):
    """Odd settings of an op, what they count as, and which requests are reported."""
    odd = make(size, seed)
    plain, reported = counted(odd)
    if rule in WITH_DRAFT:
        drafted = make(size, seed + 1000, "draft_")
        counted_draft, wrong = counted(drafted, "draft_")
        odd |= drafted
        reported |= wrong & (plain["temperature"] > 0)
        plain |= counted_draft
    return odd, plain, reported


@pytest.mark.parametrize("make", [odd_settings, random_bits], ids=["table", "fuzz"])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "greedy"])
def test_acceptance(rule, make, target):
    """As with the numbers that the odd ones count as, plus the status; as the definition; and sane."""
    size = 7 if target.interpreted else 44 if make is odd_settings else 24
    seed = RULES.index(rule)
    odd, plain, reported = settings_of(rule, size, seed, make)
    case = case_of(rule, size, seed, **odd_noise(size, seed), **odd)
    got = case.to(target.device).run(target.backend)
    check_sane(case, got)
    assert ((got.status.cpu() & SETTING_INVALID != 0) == reported).all()
    Bands().check(case, *map(without_rounding, (got, case.run("torch"))))
    same = case.changed(**plain).to(target.device).run(target.backend)
    assert_same(dataclasses.replace(got, status=got.status & ~SETTING_INVALID), same)


@pytest.mark.parametrize("make", [odd_settings, random_bits], ids=["table", "fuzz"])
def test_samplers(make, target):
    """The same of sample_tokens and sample_children."""
    size = 12 if target.interpreted else 88
    odd = make(size, 5)
    plain, reported = counted(odd)
    noise = odd_noise(size, 6)
    logits = torch.randn(size, VOCAB)
    where, moved = {"backend": target.backend}, logits.to(target.device)
    odd, plain, noise = (on(target.device, options) for options in (odd, plain, noise))
    for count in (None, 5):
        tokens = sample_tokens(moved, count=count, **odd, **noise, **where).cpu()
        assert ((tokens >= (0 if count is None else -1)) & (tokens < VOCAB)).all()
        assert torch.equal(tokens, sample_tokens(moved, count=count, **plain, **noise, **where).cpu())
        want = sample_tokens(logits, count=count, **on("cpu", odd), **on("cpu", noise), backend="torch")
        assert (tokens != want).reshape(size, -1).any(1).sum() <= 1  # a band case
    for replacement in (False, True):
        options = {**noise, "replacement": replacement, "first_parent": 3}
        children = sample_children(moved[:, None], 4, **odd, **options, **where)
        assert torch.equal(children.status.cpu() != 0, reported)
        assert torch.equal(children.status.cpu() & ~SETTING_INVALID, torch.zeros(size, dtype=torch.int32))
        same = sample_children(moved[:, None], 4, **plain, **options, **where)
        assert_same(dataclasses.replace(children, status=same.status), same)
        want = sample_children(logits[:, None], 4, **on("cpu", {**odd, **options}), backend="torch")
        differ = (children.tokens.cpu() != want.tokens).flatten(1).any(1)
        assert differ.sum() <= 1
        torch.testing.assert_close(children.logprobs.cpu()[~differ], want.logprobs[~differ], rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(children.logsumexp.cpu(), want.logsumexp, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("filters", "kept"), [({}, VOCAB), ({"top_k": 10}, 10), ({"top_p": 0.25}, 10), ({"top_k": 20, "top_p": 0.5}, 10)]
)
def test_infinity_is_uniform(filters, kept, target):
    """Over what the filters leave, which still go by the logits. A mask of -inf, or of the least float, stays one."""
    size = 80 if target.interpreted else 400 if target.backend == "torch" else 20_000
    row = torch.cat((8 * torch.randn(VOCAB - 2), torch.tensor([-INF, torch.finfo(torch.float32).min])))
    kept -= 2 if not filters else 0
    if "top_p" in filters and "top_k" not in filters:
        filters, kept = {"top_p": 0.25 * (1 - 1e-6)}, round(0.25 * (VOCAB - 2) + 0.5)
    heat = torch.full((size,), INF, device=target.device)
    positions = torch.arange(size, dtype=torch.int32, device=target.device)
    logits = row.to(target.device).expand(size, VOCAB)
    tokens = sample_tokens(logits, seeds=3, positions=positions, temperature=heat, backend=target.backend, **filters)
    counts = tokens.cpu().bincount(minlength=VOCAB).double()
    possible = row.argsort(descending=True)[:kept]
    assert counts[possible].sum() == size
    expected = size / kept
    # Beyond this once in a million, by the Wilson-Hilferty form of chi-square with kept - 1 degrees of freedom.
    free = 2 / (9 * (kept - 1))
    limit = (kept - 1) * (1 - free + 4.75 * free**0.5) ** 3
    assert ((counts[possible] - expected) ** 2 / expected).sum() < limit


def test_nothing_and_negative_are_the_argmax(target):
    """Ties go to the lowest id, as at temperature 0, and filters change nothing."""
    logits = torch.randint(0, 3, (6, 50)).float()
    heat = torch.tensor([NAN, -1.0, -INF, 0.0, 1e-45, 9e-21])
    options = on(target.device, {"temperature": heat, "top_k": torch.tensor([-5, 0, 1, 2, 3, 99]).int()})
    got = sample_tokens(logits.to(target.device), seeds=1, positions=0, backend=target.backend, **options)
    assert got.tolist() == [row.index(max(row)) for row in logits.tolist()]


def test_neighbours_are_untouched(target):
    """A request between odd ones gets what it gets alone."""
    size = 6 if target.interpreted else 20
    for rule in ("recursive",) if target.interpreted else ("recursive", "block", "longest"):
        odd, _, _ = settings_of(rule, size, 11, random_bits)
        case = case_of(rule, size, 2, **odd)
        got = fields_of(case.to(target.device).run(target.backend))
        ordinary = {name: value.clone() for name, value in odd.items()}
        for value in ordinary.values():
            value[::2] = value[1]
        alone = fields_of(case.changed(**ordinary).to(target.device).run(target.backend))
        for name, value in got.items():
            assert torch.equal(value[1::2], alone[name][1::2]), f"{rule}: {name}"


SENSELESS = [
    *(("temperature", value) for value in (NAN, INF, -1, -1e-9, 10**400)),
    *(("top_k", value) for value in (-1, 2**31)),
    *(("top_p", value) for value in (NAN, INF, -0.1, 1.1, 10**400)),
    *(("seeds", value) for value in (2**64, -(2**63) - 1)),
    *(("positions", value) for value in (-1, 2**31)),
    *(("draft_temperature", value) for value in (NAN, INF, -1)),
    ("draft_top_p", NAN),
    *(("thresholds", value) for value in ((NAN, 1.0), (1.0, INF), (1.0, -1e-9))),
    *((name, value) for name in ("epsilon", "delta") for value in (NAN, -1e-9, 1.1)),
]


@pytest.mark.parametrize(("name", "value"), SENSELESS, ids=lambda value: str(value)[:12])
def test_numbers_without_a_meaning_are_refused(name, value):
    """Where Python can see them: in one sentence, by whatever takes such a number."""
    rules = {"thresholds": ("target_only",), "epsilon": ("typical",), "delta": ("typical",)}
    rules |= {"draft_temperature": WITH_DRAFT[:4], "draft_top_p": WITH_DRAFT[:4]}
    for rule in rules.get(name, [rule for rule in RULES if rule != "greedy"]):
        with pytest.raises(ValueError, match=rf"specdec_ops\.\w+_accept: {name} must be .*, got "):
            case_of(rule, 1, 0).run("torch", **{name: value})
    if name in ("temperature", "top_k", "top_p", "seeds", "positions"):
        noise = {"seeds": 1, "positions": 2}
        with pytest.raises(ValueError, match=rf"specdec_ops\.sample_tokens: {name} must be .*, got "):
            sample_tokens(torch.zeros(1, 5), **{**noise, name: value})
        with pytest.raises(ValueError, match=rf"specdec_ops\.sample_children: {name} must be .*, got "):
            sample_children(torch.zeros(1, 1, 5), 2, **{**noise, name: value})


@pytest.mark.parametrize("rule", ["token", "block"])
def test_absurd_lengths_of_chains(rule, target):
    """What is out of range is clamped, and reported."""
    case = case_of(rule, 7, 3)
    lengths = torch.tensor([-(2**31), -1, 0, 2, 3, 4, 2**31 - 1], dtype=torch.int32)
    got = case.changed(num_steps=lengths).to(target.device).run(target.backend)
    want = case.changed(num_steps=lengths.clamp(0, 3)).to(target.device).run(target.backend)
    wrong = AcceptStatus.TREE_INVALID * torch.tensor([1, 1, 0, 0, 0, 1, 1], dtype=torch.int32)
    assert torch.equal(got.status.cpu() & AcceptStatus.TREE_INVALID, wrong)
    assert_same(dataclasses.replace(got, status=got.status & ~AcceptStatus.TREE_INVALID), want)
