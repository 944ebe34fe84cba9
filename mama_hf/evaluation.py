"""How good a model is, in numbers: perplexity of a text, multiple-choice accuracy, and what it writes.

Shapes: B = sequences, T = tokens, C = contexts, R = continuations, V = vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import datasets
import evaluate
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Iterable[str],
    window: int = 512,
    stride: int | None = None,
    num_windows: int | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """
    exp of the mean negative log-likelihood per token, over windows of a text tokenized as one string.

    Args:
        text (`str` or `Iterable[str]`): e.g. a `datasets` column; its entries are joined by blank lines.
        window (`int`, *optional*, defaults to 512): tokens that the model sees at once.
        stride (`int`, *optional*):
            tokens from one window to the next. Each token is scored once, with at least `window - stride` tokens
            before it (but in the first window). `None`: `window`, no overlap.
        num_windows (`int`, *optional*): only so many windows, evenly spaced over the text from its first to its last
            token and without overlap, each scored whole. `None`: all.

    Returns:
        `dict`: `perplexity`, `nll` (nats per token) and `num_tokens` (tokens scored).

    Raises:
        `ValueError`: for a text shorter than two tokens, or than the windows asked for.
    """
    joined = text if isinstance(text, str) else "\n\n".join(text)
    ids = torch.tensor(tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"])
    spans = _spans(len(ids), window, stride or window, num_windows)
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for start, stop, scored in tqdm(spans, "perplexity", disable=not progress):
        rows = ids[start:stop].unsqueeze(0).to(model.device)
        values = _log_likelihoods(model(rows, use_cache=False).logits[:, :-1], rows[:, 1:])[0, -scored:]
        total -= float(values.sum(dtype=torch.float64))
        count += values.numel()
    model.train(training)
    return {"perplexity": math.exp(min(total / count, 700.0)), "nll": total / count, "num_tokens": count}


class Perplexity(evaluate.Metric):
    """
    [`perplexity`] as a metric of the `evaluate` library:
    `Perplexity().compute(predictions=texts, model=model, tokenizer=tokenizer, window=512)`.

    The texts are joined by blank lines, and each token counts the same. `compute` takes the other arguments of
    [`perplexity`] by name, and returns what that returns.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Token-weighted perplexity of a causal language model on the texts in `predictions`.",
            citation="",
            inputs_description="predictions: texts. model, tokenizer, window, stride, num_windows: see perplexity.",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions: Sequence[str], **kwargs: Any) -> dict[str, float]:
        return perplexity(text=predictions, **kwargs)


def _spans(length: int, window: int, stride: int, num_windows: int | None) -> list[tuple[int, int, int]]:
    """(start, stop, number of last tokens to score) of each window."""
    if not 1 <= stride <= window or window < 2:
        raise ValueError(f"window={window} and stride={stride} need 1 <= stride <= window and window >= 2.")
    if length < 2 or (num_windows is not None and length < window):
        raise ValueError(f"The text has {length} tokens, too few for a window of {window}.")
    if num_windows is not None:
        starts = [index * (length - window) // max(1, num_windows - 1) for index in range(num_windows)]
        return [(start, start + window, window - 1) for start in starts]
    spans, scored = [], 1  # nothing predicts the first token
    for start in range(0, length, stride):
        stop = min(start + window, length)
        if start > 0 and stride == window:
            scored += 1  # without overlap, nothing in its window predicts a window's first token
        if stop > scored:
            spans.append((start, stop, stop - scored))
        scored = max(scored, stop)
        if stop == length:
            break
    return spans


def _log_likelihoods(logits: Tensor, ids: Tensor) -> Tensor:
    """log p of `ids` [B, T] under logits [B, T, V], fp32."""
    chosen = logits.gather(2, ids.unsqueeze(2)).squeeze(2).float()
    return chosen - torch.logsumexp(logits.float(), dim=2)


@torch.no_grad()
def multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Mapping[str, Any]],
    normalize: Literal["characters", "tokens"] = "characters",
    batch_size: int = 16,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Accuracy at picking the right continuation by log-likelihood, scored as lm-evaluation-harness does.

    Args:
        items (`Sequence[Mapping]`):
            each with `context` (`str`), `choices` (`list[str]`, which follow the context after a space) and `answer`
            (`int`, index of the right one).
        normalize (`str`, *optional*, defaults to `"characters"`):
            what `acc_norm` divides a choice's log-likelihood by: its length in characters (the harness's `acc_norm`)
            or in tokens.
        batch_size (`int`, *optional*, defaults to 16):
            choices in one forward pass. They are sorted by length; a context is computed once for all of its choices.

    Returns:
        `dict`: `acc`, `acc_stderr`, `acc_norm`, `acc_norm_stderr`, `num_items`, and the picks `predictions` and
        `predictions_norm`.

    Raises:
        `ValueError`: for no items or an unknown `normalize`.
    """
    if not items or normalize not in ("characters", "tokens"):
        raise ValueError(f"multiple_choice needs items, and normalize={normalize!r} must be 'characters' or 'tokens'.")
    requests = [_encode(tokenizer, item["context"], f" {choice}") for item in items for choice in item["choices"]]
    values = iter(_score_requests(model, requests, batch_size, progress))
    lengths = iter(len(continuation) for _, continuation in requests)
    plain, normed = [], []
    for item in items:
        scores = [next(values) for _ in item["choices"]]
        tokens = [next(lengths) for _ in item["choices"]]
        sizes = tokens if normalize == "tokens" else [len(choice) for choice in item["choices"]]
        plain.append(max(range(len(scores)), key=scores.__getitem__))
        ratios = [score / max(1, size) for score, size in zip(scores, sizes)]
        normed.append(max(range(len(ratios)), key=ratios.__getitem__))
    answers = [item["answer"] for item in items]
    return {
        **_accuracy("acc", plain, answers),
        **_accuracy("acc_norm", normed, answers),
        "num_items": len(items),
        "predictions": plain,
        "predictions_norm": normed,
    }


def _encode(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[tuple[int, ...], list[int]]:
    """Ids of the context and of what follows, split as lm-evaluation-harness splits them."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = tokenizer(context + continuation)["input_ids"]
    first = tokenizer(context)["input_ids"]
    if first:
        return tuple(whole[: len(first)]), whole[len(first) :]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError("An empty context needs a tokenizer with a bos or eos token to start from.")
    return (start,), whole


def _score_requests(
    model: PreTrainedModel,
    requests: Sequence[tuple[tuple[int, ...], list[int]]],
    batch_size: int,
    progress: bool,
) -> list[float]:
    """Sum of log p of each continuation after its context. Continuations of one context share its forward pass."""
    owned: dict[tuple[int, ...], list[int]] = {}
    for index, (context, _) in enumerate(requests):
        owned.setdefault(context, []).append(index)
    scores = [0.0] * len(requests)
    training = model.training
    model.eval()
    bar = tqdm(total=len(requests), desc="multiple choice", disable=not progress)
    for contexts in _batches(owned, batch_size):
        members = [index for context in contexts for index in owned[context]]
        owners = [place for place, context in enumerate(contexts) for _ in owned[context]]
        rows = [torch.tensor(requests[index][1], device=model.device) for index in members]
        values = _score_batch(model, torch.tensor(contexts, device=model.device), owners, rows)
        for index, value in zip(members, values.tolist()):
            scores[index] = value
        bar.update(len(members))
    bar.close()
    model.train(training)
    return scores


def _batches(owned: Mapping[tuple[int, ...], list[int]], batch_size: int) -> Iterator[list[tuple[int, ...]]]:
    """Contexts of one length (so that none needs padding), with `batch_size` continuations or a few more."""
    batch: list[tuple[int, ...]] = []
    count = 0
    for context in sorted(owned, key=len, reverse=True):
        if batch and (len(context) != len(batch[0]) or count >= batch_size):
            yield batch
            batch, count = [], 0
        batch.append(context)
        count += len(owned[context])
    yield batch


def _score_batch(model: PreTrainedModel, contexts: Tensor, owners: list[int], rows: list[Tensor]) -> Tensor:
    """
    Sum of log p [R] of continuations after their contexts.

    Args:
        contexts (`torch.Tensor` of shape [C, T]): ids.
        owners (`list[int]`): the context of each continuation.
        rows (`list[torch.Tensor]`): R continuations, ids.
    """
    ids = pad_sequence(rows, batch_first=True)  # padding is to the right: it changes nothing before it
    counted = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    place = torch.tensor(owners, device=ids.device)
    output = model(input_ids=contexts, use_cache=True)
    logits, cache = output.logits[place, -1:], output.get("cache")
    can_share = isinstance(cache, Cache) and all(isinstance(layer, DynamicLayer) for layer in cache.layers)
    if ids.shape[1] > 1 and can_share:
        cache.batch_select_indices(place)
        rest = model(input_ids=ids[:, :-1], cache=cache, use_cache=True).logits
        logits = torch.cat([logits, rest], dim=1)
    elif ids.shape[1] > 1:  # a recurrent state can't be handed from a context to several continuations
        whole = torch.cat([contexts[place], ids[:, :-1]], dim=1)
        logits = model(input_ids=whole, use_cache=False).logits[:, contexts.shape[1] - 1 :]
    return (_log_likelihoods(logits, ids) * counted).sum(dim=1)


def _accuracy(name: str, picks: list[int], answers: list[int]) -> dict[str, float]:
    """Mean, and its standard error as the harness computes it (sample standard deviation over sqrt(n))."""
    mean = sum(pick == answer for pick, answer in zip(picks, answers)) / len(picks)
    return {name: mean, f"{name}_stderr": math.sqrt(mean * (1 - mean) / max(1, len(picks) - 1))}


@torch.no_grad()
def generate_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 32,
) -> list[str]:
    """
    Greedy continuations of `prompts`, each without its prompt.

    Args:
        max_new_tokens (`int`, *optional*, defaults to 32): tokens written at most.
    """
    training = model.training
    model.eval()
    samples = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        inputs.pop("token_type_ids", None)
        generate: Any = model.generate
        output = generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
        new = output[0, inputs["input_ids"].shape[1] :]
        samples.append(str(tokenizer.decode(new, skip_special_tokens=True)))
    model.train(training)
    return samples
