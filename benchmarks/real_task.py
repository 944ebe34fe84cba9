"""GRPO on a real task while pruning: SmolLM2-135M-Instruct learns to answer in JSON (`json_task.py`).

    python benchmarks/real_task.py --data DIR --arc DIR/arc_easy_test.jsonl --arc-items 200 --steps 40 --seeds 0 1

DIR holds WikiText-2's `valid.txt` and `test.txt`. Each run is `--steps` steps of 16 completions (4 prompts x 4): a
third of them dense, then pruning, and the last quarter recovers with frozen masks. A one-shot start is pruned before
the first step, calibrated on `valid.txt` or, "from the task", half on that and half on the task's prompts with the
model's own answers, and trains with its masks held. Reported are the task's reward (64 held-out prompts, greedy), and
what the run cost elsewhere: WikiText-2 perplexity and ARC-Easy, as in `oneshot.py`, before and after. Results are
merged into --output run by run, what is there is not run again, and all are drawn beside it.
"""

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import json_task
import oneshot
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig

from mama_hf import MamaGRPOTrainer, MamaPruningConfig, calibration_windows, prune_model, sparsity_report


LEVELS = (0.5, 0.7)
BEFORE = "before training"
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"criterion": "magnitude"},
    "wanda": {"criterion": "wanda"},
    "mama": {},
    "mama, teacher": {"distillation_weight": 1.0},
    "mama, values moved": {"move_values": "least_squares", "update_every": 4},
    "mama, one-shot start": {},
    "mama, one-shot start from the task": {},
}
# methods that are pruned before the first step -> whether calibrated on the task, too
STARTS = {"mama, one-shot start": False, "mama, one-shot start from the task": True}
# name -> (fields of the recipe, method); the dense run has none
RUNS: dict[str, tuple[dict[str, Any] | None, str]] = {"dense": (None, "dense")} | {
    f"{method} {level}": ({**fields, "final_sparsity": level, "start": 1 / 3, "end": 0.75}, method)
    for level in LEVELS
    for method, fields in METHODS.items()
}


def evaluate(args: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    return json_task.greedy_reward(model, tokenizer) | oneshot.evaluate(args, model, tokenizer)


def load(args: argparse.Namespace) -> Any:
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)


def run(args: argparse.Namespace, tokenizer: Any, name: str, seed: int) -> dict[str, Any]:
    fields, method = RUNS[name]
    model, row = load(args), {}
    if method in STARTS:
        windows = calibration(args, model, tokenizer, from_task=STARTS[method])
        row["one_shot_seconds"] = prune_model(
            model, oneshot.recipe_of("mama", name.rpartition(" ")[2]), windows
        ).seconds
        row["start"] = evaluate(args, model, tokenizer)
    begin, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(args, folder, model, tokenizer, None if fields is None else MamaPruningConfig(**fields), seed)
    row |= {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu, "steps": args.steps}
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    row["rewards"] = [round(entry["reward"], 4) for entry in history]
    row["sparsity"] = 0.0 if fields is None else sparsity_report(model)["targets"]["sparsity"]
    return row | evaluate(args, model, tokenizer)


def calibration(args: argparse.Namespace, model: Any, tokenizer: Any, from_task: bool) -> list[torch.Tensor]:
    """Windows of WikiText-2, as in `oneshot.py`; from the task, half are its prompts with the model's answers."""
    windows = oneshot.calibration(args.data, tokenizer, seed=0)
    if from_task:
        windows[::2] = calibration_windows(json_task.dialogues(model, tokenizer), tokenizer, len(windows[::2]))
    return windows


def train(
    args: argparse.Namespace, folder: str, model: Any, tokenizer: Any, recipe: MamaPruningConfig | None, seed: int
) -> MamaGRPOTrainer:
    config = GRPOConfig(
        output_dir=folder,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=3,
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=json_task.NUM_COMPLETION_TOKENS,
        beta=0.0,
        seed=seed,
        use_cpu=args.device == "cpu",
        bf16=True,
        activation_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = MamaGRPOTrainer(
        model=model,
        reward_funcs=json_task.json_reward,
        args=config,
        train_dataset=json_task.task_dataset(seed + 1, 4 * args.steps),
        processing_class=tokenizer,
        pruning_config=recipe,
        teacher_model="snapshot" if recipe is not None and recipe.distillation_weight > 0 else None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def draw(results: dict[str, Any], path: Path) -> None:
    """What the task gained over what was forgotten: a point a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    markers = {"0.5": "o", "0.7": "s"}
    colors = {method: f"C{place}" for place, method in enumerate(METHODS)}
    for name, seeds in results.items():
        method, _, level = name.rpartition(" ")
        points = [(row["perplexity"], row["reward"]) for row in seeds.values()]
        if level in markers:
            axes.scatter(*zip(*points), marker=markers[level], color=colors[method], alpha=0.8)
        else:
            axes.scatter(*zip(*points), marker="*", s=90, color="black" if name == "dense" else "gray", label=name)
    for method, color in colors.items():
        axes.scatter([], [], color=color, label=method)
    for level, marker in markers.items():
        axes.scatter([], [], color="gray", marker=marker, label=f"{level} pruned")
    axes.set(xlabel="WikiText-2 perplexity", ylabel="held-out reward", xscale="log", ylim=(-0.03, 1.03))
    axes.set_title("GRPO while pruning, SmolLM2-135M-Instruct, JSON task (a point a seed)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/smollm2", help="Hub id or folder (examples/smollm2.py makes one)")
    parser.add_argument("--data", type=Path, required=True, help="folder with valid.txt and test.txt")
    parser.add_argument("--arc", type=Path, help="arc_easy_test.jsonl, for the accuracy on it")
    parser.add_argument("--arc-items", type=int, help="only the first so many items")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/real_task.json"))
    args = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if BEFORE not in oneshot.read(args.output):
        oneshot.write(args.output, BEFORE, "0", evaluate(args, load(args), tokenizer))
    for name, seed in ((name, seed) for seed in args.seeds for name in args.runs):
        if str(seed) in oneshot.read(args.output).get(name, {}):
            continue
        row = run(args, tokenizer, name, seed)
        oneshot.write(args.output, name, str(seed), row)
        print(f"{name}, seed {seed}: reward {row['reward']:.3f}, perplexity {row['perplexity']:.2f}", flush=True)
        gc.collect()  # the model is part of a cycle
    results = oneshot.read(args.output)
    draw(results, args.output.with_suffix(".png"))
    return results


if __name__ == "__main__":
    main()
