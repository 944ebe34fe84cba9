"""Perplexity and multiple choice against loops over single tokens; generation."""

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from mama_hf.calibration import calibration_windows
from mama_hf.evaluation import Perplexity, generate_samples, multiple_choice, perplexity


WORDS = ["<pad>", "<unk>"] + [f"w{index}" for index in range(40)] + ["Question:", "Answer:"]
TEXT = " ".join(f"w{index * index % 37}" for index in range(101))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")


def naive_nll(model, ids: list[int]) -> float:
    """-log p of the last token, from all before it."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0, -1].double()
    return -float(torch.log_softmax(logits, dim=0)[ids[-1]])


def naive_perplexity(model, ids: list[int], window: int, stride: int) -> tuple[float, int]:
    """Token by token: which window scores it, and what of that window comes before it."""
    total, count, done = 0.0, 0, set()
    for start in range(0, len(ids), stride):
        for position in range(start + 1, min(start + window, len(ids))):
            if position not in done:
                done.add(position)
                total, count = total + naive_nll(model, ids[start : position + 1]), count + 1
        if start + window >= len(ids):
            break
    return math.exp(total / count), count


@pytest.mark.parametrize(("window", "stride"), [(16, None), (16, 4), (16, 15), (200, None), (10, 10), (100, None)])
def test_perplexity_equals_the_sum_over_tokens(tiny_llama, tokenizer, window, stride):
    ids = tokenizer(TEXT)["input_ids"]
    result = perplexity(tiny_llama, tokenizer, TEXT, window, stride, progress=False)
    expected, count = naive_perplexity(tiny_llama.eval(), ids, window, stride or window)
    assert result["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert result["num_tokens"] == count


def test_windows_are_evenly_spaced_from_the_first_to_the_last_token(tiny_llama, tokenizer):
    result = perplexity(tiny_llama, tokenizer, TEXT, 11, num_windows=3, progress=False)
    ids = tokenizer(TEXT)["input_ids"]
    losses = [
        naive_nll(tiny_llama.eval(), ids[start : stop + 1])
        for start in (0, 45, 90)
        for stop in range(start + 1, start + 11)
    ]
    assert result["num_tokens"] == len(losses) == 30
    assert result["nll"] == pytest.approx(sum(losses) / 30, rel=1e-4)


def test_a_column_of_texts_is_joined(tiny_llama, tokenizer):
    halves = [TEXT[: TEXT.index("w36")], TEXT[TEXT.index("w36") :]]
    one = perplexity(tiny_llama, tokenizer, TEXT, 16, progress=False)
    assert perplexity(tiny_llama, tokenizer, halves, 16, progress=False) == one


@pytest.mark.parametrize("settings", [{"window": 1}, {"window": 8, "stride": 9}, {"window": 500, "num_windows": 2}])
def test_windows_that_can_not_work_are_refused(tiny_llama, tokenizer, settings):
    with pytest.raises(ValueError, match="window"):
        perplexity(tiny_llama, tokenizer, TEXT, progress=False, **settings)


ITEMS = [
    {
        "context": f"Question: w{index} w{index + 1} Answer:",
        "choices": [f"w{index}", f"w{3 * index % 40} w1", "w2 w3 w4"],
        "answer": index % 3,
    }
    for index in range(9)
]


@pytest.mark.parametrize("normalize", ["characters", "tokens"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_multiple_choice_equals_the_sum_over_tokens(tiny_llama, tokenizer, normalize, batch_size):
    result = multiple_choice(tiny_llama.train(), tokenizer, ITEMS, normalize, batch_size, progress=False)
    assert tiny_llama.training
    picks, normed = [], []
    for item in ITEMS:
        context = tokenizer(item["context"])["input_ids"]
        scores, ratios = [], []
        for choice in item["choices"]:
            ids = tokenizer(choice)["input_ids"]
            whole = context + ids
            score = -sum(naive_nll(tiny_llama.eval(), whole[: len(context) + n + 1]) for n in range(len(ids)))
            scores.append(score)
            ratios.append(score / (len(ids) if normalize == "tokens" else len(choice)))
        picks.append(scores.index(max(scores)))
        normed.append(ratios.index(max(ratios)))
    assert result["predictions"] == picks
    assert result["predictions_norm"] == normed
    accuracy = sum(pick == item["answer"] for pick, item in zip(picks, ITEMS)) / 9
    assert result["acc"] == pytest.approx(accuracy)
    assert result["acc_stderr"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 8))


@pytest.mark.parametrize("name", ["tied-llama", "gpt2", "mamba"])
def test_contexts_of_many_lengths_are_scored_as_one_by_one(make_model, tokenizer, name):
    torch.manual_seed(0)
    if name == "mamba":  # its state can't be handed from one context to several choices
        config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=4)
        model = MambaForCausalLM(config)
    else:
        model = make_model(name)
    items = [
        {"context": " ".join(f"w{n}" for n in range(index % 4 + 1)), "choices": [f"w{index} w1 w2", "w3"], "answer": 0}
        for index in range(10)
    ]
    together = multiple_choice(model, tokenizer, items, batch_size=5, progress=False)
    apart = [multiple_choice(model, tokenizer, [item], batch_size=1, progress=False) for item in items]
    assert together["predictions"] == [result["predictions"][0] for result in apart]
    for item, pick in zip(items, together["predictions"]):
        nll = []
        for choice in item["choices"]:
            context, ids = tokenizer(item["context"])["input_ids"], tokenizer(choice)["input_ids"]
            whole = context + ids
            nll.append(sum(naive_nll(model.eval(), whole[: len(context) + n + 1]) for n in range(len(ids))))
        assert nll[pick] == min(nll)


def test_an_empty_context_starts_from_the_first_special_token(tiny_llama, tokenizer):
    item = {"context": "", "choices": ["w1", "w2 w3"], "answer": 0}
    with pytest.raises(ValueError, match="bos or eos"):
        multiple_choice(tiny_llama, tokenizer, [item], progress=False)
    tokenizer.bos_token = "w9"
    given = {"context": "w9", "choices": ["w1", "w2 w3"], "answer": 0}
    results = [multiple_choice(tiny_llama, tokenizer, [one], progress=False) for one in (item, given)]
    assert results[0] == results[1]


def test_perplexity_is_a_metric_of_evaluate(tiny_llama, tokenizer, tmp_path):
    metric = Perplexity(cache_dir=str(tmp_path))
    texts = [TEXT[: TEXT.index("w36")], TEXT[TEXT.index("w36") :]]
    settings = {"window": 16, "stride": 4, "progress": False}
    found = metric.compute(predictions=texts, model=tiny_llama, tokenizer=tokenizer, **settings)
    assert found == perplexity(tiny_llama, tokenizer, texts, **settings)


def test_multiple_choice_needs_items_and_a_known_length(tiny_llama, tokenizer):
    with pytest.raises(ValueError, match="items"):
        multiple_choice(tiny_llama, tokenizer, [], progress=False)
    with pytest.raises(ValueError, match="words"):
        multiple_choice(tiny_llama, tokenizer, ITEMS, "words", progress=False)  # type: ignore[arg-type]


def test_samples_are_greedy_and_without_their_prompt(tiny_llama, tokenizer):
    samples = generate_samples(tiny_llama, tokenizer, ["w1 w2", "w3"], max_new_tokens=3)
    ids = tokenizer("w1 w2")["input_ids"]
    tiny_llama.eval()
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(tiny_llama(torch.tensor([ids])).logits[0, -1].argmax()))
    assert samples[0] == tokenizer.decode(ids[2:], skip_special_tokens=True)
    assert len(samples) == 2


def test_calibration_windows_are_cut_from_the_text(tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    windows = calibration_windows(TEXT, tokenizer, num_windows=5, length=20, seed=1)
    assert [tuple(window.shape) for window in windows] == [(1, 20)] * 5
    starts = [ids[start : start + 20] for start in range(len(ids) - 19)]
    assert all(window[0].tolist() in starts for window in windows)
    again = calibration_windows([TEXT], tokenizer, num_windows=5, length=20, seed=1)
    assert all(torch.equal(one, two) for one, two in zip(windows, again))
    with pytest.raises(ValueError, match="101 tokens"):
        calibration_windows(TEXT, tokenizer, length=102)
