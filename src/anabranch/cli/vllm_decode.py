"""Run by vLLM's own Python, not by ours: `python vllm_decode.py JOB.json`, which names a model and cases.

Writes to the file `told` that the job names, for each case, its tokens a second part by part and the memory held. It
imports nothing of Anabranch: vLLM wants another transformers.
"""

import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports] - of its own Python


def main(job: dict[str, Any]) -> None:
    """All cases on one engine."""
    engine = LLM(
        job["model"],
        dtype=job["dtype"],
        skip_tokenizer_init=True,
        max_model_len=job["tokens"],
        max_num_seqs=job["chains"],
    ).llm_engine
    told = []
    for number, case in enumerate(job["cases"]):
        rates = parts(engine, f"case{number}", case, job["rounds"])
        lines = Path("/proc/self/status").read_text().splitlines()
        resident_kib = int(next(line for line in lines if line.startswith("VmRSS")).split()[1])
        told.append({"rates": rates, "resident_mib": resident_kib / 1024})
    # Not to stdout: vLLM still logs there when it ends.
    Path(job["told"]).write_text(json.dumps(told))


def parts(engine: Any, name: str, case: dict[str, Any], rounds: int) -> list[float]:
    """Tokens a second of all chains, in so many parts of the new tokens, once every chain has one."""
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
            for output in engine.step():
                for chain in output.outputs:
                    decoded[output.request_id, chain.index] = len(chain.token_ids)
        return time.perf_counter()

    marks = [(decode_until(0), sum(decoded.values()))]
    part = max(1, case["new_tokens"] // rounds) * case["batch"]
    for _ in range(rounds):
        marks.append((decode_until(marks[-1][1] + part), sum(decoded.values())))
    engine.abort_request(requests)
    while engine.has_unfinished_requests():
        engine.step()
    return [(n - n0) / (s - s0) for (s0, n0), (s, n) in pairwise(marks)]


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
