"""Does moving values inside training help? The demo task with few, large mask updates, three seeds.

    python benchmarks/move_values.py

Each run is GRPO on mix6 as in `examples/demo.py`, from one pre-trained model a seed, with --updates mask updates from
step 20 to 110 of 150. The result is the accuracy on 512 held-out prompts after the run.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from mama_hf import MamaGRPOTrainer, MamaPruningConfig


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import mix6


def post_train(start: dict[str, Any], tokenizer: Any, seed: int, config: MamaPruningConfig) -> float:
    """Held-out accuracy after one GRPO run."""
    model = mix6.build_model(tokenizer, seed)
    model.load_state_dict(start)
    with tempfile.TemporaryDirectory() as folder:
        trainer = MamaGRPOTrainer(
            model=model,
            reward_funcs=mix6.exact_match_reward,
            args=mix6.grpo_arguments(folder, seed, max_steps=150),
            train_dataset=mix6.grpo_dataset(seed),
            processing_class=tokenizer,
            pruning_config=config,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return mix6.greedy_accuracy(model, tokenizer)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.7, 0.8])
    parser.add_argument("--criteria", nargs="+", default=["magnitude", "mama"])
    parser.add_argument("--rules", nargs="+", default=["none", "mean", "least_squares"])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/move_values.json"))
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    tokenizer = mix6.build_tokenizer()
    results: dict[str, Any] = {}
    for seed in args.seeds:
        model = mix6.build_model(tokenizer, seed)
        mix6.pretrain(model, tokenizer, seed)
        start = {name: weight.clone() for name, weight in model.state_dict().items()}
        for number, sparsity, criterion, rule in (
            (number, sparsity, criterion, rule)
            for number in args.updates
            for sparsity in args.sparsities
            for criterion in args.criteria
            for rule in args.rules
        ):
            # the first of the updates asks for a share already: a cubic schedule from step 20 would begin with zero
            shape = {"schedule": "one-shot", "start": 65} if number == 1 else {"start": 20 + 90 // number, "end": 110}
            if number > 1:
                shape |= {"update_every": 90 // number, "initial_sparsity": sparsity * (1 - (1 - 1 / number) ** 3)}
            config = MamaPruningConfig(final_sparsity=sparsity, criterion=criterion, move_values=rule, **shape)
            accuracy = post_train(start, tokenizer, seed, config)
            row = results.setdefault(f"{criterion}, {sparsity}, {number} updates", {}).setdefault(rule, [])
            row.append(accuracy)
            print(f"seed {seed}, {criterion}, {sparsity}, {number} updates, {rule}: {accuracy:.3f}", flush=True)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for name, rules in results.items():
        print(name, {rule: round(statistics.mean(values), 3) for rule, values in rules.items()})
    return results


if __name__ == "__main__":
    main()
