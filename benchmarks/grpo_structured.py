"""Neurons and heads that go while GRPO trains, on the demo task; what is left is shrunk, saved, loaded and evaluated.

    python benchmarks/grpo_structured.py

The accuracy is that of the shrunk model, greedy, on 512 held-out prompts; the parameters are counted in it. Of runs
with heads, the shares that are gone and the held-out reward are kept step by step, and drawn beside the results.
"""

import itertools
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
from mix6_runs import END, START, mix6, post_train, pretrained, study
from transformers import AutoModelForCausalLM, TrainerCallback

from mama_hf import MamaPruningConfig, shrink, sparsity_report


matplotlib.use("Agg")
from matplotlib import pyplot


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
OUTPUT = "benchmarks/results/grpo_structured.json"


class Curve(TrainerCallback):
    """The share of each kind of group that is gone, and the newest held-out reward, at every logged step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "pruning/reward_check" in logs:
            shares = {kind: row["sparsity"] for kind, row in sparsity_report(kwargs["model"])["groups"].items()}
            self.rows.append({"step": state.global_step, "reward": logs["pruning/reward_check"], **shares})


def run(name: str, seed: int, tokenizer: Any, models: Path) -> dict[str, Any]:
    model, curve = pretrained(tokenizer, seed, models), Curve()
    recipe = MamaPruningConfig(**SPAN, **RUNS[name])
    masked, _ = post_train(model, tokenizer, seed, recipe, callbacks=[curve])
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
        "curve": curve.rows,
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """A panel for each run with heads, a line for each seed."""
    names = [name for name in RUNS if "head" in RUNS[name]["granularity"] and results.get(name)]
    figure, panels = pyplot.subplots(1, len(names), sharey=True, squeeze=False, figsize=(5.5 * len(names), 4))
    for axes, name in zip(panels[0], names):
        for index, row in enumerate(results[name].values()):
            curve = row["curve"]
            measured = [new for old, new in itertools.pairwise(curve) if new["reward"] != old["reward"]]
            for kind, color in {"neuron": "tab:blue", "head": "tab:orange"}.items():
                label = None if index else f"{kind}s gone"
                axes.plot([p["step"] for p in curve], [p[kind] for p in curve], color=color, alpha=0.7, label=label)
            label = None if index else "held-out reward after an update (low: it was taken back)"
            steps, rewards = [p["step"] for p in measured], [p["reward"] for p in measured]
            axes.scatter(steps, rewards, color="black", s=4, alpha=0.5, label=label)
        axes.set(title=name, xlabel="optimizer step", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    figure.legend(
        *panels[0][0].get_legend_handles_labels(), fontsize="small", loc="upper center", ncols=3, borderaxespad=0
    )
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    draw(study(__doc__, RUNS, OUTPUT, run), Path(OUTPUT).with_suffix(".png"))
