"""GRPO by TRL's trainer, with samples from our engine and the trainer's own weights (no copy but the packed one):

    pip install trl
    python -m recipes.trl_grpo runs/reasoning/pretrained --steps 20     # a model of recipes.reasoning_grpo

TRL takes an engine by `rollout_func`, which it calls experimental. What it has no place for is the routing that our
rollouts record: replaying it in the update, and planning placement by it, is why recipes.reasoning_grpo has a loop of
its own.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from recipes.arithmetic import MAX_NEW_TOKENS, Problem, answer, problems, solved
from recipes.judging import PRACTISED, settings
from recipes.tiny import EOS
from transformers import AutoModelForCausalLM, AutoTokenizer

from anabranch.scheduling.chain import Request
from anabranch.scheduling.sampling import Sampling
from anabranch.serving.rollout import RolloutEngine

PROMPTS, SAMPLES = 64, 8


def rollouts(engine: RolloutEngine) -> Any:
    """A `rollout_func`: a sample of each prompt that it is given, which come as often as samples are wanted."""

    def generate(prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        seed = PRACTISED + trainer.state.global_step * len(prompts)
        done = engine.generate(
            [
                Request(
                    tuple(trainer.processing_class(prompt)["input_ids"]),
                    MAX_NEW_TOKENS,
                    sampling=Sampling(temperature=1.0, seed=seed + i),
                    stop_tokens=frozenset({EOS}),
                )
                for i, prompt in enumerate(prompts)
            ]
        )
        return {
            "prompt_ids": [list(r.prompt) for r in done],
            "completion_ids": [r.tokens for r in done],
            "logprobs": [r.logprobs for r in done],
        }

    return generate


def reward(asked: list[Problem]) -> Any:
    """A point for an answer that the verifier takes. Problems are found by their number in the dataset."""

    def solved_or_not(completion_ids: list[list[int]], number: list[int], **_: Any) -> list[float]:
        return [
            float(solved(asked[i], answer(tokens))) for i, tokens in zip(number, completion_ids, strict=True)
        ]

    return solved_or_not


def main(
    model: Annotated[Path, typer.Argument(help="folder of a pretrained model of recipes.reasoning_grpo")],
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps")] = 20,
    out: Annotated[Path, typer.Option(help="TRL's folder")] = Path("runs/trl_grpo"),
) -> None:
    """Improve a model by TRL's GRPOTrainer."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    asked = problems(PRACTISED, PROMPTS * steps)
    trained = AutoModelForCausalLM.from_pretrained(model)
    config = GRPOConfig(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=PROMPTS * SAMPLES, num_generations=SAMPLES,
        max_completion_length=MAX_NEW_TOKENS, learning_rate=7e-5, beta=0.0, logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, bf16=False,
    )  # fmt: skip
    with RolloutEngine(trained, settings("native")) as engine:
        trainer = GRPOTrainer(
            trained,
            reward(asked),
            config,
            Dataset.from_list(
                [{"prompt": f"{p.expression}=<think>", "number": i} for i, p in enumerate(asked)]
            ),
            processing_class=AutoTokenizer.from_pretrained(model),
            rollout_func=rollouts(engine),
        )
        trainer.train()
    told = [log["rewards/solved_or_not/mean"] for log in trainer.state.log_history if "reward" in log]
    typer.echo(f"solved, step by step: {' '.join(f'{value:.3f}' for value in told)}")


if __name__ == "__main__":
    typer.run(main)
