"""Calibration text: loaded, cut into windows, and the check of what the caller hands over.

Shapes: B = sequences in a batch, T = tokens in a sequence.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")

Batch = dict[str, Tensor]


def load_text(source: str | os.PathLike, config: str | None = None, split: str = "train", column: str = "text") -> str:
    """
    The text of a file, or of a data set's column, whose entries are joined by blank lines.

    Args:
        source (`str`): path of a file that is there, else the id of a data set on the Hub (or a folder of one).
        config, split, column (`str`, *optional*): of the data set.

    Raises:
        `ValueError`: for a data set without that column, or a text that is empty.
    """
    if os.path.isfile(source):
        text = Path(source).read_text(encoding="utf-8")
    else:
        rows = datasets.load_dataset(str(source), config, split=split)
        if column not in rows.column_names:
            raise ValueError(f"{source} has no column {column!r}; it has {', '.join(rows.column_names)}.")
        text = "\n\n".join(rows[column])
    if not text.strip():
        raise ValueError(f"{source} has no text.")
    return text


def calibration_windows(
    text: str | Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    num_windows: int = 16,
    length: int = 512,
    seed: int = 0,
) -> list[Tensor]:
    """
    Windows at random offsets of a text, tokenized as one string: a calibration set for [`prune_model`].

    Args:
        text (`str` or `Iterable[str]`): e.g. a `datasets` column, whose entries are joined by blank lines.
        num_windows (`int`, *optional*, defaults to 16): number of windows.
        length (`int`, *optional*, defaults to 512): tokens in each.
        seed (`int`, *optional*, defaults to 0): of the offsets.

    Returns:
        `list[torch.Tensor]`: `num_windows` id tensors [1, length].

    Raises:
        `ValueError`: if the text has fewer than `length` tokens.
    """
    joined = text if isinstance(text, str) else "\n\n".join(text)
    ids = torch.tensor(tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < length:
        raise ValueError(
            f"The text has {len(ids)} tokens, too few for a window of {length}. Give more, or less length."
        )
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randint(len(ids) - length + 1, (num_windows,), generator=generator).tolist()
    return [ids[offset : offset + length].unsqueeze(0) for offset in offsets]


def check_calibration(calibration: Iterable[Any], num_embeddings: int) -> list[Batch]:
    """
    The batches as dicts of `input_ids` [B, T] and `attention_mask` [B, T] (1 = a token, 0 = padding) at least.

    Args:
        calibration (`Iterable`): dicts or id tensors [B, T].
        num_embeddings (`int`): ids must be below.

    Raises:
        `ValueError`: for no batch or only padding, for ids of another shape or type, or outside the vocabulary.
    """
    if isinstance(calibration, Tensor | Mapping | str):
        raise ValueError(
            f"calibration must be an iterable of batches, not one {type(calibration).__name__}: put it in a list."
        )
    batches = [_check_batch(batch, index, num_embeddings) for index, batch in enumerate(calibration)]
    if not batches or not any(bool(batch["attention_mask"].any()) for batch in batches):
        raise ValueError(
            "calibration has no tokens. Give batches of text like the model's own, e.g. "
            "mama_hf.calibration_windows(text, tokenizer)."
        )
    return batches


def _check_batch(batch: Any, index: int, num_embeddings: int) -> Batch:
    values = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    if not isinstance(values, Mapping) or not isinstance(values.get("input_ids"), Tensor):
        raise ValueError(
            f"Calibration batch {index} is a {type(batch).__name__}; it must be a dict with the tensor 'input_ids' "
            "[B, T] (and 'attention_mask'), or an id tensor [B, T]."
        )
    inputs = {name: values[name] for name in _INPUTS if values.get(name) is not None}
    ids = inputs["input_ids"]
    if ids.ndim != 2 or ids.is_floating_point() or ids.numel() == 0:
        raise ValueError(
            f"Calibration batch {index} has input_ids of shape {tuple(ids.shape)} and {ids.dtype}, not [B, T] ids."
        )
    inputs.setdefault("attention_mask", torch.ones_like(ids))
    if inputs["attention_mask"].shape != ids.shape:
        raise ValueError(
            f"Calibration batch {index} has an attention_mask of shape {tuple(inputs['attention_mask'].shape)} for "
            f"input_ids of shape {tuple(ids.shape)}."
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= num_embeddings:
        raise ValueError(
            f"Calibration batch {index} has ids from {low} to {high}, but the model's vocabulary is 0 to "
            f"{num_embeddings - 1}. Tokenize with the model's own tokenizer."
        )
    return inputs


def fingerprint(batches: list[Batch]) -> str:
    """Hash of all ids and masks: whether two calibration sets are the same."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(value.cpu().to(torch.int64).numpy().tobytes())
    return digest.hexdigest()
