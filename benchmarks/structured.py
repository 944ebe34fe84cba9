"""One-shot structured pruning of SmolLM2-135M-Instruct: WikiText-2 perplexity, and the parameters that it costs.

    python benchmarks/structured.py --data DIR --cases neuron head layer --levels 0.25 0.5

Calibration and evaluation are those of `benchmarks/oneshot.py`. `removed` counts the parameters of what is wholly
zero, or dropped: what can be cut out of the model. Each result is merged into --output at once; what is there already
is not measured again.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from oneshot import read, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from mama_hf import MamaPruningConfig, calibration_windows, prune_model
from mama_hf.coupling import find_coupled_groups
from mama_hf.evaluation import perplexity
from mama_hf.groups import alive, members_of


# how groups are chosen, and what becomes of the values
METHODS: dict[str, dict[str, str]] = {
    "mama": {"criterion": "mama", "move_values": "least_squares"},
    "mama-global": {"criterion": "mama", "move_values": "least_squares", "scope": "global"},
    "activation-least-squares": {"criterion": "wanda", "move_values": "least_squares"},
    "activation": {"criterion": "wanda"},
    "weight-norm": {"criterion": "magnitude"},
}
BLOCK_INFLUENCE = "block-influence"  # the one rule for whole layers


def measure(args: argparse.Namespace, case: str, method: str, level: float) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    text = (args.data / "valid.txt").read_text(encoding="utf-8")
    windows = calibration_windows(text, tokenizer, 16, 512, args.seed)
    before = sum(parameter.numel() for parameter in model.parameters())
    result: dict[str, Any] = {}
    if case != "dense":
        recipe = MamaPruningConfig(final_sparsity=level, granularity=case, **METHODS.get(method, {}))
        start, cpu = time.perf_counter(), time.process_time()
        report = prune_model(model, recipe, windows)
        result = {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu,
            "sparsity": report.sparsity,
            "zeros_by_layer": [row["zeros"] for row in report["layers"].values()],
        }
    left = sum(parameter.numel() for parameter in model.parameters())
    test = (args.data / "test.txt").read_text(encoding="utf-8")
    result |= {"parameters": before, "removed": before - left + num_cuttable(model)}
    return result | {"perplexity": perplexity(model, tokenizer, test, 512, num_windows=8)["perplexity"]}


def num_cuttable(model: Any) -> int:
    """Parameters of the neurons and heads that are wholly zero."""
    total = 0
    for group in find_coupled_groups(model, "neuron+head"):
        size = sum(member.parameter.numel() for member in members_of(group)) // group.num_groups
        total += size * (group.num_groups - int(alive(group).sum()))
    return total


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/smollm2", help="Hub id or folder (examples/smollm2.py makes one)")
    parser.add_argument("--data", type=Path, required=True, help="folder with valid.txt and test.txt")
    parser.add_argument(
        "--cases", nargs="+", default=["neuron"], choices=["dense", "neuron", "head", "neuron+head", "layer"]
    )
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="not for layers")
    parser.add_argument("--levels", nargs="+", type=float, default=[0.25, 0.5], help="fractions of the groups")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration windows")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/structured.json"))
    args = parser.parse_args(argv)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for case in args.cases:
        methods = {"dense": ["dense"], "layer": [BLOCK_INFLUENCE]}.get(case, args.methods)
        for level in [0.0] if case == "dense" else args.levels:
            for method in methods:
                name, key = f"{case} {level:g}", method
                if key in read(args.output).get(name, {}):
                    continue
                row = measure(args, case, method, level)
                write(args.output, name, key, row)
                print(f"{name} {key}: perplexity {row['perplexity']:.2f}, {row['removed']:,} removed", flush=True)
    return read(args.output)


if __name__ == "__main__":
    main()
