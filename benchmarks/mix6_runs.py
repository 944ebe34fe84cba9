"""What the studies on the demo task (`examples/mix6.py`) share: a pre-trained model for each seed, and a GRPO run."""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oneshot
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from mama_hf import MamaGRPOTrainer, MamaPruningConfig


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import mix6


STEPS, START, END = 150, 20, 110  # of a GRPO run, and of the pruning phase in it


def prepare() -> PreTrainedTokenizerFast:
    """One thread (a second one only waits at this size), few messages; returns the task's tokenizer."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    return mix6.build_tokenizer()


def pretrained(tokenizer: PreTrainedTokenizerFast, seed: int, folder: Path) -> LlamaForCausalLM:
    """The pre-trained model of a seed, kept in `folder` for the next run."""
    model, path = mix6.build_model(tokenizer, seed), folder / f"mix6-{seed}.safetensors"
    if path.is_file():
        model.load_state_dict(load_file(path))
        return model
    mix6.pretrain(model, tokenizer, seed, disable_tqdm=True)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    save_file(model.state_dict(), unfinished)
    unfinished.replace(path)
    return model


def study(
    doc: str | None,
    runs: dict[str, Any],
    output: str,
    run: Callable[[str, int, PreTrainedTokenizerFast, Path], dict[str, Any]],
) -> dict[str, Any]:
    """
    The command line of a study: each of `runs` with each seed. What --output has already is not run again.

    Args:
        doc (`str`): of the script.
        runs (`dict`): by name.
        output (`str`): file of the results.
        run (`Callable`): (name, seed, tokenizer, folder of the pre-trained models) -> result, as JSON types.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", nargs="+", choices=list(runs), default=list(runs))
    parser.add_argument("--models", type=Path, default=Path("outputs/mix6"), help="folder of the pre-trained models")
    parser.add_argument("--output", type=Path, default=Path(output))
    args = parser.parse_args()
    tokenizer = prepare()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for name, seed in ((name, seed) for name in args.runs for seed in args.seeds):
        if str(seed) in oneshot.read(args.output).get(name, {}):
            continue
        row = run(name, seed, tokenizer, args.models)
        print(f"{name}, seed {seed}: {row}", flush=True)
        oneshot.write(args.output, name, str(seed), row)
    return oneshot.read(args.output)


def post_train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    config: MamaPruningConfig | None,
    reward: Any = mix6.exact_match_reward,
    grpo: dict[str, Any] | None = None,
    rewarded: str = "a",
    trainer_class: type[MamaGRPOTrainer] = MamaGRPOTrainer,
    **settings: Any,
) -> tuple[float, MamaGRPOTrainer]:
    """
    One GRPO run, in place.

    Args:
        grpo (`dict`, *optional*): arguments of `GRPOConfig` in place of the task's.
        rewarded (`str`, *optional*, defaults to `"a"`): tag of the operation that answers rightly.
        settings: more arguments of [`MamaGRPOTrainer`].

    Returns:
        `tuple`: the accuracy on 512 held-out prompts, and the trainer.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=model,
            reward_funcs=reward,
            args=mix6.grpo_arguments(folder, seed, max_steps=STEPS, disable_tqdm=True, **(grpo or {})),
            train_dataset=mix6.grpo_dataset(seed, rewarded=rewarded),
            processing_class=tokenizer,
            pruning_config=config,
            **settings,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return mix6.greedy_accuracy(model, tokenizer, rewarded=rewarded), trainer
