"""Neurons and heads that go while GRPO trains, on the demo task; what is left is shrunk, saved, loaded and evaluated.

    python benchmarks/grpo_structured.py

The accuracy is that of the shrunk model, greedy, on 512 held-out prompts; the parameters are counted in it.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from mix6_runs import END, START, mix6, post_train, prepare, pretrained
from transformers import AutoModelForCausalLM

from mama_hf import MamaPruningConfig, shrink, sparsity_report


SPAN: dict[str, Any] = {"start": START, "end": END}
RUNS: dict[str, dict[str, Any]] = {
    "neurons 0.75": {"granularity": "neuron", "final_sparsity": 0.75},
    "neurons 0.75, values moved": {"granularity": "neuron", "final_sparsity": 0.75, "move_values": "least_squares"},
    "neurons 0.75, magnitude": {"granularity": "neuron", "final_sparsity": 0.75, "criterion": "magnitude"},
    "neurons + heads, auto": {"granularity": "neuron+head", "final_sparsity": "auto", "reward_tolerance": 0.05},
    "neurons + heads, auto, values moved": {
        **{"granularity": "neuron+head", "final_sparsity": "auto", "reward_tolerance": 0.05},
        "move_values": "least_squares",
    },
}


def run(name: str, seed: int, tokenizer: Any, models: Path) -> dict[str, Any]:
    model = pretrained(tokenizer, seed, models)
    masked, _ = post_train(model, tokenizer, seed, MamaPruningConfig(**SPAN, **RUNS[name]))
    groups = sparsity_report(model)["groups"]
    with tempfile.TemporaryDirectory() as folder:
        shrink(model).save_pretrained(folder)
        small = AutoModelForCausalLM.from_pretrained(folder)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return {
        "accuracy": mix6.greedy_accuracy(small, tokenizer),
        "accuracy_masked": masked,
        "groups": groups,
        "parameters": [model.num_parameters(), small.num_parameters()],
        "bytes": size,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--models", type=Path, default=Path("outputs/mix6"), help="folder of the pre-trained models")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/grpo_structured.json"))
    args = parser.parse_args(argv)
    tokenizer = prepare()
    results: dict[str, Any] = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else {}
    for name, seed in ((name, seed) for name in args.runs for seed in args.seeds):
        if str(seed) in results.setdefault(name, {}):
            continue
        row = results[name][str(seed)] = run(name, seed, tokenizer, args.models)
        print(f"{name}, seed {seed}: {row['accuracy']:.3f}, {row['parameters']}, {row['groups']}", flush=True)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
