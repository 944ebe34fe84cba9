"""What the commands of `mama-hf` do: each takes the parsed arguments and returns what is printed."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from .calibration import calibration_windows, load_text
from .config import MamaPruningConfig
from .evaluation import multiple_choice, perplexity
from .oneshot import prune_model
from .report import sparsity_report
from .shrink import shrink


_RECIPE_OPTIONS = (
    "final_sparsity",
    "criterion",
    "granularity",
    "scope",
    "allocation",
    "move_values",
    "exclude_modules",
    "multiple_of",
)


def prune(arguments: argparse.Namespace) -> str:
    """Prune a model in one shot and save it, with its tokenizer and the report."""
    recipe = _recipe(arguments)
    if arguments.calibration is None:
        raise ValueError("--calibration is missing: name a text file or a data set like what the model will see.")
    text = load_text(
        arguments.calibration, arguments.calibration_config, arguments.calibration_split, arguments.calibration_column
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows = calibration_windows(text, tokenizer, arguments.num_windows, arguments.window, arguments.seed)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)
    report = prune_model(
        model,
        recipe,
        windows,
        device=arguments.device,
        iterations=arguments.iterations,
        resume_dir=arguments.resume_dir,
    )
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    report.save(Path(arguments.output) / "pruning_report.json")
    return f"{report}\n{arguments.output} has the model and pruning_report.json.\n"


def _recipe(arguments: argparse.Namespace) -> MamaPruningConfig:
    if arguments.recipe is None:
        values: dict[str, Any] = {"final_sparsity": 0.5, "move_values": "least_squares"}
        if arguments.criterion == "sparsegpt":
            values["move_values"] = "none"  # it sets the values itself
    else:
        values = dataclasses.asdict(MamaPruningConfig.from_pretrained(arguments.recipe))
    given = {name: getattr(arguments, name) for name in _RECIPE_OPTIONS if getattr(arguments, name) is not None}
    return MamaPruningConfig(**{**values, **given})


def shrink_model(arguments: argparse.Namespace) -> str:
    """Cut a model's idle neurons and heads out and save what is left, with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)
    small = shrink(model)
    small.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    before, after = model.num_parameters(), small.num_parameters()
    return f"{before:,} parameters before, {after:,} after ({after / before:.1%}). {arguments.output} has the model.\n"


def report(arguments: argparse.Namespace) -> str:
    """The zeros of a saved model."""
    result = sparsity_report(arguments.folder)
    return json.dumps(result.to_dict(), indent=2) + "\n" if arguments.json else str(result)


def evaluate(arguments: argparse.Namespace) -> str:
    """Perplexity and multiple-choice accuracy, as JSON."""
    if arguments.text is None and arguments.items is None:
        raise ValueError("Give --text (for the perplexity), --items (for the accuracy) or both.")
    results: dict[str, Any] = {}
    items = (
        [json.loads(line) for line in Path(arguments.items).read_text("utf-8").splitlines()] if arguments.items else []
    )
    text = None
    if arguments.text is not None:
        text = load_text(arguments.text, arguments.text_config, arguments.text_split, arguments.text_column)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).to(arguments.device)
    if text is not None:
        results |= perplexity(model, tokenizer, text, arguments.window, arguments.stride)
    if items:
        found = multiple_choice(model, tokenizer, items, batch_size=arguments.batch_size)
        results |= {name: value for name, value in found.items() if not name.startswith("predictions")}
    return json.dumps(results, indent=2) + "\n"
