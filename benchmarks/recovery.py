"""After one-shot pruning, recovery with a teacher: SFT and distillation from the dense model, against SFT alone.

    python benchmarks/recovery.py --data DIR
    python benchmarks/recovery.py --data DIR --cases dense "unstructured 0.7" --learning-rates 1e-4 3e-4 --steps 200

SmolLM2-135M-Instruct is pruned by `mama` with values moved, as in `oneshot.py`; of neurons, what is left is shrunk.
Then it is trained as in `oneshot_recovery.py`, on `valid.txt`, and evaluated on `test.txt`. Masks are held where it is
not shrunk. `recovered` is the share of the gap to the dense model's perplexity that came back. The text is of the
test's kind, so that the dense model gains by the same training too: with the case "dense" it is trained, by SFT alone,
and `recovered_of_trained` is the share of the gap to that, at the same learning rate, steps and seed.
"""

import argparse
import gc
from pathlib import Path
from typing import Any

import oneshot
import torch
from oneshot_recovery import sft_config, train_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import PrinterCallback

from mama_hf import MamaPruningConfig, MamaSFTTrainer, shrink


# name -> (weight of the divergence, whether the teacher was trained on the same text before, with seed 0)
METHODS = {"sft": (0.0, False), "sft+distillation": (1.0, False), "sft+distillation, trained teacher": (1.0, True)}


def split(case: str) -> tuple[str, float]:
    """("neuron", 0.25) of "neuron 0.25"; ("dense", 0.0) of "dense"."""
    granularity, _, level = case.partition(" ")
    return granularity, float(level or 0)


def start_of(args: argparse.Namespace, tokenizer: Any, case: str) -> Path:
    """Folder with the pruned model. It is pruned once: what an earlier run left there is used again."""
    granularity, level = split(case)
    folder = args.starts / case.replace(" ", "-")
    if granularity == "dense":
        return Path(args.model)
    if not folder.is_dir():
        model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        recipe = MamaPruningConfig(final_sparsity=level, granularity=granularity, move_values="least_squares")
        oneshot.prune(args, model, tokenizer, recipe)
        save(model if granularity == "unstructured" else shrink(model), folder)
    return folder


def trained_dense(args: argparse.Namespace, tokenizer: Any, rate: float, seed: int) -> Path:
    """Folder with the dense model after the same SFT. It is trained once, as `start_of` prunes once."""
    args = argparse.Namespace(**{**vars(args), "seed": seed})
    folder = args.starts / f"dense-{rate:g}-{args.steps}-{seed}"
    if not folder.is_dir():
        model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        train(args, model, tokenizer, "dense", "sft", rate)
        save(model, folder)
    return folder


def save(model: Any, folder: Path) -> None:
    unfinished = folder.with_name(f"{folder.name}.tmp")
    model.save_pretrained(unfinished)
    unfinished.rename(folder)


def train(args: argparse.Namespace, model: Any, tokenizer: Any, case: str, method: str, rate: float) -> None:
    granularity, level = split(case)
    held = level if granularity == "unstructured" else 0.0  # a shrunk model has nothing more to lose
    weight, is_trained = METHODS[method]
    teacher = trained_dense(args, tokenizer, rate, seed=0) if is_trained else args.model
    recipe = MamaPruningConfig(final_sparsity=held, distillation_weight=weight)
    trainer = MamaSFTTrainer(
        model,
        sft_config(args, rate, args.seed),
        train_dataset=train_dataset(args, tokenizer),
        processing_class=tokenizer,
        pruning_config=recipe,
        teacher_model=teacher if weight else None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def measure(args: argparse.Namespace, tokenizer: Any, case: str, method: str, rate: float) -> dict[str, Any]:
    model: Any = AutoModelForCausalLM.from_pretrained(start_of(args, tokenizer, case), dtype=torch.float32)
    before = oneshot.test_perplexity(args.data, model, tokenizer)
    if case == "dense":
        model = AutoModelForCausalLM.from_pretrained(
            trained_dense(args, tokenizer, rate, args.seed), dtype=torch.float32
        )
    else:
        train(args, model, tokenizer, case, method, rate)
    return {
        "before": before,
        "after": oneshot.test_perplexity(args.data, model, tokenizer),
        "parameters": model.num_parameters(),
        "zeros": sum(int((parameter == 0).sum()) for parameter in model.parameters()),
        **{"learning_rate": rate, "steps": args.steps, "tokens_per_step": args.batch_size * args.window},
    }


def shares(row: dict[str, Any], trained: dict[str, Any] | None, dense: float) -> dict[str, float]:
    """How much of the gap to the dense model came back."""
    gain, found = row["before"] - row["after"], {"recovered": (row["before"] - row["after"]) / (row["before"] - dense)}
    return found if trained is None else {**found, "recovered_of_trained": gain / (row["before"] - trained["after"])}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/smollm2", help="Hub id or folder (examples/smollm2.py makes one)")
    parser.add_argument("--data", type=Path, required=True, help="folder with valid.txt and test.txt")
    parser.add_argument("--cases", nargs="+", default=["dense", "neuron 0.25", "neuron 0.5"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="not for dense")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-4])
    parser.add_argument("--seed", type=int, default=0, help="of calibration and of the order of the data")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--window", type=int, default=128, help="tokens of a training example")
    parser.add_argument("--starts", type=Path, default=Path("outputs/recovery"), help="folder for the pruned models")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/recovery.json"))
    args = parser.parse_args(argv)
    args.iterations = None  # of `oneshot.prune`
    args.output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for case in args.cases:
        for method in ["sft"] if case == "dense" else args.methods:
            for rate in args.learning_rates:
                key = f"{method}, learning rate {rate:g}, {args.steps} steps, seed {args.seed}"
                if key in oneshot.read(args.output).get(case, {}):
                    continue
                row = measure(args, tokenizer, case, method, rate)
                oneshot.write(args.output, case, key, row)
                print(f"{case}, {key}: {row['before']:.2f} -> {row['after']:.2f}", flush=True)
                gc.collect()
    return summary(args.output)


def summary(path: Path) -> dict[str, Any]:
    """All results, with the shares that came back once the dense model is among them."""
    results = oneshot.read(path)
    trained = results.get("dense", {})
    for case, rows in results.items():
        for key, row in rows.items():
            if trained and case != "dense":
                twin = trained.get("sft, learning rate" + key.partition(", learning rate")[2])
                row |= shares(row, twin, next(iter(trained.values()))["before"])
                oneshot.write(path, case, key, row)
    return results


if __name__ == "__main__":
    main()
