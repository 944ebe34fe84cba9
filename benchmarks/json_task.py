"""A task with a verifiable reward for SmolLM2-135M-Instruct: a sentence about a person becomes a JSON object.

    Maria is 66 years old and lives in Oslo.   ->   {"name": "Maria", "age": 66, "city": "Oslo"}

The reward is shaped, so that a small model learns it in few steps: 0.2 for an object that parses, 0.2 for each value
that is right, and 0.2 for just these three keys with nothing written around the object. Ages that are multiples of 7
are held out of training.
"""

import json
import random
import re
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase


NUM_COMPLETION_TOKENS = 32
HELDOUT_DIVISOR = 7
SYSTEM = "Answer with a JSON object that has the keys name, age and city."
FORMS = (
    "{name} is {age} years old and lives in {city}.",
    "{name} lives in {city} and is {age} years old.",
    "In {city} lives {name}, who is {age} years old.",
)
NAMES = (
    *("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo", "Maria"),
    *("Noah", "Olivia", "Paul", "Rosa", "Sam", "Tina", "Victor"),
)
CITIES = (
    *("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Oslo", "Lisbon", "Athens", "Dublin", "Prague"),
    *("Warsaw", "Boston", "Denver", "Tokyo", "Delhi"),
)


def task_dataset(seed: int, num_prompts: int, held_out: bool = False) -> Dataset:
    """
    Draws prompts: a dataset with the columns `prompt` (messages), `name`, `age` and `city`.

    Args:
        held_out (`bool`, *optional*, defaults to `False`): whether with the ages that training never shows.
    """
    rng = random.Random(seed)
    ages = [age for age in range(18, 90) if (age % HELDOUT_DIVISOR == 0) == held_out]
    rows = []
    for _ in range(num_prompts):
        person = {"name": rng.choice(NAMES), "age": rng.choice(ages), "city": rng.choice(CITIES)}
        sentence = rng.choice(FORMS).format(**person)
        prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": sentence}]
        rows.append({"prompt": prompt, **person})
    return Dataset.from_list(rows)


def score(text: str, person: dict[str, Any]) -> float:
    """Reward of one completion, in [0, 1]."""
    match = re.search(r"\{[^{}]*\}", text)
    try:
        found = None if match is None else json.loads(match[0])
    except ValueError:
        found = None
    if match is None or found is None:
        return 0.0
    right = sum(str(found.get(key)) == str(value) for key, value in person.items())
    is_clean = found.keys() == person.keys() and text.strip() == match[0]
    return 0.2 + 0.2 * right + 0.2 * is_clean


def json_reward(
    completions: list[list[dict[str, str]]], name: list[str], age: list[int], city: list[str], **kwargs: Any
) -> list[float]:
    """Reward of each completion, as `GRPOTrainer` asks for it."""
    people = [{"name": n, "age": a, "city": c} for n, a, c in zip(name, age, city, strict=True)]
    return [score(completion[0]["content"], person) for completion, person in zip(completions, people, strict=True)]


@torch.no_grad()
def greedy_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """The model's greedy completions of `prompt_texts`."""
    batch: Any = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    training = model.training
    model.eval()
    generate: Any = model.generate
    output = generate(
        **batch.to(model.device),
        max_new_tokens=NUM_COMPLETION_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.train(training)
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def prompt_texts(tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> Any:
    """The prompts of `task_dataset` as the model reads them."""
    return tokenizer.apply_chat_template(list(rows["prompt"]), add_generation_prompt=True, tokenize=False)


def dialogues(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_prompts: int = 192) -> list[str]:
    """Prompts of the task as the model sees them in training, each with its own greedy answer: to calibrate on."""
    prompts, end = prompt_texts(tokenizer, task_dataset(0, num_prompts)), str(tokenizer.eos_token)
    answers = greedy_answers(model, tokenizer, prompts)
    return [prompt + answer + end for prompt, answer in zip(prompts, answers, strict=True)]


def greedy_reward(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_prompts: int = 64
) -> dict[str, float]:
    """Mean reward on held-out prompts, always the same ones, decoded greedily, and the share that is wholly right."""
    rows = task_dataset(0, num_prompts, held_out=True)
    answers = greedy_answers(model, tokenizer, prompt_texts(tokenizer, rows))
    completions = [[{"role": "assistant", "content": text}] for text in answers]
    rewards = json_reward(completions, list(rows["name"]), list(rows["age"]), list(rows["city"]))
    return {
        "reward": sum(rewards) / num_prompts,
        "all_right": sum(reward > 0.99 for reward in rewards) / num_prompts,
    }
