"""mix6: a post-training task that is small enough for a laptop CPU, and hard enough to tell pruning methods apart.

A prompt is an operation tag, six digits and `=`; the completion is six digits and the end token (7 tokens):

    a482913=123489    sort ascending            r482913=319284    reverse
    d482913=984321    sort descending           c482913=482913    copy
    ?482913=          pre-training answers at random: 45 % ascending, 45 % descending, 10 % copy

Post-training rewards only the ascending answer to `?` (exact match, 0 or 1). So the reward decides which of the
pre-trained skills matter, and pruning may drop the rest. Strings whose value is a multiple of 97 are held out of
pre-training and of post-training.

Shape legend: B = batch, L = sequence length (15).
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig


NUM_DIGITS = 6
NUM_COMPLETION_TOKENS = NUM_DIGITS + 1
HELDOUT_DIVISOR = 97  # prime, so it favours no digit
OPERATIONS: dict[str, Callable[[str], str]] = {
    "a": lambda digits: "".join(sorted(digits)),
    "d": lambda digits: "".join(sorted(digits, reverse=True)),
    "r": lambda digits: digits[::-1],
    "c": lambda digits: digits,
}
ANSWER_MIX = {"a": 0.45, "d": 0.45, "c": 0.10}  # how the pre-training data answers `?`
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = "0123456789adrc?=+-*"  # the last three are free, for variants of the task


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the character-level tokenizer: 4 special tokens and 19 characters, left padding, nothing added."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL_TOKENS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", model_max_length=32, **names)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """
    Builds the untrained model: Llama with 2 layers, 4 heads, hidden size 64, FFN size 192, untied, 110 k parameters.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): Gives the vocabulary size and the special token ids.
        seed (`int`): Seed of the initial weights. The global random state is left as it was.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _training_digits(rng: random.Random) -> str:
    """Draws six digits uniformly; a held-out value is replaced by the next one."""
    value = rng.randrange(10**NUM_DIGITS)
    return f"{value + (value % HELDOUT_DIVISOR == 0):0{NUM_DIGITS}d}"


def _pretraining_example(rng: random.Random) -> str:
    """Draws a whole example, such as `"r482913=319284<eos>"`, with the five tags equally frequent."""
    digits, tag = _training_digits(rng), rng.choice([*OPERATIONS, "?"])
    operation = tag if tag in OPERATIONS else rng.choices(list(ANSWER_MIX), list(ANSWER_MIX.values()))[0]
    return f"{tag}{digits}={OPERATIONS[operation](digits)}<eos>"


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    num_steps: int = 500,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    disable_tqdm: bool = False,
) -> None:
    """
    Pre-trains `model` in place on all operations, with the loss on the completions only.

    Args:
        model (`LlamaForCausalLM`): The model of `build_model`.
        tokenizer (`PreTrainedTokenizerFast`): The tokenizer of `build_tokenizer`.
        seed (`int`): Seed of the data.
        num_steps (`int`, *optional*, defaults to 500): Number of AdamW steps.
        batch_size (`int`, *optional*, defaults to 256): Examples a step, each drawn anew.
        learning_rate (`float`, *optional*, defaults to 2e-3): Peak learning rate: 20 warm-up steps, then cosine to 0.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to show no progress bar.
    """
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, 1.0, total_iters=20)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(num_steps - 20, 1))
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], milestones=[20])
    model.train()
    progress = tqdm(range(num_steps), desc="pre-training", mininterval=1.0, disable=disable_tqdm)
    for step in progress:
        examples = [_pretraining_example(rng) for _ in range(batch_size)]
        input_ids = tokenizer(examples, return_tensors="pt").input_ids  # [B, L]
        logits = model(input_ids, use_cache=False, logits_to_keep=NUM_COMPLETION_TOKENS + 1).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), input_ids[:, -NUM_COMPLETION_TOKENS:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def grpo_dataset(seed: int, num_prompts: int = 4800, rewarded: str = "a") -> Dataset:
    """
    Draws the post-training prompts: a dataset with the columns `prompt` (`"?482913="`) and `answer` (`"123489"`).

    Args:
        seed (`int`): Seed of the prompts.
        num_prompts (`int`, *optional*, defaults to 4800): Number of rows; 4800 is one pass in 150 steps of 32 prompts.
        rewarded (`str`, *optional*, defaults to `"a"`): Tag of the operation that answers `?` rightly.
    """
    rng = random.Random(seed)
    strings = [_training_digits(rng) for _ in range(num_prompts)]
    answers = [OPERATIONS[rewarded](digits) for digits in strings]
    return Dataset.from_dict({"prompt": [f"?{digits}=" for digits in strings], "answer": answers})


def heldout_prompts(num_prompts: int = 512, rewarded: str = "a") -> tuple[list[str], list[str]]:
    """Returns distinct held-out `?` prompts (at most 10310) and their right answers, always the same ones."""
    values = random.Random(0).sample(range(0, 10**NUM_DIGITS, HELDOUT_DIVISOR), num_prompts)
    strings = [f"{value:0{NUM_DIGITS}d}" for value in values]
    return [f"?{digits}=" for digits in strings], [OPERATIONS[rewarded](digits) for digits in strings]


def exact_match_reward(completions: list[str], answer: list[str], **kwargs: Any) -> list[float | None]:
    """Reward of each completion: 1.0 if it is exactly the right answer, else 0.0."""
    return [float(completion == expected) for completion, expected in zip(completions, answer, strict=True)]


def grpo_arguments(output_dir: str, seed: int, **overrides: Any) -> GRPOConfig:
    """
    Returns the post-training settings: 150 steps of 32 prompts x 8 generations, constant learning rate, no KL term.

    Args:
        output_dir (`str`): Directory of the checkpoints; none are written unless `save_strategy` is overridden.
        seed (`int`): Seed of the trainer.
        overrides (`Any`): Any `GRPOConfig` argument, in place of the setting here.
    """
    settings: dict[str, Any] = {
        "output_dir": output_dir,
        "seed": seed,
        "max_steps": 150,
        "per_device_train_batch_size": 256,
        "num_generations": 8,
        "max_completion_length": NUM_COMPLETION_TOKENS,
        "temperature": 1.0,
        "beta": 0.0,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,  # gradient_checkpointing, by the name it has since transformers 5.24
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
    }
    return GRPOConfig(**(settings | overrides))


@torch.no_grad()
def greedy_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, num_prompts: int = 512, rewarded: str = "a"
) -> float:
    """Fraction, in [0, 1], of held-out `?` prompts whose greedy completion is the right answer."""
    prompts, answers = heldout_prompts(num_prompts, rewarded)
    input_ids = tokenizer(prompts, return_tensors="pt").input_ids  # all of one length, so no padding
    was_training = model.training
    model.eval()
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=GenerationConfig(
            max_new_tokens=NUM_COMPLETION_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
    )
    model.train(was_training)
    completions = tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
    return exact_match_reward(completions, answers).count(1.0) / num_prompts
