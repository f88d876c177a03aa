"""llama.cpp (xllamacpp) and OpenVINO, each as a process of its own: `python -m benchmarks.decode.other_engines NAME`.

The task comes as JSON on the input, the result goes as JSON to the output. Both read the same GGUF file and get the
same token ids. They are timed by what they say of themselves: tokens after the first, over the time that these took.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

from benchmarks.harness.machine import ROOT

ENGINES = {"xllamacpp": "xllamacpp", "openvino": "openvino_genai"}
KINDS = ("plain", "n-grams")


def missing(engine: str) -> str:
    """Why an engine takes no part, or ""."""
    module = ENGINES[engine]
    return "" if importlib.util.find_spec(module) else f"{module.replace('_', '-')} is not installed"


def run(engine: str, task: dict, timeout: float = 600) -> list[dict]:
    """Do a task in a process of its own. Returns, for each prompt: tokens (ids, or None), timed, seconds, calls.

    Args:
        engine: a key of ENGINES.
        task: model (a GGUF file), kind (of KINDS), prompts (ids), length, temperature, eos, draft_tokens, threads.
        timeout: seconds.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, "-m", "benchmarks.decode.other_engines", engine]
    given = json.dumps(task)
    done = subprocess.run(command, input=given, capture_output=True, text=True, cwd=ROOT, timeout=timeout, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def _xllamacpp(task: dict) -> list[dict]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = task["model"], 2048, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = task["threads"]
    if task["kind"] == "n-grams":
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
        params.speculative.ngram_simple.size_n, params.speculative.ngram_simple.size_m = 2, task["draft_tokens"]
    server, results = xllamacpp.Server(params), []
    for place, prompt in enumerate(task["prompts"]):
        sampling = {"temperature": task["temperature"], "seed": place, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        if task["temperature"] == 0:
            sampling["top_k"] = 1
        given = {"prompt": prompt, "n_predict": task["length"], "cache_prompt": False, **sampling}
        times = server.handle_completions(given)["timings"]
        count = times["predicted_n"]  # the time of the first token is the prompt's
        calls = count - times.get("draft_n_accepted", 0)
        results.append({"tokens": None, "timed": count - 1, "seconds": times["predicted_ms"] / 1e3, "calls": calls})
    return results


def _openvino(task: dict) -> list[dict]:
    import numpy as np
    import openvino
    import openvino_genai

    lookup = task["kind"] == "n-grams"
    options = {"INFERENCE_NUM_THREADS": task["threads"]}
    pipeline = openvino_genai.LLMPipeline(task["model"], "CPU", prompt_lookup=lookup, **options)
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.do_sample = task["length"], task["temperature"] > 0
    if config.do_sample:
        config.temperature, config.top_p, config.top_k = task["temperature"], 1.0, 1 << 30
    config.stop_token_ids = set(task["eos"])
    if lookup:
        config.num_assistant_tokens, config.max_ngram_size = task["draft_tokens"], 3
    results = []
    for place, prompt in enumerate(task["prompts"]):
        config.rng_seed = place
        done = pipeline.generate(openvino.Tensor(np.array([prompt], dtype=np.int64)), config)
        measured = done.perf_metrics
        count = measured.get_num_generated_tokens()
        seconds = (measured.get_generate_duration().mean - measured.get_ttft().mean) / 1e3
        results.append({"tokens": list(done.tokens[0]), "timed": count - 1, "seconds": seconds, "calls": None})
    return results


def main() -> int:
    """Prints the results alone: what libraries say goes elsewhere."""
    results_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    results = {"xllamacpp": _xllamacpp, "openvino": _openvino}[sys.argv[1]](json.load(sys.stdin))
    print("\n" + json.dumps(results), file=results_to, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
