"""`final_sparsity="auto"` on the demo task: how far the reward lets pruning go, and what is left of the accuracy.

    python benchmarks/auto_study.py

For each seed: the dense run, `auto` with a tolerance of 0.05, the same with values moved, and `auto` with a reward
that turns to noise half-way. GRPO goes on to follow the noise, which ruins the dense model; the check stops pruning
and, at the end, puts the last state back that held the reward. Accuracy is greedy, on 512 prompts that neither
training nor the check has seen.
"""

import random
from pathlib import Path
from typing import Any

from mix6_runs import END, START, STEPS, mix6, post_train, pretrained, study

from mama_hf import MamaPruningConfig


AUTO: dict[str, Any] = {"final_sparsity": "auto", "reward_tolerance": 0.05, "start": START, "end": END}
RUNS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "auto": AUTO,
    "auto, values moved": {**AUTO, "move_values": "least_squares"},
    "auto, noise from half-way": AUTO,
    "dense, noise from half-way": None,
}


class TurnsToNoise:
    """The task's reward until half of the training batches are scored, uniform noise in [0, 1) from then on."""

    __name__ = "turns_to_noise"

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def __call__(self, completions: list[str], answer: list[str], **kwargs: Any) -> list[float | None]:
        if kwargs["trainer_state"].global_step < STEPS // 2:
            return mix6.exact_match_reward(completions, answer)
        return [self.rng.random() for _ in completions]


def run(name: str, seed: int, tokenizer: Any, models: Path) -> dict[str, Any]:
    fields = RUNS[name]
    config = None if fields is None else MamaPruningConfig(**fields)
    reward = TurnsToNoise(seed) if "noise" in name else mix6.exact_match_reward
    accuracy, trainer = post_train(pretrained(tokenizer, seed, models), tokenizer, seed, config, reward)
    if trainer.pruning_callback is None:
        return {"accuracy": accuracy}
    report = trainer.pruning_callback.report
    assert report is not None, "training has ended"
    return {"accuracy": accuracy, **report}


if __name__ == "__main__":
    study(__doc__, RUNS, "benchmarks/results/auto_study.json", run)
