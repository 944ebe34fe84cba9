"""Which score, scope and options keep the reward: GRPO on the demo task while it is pruned.

    python benchmarks/reward_study.py --seeds 0 1 2 3 4                       # the table of the README
    python benchmarks/reward_study.py --seeds 0 1 2 --variants all --sparsities 0.85 0.9

Every run starts from its seed's pre-trained model and has the same budget: 150 steps of 32 prompts x 8 completions,
pruned by the cubic schedule from step 20 to 110. The number is the greedy accuracy on 512 held-out prompts. Results
are merged into --output run by run (what is there is not run again) and drawn beside it.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from mix6_runs import END, START, post_train, prepare, pretrained

from mama_hf import MamaPruningConfig, criteria
from mama_hf.criteria import CRITERIA, Criterion


# The family |w|^a x movement^b: name -> (criterion that stands for "mama" in the run, fields of the recipe)
SQUARE = ("gradient_square",)
VARIANTS: dict[str, tuple[Criterion, dict[str, Any]]] = {
    "mama": (CRITERIA["mama"], {}),
    "magnitude": (CRITERIA["magnitude"], {}),
    "wanda": (CRITERIA["wanda"], {}),
    "taylor": (CRITERIA["taylor"], {}),
    "random": (CRITERIA["random"], {}),
    # the others: what was tried for "mama"
    "|w| RMS(g)": (
        Criterion(lambda weight, gradient_square: weight.abs() * gradient_square.sqrt(), SQUARE, "global"),
        {},
    ),
    "|w| RMS(g)^1/4": (
        Criterion(lambda weight, gradient_square: weight.abs() * gradient_square**0.125, SQUARE, "global"),
        {},
    ),
    "|w|^2 RMS(g)^1/2": (
        Criterion(lambda weight, gradient_square: weight.square() * gradient_square**0.25, SQUARE, "global"),
        {},
    ),
    "(|w| EMA|g w|)^1/2": (
        Criterion(lambda weight, taylor: (weight.abs() * taylor).sqrt(), ("taylor",), "global"),
        {"ema_decay": 0.9},
    ),
    "(|w| sum|g w|)^1/2": (
        Criterion(lambda weight, taylor: (weight.abs() * taylor).sqrt(), ("taylor",), "global"),
        {},
    ),
    "mama, layer scope": (CRITERIA["mama"], {"scope": "layer"}),
    "mama, EMA 0.8": (CRITERIA["mama"], {"ema_decay": 0.8}),
    "mama, EMA 0.97": (CRITERIA["mama"], {"ema_decay": 0.97}),
    "mama, regrowth 0.1": (CRITERIA["mama"], {"regrowth": 0.1}),
    "mama, regrowth 0.2": (CRITERIA["mama"], {"regrowth": 0.2}),
    "mama, EMA 0.97, regrowth 0.1": (CRITERIA["mama"], {"ema_decay": 0.97, "regrowth": 0.1}),
    "mama, values moved": (CRITERIA["mama"], {"move_values": "least_squares"}),
    "mama, values moved, an update every 10 steps": (
        CRITERIA["mama"],
        {"move_values": "least_squares", "update_every": 10},
    ),
    "mama, values moved, an update every 30 steps": (
        CRITERIA["mama"],
        {"move_values": "least_squares", "update_every": 30},
    ),
    "mama, teacher from the start of pruning": (CRITERIA["mama"], {"distillation_weight": 1.0}),
    "mama, values moved, that teacher": (
        CRITERIA["mama"],
        {"move_values": "least_squares", "distillation_weight": 1.0},
    ),
    "mama, an update every 5 steps": (CRITERIA["mama"], {"update_every": 5}),
    "mama, an update every step": (CRITERIA["mama"], {"update_every": 1}),
}
DRAWN = ["mama", "mama, values moved", "magnitude", "wanda", "taylor", "random"]


def run(seed: int, sparsity: float, variant: str, tokenizer: Any, folder: Path) -> float:
    criterion, fields = VARIANTS[variant]
    name = variant if variant in CRITERIA else "mama"
    shipped = criteria.CRITERIA[name]
    criteria.CRITERIA[name] = criterion
    try:
        recipe = MamaPruningConfig(final_sparsity=sparsity, start=START, end=END, criterion=name, **fields)  # type: ignore[arg-type]
        teacher = {"teacher_model": "snapshot"} if recipe.distillation_weight > 0 else {}
        return post_train(pretrained(tokenizer, seed, folder), tokenizer, seed, recipe, **teacher)[0]
    finally:
        criteria.CRITERIA[name] = shipped


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy over sparsity: means, and the range over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name in DRAWN:
        points = sorted((float(level), list(seeds.values())) for level, seeds in results.get(name, {}).items())
        if points:
            levels = [level for level, _ in points]
            means = [statistics.mean(values) for _, values in points]
            (line,) = axes.plot(levels, means, marker="o", label=name)
            low, high = [min(values) for _, values in points], [max(values) for _, values in points]
            axes.fill_between(levels, low, high, color=line.get_color(), alpha=0.15)
    axes.set(xlabel="zeros in the linear layers", ylabel="held-out accuracy", ylim=(-0.03, 1.03))
    axes.set_title("GRPO while pruning, demo task (mean and range of the seeds)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.85, 0.9])
    parser.add_argument("--variants", nargs="+", default=DRAWN, help='names of VARIANTS, or "all"')
    parser.add_argument("--models", type=Path, default=Path("outputs/mix6"), help="folder of the pre-trained models")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/reward_study.json"))
    args = parser.parse_args(argv)
    tokenizer = prepare()
    variants = list(VARIANTS) if args.variants == ["all"] else args.variants
    runs = [(s, level, v) for s in args.seeds for level in args.sparsities for v in variants]
    for seed, sparsity, variant in runs:
        results = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else {}
        row = results.setdefault(variant, {}).setdefault(str(sparsity), {})
        if str(seed) in row:
            continue
        row[str(seed)] = run(seed, sparsity, variant, tokenizer, args.models)
        print(f"{variant}, {sparsity}, seed {seed}: {row[str(seed)]:.3f}", flush=True)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    results = json.loads(args.output.read_text(encoding="utf-8"))
    draw(results, args.output.with_suffix(".png"))
    return results


if __name__ == "__main__":
    main()
