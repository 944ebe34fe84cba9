"""`final_sparsity="auto"` on the demo task: how far the reward lets pruning go, and what is left of the accuracy.

    python benchmarks/auto_study.py

For each seed: the dense run, `auto` with a tolerance of 0.05, the same with values moved, and `auto` with a reward
that turns to noise half-way (there the dense model is ruined as well: the check stops pruning, not the training).
Accuracy is greedy, on 512 prompts that neither training nor the check has seen.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from mix6_runs import END, START, STEPS, mix6, post_train, prepare, pretrained

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
    """The task's reward until half of the training batches are scored, coin flips from then on."""

    __name__ = "turns_to_noise"

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def __call__(self, completions: list[str], answer: list[str], **kwargs: Any) -> list[float | None]:
        if kwargs["trainer_state"].global_step < STEPS // 2:
            return mix6.exact_match_reward(completions, answer)
        return [float(self.rng.random() < 0.5) for _ in completions]


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


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--models", type=Path, default=Path("outputs/mix6"), help="folder of the pre-trained models")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/auto_study.json"))
    args = parser.parse_args(argv)
    tokenizer = prepare()
    results: dict[str, Any] = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else {}
    for name, seed in ((name, seed) for name in args.runs for seed in args.seeds):
        if str(seed) in results.setdefault(name, {}):
            continue
        row = results[name][str(seed)] = run(name, seed, tokenizer, args.models)
        print(f"{name}, seed {seed}: accuracy {row['accuracy']:.3f}, sparsity {row.get('reached', 0):.3f}", flush=True)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
