"""Run by vLLM's own Python, not by ours: `python vllm_decode.py FD`.

Its first line on stdin names a model and sizes, every further one a case. To the file descriptor it answers, once the
model is loaded and after each case, with a line. It imports nothing of Anabranch: vLLM wants another transformers.
"""

import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports] - of its own Python


def main(told: int) -> None:
    """All cases on one engine."""
    job = json.loads(sys.stdin.readline())
    engine = LLM(
        job["model"],
        dtype=job["dtype"],
        skip_tokenizer_init=True,
        max_model_len=job["tokens"],
        max_num_seqs=job["chains"],
    ).llm_engine
    # Not to stdout: vLLM logs there.
    with os.fdopen(told, "w") as answers:
        print(json.dumps({}), file=answers, flush=True)
        for number, line in enumerate(sys.stdin):
            answer = {
                "rates": measured(engine, f"case{number}", json.loads(line)),
                "resident_mib": resident_mib(),
            }
            print(json.dumps(answer), file=answers, flush=True)


def measured(engine: Any, name: str, case: dict[str, Any]) -> list[float]:
    """Parts of as many runs as it takes to time so many seconds."""
    rates: list[float] = []
    spent_s = 0.0
    while spent_s < case["timed_s"]:
        marks = parts(engine, f"{name}-{len(rates)}", case)
        rates += [(n - n0) / (s - s0) for (s0, n0), (s, n) in pairwise(marks)]
        spent_s += marks[-1][0] - marks[0][0]
    return rates


def parts(engine: Any, name: str, case: dict[str, Any]) -> list[tuple[float, int]]:
    """When so many tokens of all chains were there: once every chain has one, and after each part of the new tokens."""
    settings = SamplingParams(
        n=case["samples"], temperature=0.0 if case["samples"] == 1 else 1.0, max_tokens=case["most_tokens"],
        ignore_eos=True, detokenize=False,
    )  # fmt: skip
    requests = [f"{name}-{i}" for i in range(len(case["prompts"]))]
    for request, prompt in zip(requests, case["prompts"], strict=True):
        engine.add_request(request, {"prompt_token_ids": prompt}, settings)
    decoded: dict[tuple[str, int], int] = {}

    def decode_until(tokens: int) -> float:
        while len(decoded) < case["batch"] or sum(decoded.values()) < tokens:
            if not engine.has_unfinished_requests():
                raise RuntimeError(f"chains ended early: {len(decoded)} of {case['batch']} began")
            for output in engine.step():
                for chain in output.outputs:
                    decoded[output.request_id, chain.index] = len(chain.token_ids)
        return time.perf_counter()

    marks = [(decode_until(0), sum(decoded.values()))]
    part = max(1, case["new_tokens"] // case["rounds"]) * case["batch"]
    for _ in range(case["rounds"]):
        marks.append((decode_until(marks[-1][1] + part), sum(decoded.values())))
    engine.abort_request(requests)
    while engine.has_unfinished_requests():
        engine.step()
    return marks


def resident_mib() -> float:
    """Of this process, in which all of vLLM runs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


if __name__ == "__main__":
    main(int(sys.argv[1]))
