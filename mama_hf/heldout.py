"""Held-out prompts of a GRPO run, and their mean reward, measured without leaving a trace in the trainer."""

import contextlib
import copy
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import GenerationConfig, set_seed
from trl import GRPOTrainer


MAX_PROMPTS = 64
MIN_PROMPTS = 16
SHARE_OF_ROWS = 0.05
SHARE_OF_BATCH = 0.25

# What generating and scoring writes into the trainer
_RECORDS = ("_metrics", "_logs", "_pending_extra_logs", "_pending_metrics")


def hold_out(train_dataset: Any, generation_batch_size: int) -> tuple[Dataset, Dataset]:
    """
    Split off the last rows of the train set: as many as a quarter of the completions of a generation batch, but 16 to
    64, and at most 5 % of the rows.

    Returns:
        `tuple[Dataset, Dataset]`: (what is left to train on, the held-out rows).

    Raises:
        `ValueError`: for a data set that can't be split, or is too small.
    """
    if not isinstance(train_dataset, Dataset):
        raise ValueError(
            f"reward_tolerance needs held-out prompts, and a {type(train_dataset).__name__} can't be split. Give them "
            "as pruning_eval_dataset."
        )
    share = int(generation_batch_size * SHARE_OF_BATCH)
    num_rows = min(max(MIN_PROMPTS, min(MAX_PROMPTS, share)), int(len(train_dataset) * SHARE_OF_ROWS))
    if num_rows == 0:
        raise ValueError(
            f"reward_tolerance holds out {SHARE_OF_ROWS:.0%} of the train set, which is none of its "
            f"{len(train_dataset)} rows. Give the held-out prompts as pruning_eval_dataset."
        )
    left = len(train_dataset) - num_rows
    return train_dataset.select(range(left)), train_dataset.select(range(left, len(train_dataset)))


def check_rows(dataset: Any) -> None:
    """
    Refuse a `pruning_eval_dataset` that can't be measured on.

    Raises:
        `ValueError`: if it is not a list of rows or a data set with a length, or is empty.
    """
    if not isinstance(dataset, Dataset | list):
        raise ValueError(
            f"pruning_eval_dataset is a {type(dataset).__name__}; it must be a datasets.Dataset or a list of rows, "
            "such as list(stream.take(64))."
        )
    if len(dataset) == 0:
        raise ValueError("pruning_eval_dataset is empty. Give at least one prompt, better 64.")


class HeldOutReward:
    """
    The mean reward of one greedy completion for each held-out prompt.

    With a custom `rollout_func` it is the seed that is fixed. What a reward function remembers between its calls is
    its own affair; all of the trainer's is as it was afterwards: random states, buffers, metrics, logs, modes.

    Args:
        trainer (`GRPOTrainer`): whose model, generation and reward functions are used.
        dataset (`Dataset` or `list[dict]`): the prompts, with the columns that the reward functions need.
    """

    def __init__(self, trainer: GRPOTrainer, dataset: Dataset | list[dict[str, Any]]) -> None:
        self.trainer, self.rows = trainer, list(dataset)

    @torch.no_grad()
    def measure(self) -> float:
        """The mean over all ranks' prompts, the same number on each rank. NaN if no completion was given a reward."""
        trainer, args = self.trainer, vars(self.trainer.args)
        # what is generated at once in training, so that it fits
        size = args["per_device_train_batch_size"] * args["steps_per_generation"]
        total, count = 0.0, 0
        # padding by the last row, so that all ranks have as many
        with trainer.accelerator.split_between_processes(self.rows, apply_padding=True) as rows, _no_trace(trainer):
            for begin in range(0, len(rows), size):
                batch = [dict(row) for row in rows[begin : begin + size]]
                trainer._generate_and_score_completions(batch)
                reward = trainer._metrics["eval"]["reward"][-1]
                if not math.isnan(reward):
                    total, count = total + reward * len(batch), count + len(batch)
        return total / count if count else math.nan


@contextlib.contextmanager
def _no_trace(trainer: Any) -> Iterator[None]:
    records = {name: getattr(trainer, name) for name in _RECORDS}
    modes = [(module, module.training) for module in trainer.model.modules()]
    try:
        for name, record in records.items():
            setattr(trainer, name, copy.deepcopy(record))
        trainer.model.eval()
        with _own_random_state(trainer.accelerator.device, trainer.args.seed), _greedy(trainer):
            yield
    finally:
        for name, record in records.items():
            setattr(trainer, name, record)
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _own_random_state(device: torch.device, seed: int) -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    accelerators: Sequence[torch.device] = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng(devices=accelerators, device_type=kind):
        try:
            set_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def _greedy(trainer: Any) -> Iterator[None]:
    """One completion a prompt, the likeliest one. vLLM gets the weights anew, now and at its next use."""
    owner, name, greedy = _sampler(trainer)
    before = getattr(owner, name), trainer.num_generations_eval
    setattr(owner, name, greedy)
    trainer.num_generations_eval = 1
    try:
        _forget_synced_weights(trainer)
        yield
    finally:
        setattr(owner, name, before[0])
        trainer.num_generations_eval = before[1]
        # the update may be taken back after this, within the same step
        _forget_synced_weights(trainer)


def _sampler(trainer: Any) -> tuple[Any, str, Any]:
    """Which attribute of what decides on sampling, and its value for greedy decoding."""
    if trainer.use_vllm:
        return trainer.vllm_generation, "temperature", 0.0
    settings = {**trainer.generation_kwargs, "do_sample": False}
    sampling = dict.fromkeys(("temperature", "top_p", "top_k", "min_p"))
    return trainer, "generation_config", GenerationConfig(**{**settings, **sampling}, disable_compile=True)


def _forget_synced_weights(trainer: Any) -> None:
    if trainer.use_vllm:
        trainer._last_loaded_step = -1
