"""vLLM beside us: a process of its own Python, which keeps a model loaded and measures one case after the other."""

import json
import os
import select
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from anabranch.cli.generate_cases import GenerateCase, entering_tokens, prompts_of
from anabranch.cli.generate_engines import ROUNDS, Rate, rate_of_parts
from anabranch.cli.launch import KEEPS_MEMORY
from anabranch.errors import AnabranchError

# Until it has loaded a model, or measured a case.
ANSWER_S = 1800
END_S = 60
SCRIPT = Path(__file__).with_name("vllm_decode.py")


class VllmProcess:
    """One model in one precision, as a context. cases: all that it will be asked for; they set its sizes.

    Every method raises AnabranchError with the end of what vLLM said where it fails.
    """

    def __init__(self, python: Path, folder: Path, cases: Sequence[GenerateCase]) -> None:
        self._folder, self._log = folder, tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed with the process
        told, theirs = os.pipe()
        self._told: TextIO = os.fdopen(told)
        self._process = subprocess.Popen(
            [str(python), "-P", str(SCRIPT), str(theirs)], stdin=subprocess.PIPE, stdout=self._log, stderr=self._log,
            pass_fds=(theirs,), text=True, env=_environment(),
        )  # fmt: skip
        os.close(theirs)
        self._job = {
            "model": str(folder),
            "dtype": cases[0].dtype,
            "tokens": max(case.prompt_tokens + case.new_tokens + entering_tokens(case) for case in cases),
            "chains": max(case.batch for case in cases),
        }

    def __enter__(self) -> "VllmProcess":
        with ExitStack() as failing:
            failing.callback(self.close)
            self._ask(self._job)
            failing.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._process.kill()
        self.close()

    def measure(self, case: GenerateCase, timed_s: float) -> Rate:
        """Its rate, over as many seconds and in such parts as ours."""
        prompts = prompts_of(self._folder, case.batch // case.samples, case.prompt_tokens)
        most_tokens = case.new_tokens + entering_tokens(case)
        asked = {
            **asdict(case), "most_tokens": most_tokens, "prompts": prompts, "rounds": ROUNDS, "timed_s": timed_s,
        }  # fmt: skip
        answer = self._ask(asked)
        return rate_of_parts(answer["rates"], answer["resident_mib"])

    def _ask(self, what: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            print(json.dumps(what), file=self._process.stdin, flush=True)
            ready, _, _ = select.select([self._told], [], [], ANSWER_S)
            line = self._told.readline() if ready else ""
        except OSError:
            line = ""
        if not line:
            self._log.seek(0)
            raise AnabranchError(
                f"vLLM gave no answer within {ANSWER_S} s, or ended: {self._log.read()[-1500:]}"
            )
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._told.close()
        self._log.close()


def _environment() -> dict[str, str]:
    """What our ranks have too, and none of our modules. On CPU vLLM keeps one core for itself unless told which to use.
    All in one process: two would share the cores, and killing one leaves the other."""
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {
        **ours,
        **KEEPS_MEMORY,
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
