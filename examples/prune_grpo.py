"""Prune a causal language model while GRPO post-trains it: the rewards decide which weights stay.

    python examples/smollm2.py      # SmolLM2-135M-Instruct, once
    python examples/prune_grpo.py   # half of its weights become zero while it learns to add

The task is the sum of two numbers below 20, after two solved examples in the prompt. Without training the model gets a
good third of them right. The default run sees no prompt twice, so that its rewards are those of unseen sums.
`--sparsity 0` is the dense GRPO run to compare with.
"""

import argparse
import re
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from mama_hf import MamaGRPOTrainer, MamaPruningConfig, sparsity_report


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/smollm2", help="Hub id or folder")
    parser.add_argument("--dataset", help="Hub id with the columns `prompt` and `answer`; sums if not given")
    parser.add_argument("--output-dir", default="outputs/grpo")
    parser.add_argument("--sparsity", type=float, default=0.5, help="fraction of zeros; 0: dense GRPO")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--batch-size", type=int, default=32, help="completions a step")
    parser.add_argument("--num-generations", type=int, default=8, help="completions a prompt")
    parser.add_argument("--max-completion-length", type=int, default=4, help="tokens of a completion")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def sums() -> Dataset:
    """All 400 sums of two numbers below 20, with their answers."""
    pairs = [(a, b) for a in range(20) for b in range(20)]
    prompts = [f"2 + 3 = 5\n4 + 1 = 5\n{a} + {b} =" for a, b in pairs]
    return Dataset.from_dict({"prompt": prompts, "answer": [str(a + b) for a, b in pairs]})


def first_number_reward(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """1 where the first number in the completion is the answer, else 0."""
    numbers = [re.search(r"\d+", completion) for completion in completions]
    return [float(number is not None and number[0] == right) for number, right in zip(numbers, answer)]


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse_args(argv)
    config = GRPOConfig(
        output_dir=args.output_dir,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=args.batch_size,
        num_generations=args.num_generations,
        max_completion_length=args.max_completion_length,
        seed=args.seed,
        use_cpu=not torch.accelerator.is_available(),
        bf16=torch.cuda.is_available(),
        activation_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = MamaGRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        reward_funcs=first_number_reward,
        args=config,
        train_dataset=load_dataset(args.dataset, split="train") if args.dataset else sums(),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        pruning_config=MamaPruningConfig(final_sparsity=args.sparsity),
    )
    trainer.train()
    trainer.save_model()
    report = sparsity_report(trainer.model)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    num_steps = min(10, len(rewards))
    results = {
        "reward_before": sum(rewards[:num_steps]) / num_steps,
        "reward_after": sum(rewards[-num_steps:]) / num_steps,
        "sparsity": report["targets"]["sparsity"],
    }
    print(results, report["total"], sep="\n")
    return results


if __name__ == "__main__":
    main()
