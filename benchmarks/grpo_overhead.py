"""Cost of each option of `MamaGRPOTrainer` over TRL's GRPOTrainer, on the demo task: CPU time as a ratio.

    python benchmarks/grpo_overhead.py

All runs are in one process, from one pre-trained model, and alternate; each round gives one ratio for each option. The
model is tiny (110 k parameters) against what a GRPO step does around it, so that the ratio of the dense trainer's own
work is as small as it can be, and that of what is done per mask update as large: an update in each step of the
pruning phase, or in each second one with a reward check.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from mix6_runs import mix6, prepare, pretrained
from transformers.trainer_callback import PrinterCallback
from trl import GRPOTrainer

from mama_hf import MamaGRPOTrainer, MamaPruningConfig


OPTIONS: dict[str, dict[str, Any] | None] = {
    "GRPOTrainer": None,
    "mama": {},
    "move_values": {"move_values": "least_squares"},
    "reward check": {"reward_tolerance": 0.5},
    "teacher": {"distillation_weight": 0.1},
}


def measure(name: str, model: Any, tokenizer: Any, steps: int) -> float:
    """CPU seconds of `train`."""
    fields = OPTIONS[name]
    trainer_class: Any = GRPOTrainer if fields is None else MamaGRPOTrainer
    extra: dict[str, Any] = {}
    if fields is not None:
        start, end = round(steps * 20 / 150), round(steps * 110 / 150)
        extra["pruning_config"] = MamaPruningConfig(final_sparsity=0.8, start=start, end=end, **fields)
    if name == "teacher":
        extra["teacher_model"] = "initial"
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=model,
            reward_funcs=mix6.exact_match_reward,
            args=mix6.grpo_arguments(folder, 0, max_steps=steps, disable_tqdm=True),
            train_dataset=mix6.grpo_dataset(0),
            processing_class=tokenizer,
            **extra,
        )
        trainer.remove_callback(PrinterCallback)
        begin = time.process_time()
        trainer.train()
        return time.process_time() - begin


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--models", type=Path, default=Path("outputs/mix6"), help="folder of the pre-trained model")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/grpo_overhead.json"))
    args = parser.parse_args(argv)
    tokenizer = prepare()
    rounds = []
    for _ in range(args.rounds):
        seconds = {
            name: measure(name, pretrained(tokenizer, 0, args.models), tokenizer, args.steps) for name in OPTIONS
        }
        rounds.append(seconds)
        print({name: round(value / seconds["GRPOTrainer"], 3) for name, value in seconds.items()}, flush=True)
    ratios = {name: sorted(row[name] / row["GRPOTrainer"] for row in rounds) for name in OPTIONS}
    result = {
        "steps": args.steps,
        "cpu_ratio": {name: {"median": statistics.median(r), "min": r[0], "max": r[-1]} for name, r in ratios.items()},
        "cpu_seconds": rounds,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
