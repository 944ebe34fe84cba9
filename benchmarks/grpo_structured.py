"""Neurons and heads that go while GRPO trains, on the demo task; what is left is shrunk, saved, loaded and evaluated.

    python benchmarks/grpo_structured.py

The accuracy is that of the shrunk model, greedy, on 512 held-out prompts; the parameters are counted in it.
"""

import tempfile
from pathlib import Path
from typing import Any

from mix6_runs import END, START, mix6, post_train, pretrained, study
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


if __name__ == "__main__":
    study(__doc__, RUNS, "benchmarks/results/grpo_structured.json", run)
