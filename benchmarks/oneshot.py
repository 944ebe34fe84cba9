"""One-shot pruning of SmolLM2-135M-Instruct: WikiText-2 perplexity over sparsity, method by method.

    python benchmarks/oneshot.py --data DIR --methods mama sparsegpt wanda --levels 0.5 0.7 2:4

DIR holds `valid.txt` (calibration: 16 windows of 512 tokens at random offsets, seed 0) and `test.txt` (evaluation: 8
windows of 512, evenly spaced). Outside the calibration's domain, 4 windows of 512 of the licence and of the standard
library's `argparse.py` are evaluated. Each result is merged into --output at once, and all are drawn beside it; what
is there already is not measured again. Times are of `prune_model` alone; `cpu_seconds`, of the process, is the fair
one where other work shares the machine. The peak of the resident memory is that of `prune_model` (Linux); what an
earlier model has left to the allocator counts, so that only first runs of a process compare.
"""

import argparse
import gc
import inspect
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mama_hf import MamaPruningConfig, calibration_windows, prune_model
from mama_hf.evaluation import generate_samples, multiple_choice, perplexity


ROOT = Path(__file__).resolve().parents[1]
METHODS: dict[str, dict[str, str]] = {
    "mama": {"criterion": "mama", "move_values": "least_squares"},
    "mama-owl": {"criterion": "mama", "move_values": "least_squares", "allocation": "owl"},
    "sparsegpt": {"criterion": "sparsegpt"},
    "wanda": {"criterion": "wanda"},
    "wanda-owl": {"criterion": "wanda", "allocation": "owl"},
    "wanda-least-squares": {"criterion": "wanda", "move_values": "least_squares"},
    "magnitude": {"criterion": "magnitude", "scope": "layer"},
    "magnitude-row": {"criterion": "magnitude", "scope": "row"},
    "magnitude-mean": {"criterion": "magnitude", "scope": "row", "move_values": "mean"},
    "magnitude-bias": {"criterion": "magnitude", "scope": "row", "move_values": "bias"},
}


def recipe_of(method: str, level: str, scope: str | None = None) -> MamaPruningConfig:
    settings: dict[str, Any] = dict(METHODS[method])
    if scope is not None:
        settings["scope"] = scope
    if ":" in level:
        kept, group = map(int, level.split(":"))
        settings.pop("scope", None)
        return MamaPruningConfig(granularity=level, final_sparsity=1 - kept / group, **settings)
    return MamaPruningConfig(final_sparsity=float(level), **settings)


def measure(args: argparse.Namespace, tokenizer: Any, method: str, level: str) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    result = {} if method == "dense" else prune(args, model, tokenizer, recipe_of(method, level, args.scope))
    result |= evaluate(args, model, tokenizer)
    if args.save:
        model.save_pretrained(args.save / f"{method}-{level}")
        tokenizer.save_pretrained(args.save / f"{method}-{level}")
    return result


def prune(args: argparse.Namespace, model: Any, tokenizer: Any, recipe: MamaPruningConfig) -> dict[str, Any]:
    windows = calibration(args.data, tokenizer, args.seed)
    if recipe.criterion == "magnitude" and recipe.move_values in ("none", "mean"):
        windows = [windows[0][:, :16]]  # weights alone decide
    reset_peak()
    start, cpu = time.perf_counter(), time.process_time()
    report = prune_model(model, recipe, windows, iterations=args.iterations)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "solver_seconds": report.seconds,
        "sparsity": report.sparsity,
        "peak_bytes": status_bytes("VmHWM"),
    }


def calibration(data: Path, tokenizer: Any, seed: int) -> list[Any]:
    return calibration_windows((data / "valid.txt").read_text(encoding="utf-8"), tokenizer, 16, 512, seed)


def test_perplexity(data: Path, model: Any, tokenizer: Any) -> float:
    text = (data / "test.txt").read_text(encoding="utf-8")
    return perplexity(model, tokenizer, text, 512, num_windows=8)["perplexity"]


def evaluate(args: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    result: dict[str, Any] = {"perplexity": test_perplexity(args.data, model, tokenizer)}
    others = {"licence": ROOT / "LICENSE", "python": Path(str(inspect.getsourcefile(argparse)))}
    result["other_perplexity"] = {
        name: perplexity(model, tokenizer, path.read_text(encoding="utf-8"), 512, num_windows=4)["perplexity"]
        for name, path in others.items()
    }
    result["sample"] = generate_samples(model, tokenizer, ["University is"], max_new_tokens=16)[0]
    if args.arc:
        result["arc_easy"] = arc_scores(args.arc, args.arc_items, model, tokenizer)
    return result


def reset_peak() -> None:
    """Let the kernel count this process's peak of resident memory from now on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def status_bytes(field: str) -> int:
    """A size of this process, as "VmHWM", the peak of its resident memory."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def arc_items(path: Path, number: int | None) -> list[dict[str, Any]]:
    """The first lines of ARC, as lm-evaluation-harness puts them."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:number]]
    return [
        {"context": f"Question: {row['question']}\nAnswer:", "choices": row["choices"], "answer": row["label"]}
        for row in rows
    ]


def arc_scores(path: Path, number: int | None, model: Any, tokenizer: Any) -> dict[str, Any]:
    scores = multiple_choice(model, tokenizer, arc_items(path, number))
    return {key: value for key, value in scores.items() if not key.startswith("predictions")}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(path: Path, name: str, key: str, row: dict[str, Any]) -> None:
    """Merge one result into the file, which another run may have added to meanwhile."""
    results = read(path)
    results.setdefault(name, {})[key] = row
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for method in METHODS:
        levels = results.get(method, {})
        points = sorted((float(level), row["perplexity"]) for level, row in levels.items() if _is_number(level))
        if points:
            axes.plot(*zip(*points), marker="o", label=method)
    if "dense" in results:
        axes.axhline(results["dense"]["0"]["perplexity"], color="black", linestyle=":", label="dense")
    axes.set(xlabel="sparsity", ylabel="WikiText-2 perplexity", yscale="log", title="One-shot, SmolLM2-135M-Instruct")
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def _is_number(level: str) -> bool:
    return ":" not in level


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/smollm2", help="Hub id or folder (examples/smollm2.py makes one)")
    parser.add_argument("--data", type=Path, required=True, help="folder with valid.txt and test.txt")
    parser.add_argument("--methods", nargs="+", choices=["dense", *METHODS], default=["mama", "sparsegpt", "wanda"])
    parser.add_argument("--levels", nargs="+", default=["0.5", "0.7", "2:4"])
    parser.add_argument("--iterations", type=int, help="solver steps of the least-squares methods")
    parser.add_argument("--scope", choices=("layer", "row"))
    parser.add_argument("--arc", type=Path, help="arc_easy_test.jsonl, for the accuracy on it")
    parser.add_argument("--arc-items", type=int, help="only the first so many items")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration windows")
    parser.add_argument("--save", type=Path, help="folder to save the pruned models to")
    parser.add_argument("--suffix", default="", help="added to the methods' names in the results")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/oneshot.json"))
    args = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for level in args.levels:
        for method in args.methods:
            name, key = method + args.suffix, "0" if method == "dense" else level
            if key in read(args.output).get(name, {}):
                continue
            row = measure(args, tokenizer, method, level)
            gc.collect()  # the model is part of a cycle
            print(f"{name} {key}: perplexity {row['perplexity']:.2f}, {row.get('cpu_seconds', 0):.0f} s", flush=True)
            write(args.output, name, key, row)
    results = read(args.output)
    draw(results, args.output.with_suffix(".png"))
    return results


if __name__ == "__main__":
    main()
