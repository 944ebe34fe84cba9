"""The demo: a model is pre-trained, then post-trained with GRPO, and loses most of its weights on the way.

    make demo                               # or: python examples/demo.py; some minutes on two CPU cores

Five GRPO runs start from the same pre-trained model: dense, 80 % zeros by magnitude, 80 % by `mama`, which lets the
rewards decide what goes, `auto`, where they also decide how much goes, and `neurons`, which loses three of four FFN
neurons. All are evaluated on held-out prompts; the third model is saved and loaded through the Auto classes before,
and the last one cut to size as well. The output folder gets `results.json`, `pruning.png`, `model/`, `small-model/`;
--record adds the results to a file with those of other seeds.
"""

import argparse
import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import mix6
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging

from mama_hf import MamaGRPOTrainer, MamaPruningConfig, shrink, sparsity_report


matplotlib.use("Agg")
from matplotlib import pyplot


SPARSITY = 0.80
TOLERANCE = 0.05  # of the reward, with "auto"
NEURONS = 0.75  # share of the FFN neurons that go in the last run
COLORS = {
    "dense": "tab:gray",
    "magnitude": "tab:orange",
    "mama": "tab:blue",
    "auto": "tab:green",
    "neurons": "tab:red",
}


def recipe(name: str, max_steps: int) -> MamaPruningConfig | None:
    """Zeros on a cubic schedule; the last quarter of the run recovers with frozen masks."""
    span: dict[str, Any] = {"start": round(max_steps * 20 / 150), "end": round(max_steps * 110 / 150)}
    if name == "dense":
        return None
    if name == "auto":
        return MamaPruningConfig(final_sparsity="auto", reward_tolerance=TOLERANCE, **span)
    if name == "neurons":
        return MamaPruningConfig(granularity="neuron", final_sparsity=NEURONS, **span)
    return MamaPruningConfig(final_sparsity=SPARSITY, criterion=name, **span)  # type: ignore[arg-type]


def post_train(
    name: str,
    start: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    pruning_config: MamaPruningConfig | None,
    output_dir: Path,
    seed: int,
    max_steps: int,
) -> tuple[LlamaForCausalLM, list[dict[str, float]]]:
    """One GRPO run from the weights `start`; returns the model and the trainer's log."""
    model = mix6.build_model(tokenizer, seed)
    model.load_state_dict(start)
    arguments = mix6.grpo_arguments(
        str(output_dir / "runs" / name), seed, max_steps=max_steps, logging_steps=5, disable_tqdm=False
    )
    trainer = MamaGRPOTrainer(
        model=model,
        reward_funcs=mix6.exact_match_reward,
        args=arguments,
        train_dataset=mix6.grpo_dataset(seed),
        processing_class=tokenizer,
        pruning_config=pruning_config,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(OneLineProgress(name))
    trainer.train()
    return model, [entry for entry in trainer.state.log_history if "loss" in entry]


class OneLineProgress(ProgressCallback):
    """The progress bar with the reward and the sparsity in it, instead of a dict of logs every few steps."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.training_bar.set_description(f"GRPO, {self.name:9}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:  # the closing log has no sparsity
            sparsity = float(logs.get("pruning/sparsity", 0.0))
            self.training_bar.set_postfix_str(f"reward {float(logs['reward']):.2f}, sparsity {sparsity:.2f}")


def reload(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Any:
    """The model as it comes out of a folder that it was saved to."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def measure(
    masked: Any, small: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, small_folder: Path
) -> dict[str, dict[str, float]]:
    """Parameters, bytes on disk and seconds for the held-out prompts (the fastest of three), before and after."""
    times: dict[str, list[float]] = {"before": [], "after": []}
    for _ in range(3):  # in turn, so that another load on the machine hits both
        for key, model in (("before", masked), ("after", small)):
            start = time.perf_counter()
            mix6.greedy_accuracy(model, tokenizer)
            times[key].append(time.perf_counter() - start)
    return {
        key: {
            "parameters": model.num_parameters(),
            "bytes": sum(path.stat().st_size for path in place.glob("*.safetensors")),
            "seconds": round(min(times[key]), 3),
        }
        for key, model, place in (("before", masked, folder), ("after", small, small_folder))
    }


def plot(histories: dict[str, list[dict[str, float]]], accuracies: dict[str, float], path: Path) -> None:
    """Reward and sparsity over the steps of each run, one above the other."""
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=[3, 2])
    for name, history in histories.items():
        steps = [entry["step"] for entry in history]
        label = f"{name} (held-out accuracy {accuracies[name]:.3f})"
        above.plot(steps, [entry["reward"] for entry in history], color=COLORS[name], label=label)
    for name in ("mama", "auto"):
        pruned = [
            (entry["step"], entry["pruning/sparsity"]) for entry in histories[name] if "pruning/sparsity" in entry
        ]
        label = f"{name}, and magnitude" if name == "mama" else name
        below.plot(*zip(*pruned), color=COLORS[name], label=label)
    above.set(ylabel="mean training reward", ylim=(-0.03, 1.03), title="GRPO on mix6 while it is pruned")
    above.legend(loc="lower left")
    below.legend(loc="lower right")
    below.set(xlabel="optimizer step", ylabel="zeros", ylim=(-0.03, 1.03))
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def record(results: dict[str, Any], path: Path) -> None:
    """Put the results among those of other seeds."""
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    recorded[str(results["seed"])] = results
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(recorded, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--record", type=Path, help="JSON file that gets the results too, by seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pretraining-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=150, help="GRPO steps of each run")
    args = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.set_verbosity_error()
    torch.set_num_threads(1)  # at this size a second thread only waits
    console, began = Console(), time.perf_counter()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    tokenizer = mix6.build_tokenizer()
    model = mix6.build_model(tokenizer, args.seed)
    mix6.pretrain(model, tokenizer, args.seed, num_steps=args.pretraining_steps)
    before = mix6.greedy_accuracy(model, tokenizer)
    console.print(f"Pre-trained: held-out accuracy {before:.3f} (the reward wants one answer of the three it gives).")
    start = {name: weight.clone() for name, weight in model.state_dict().items()}

    results: dict[str, Any] = {"seed": args.seed, "pretrained": {"accuracy": before}}
    histories = {}
    for name in COLORS:
        pruning_config = recipe(name, args.steps)
        model, histories[name] = post_train(
            name, start, tokenizer, pruning_config, args.output_dir, args.seed, args.steps
        )
        results[name] = {}
        if pruning_config is not None:
            results[name]["sparsity"] = sparsity_report(model)["targets"]["sparsity"]
        if name == "mama":
            model = reload(model, tokenizer, args.output_dir / "model")
            tokenizer = AutoTokenizer.from_pretrained(args.output_dir / "model")
        if name == "neurons":
            masked, folder = model, args.output_dir / "small-model"
            model = reload(shrink(masked), tokenizer, folder)
            # the zeros of `model/` take as many bytes as those of the neurons do before they are cut
            results[name] |= measure(masked, model, tokenizer, args.output_dir / "model", folder)
        results[name]["accuracy"] = mix6.greedy_accuracy(model, tokenizer)

    results["seconds"] = round(time.perf_counter() - began, 1)
    packages = ("mama-hf", "torch", "transformers", "trl", "accelerate")
    results["versions"] = {package: version(package) for package in packages}
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if args.record is not None:
        record(results, args.record)
    accuracies = {name: results[name]["accuracy"] for name in histories}
    plot(histories, accuracies, args.output_dir / "pruning.png")
    table = Table(title=f"Held-out accuracy after GRPO, seed {args.seed}", title_justify="left")
    for column in ("run", "zeros in the linear layers", "accuracy"):
        table.add_column(column)
    for name in histories:
        table.add_row(name, f"{results[name].get('sparsity', 0.0):.4f}", f"{accuracies[name]:.3f}")
    console.print(table)
    before, after = results["neurons"]["before"], results["neurons"]["after"]
    console.print(
        f"Zeros alone change nothing in size: {before['parameters']:,} parameters, {before['bytes']:,} bytes, "
        f"{before['seconds']:.2f} s for the held-out prompts. Cut out, the neurons leave {after['parameters']:,} "
        f"parameters, {after['bytes']:,} bytes, {after['seconds']:.2f} s."
    )
    console.print(
        f"{results['seconds']:.0f} s. results.json, pruning.png, model/ and small-model/ are in {args.output_dir}."
    )
    return results


if __name__ == "__main__":
    main()
