"""Does moving values inside training help? The demo task with few, large mask updates, three seeds.

    python benchmarks/move_values.py

Each run is GRPO on mix6 as in `examples/demo.py`, from one pre-trained model a seed, with --updates mask updates from
step 20 to 110 of 150. The result is the accuracy on 512 held-out prompts after the run.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from mix6_runs import END, START, post_train, prepare, pretrained

from mama_hf import MamaPruningConfig


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.7, 0.8])
    parser.add_argument("--criteria", nargs="+", default=["magnitude", "mama"])
    parser.add_argument("--rules", nargs="+", default=["none", "mean", "least_squares"])
    parser.add_argument("--models", type=Path, default=Path("outputs/mix6"), help="folder of the pre-trained models")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/move_values.json"))
    args = parser.parse_args(argv)
    tokenizer = prepare()
    results: dict[str, Any] = {}
    for seed in args.seeds:
        for number, sparsity, criterion, rule in (
            (number, sparsity, criterion, rule)
            for number in args.updates
            for sparsity in args.sparsities
            for criterion in args.criteria
            for rule in args.rules
        ):
            # the first of the updates asks for a share already: a cubic schedule from step 20 would begin with zero
            every = (END - START) // number
            shape: dict[str, Any] = {"schedule": "one-shot", "start": (START + END) // 2}
            if number > 1:
                first = sparsity * (1 - (1 - 1 / number) ** 3)
                shape = {"start": START + every, "end": END, "update_every": every, "initial_sparsity": first}
            config = MamaPruningConfig(final_sparsity=sparsity, criterion=criterion, move_values=rule, **shape)
            accuracy, _ = post_train(pretrained(tokenizer, seed, args.models), tokenizer, seed, config)
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
