"""The experiment of the MAMA paper on SmolLM2-135M-Instruct: perplexity and a continuation, level by level.

    python benchmarks/paper_table.py --data DIR

The methods of `oneshot.py` are measured by it, at the paper's levels (what --results has already is not measured
again). Added here: inverted magnitude (the largest weights go; a sanity check), and the paper's rule as its authors'
code has it, which zeroes the pruned weights before it sums them: at three levels its weights are checked to be those
of magnitude pruning, bit for bit. The table is written to `benchmarks/paper_table.md`.
"""

import argparse
from pathlib import Path
from typing import Any

import oneshot
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mama_hf.config import MamaPruningConfig
from mama_hf.masks import select
from mama_hf.targets import find_targets


LEVELS = ["0.01", "0.05", *(f"{tenth / 10:.2f}" for tenth in range(1, 10)), "0.95", "0.99", "2:4", "4:8"]
METHODS = ["magnitude", "wanda", "sparsegpt", "mama"]
COLUMNS = {
    "inverted": "inverted magnitude",
    "magnitude": "magnitude",
    "published": "MAMA as published",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "mama": "MAMA (this package)",
}

INTRODUCTION = """# The paper's experiment, on SmolLM2-135M-Instruct

Written by `paper_table.py`: WikiText-2 perplexity after one-shot pruning (dense 24.49), 8 windows of 512 tokens, and
what the model writes after "University is", greedily.

What differs from the paper (arXiv 2505.14052): it has Llama-7B, of which every method may take more before it
suffers, a calibration of its own, and seven zero-shot tasks. Here it is a model of 135 M parameters, calibrated on 16
windows of 512 tokens of WikiText-2's validation text, and of the tasks ARC-Easy at 0.5 (in the README). The order of
magnitude, Wanda and SparseGPT is the same. The paper's own column is within 7 % of magnitude pruning's at all levels,
and it has to be: its published code sets the pruned weights to zero before it sums them up to spread the sum over the
kept ones, so that what is moved is always zero. `paper_table.py` applies that rule and finds the weights of magnitude
pruning, bit for bit. Here the values do move, by least squares, and the mask is chosen together with them: that is the
last column. At the lowest levels all methods agree. From 0.9 on none of them writes sense any more, though the last
column's perplexity is still far lower: what it has kept is the statistics of the calibration's kind of text.
"""


def key_of(level: str) -> str:
    """The level as `oneshot.py` writes it."""
    return level if ":" in level else str(float(level))


@torch.no_grad()
def prune_by_magnitude(model: Any, level: str, sign: int) -> None:
    """Zero each layer's smallest (sign 1) or largest (sign -1) weights."""
    config = oneshot.recipe_of("magnitude", level)
    for target in find_targets(model, MamaPruningConfig(), trainable_only=False):
        rows = target.to_rows(target.weight)
        score = sign * rows.abs()
        mask = select([score], [score], float(config.final_sparsity), "layer", config.n_of_m)[0]
        target.parameter.mul_(target.from_rows(mask))


@torch.no_grad()
def prune_as_published(model: Any, level: str) -> None:
    """Magnitude's mask; then the pruned values, which are zero by now, are summed and spread over the kept ones."""
    prune_by_magnitude(model, level, 1)
    for target in find_targets(model, MamaPruningConfig(), trainable_only=False):
        kept = target.parameter != 0
        pruned_values = target.parameter[~kept]
        target.parameter += pruned_values.sum() / max(1, int(kept.sum())) * kept


def measure_inverted(args: argparse.Namespace, tokenizer: Any, level: str) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    prune_by_magnitude(model, level, -1)
    return {"perplexity": oneshot.test_perplexity(args.data, model, tokenizer)}


def check_published(args: argparse.Namespace, level: str) -> None:
    """Raises `SystemExit` if the rule as published does anything that magnitude pruning does not."""
    published, magnitude = (AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32) for _ in range(2))
    prune_as_published(published, level)
    prune_by_magnitude(magnitude, level, 1)
    if not all(map(torch.equal, published.parameters(), magnitude.parameters())):
        raise SystemExit(f"at {level} the published rule differs from magnitude pruning after all")


def render(results: dict[str, Any]) -> str:
    """Two tables in Markdown: perplexity, and what the model writes."""
    heads = list(COLUMNS.values())
    rule = "|---" * (len(heads) + 1) + "|"
    lines = ["| level | " + " | ".join(heads) + " |", rule]
    for level in LEVELS:
        cells = [results["magnitude" if name == "published" else name][key_of(level)] for name in COLUMNS]
        lines.append(f"| {level} | " + " | ".join(number(cell["perplexity"]) for cell in cells) + " |")
    lines += [
        "",
        "| level | " + " | ".join(COLUMNS[name] for name in METHODS) + " |",
        "|---" * (len(METHODS) + 1) + "|",
    ]
    for level in LEVELS:
        cells = [results[name][key_of(level)]["sample"] for name in METHODS]
        lines.append(f"| {level} | " + " | ".join(one_line(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def number(value: float) -> str:
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def one_line(text: str) -> str:
    cleaned = "".join(letter if letter.isprintable() else " " for letter in text).replace("|", "\\|").strip()
    return cleaned[:60] or "(nothing)"


def main(argv: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/smollm2", help="Hub id or folder (examples/smollm2.py makes one)")
    parser.add_argument("--data", type=Path, required=True, help="folder with valid.txt and test.txt")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/oneshot.json"))
    parser.add_argument("--own-results", type=Path, default=Path("benchmarks/results/paper_table.json"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/paper_table.md"))
    args = parser.parse_args(argv)
    common = ["--model", str(args.model), "--data", str(args.data), "--output", str(args.results)]
    oneshot.main([*common, "--methods", *METHODS, "--levels", *map(key_of, LEVELS)])
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for level in ("0.50", "0.95", "2:4"):
        check_published(args, level)
    for level in LEVELS:
        if key_of(level) not in oneshot.read(args.own_results).get("inverted", {}):
            oneshot.write(args.own_results, "inverted", key_of(level), measure_inverted(args, tokenizer, level))
    table = render({**oneshot.read(args.results), **oneshot.read(args.own_results)})
    args.output.write_text(f"{INTRODUCTION}\n{table}", encoding="utf-8")
    print(table)
    return table


if __name__ == "__main__":
    main()
