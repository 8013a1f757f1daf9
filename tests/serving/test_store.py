"""The expert store: the same numbers as with all experts in memory, in the memory that was allowed."""

import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.store import StoreRun
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from anabranch.errors import CheckpointError, ConfigError
from anabranch.scheduling.chain import Request
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.engine import MIB, Completion, Engine, EngineSettings, StoreFigures
from anabranch.serving.step.native import NativeStep
from integrations.toy_models import COMMON, FAMILIES

LAYERS, EXPERTS = 3, 12
SIZES = {
    "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": LAYERS,
    "head_dim": 32, "max_position_embeddings": 256, "clip_qkv": None,
}  # fmt: skip
TEXT = inspect.getsource(textwrap).encode()
REQUESTS = [Request(tuple(TEXT[i * 40 : i * 40 + n]), 24) for i, n in enumerate((5, 17, 33, 50))]
Output = tuple[list[Completion], StoreFigures | None]


def write_model(folder: Path, name: str, **more: object) -> Path:
    family = FAMILIES[name]
    settings = {**COMMON, **family.settings, **SIZES, family.experts: EXPERTS, **more}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family.model_type, **settings)).save_pretrained(
        folder
    )
    return folder


def settings_of(
    limit_mib: int | None, store: Path, dtype: str = "float32", chunk: int = 32
) -> EngineSettings:
    limits = Limits(slots=3, chunk=chunk, tokens=128)
    return EngineSettings(
        dtype=dtype, kv_memory_mib=2, threads=2, step="native", memory_limit_mib=limit_mib,
        store_folder=str(store), limits=limits,
    )  # fmt: skip


def run(folder: Path, settings: EngineSettings) -> Output:
    with Engine.from_folder(folder, settings) as engine:
        done = engine.generate(REQUESTS)
        engine.check()
        return done, engine.store


def weights_mib(folder: Path, dtype: str) -> float:
    with Engine.from_folder(folder, settings_of(None, folder, dtype)) as engine:
        assert isinstance(engine.step, NativeStep)
        return engine.step.weight_bytes / MIB


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("qwen3_moe"), "qwen3_moe")


@pytest.fixture(scope="module")
def whole(model: Path) -> list[Completion]:
    return run(model, settings_of(None, model))[0]


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_third_of_the_memory_gives_the_same_numbers(name: str, dtype: str, tmp_path: Path) -> None:
    # qwen2_moe: a dense first layer and shared experts too.
    folder = write_model(tmp_path, name, **({"mlp_only_layers": [0]} if name == "qwen2_moe" else {}))
    limit_mib = round(weights_mib(folder, dtype) / 3)
    expected, _ = run(folder, settings_of(None, tmp_path, dtype))
    got, figures = run(folder, settings_of(limit_mib, tmp_path / "store", dtype))
    assert got == expected
    assert figures is not None and figures.slots < figures.experts / 2
    assert figures.misses and figures.hits and 0 < figures.hit_rate < 1
    read_ahead = figures.bytes_read // figures.record_bytes - figures.misses
    assert read_ahead > 0, "a miss is read once; what is expected is read besides"


def test_the_least_limit_works_in_several_rounds_a_layer(
    model: Path, whole: list[Completion], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="the least that works is") as error:
        Engine.from_folder(model, settings_of(1, tmp_path))
    least_mib = int(str(error.value).rsplit(maxsplit=1)[1])
    with pytest.raises(ConfigError, match="the least that works is"):
        Engine.from_folder(model, settings_of(least_mib - 1, tmp_path))
    for chunk in (8, 64):
        got, figures = run(model, settings_of(least_mib, tmp_path, chunk=chunk))
        assert got == whole
        # Fewer than the four experts of a single token.
        assert figures is not None and figures.slots < 4


def test_tied_sharded_and_fused_checkpoints(tmp_path: Path) -> None:
    tied = write_model(tmp_path / "tied", "qwen3_moe", tie_word_embeddings=True)
    loaded = AutoModelForCausalLM.from_pretrained(tied)
    loaded.save_pretrained(tmp_path / "shards", max_shard_size="500KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    fused = tmp_path / "fused"
    fused.mkdir()
    (fused / "config.json").write_bytes((tied / "config.json").read_bytes())
    state = {n: t.detach() for n, t in loaded.state_dict().items() if n != "lm_head.weight"}
    assert "model.layers.0.mlp.experts.gate_up_proj" in state
    save_file(state, fused / "model.safetensors")
    expected, _ = run(tied, settings_of(None, tmp_path))
    for folder in (tied, tmp_path / "shards", fused):
        assert run(folder, settings_of(8, tmp_path / "store"))[0] == expected


def test_a_truncated_file_is_made_anew(model: Path, whole: list[Completion], tmp_path: Path) -> None:
    run(model, settings_of(8, tmp_path))
    (file,) = tmp_path.glob("*.experts")
    made = file.read_bytes()
    for damaged in (made[:-1], made[:-4096], bytes(100) + made[100:]):
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match="is damaged and made anew"):
            got, _ = run(model, settings_of(8, tmp_path))
        assert got == whole
        assert file.read_bytes() == made
    stamp_ns = file.stat().st_mtime_ns
    run(model, settings_of(8, tmp_path))
    assert file.stat().st_mtime_ns == stamp_ns, "a whole file is used again"


def test_a_damaged_record_is_repaired_while_it_is_used(
    model: Path, whole: list[Completion], tmp_path: Path
) -> None:
    run(model, settings_of(8, tmp_path))
    (file,) = tmp_path.glob("*.experts")
    made = file.read_bytes()
    record_bytes = (len(made) - 4096) // (LAYERS * EXPERTS)
    damaged = np.frombuffer(made, dtype=np.uint8).copy()
    damaged[4096 + 100 :: record_bytes] ^= 1  # one bit of every record
    file.write_bytes(damaged.tobytes())
    with pytest.warns(UserWarning, match="record .* is damaged and made anew"):
        got, _ = run(model, settings_of(8, tmp_path))
    assert got == whole
    assert file.read_bytes() == made


def test_a_record_that_cannot_be_made_again_is_an_error(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((model / name).read_bytes())
    with Engine.from_folder(folder, settings_of(8, tmp_path)) as engine:
        (file,) = tmp_path.glob("*.experts")
        with file.open("r+b") as damaged:
            damaged.seek(4096)
            damaged.write(bytes(file.stat().st_size - 4096))
        state = load_file(model / "model.safetensors")
        save_file({name: tensor + 1 for name, tensor in state.items()}, folder / "model.safetensors")
        with (
            pytest.warns(UserWarning, match="record"),
            pytest.raises(CheckpointError, match="has changed since"),
        ):
            engine.generate(REQUESTS)


def test_two_processes_make_one_file_and_stay_within_their_limit(tmp_path: Path) -> None:
    folder = write_model(
        tmp_path / "model", "qwen3_moe", hidden_size=256, moe_intermediate_size=512, num_hidden_layers=6,
        num_experts=16,
    )  # fmt: skip
    run_of = StoreRun(str(folder), str(tmp_path / "store"), "float32", 2, 16, 48)
    command = [sys.executable, "-m", "benchmarks.store", "--run", json.dumps(run_of)]
    root = Path(__file__).resolve().parents[2]
    source = {**os.environ, "PYTHONPATH": os.pathsep.join((str(root / "src"), str(root)))}
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=source) for _ in range(2)]
    results = [json.loads(process.communicate()[0]) for process in processes]
    assert {file.suffix for file in (tmp_path / "store").iterdir()} == {".experts", ".lock"}
    settings = EngineSettings(dtype="float32", kv_memory_mib=32, threads=2, limits=Limits(2, 256, 512))
    with Engine.from_folder(folder, settings) as engine:
        expected = [
            done.tokens for done in engine.generate([Request(tuple(p), 16) for p in results[0]["prompts"]])
        ]
        assert isinstance(engine.step, NativeStep)
        assert engine.step.weight_bytes > 144 * MIB
    for result in results:
        assert result["tokens"] == expected
        # Beside the weights: keys and values (32 MiB), rows of a step, code that is loaded on the way.
        assert result["peak_bytes"] - result["before_bytes"] < (48 + 32 + 32) * MIB


def test_a_limit_needs_a_folder_and_the_native_step(model: Path, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with pytest.raises(ConfigError, match="from_folder"):
        Engine(loaded, settings_of(8, tmp_path))
    with pytest.raises(ConfigError, match="memory_limit_mib"):
        EngineSettings(memory_limit_mib=8, step="torch")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        Engine.from_folder(tmp_path, settings_of(8, tmp_path))
    dense = write_model(tmp_path / "dense", "qwen2_moe", mlp_only_layers=list(range(LAYERS)))
    with pytest.raises(ConfigError, match="wants a model with experts"):
        Engine.from_folder(dense, settings_of(8, tmp_path))
