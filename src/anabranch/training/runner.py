"""One training run, as one rank sees it."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Subset
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments, set_seed
from transformers.distributed import DistributedConfig

from anabranch.errors import CheckpointError, ConfigError
from anabranch.integrations.callback import AdaptiveCallback
from anabranch.integrations.transformers import NAME, register
from anabranch.telemetry.jsonl import JsonlSink
from anabranch.telemetry.record import StepRecord
from anabranch.telemetry.sinks import Sink
from anabranch.telemetry.tensorboard import TensorboardSink
from anabranch.training.config import RunConfig
from anabranch.training.data import TrainingData, build_data
from anabranch.training.origin import Origin, find_origin
from anabranch.training.recorder import OrderlyStop, StepRecorder, TraceRecorder
from anabranch.training.trainer import AdaptiveTrainer, latest_checkpoint
from anabranch.workload.trace import TraceWriter

# Validation windows of one evaluation: enough to tell runs apart, few enough not to dominate short ones.
EVAL_WINDOWS = 128


@dataclass(frozen=True)
class RunSummary:
    """What a run came to. Medians and means are over its steps, the first two left out as warm-up."""

    planner: str
    steps: int
    stopped_early: bool
    first_loss: float
    last_loss: float
    eval_loss: float
    step_ms_median: float
    tokens_per_s: float
    max_mean_before: float
    max_mean_after: float
    guests_per_step: float
    token_mb_per_step: float
    weight_mb_per_step: float
    joules_per_step: float
    energy_source: str
    losses: tuple[float, ...]


def run(config: RunConfig, watchers: Sequence[Sink] = ()) -> RunSummary:
    """Train as configured, on this rank of an initialised or initialisable process group.

    watchers: further sinks for the step records, used on rank 0. Raises AnabranchError for what the user can
    correct; nothing is written to `out` before model and data are known to be usable.
    """
    origin = find_origin(config.model, config.sequence_length)
    _join(config)
    cache = Path(config.cache).expanduser()
    data = build_data(
        list(config.data), vocab_size=origin.config.vocab_size, sequence_length=origin.sequence_length,
        seed=config.seed, cache_dir=cache, max_bytes=config.max_bytes, tokenizer=origin.tokenizer(),
    )  # fmt: skip
    if len(data.tokenizer) > origin.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {len(data.tokenizer)} tokens, the model {origin.config.vocab_size}", setting="model"
        )
    identity = json.dumps(json.loads(config.identity()) | {"data_fingerprint": data.fingerprint}, sort_keys=True)
    checkpoint = latest_checkpoint(config.out_path / "checkpoints", identity) if config.resume else None
    if _first() and checkpoint is None:
        _start_folder(config, origin)
    _barrier()
    model = _load(config, checkpoint or origin.weights or config.out_path / "initial")
    return _train(config, model, data, identity, checkpoint, watchers)


def _join(config: RunConfig) -> None:
    """Join the group of ranks, which must be as large as configured."""
    if not dist.is_initialized() and config.ranks > 1:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        backend = dist.get_default_backend_for_device(accelerator or torch.device("cpu"))
        dist.init_process_group(backend, timeout=timedelta(seconds=config.timeout_s))
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world != config.ranks:
        raise ConfigError(f"{config.ranks} configured, but {world} started; make them equal", setting="ranks")


def _first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _start_folder(config: RunConfig, origin: Origin) -> None:
    """A new run's folder: its configuration, and initial weights where there are none to start from."""
    if config.overwrite and config.out_path.exists():
        shutil.rmtree(config.out_path)
    config.out_path.mkdir(parents=True, exist_ok=True)
    (config.out_path / "config.json").write_text(json.dumps(config.to_dict(), indent=2))
    if origin.weights is None:
        origin.write_initial(config.out_path / "initial", config.seed)


def _load(config: RunConfig, folder: Path) -> PreTrainedModel:
    register(config.experts)
    sharding = DistributedConfig(
        fsdp_size=config.ranks,
        ep_size=config.group_size,
        ep_implementation=NAME,
        fsdp_mixed_precision=config.dtype == "bfloat16",
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_config=sharding if config.ranks > 1 else None
    )


def _train(
    config: RunConfig,
    model: PreTrainedModel,
    data: TrainingData,
    identity: str,
    checkpoint: Path | None,
    watchers: Sequence[Sink],
) -> RunSummary:
    set_seed(config.seed)
    sequence = data.train[0]["input_ids"].shape[0]
    balance, stop = AdaptiveCallback(), OrderlyStop()
    sinks = [*_sinks(config, checkpoint), *watchers] if _first() else []
    recorder = StepRecorder(balance, sinks, config.ranks * config.batch_size * sequence)
    held_out = Subset(data.validation, range(min(EVAL_WINDOWS, len(data.validation))))
    trainer = AdaptiveTrainer(
        model=model, args=_arguments(config), train_dataset=data.train, eval_dataset=held_out,
        processing_class=data.tokenizer, callbacks=[balance, recorder, stop], identity=identity,
    )  # fmt: skip
    trainer.remove_callback(_printer(trainer))
    writer = _trace(config, model, sequence) if config.trace_every else None
    if config.trace_every:
        trainer.add_callback(TraceRecorder(writer, every=config.trace_every, ids=config.trace_ids))
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        eval_loss = trainer.evaluate()["eval_loss"] if not stop.stopped else float("nan")
    finally:
        if writer is not None:
            writer.save()
        for sink in sinks:
            sink.close()
    if not stop.stopped:
        trainer.save_model(str(config.out_path / "model"))
    summary = _summarise(config, recorder.records, trainer.state.global_step, stop.stopped, eval_loss)
    if _first():
        (config.out_path / "summary.json").write_text(json.dumps(asdict(summary), indent=2))
    return summary


def _sinks(config: RunConfig, checkpoint: Path | None) -> list[Sink]:
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else None
    return [
        JsonlSink(config.out_path / "metrics.jsonl", resumed_step=step),
        TensorboardSink(config.out_path / "tensorboard", resumed_step=step),
    ]


def _trace(config: RunConfig, model: PreTrainedModel, sequence: int) -> TraceWriter | None:
    if not _first():
        return None
    shape = model.config
    experts = getattr(shape, "num_experts", None) or shape.num_local_experts
    return TraceWriter(
        config.out_path / "routing.npz", model_type=shape.model_type, experts=experts,
        top_k=shape.num_experts_per_tok, ranks=config.group_size, tokens_per_rank=config.batch_size * sequence,
    )  # fmt: skip


def _arguments(config: RunConfig) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(config.out_path / "checkpoints"),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, config.steps // 10),
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=1,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 1,
        save_total_limit=2,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        prediction_loss_only=True,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        seed=config.seed,
        use_cpu=torch.accelerator.current_accelerator(check_available=True) is None,
        dataloader_pin_memory=torch.accelerator.is_available(),
        ddp_timeout=config.timeout_s,
    )


def _printer(trainer: AdaptiveTrainer) -> Any:
    """The callback that prints every log as a dict: the run's own display shows them."""
    return next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback")


def _summarise(
    config: RunConfig, records: list[StepRecord], steps: int, stopped: bool, eval_loss: float
) -> RunSummary:
    steady = records[2:] or records

    def median(name: str) -> float:
        return float(np.median([getattr(r, name) for r in steady])) if steady else float("nan")

    def mean(name: str) -> float:
        return float(np.mean([getattr(r, name) for r in steady])) if steady else float("nan")

    return RunSummary(
        planner=config.experts.planner,
        steps=steps,
        stopped_early=stopped,
        first_loss=records[0].loss if records else float("nan"),
        last_loss=records[-1].loss if records else float("nan"),
        eval_loss=eval_loss,
        step_ms_median=median("step_ms"),
        tokens_per_s=median("tokens_per_s"),
        max_mean_before=mean("max_mean_before"),
        max_mean_after=mean("max_mean_after"),
        guests_per_step=mean("guests"),
        token_mb_per_step=mean("token_bytes") / 1e6,
        weight_mb_per_step=mean("weight_bytes") / 1e6,
        joules_per_step=mean("joules"),
        energy_source=records[0].energy_source if records else "estimate",
        losses=tuple(r.loss for r in records),
    )
