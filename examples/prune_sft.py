"""Prune a causal language model while TRL's `SFTTrainer` fine-tunes it on plain text; `--sparsity 0` keeps it dense.

For example, with half of the weights gone at the end, anywhere or two of each four:
    python examples/smollm2.py                                             # a 135M model, once
    python examples/prune_sft.py --dataset train.txt --eval-file test.txt
    python examples/prune_sft.py --dataset train.txt --eval-file test.txt --granularity 2:4
    python examples/prune_sft.py --dataset train.txt --eval-file test.txt --distillation-weight 1 --teacher snapshot
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from mama_hf import MamaPruningConfig, MamaSFTTrainer, sparsity_report
from mama_hf.evaluation import perplexity


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/smollm2", help="Hub id or folder")
    parser.add_argument("--dataset", required=True, help="a .txt file, or a Hub id with a `text` column")
    parser.add_argument("--dataset-config", help="configuration of the Hub dataset")
    parser.add_argument("--eval-file", type=Path, help="text file whose perplexity is reported before and after")
    parser.add_argument("--output-dir", default="outputs/sft")
    parser.add_argument("--granularity", default="unstructured", help='"unstructured", or N kept of M: "2:4"')
    parser.add_argument("--criterion", default="mama")
    parser.add_argument("--sparsity", type=float, default=0.5, help="fraction of zeros; 0: dense fine-tuning")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--window", type=int, default=256, help="tokens of a training example")
    parser.add_argument("--eval-window", type=int, default=512, help="tokens of an evaluation window")
    parser.add_argument("--num-eval-windows", type=int, default=8)
    parser.add_argument("--distillation-weight", type=float, default=0.0, help="of the divergence from the teacher")
    parser.add_argument("--teacher", help='"initial", "snapshot", a Hub id or a folder')
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def load_text(dataset: str, config: str | None) -> str:
    if dataset.endswith(".txt"):
        return Path(dataset).read_text(encoding="utf-8")
    return "\n".join(load_dataset(dataset, config, split="train")["text"])


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    ids = torch.tensor(tokenizer(load_text(args.dataset, args.dataset_config), verbose=False).input_ids)
    rows = Dataset.from_dict({"input_ids": ids[: len(ids) // args.window * args.window].view(-1, args.window)})
    teacher = args.teacher
    recipe = MamaPruningConfig(
        final_sparsity=args.sparsity,
        granularity=args.granularity,
        criterion=args.criterion,
        distillation_weight=args.distillation_weight,
    )
    config = SFTConfig(
        output_dir=args.output_dir,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        warmup_steps=0.05,
        per_device_train_batch_size=args.batch_size,
        max_length=args.window,
        seed=args.seed,
        use_cpu=not torch.accelerator.is_available(),
        bf16=torch.cuda.is_available(),
        activation_checkpointing=False,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    )
    trainer = MamaSFTTrainer(
        model, config, train_dataset=rows, processing_class=tokenizer, pruning_config=recipe, teacher_model=teacher
    )
    results: dict[str, float] = {}
    if args.eval_file:
        text = args.eval_file.read_text(encoding="utf-8")
        windows = {"window": args.eval_window, "num_windows": args.num_eval_windows}
        results["perplexity_before"] = perplexity(model, tokenizer, text, **windows)["perplexity"]
    results["loss"] = trainer.train().training_loss
    trainer.save_model()
    if args.eval_file:
        results["perplexity_after"] = perplexity(model, tokenizer, text, **windows)["perplexity"]
    report = sparsity_report(model)
    results["sparsity"] = report["targets"]["sparsity"]
    print(results, report["total"], sep="\n")
    return results


if __name__ == "__main__":
    main()
