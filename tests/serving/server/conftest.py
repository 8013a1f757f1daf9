"""Real servers on loopback, started as users start them, and a toy model that writes real tokens."""

import inspect
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from tests.integrations.toy_models import toy_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from anabranch.scheduling.chain import Request
from anabranch.scheduling.sampling import Sampling
from anabranch.serving.engine import Engine
from anabranch.serving.settings import EngineSettings
from anabranch.serving.text import text_of
from anabranch.training.tokens import load_or_train_tokenizer

START_S, WAIT_S = 120, 20
KEY = "a-key-of-tests"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
SOURCE = Path(__file__).parents[3] / "src"


class Server:
    """`anabranch serve` as a process."""

    def __init__(self, folder: Path, log: Path, *options: str) -> None:
        self._log, self.key = log, KEY if KEY in options else "none"
        command = [sys.executable, "-m", "anabranch", "serve", str(folder), "--port", "0", "--threads", "1"]
        environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
        with log.open("w") as stderr:
            self.process = subprocess.Popen([*command, *options], stderr=stderr, env=environment)

    @property
    def said(self) -> str:
        return self._log.read_text()

    @property
    def url(self) -> str:
        """Waits until it serves."""
        until(lambda: "/v1\n" in self.said or self.process.poll() is not None, START_S)
        assert self.process.poll() is None, self.said
        return self.said.split(" at ")[1].split("/v1")[0]

    def client(self, key: str | None = None) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or self.key, max_retries=0, timeout=60)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, headers={"Authorization": f"Bearer {self.key}"}, timeout=WAIT_S)

    def post(self, body: object, path: str = "/v1/completions") -> httpx.Response:
        """A body: what is to be sent as JSON, or bytes as they are, also in pieces."""
        what = {"json": body} if isinstance(body, dict) else {"content": body}
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        return httpx.post(self.url + path, headers=headers, timeout=60, **what)

    def metric(self, name: str, **labels: str) -> float:
        samples = [s for f in text_string_to_metric_families(self.get("/metrics").text) for s in f.samples]
        return next(s.value for s in samples if s.name == f"anabranch_{name}" and s.labels == labels)

    def free(self) -> bool:
        """Whether no chain is left and every page is free or the prefix tree's."""
        pages = {state: self.metric("kv_pages", state=state) for state in ("free", "cached", "total")}
        return self.metric("chains_running") == 0 and pages["free"] + pages["cached"] == pages["total"]

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(WAIT_S)


def until(holds, within_s: float = WAIT_S) -> None:
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def served_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("served") / "toy"
    tokenizer = load_or_train_tokenizer([inspect.getsource(textwrap)], 400, folder.parent)
    tokenizer.chat_template = TEMPLATE
    config = toy_config("qwen3_moe", 8)
    config.update(
        {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 4096,
            "head_dim": 16,
            "initializer_range": 0.3,
        }
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bare_model(served_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template."""
    folder = tmp_path_factory.mktemp("served") / "bare"
    AutoModelForCausalLM.from_pretrained(served_model).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(served_model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def server(served_model: Path, tight_server: Server, tmp_path_factory) -> Iterator[Server]:
    """Open to this machine. It starts beside `tight_server`."""
    server = Server(served_model, tmp_path_factory.mktemp("log") / "server")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def tight_server(bare_model: Path, tmp_path_factory) -> Iterator[Server]:
    """One request at a time and one that waits, small bodies, a key; guesses ahead."""
    options = ("--max-requests", "1", "--max-queue", "1", "--max-body-bytes", "4000", "--api-key", KEY)
    options += ("--speculate", "4")
    server = Server(bare_model, tmp_path_factory.mktemp("log") / "tight", *options)
    yield server
    server.stop()


class Oracle:
    """The engine in this process."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self._engine = Engine(model, EngineSettings(threads=1, kv_memory_mib=16))
        self._stop = frozenset({self.tokenizer.eos_token_id})

    def complete(self, prompt: str, tokens: int, samples: int = 1, sampling: Sampling | None = None):
        """Completions of a prompt and their texts."""
        ids = tuple(self.tokenizer(prompt)["input_ids"])
        request = Request(ids, tokens, samples, sampling or Sampling(), self._stop)
        done = self._engine.generate([request])
        return [(c, text_of(self.tokenizer, c.tokens, ids)) for c in done]


@pytest.fixture(scope="session")
def oracle(served_model: Path) -> Oracle:
    return Oracle(served_model)
