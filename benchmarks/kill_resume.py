"""
Is a run that was killed and resumed the same as one that was not, bit for bit?

    python benchmarks/kill_resume.py --rounds 5 --seed 0

Each round trains a tiny Llama (Trainer, gradient accumulation 2, a checkpoint every 3 of 60 steps) in a process that
gets SIGKILL at random moments after a checkpoint is complete, and resumes it each time, until the end. The last
checkpoint must equal that of an uninterrupted run: weights, optimizer, masks and statistics, logs. The exit status is
1 if one does not.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from mama_hf import MamaPruningCallback, MamaPruningConfig


MAX_STEPS, MAX_KILLS = 60, 3
RECIPES: list[dict[str, Any]] = [{"criterion": name} for name in ("mama", "wanda", "displacement", "random")]
RECIPES.insert(1, {"criterion": "taylor", "regrowth": 0.1})


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints: their pruning state is written last, under another name until it is whole."""
    return sorted(
        int(path.parent.name.split("-")[1]) for path in folder.glob("checkpoint-*/pruning_state.safetensors")
    )


def train(folder: Path, recipe: dict[str, Any]) -> None:
    """In a process of its own: trains, from the last complete checkpoint if there is one."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=MAX_STEPS,
        save_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to="none",
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 64, (256, 16)).tolist()]
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, attention_dropout=0.1, **size))
    callback = MamaPruningCallback(MamaPruningConfig(final_sparsity=0.8, start=6, end=45, **recipe))
    steps = complete_steps(folder)
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train(
        resume_from_checkpoint=f"{folder}/checkpoint-{steps[-1]}" if steps else None
    )


def run(folder: Path, recipe: dict[str, Any], rng: random.Random | None = None) -> list[int]:
    """Train to the end; with `rng`, kill it up to 3 times. Returns the newest complete checkpoint at each kill."""
    killed: list[int] = []
    while True:
        folder.mkdir(exist_ok=True)
        with open(folder / "output.txt", "w") as output:
            command = [sys.executable, __file__, "--train", str(folder), json.dumps(recipe)]
            process = subprocess.Popen(command, stdout=output, stderr=output)
            if rng is not None and len(killed) < MAX_KILLS:
                last = len(complete_steps(folder)) + rng.randint(1, 6)
                while process.poll() is None and len(complete_steps(folder)) < last:
                    time.sleep(0.002)
                time.sleep(rng.uniform(0.0, 0.2))  # anywhere in the next steps and the writing of their checkpoint
                process.kill()
            status = process.wait()
        if status == 0:
            return killed
        if status > 0:
            raise RuntimeError((folder / "output.txt").read_text())
        killed.append(complete_steps(folder)[-1])


def first_difference(one: Path, other: Path) -> str | None:
    """The name of the first file in which two checkpoints differ, if any."""
    readers = {
        "model.safetensors": load_file,
        "optimizer.pt": lambda path: torch.load(path, weights_only=True)["state"],
        "pruning_state.safetensors": load_file,
        "trainer_state.json": lambda path: json.loads(path.read_text())["log_history"],
    }
    for name, read in readers.items():
        try:
            torch.testing.assert_close(read(one / name), read(other / name), rtol=0, atol=0, equal_nan=True)
        except AssertionError:
            return name
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="number of runs that are killed (one criterion each)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments at which they are killed")
    parser.add_argument("--train", nargs=2, metavar=("FOLDER", "RECIPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(Path(options.train[0]), json.loads(options.train[1]))
        return 0
    rng, num_identical = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as name:
        for index in range(options.rounds):
            recipe = RECIPES[index % len(RECIPES)]
            whole, killed = Path(name, f"whole-{recipe['criterion']}"), Path(name, f"killed-{index}")
            if not whole.exists():
                run(whole, recipe)
            steps = run(killed, recipe, rng)
            found = first_difference(*(folder / f"checkpoint-{MAX_STEPS}" for folder in (whole, killed)))
            num_identical += found is None
            verdict = "identical" if found is None else f"{found} DIFFERS"
            print(f"round {index + 1}, {recipe}: killed after the checkpoints {steps}: {verdict}", flush=True)
    print(f"{num_identical} of {options.rounds} killed runs are bit-identical to the uninterrupted one.")
    return int(num_identical < options.rounds)


if __name__ == "__main__":
    sys.exit(main())
