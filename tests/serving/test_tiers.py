"""Pages of preempted chains outside the pool: the same tokens as transformers, nothing left behind."""

import fcntl
import heapq
import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from anabranch.errors import ConfigError
from anabranch.scheduling.chain import Request
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.engine import Engine, EngineSettings

NEW = 70
LIMITS = Limits(slots=4, chunk=32, tokens=256)
TEXT = inspect.getsource(heapq).encode()


@pytest.fixture(scope="module")
def model():
    """16 pages, 256 tokens, take one MiB in fp32."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, num_experts=4, num_experts_per_tok=2, max_position_embeddings=256,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def requests():
    return [Request(tuple(TEXT[i * 40 : i * 40 + 30 + 17 * i]), NEW) for i in range(4)]


@pytest.fixture(scope="module")
def reference(model, requests):
    made = []
    for request in requests:
        prompt = torch.tensor([request.prompt])
        out = model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        made.append(out[0, len(request.prompt) :].tolist())
    return made


def engine(model, **settings) -> Engine:
    settings = {"kv_memory_mib": 1, "limits": LIMITS, **settings}
    return Engine(model, EngineSettings(step="native", threads=1, **settings))


@pytest.mark.parametrize("on_disk", [False, True])
def test_preempted_chains_come_back_with_the_tokens_of_transformers(
    model, requests, reference, tmp_path, on_disk
):
    with engine(model, spill_mib=16, spill_folder=str(tmp_path) if on_disk else None) as served:
        got = served.generate(requests)
        tally = served.scheduler.tally
        assert [g.tokens for g in got] == reference
        assert tally.preempted == tally.kept == tally.fetched > 0
        # No token was computed twice.
        assert tally.prefilled == sum(len(r.prompt) for r in requests) - tally.reused
        served.check()
        assert served.tier is not None and served.tier.held_bytes == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_coded_pages_and_their_open_ones_come_back_as_they_were(model, kv_dtype):
    # A prompt enters at once: what its tokens see coded and what as written does not depend on the load.
    limits = Limits(slots=8, chunk=1024, tokens=256)
    requests = [Request(tuple(TEXT[i * 40 : i * 40 + 60 + i]), 150) for i in range(8)]
    made = []
    for memory, spill in ((8, 0), (1, 16)):
        settings = {"kv_memory_mib": memory, "spill_mib": spill, "limits": limits}
        with engine(model, kv_dtype=kv_dtype, **settings) as served:
            made.append([completion.tokens for completion in served.generate(requests)])
            served.check()
            assert bool(served.scheduler.tally.fetched) == bool(spill)
    assert made[0] == made[1]


def test_the_limit_holds_and_what_does_not_fit_is_computed_once_more(model, requests, reference):
    with engine(model, spill_mib=1) as served:
        assert served.tier is not None
        served.tier._limit = 0
        got = served.generate(requests)
        assert served.scheduler.tally.preempted > 0 == served.scheduler.tally.kept
    assert [g.tokens for g in got] == reference


def test_lost_files_are_computed_once_more(model, requests, reference, tmp_path):
    with engine(model, spill_mib=16, spill_folder=str(tmp_path)) as served:
        chains = [chain for request in requests for chain in served.submit(request)]
        lost = 0
        while any(chain.end is None for chain in chains):
            served.advance()
            for file in tmp_path.glob("*/*.safetensors"):
                if lost == 0:
                    file.write_bytes(b"torn")
                    lost += 1
        tally = served.scheduler.tally
        assert lost == 1 and tally.fetched < tally.kept
        served.check()
    assert [chain.tokens[len(chain.request.prompt) :] for chain in chains] == reference


def test_cancelled_chains_leave_nothing_behind(model, requests, tmp_path):
    with engine(model, spill_mib=16, spill_folder=str(tmp_path)) as served:
        chains = [chain for request in requests for chain in served.submit(request)]
        while not any(chain.kept for chain in chains):
            served.advance()
        assert served.tier is not None and served.tier.held_bytes > 0
        for chain in chains:
            served.cancel(chain)
        assert served.advance() == []
        served.check()
        assert served.tier.held_bytes == 0


def test_leftovers_of_a_dead_run_are_removed_and_those_of_a_live_one_stay(model, tmp_path):
    dead, live = tmp_path / "anabranch-kv-dead", tmp_path / "anabranch-kv-live"
    for folder in (dead, live):
        folder.mkdir()
        (folder / "lock").touch()
        (folder / "1.safetensors").write_bytes(b"pages")
    (tmp_path / "mine.txt").touch()
    with (live / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        engine(model, spill_mib=1, spill_folder=str(tmp_path)).close()
    assert {path.name for path in tmp_path.iterdir()} == {live.name, "mine.txt"}


def test_settings_that_cannot_work_name_themselves(model, tmp_path):
    with pytest.raises(ConfigError, match="spill_mib"):
        EngineSettings(spill_folder=str(tmp_path))
    with pytest.raises(ConfigError, match="spill_mib"):
        EngineSettings(spill_mib=-1)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="spill_folder"):
        engine(model, spill_mib=1, spill_folder=str(tmp_path / "file"))
