"""After one-shot pruning, recovery: SFT with frozen masks, from the starts that different methods give.

    python benchmarks/oneshot_recovery.py --data DIR --methods mama sparsegpt wanda --levels 0.5 0.7 2:4

SmolLM2-135M-Instruct is pruned as in `oneshot.py`, then trained on the same text (`valid.txt`) with its masks held,
and evaluated on `test.txt`. The trainer's recipe asks for what is there, so that nothing more is pruned. `dense` is
the same training without pruning. bf16 autocast; a start's runs differ in the order of the data (--seeds).
"""

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import oneshot
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from mama_hf import MamaPruningCallback, MamaPruningConfig, sparsity_report


def train(args: argparse.Namespace, model: Any, tokenizer: Any, method: str, level: str, seed: int) -> Any:
    trainer = SFTTrainer(
        model,
        sft_config(args, args.learning_rate, seed),
        train_dataset=train_dataset(args, tokenizer),
        processing_class=tokenizer,
        callbacks=None if method == "dense" else [MamaPruningCallback(held_recipe(method, level))],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer.train()


def sft_config(args: argparse.Namespace, learning_rate: float, seed: int) -> SFTConfig:
    return SFTConfig(
        output_dir="outputs/oneshot_recovery",
        max_steps=args.steps,
        learning_rate=learning_rate,
        warmup_steps=0.05,
        per_device_train_batch_size=args.batch_size,
        max_length=args.window,
        seed=seed,
        use_cpu=not torch.accelerator.is_available(),
        bf16=True,
        activation_checkpointing=False,
        save_strategy="no",
        report_to="none",
    )


def train_dataset(args: argparse.Namespace, tokenizer: Any) -> Dataset:
    """The whole of `valid.txt`, in windows."""
    text = (args.data / "valid.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    return Dataset.from_dict({"input_ids": ids[: len(ids) // args.window * args.window].view(-1, args.window)})


def held_recipe(method: str, level: str) -> MamaPruningConfig:
    """A recipe of the same sparsity that a trainer takes."""
    recipe = oneshot.recipe_of(method, level)
    return MamaPruningConfig(final_sparsity=recipe.final_sparsity, granularity=recipe.granularity)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/smollm2", help="Hub id or folder (examples/smollm2.py makes one)")
    parser.add_argument("--data", type=Path, required=True, help="folder with valid.txt and test.txt")
    parser.add_argument("--methods", nargs="+", default=["mama", "sparsegpt", "wanda"])
    parser.add_argument("--levels", nargs="+", default=["0.5", "0.7", "2:4"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--window", type=int, default=128, help="tokens of a training example")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/oneshot_recovery.json"))
    args = parser.parse_args(argv)
    args.iterations, args.seed = None, 0  # of `oneshot.prune`
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for level, method, seed in (
        (level, method, seed) for level in args.levels for method in args.methods for seed in args.seeds
    ):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        if method != "dense":
            oneshot.prune(args, model, tokenizer, oneshot.recipe_of(method, level, None))
        before = oneshot.test_perplexity(args.data, model, tokenizer)
        train(args, model, tokenizer, method, level, seed)
        after = oneshot.test_perplexity(args.data, model, tokenizer)
        sparsity = sparsity_report(model)["targets"]["sparsity"] if method != "dense" else 0.0
        settings = {"steps": args.steps, "tokens_per_step": args.batch_size * args.window}
        row = {"before": before, "after": after, "sparsity": sparsity, "learning_rate": args.learning_rate, **settings}
        oneshot.write(args.output, f"{method} {level}", str(seed), row)
        print(f"{method} {level} seed {seed}: {before:.2f} -> {after:.2f}", flush=True)
        del model
        gc.collect()
    return json.loads(args.output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
