"""Run by vLLM's own Python, not by ours: `python vllm_decode.py JOB.json`, which names a model and cases.

Writes to the file `told` that the job names: for each case the seconds of its runs of one new token, and of all of
them. It imports nothing of Anabranch: vLLM wants another transformers.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports] - of its own Python


def main(job: dict[str, Any]) -> None:
    """All cases on one engine."""
    llm = LLM(
        job["model"],
        dtype=job["dtype"],
        skip_tokenizer_init=True,
        max_model_len=job["tokens"],
        max_num_seqs=job["chains"],
    )
    told = []
    for case in job["cases"]:
        rounds = iter(case["prompts"])
        seconds: dict[str, list[float]] = {"one": [], "all": []}
        for _ in range(job["rounds"]):
            for name, new_tokens in (("one", 1), ("all", case["new_tokens"])):
                settings = SamplingParams(
                    n=case["samples"], temperature=0.0 if case["samples"] == 1 else 1.0, max_tokens=new_tokens,
                    ignore_eos=True, detokenize=False,
                )  # fmt: skip
                prompts = [{"prompt_token_ids": prompt} for prompt in next(rounds)]
                began_s = time.perf_counter()
                llm.generate(prompts, settings, use_tqdm=False)
                seconds[name].append(time.perf_counter() - began_s)
        lines = Path("/proc/self/status").read_text().splitlines()
        resident_kib = int(next(line for line in lines if line.startswith("VmRSS")).split()[1])
        told.append({**seconds, "resident_mib": resident_kib / 1024})
    # Not to stdout: vLLM still logs there when it ends.
    Path(job["told"]).write_text(json.dumps(told))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
