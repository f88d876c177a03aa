"""Improved multi-candidate decoding against its enumerated law: how far it is from the target, and no further.

The rule is lossy. So each case has two sides: thousands of engine runs follow the law that the paper's algorithm has by
enumeration, and they are as far from the target's law as that one is. Mistakes of the authors' programs have other
laws, which the same runs are told from.
"""

import collections
import dataclasses
import functools

import pytest
import torch

from specdec_ops import Tree, drafts
from specdec_ops.decode import Cache, Engine, Rows, Sampling
from specdec_ops.decode.cache import Sequence
from tests.decode.multi_candidate_laws import Lu2024, plain, random_rows, total_variation
from tests.decode.test_engine import law_by_hand
from tests.harness.chi_squared import against_law
from tests.harness.tiny_models import make_decoder

VOCAB, LENGTH, EOS, PROMPT, RUNS = 3, 4, 2, [0, 1, 2], 6000
TARGET, DRAFT = make_decoder(21, vocab=VOCAB, sharpness=1.0), make_decoder(26, vocab=VOCAB, sharpness=1.0)
SURE = 0.6  # the likeliest token of some rows of the draft is as likely, of others not
PLAIN = Sampling(temperature=1.0, max_tokens=LENGTH, eos=())


def logits_after(model, text: tuple[int, ...]) -> torch.Tensor:
    """float64 [vocab], by one pass."""
    cache, sequence = Cache(model.shape, 8), Sequence()
    cache.reserve(sequence, len(text))
    table, start = cache.page_table([sequence]), torch.zeros(1, dtype=torch.int32)
    rows = Rows(torch.tensor([text], dtype=torch.int32), Tree.chain(len(text)).to("cpu"), start, table)
    return model.forward(rows, cache).logits[-1].double()


def rows_of(model, before: list[int], sampling: Sampling, temperature: float | None = None):
    """Of a text that goes on after `before`, the probabilities of the next token after the filters."""
    heat = sampling.temperature if temperature is None else temperature
    filters = {"top_k": sampling.top_k, "top_p": sampling.top_p}
    return functools.cache(lambda text: law_by_hand(logits_after(model, (*before, *text)) / heat, **filters))


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A form of the draft, and what is asked of the engine."""

    roots: int
    branching: tuple[int, ...]
    stops: bool = False
    sampling: Sampling = PLAIN

    @functools.cache  # noqa: B019 -- cases live as long as the module
    def enumerated(self, mistake: str = "") -> Lu2024:
        """With one root the texts of the enumeration begin with the last token of the prompt."""
        before, last = (PROMPT, None) if self.roots > 1 else (PROMPT[:-1], PROMPT[-1])

        @functools.cache
        def goes_on(text: tuple[int, ...]) -> bool:
            return not self.stops or float(logits_after(DRAFT, (*before, *text)).softmax(-1).max()) >= SURE

        laws = [rows_of(model, before, self.sampling) for model in (TARGET, DRAFT)]
        first, ends = rows_of(TARGET, before, self.sampling, 1.0), frozenset(self.sampling.eos)
        return Lu2024(*laws, self.roots, self.branching, LENGTH, last, ends, goes_on, mistake, first)

    @functools.cache  # noqa: B019
    def law(self, mistake: str = "") -> dict:
        found = self.enumerated(mistake).law()
        return found if self.roots > 1 else {answer[1:]: weight for answer, weight in found.items()}

    def plain(self) -> dict:
        return plain(rows_of(TARGET, PROMPT, self.sampling), LENGTH, frozenset(self.sampling.eos))

    @functools.cached_property
    def runs(self):
        stop = drafts.StopBelow("probability", SURE) if self.stops else None
        draft = drafts.MultiCandidate(DRAFT, self.branching, target_roots=self.roots, stop=stop)
        engine = Engine(TARGET, draft, "longest_path", max_batch=128, max_length=40)
        asked = [dataclasses.replace(self.sampling, seed=seed) for seed in range(RUNS)]
        return engine.generate([PROMPT] * RUNS, asked)

    @functools.cached_property
    def counts(self) -> collections.Counter:
        return collections.Counter(tuple(result.tokens) for result in self.runs)


WARM = Sampling(temperature=0.6, max_tokens=LENGTH, eos=EOS)
FILTERED = Sampling(temperature=1.3, top_k=2, max_tokens=LENGTH, eos=())
CASES = {
    "one root, chain": Case(1, (1, 1)),
    "one root, siblings": Case(1, (2, 1)),
    "two roots, fork": Case(2, (1, 1), sampling=WARM),
    "two roots, siblings": Case(2, (2, 1)),
    "two roots, filtered": Case(2, (1, 1), sampling=FILTERED),
    "three roots": Case(3, (1,)),
    "one root, stop": Case(1, (2, 1), stops=True),
    "two roots, stop": Case(2, (1, 1, 1), stops=True),
}


@pytest.mark.parametrize("name", CASES)
def test_answers_have_the_enumerated_law(name):
    case = CASES[name]
    law = case.law()
    assert sum(law.values()) == pytest.approx(1)
    statistic, limit = against_law(case.counts, law)
    assert statistic < limit


@pytest.mark.parametrize("name", CASES)
def test_answers_are_as_far_from_the_target_as_enumerated(name):
    """Half the sum of differences of shares; by luck it is off by about sqrt(answers / runs) / 2."""
    case = CASES[name]
    exact = total_variation(case.law(), case.plain())
    shares = {answer: count / RUNS for answer, count in case.counts.items()}
    assert exact > 0.03, "the rule is lossy, and the test has to see it"
    assert total_variation(shares, case.plain()) == pytest.approx(exact, abs=0.5 * (len(case.plain()) / RUNS) ** 0.5)
    statistic, limit = against_law(case.counts, case.plain())
    assert statistic > limit


@pytest.mark.parametrize("name", CASES)
def test_as_many_rounds_as_enumerated(name):
    """What a stop saves and a longest path gains."""
    case = CASES[name]
    mean = sum(result.stats.target_calls for result in case.runs) / RUNS
    assert mean == pytest.approx(case.enumerated().calls(), abs=0.04)


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("two roots, fork", "residual_row"),  # what follows a rejection is drawn without the q of an earlier row
        ("two roots, fork", "first_roots"),  # the first roots are drawn at temperature 1
        ("one root, chain", "length_zero"),  # what would make it exact; the rule is the paper's
    ],
)
def test_mistakes_have_other_laws(name, mistake):
    """Each is enumerated, differs from ours, and the engine's answers are told from it."""
    case = CASES[name]
    wrong = case.law(mistake)
    assert total_variation(wrong, case.law()) > 0.02
    statistic, limit = against_law(case.counts, wrong)
    assert statistic > limit


def test_the_missing_residual_is_all_that_a_chain_lacks():
    """With one root and no siblings the paper's rule is speculative sampling, but for a residual at the root."""
    for seed in range(4):
        rows = random_rows(3, seed), random_rows(3, 100 + seed)
        found = {
            mistake: total_variation(Lu2024(*rows, 1, (1, 1), 4, mistake=mistake).law(), plain(rows[0], 4))
            for mistake in ("", "length_zero")
        }
        assert found["length_zero"] < 1e-12 < 0.05 < found[""]


def test_more_roots_are_further_from_the_target():
    rows = random_rows(3, 5), random_rows(3, 105)
    found = [total_variation(Lu2024(*rows, roots, (1, 1), 4).law(), plain(rows[0], 4)) for roots in (1, 2, 3)]
    assert found == sorted(found) and found[2] > found[0] + 0.05
