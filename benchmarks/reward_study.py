"""Which score, scope and options keep the reward: GRPO on the demo task while it is pruned.

    python benchmarks/reward_study.py --seeds 0 1 2 3 4                       # the table of the README
    python benchmarks/reward_study.py --seeds 0 1 2 --variants all --sparsities 0.85 0.9
    python benchmarks/reward_study.py --rewarded c --seeds 0 1 2              # another task: reward_study_c.json

Every run starts from its seed's pre-trained model and has the same budget: 150 steps of 32 prompts x 8 completions,
pruned by the cubic schedule from step 20 to 110. The number is the greedy accuracy on 512 held-out prompts. Results
are merged into --output run by run (what is there is not run again) and drawn beside it.
"""

import argparse
import functools
import statistics
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import oneshot
import torch
from mix6_runs import END, START, mix6, post_train, prepare, pretrained
from transformers import TrainerCallback

from mama_hf import MamaGRPOTrainer, MamaPruningConfig, criteria, masks
from mama_hf.criteria import Criterion


class RawRewardTrainer(MamaGRPOTrainer):
    """
    The statistics see the gradient of the policy weighted by the rewards as they are, not by the advantages, which are
    centred and scaled in each group. Training itself is as ever; each step has a second forward and backward pass.
    """

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        outputs = super()._generate_and_score_completions(inputs)
        completions = self.processing_class.batch_decode(outputs["completion_ids"], skip_special_tokens=True)
        rewards = mix6.exact_match_reward(completions, [row["answer"] for row in inputs])
        return {**outputs, "raw_rewards": torch.tensor(rewards)}

    def make_pruning_callback(self, *args: Any) -> Any:
        callback = super().make_pruning_callback(*args)
        callback.on_pre_optimizer_step = functools.partial(self._with_raw_gradients, callback.on_pre_optimizer_step)
        return callback

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        self._inputs = inputs
        return super()._compute_loss(model, inputs)

    def _with_raw_gradients(self, observe: Any, *args: Any, **kwargs: Any) -> None:
        parameters = list(self.model.parameters())
        gradients = [parameter.grad for parameter in parameters]
        self.model.zero_grad()
        inputs = {**self._inputs, "advantages": self._inputs["raw_rewards"]}
        super()._compute_loss(self.model, inputs).backward()
        observe(*args, **kwargs)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


class Variant(NamedTuple):
    """
    Args:
        fields (`dict`): of the recipe.
        criterion (`Criterion`, *optional*): what the recipe's criterion means in the run; `None`: what is shipped.
        floor (`float`): share of the uniform allocation that every weight keeps at least, where scope is global.
        raw (`bool`): whether the statistics see the rewards in place of the advantages.
        teacher (`str`, *optional*): as the trainer's `teacher_model`, or "trained": by the same run without pruning.
        recovery_rate (`float`): what the learning rate is multiplied with once the masks are frozen.
    """

    fields: dict[str, Any] = {}
    criterion: Criterion | None = None
    floor: float = masks.GLOBAL_FLOOR
    raw: bool = False
    teacher: str | None = None
    recovery_rate: float = 1.0


class RecoveryRate(TrainerCallback):
    """Multiplies the learning rate of the steps after `END`; the scheduler sets it anew in each step."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if state.global_step >= END:
            for group in optimizer.param_groups:
                group["lr"] *= self.factor


def product(exponent: float) -> Variant:
    """|w| RMS(g)^exponent. (|w|^a x movement^b ranks as |w| x movement^(b/a): one exponent is enough.)"""

    def score(weight: torch.Tensor, gradient_square: torch.Tensor) -> torch.Tensor:
        return weight.abs() * gradient_square ** (exponent / 2)

    return Variant({}, Criterion(score, ("gradient_square",), "global"))


def taylor_product(weight: torch.Tensor, taylor: torch.Tensor) -> torch.Tensor:
    return (weight.abs() * taylor).sqrt()


def scale_free(weight: torch.Tensor, gradient_square: torch.Tensor) -> torch.Tensor:
    """|w| RMS(g)^1/2 / RMS(w)^1/2 (of the weights kept): the same when a layer grows by c and its gradient by 1/c."""
    mean_square = weight.square().sum() / weight.count_nonzero().clamp(min=1)
    return weight.abs() * (gradient_square / mean_square) ** 0.25


TAYLOR_PRODUCT = Criterion(taylor_product, ("taylor",), "global")
MOVED = {"move_values": "least_squares"}
VARIANTS = {
    **{name: Variant({"criterion": name}) for name in ("mama", "magnitude", "wanda", "taylor", "random")},
    # the others: what was tried for "mama", which is |w| RMS(g)^1/2 with an EMA of 0.9 and the global scope
    "|w| RMS(g)^1/4": product(0.25),
    "|w| RMS(g)^3/4": product(0.75),
    "|w| RMS(g)": product(1),
    "(|w| EMA|g w|)^1/2": Variant({"ema_decay": 0.9}, TAYLOR_PRODUCT),
    "(|w| sum|g w|)^1/2": Variant({}, TAYLOR_PRODUCT),
    "|w| RMS(g)^1/2 / RMS(w)^1/2": Variant({}, Criterion(scale_free, ("gradient_square",), "global")),
    "mama, EMA 0.8": Variant({"ema_decay": 0.8}),
    "mama, EMA 0.97": Variant({"ema_decay": 0.97}),
    "mama, raw rewards": Variant(raw=True),
    "mama, layer scope": Variant({"scope": "layer"}),
    "mama, layers keep 0.3 of uniform": Variant(floor=0.3),
    "mama, layers keep 0.6 of uniform": Variant(floor=0.6),
    "mama, regrowth 0.1": Variant({"regrowth": 0.1}),
    "mama, regrowth 0.2": Variant({"regrowth": 0.2}),
    "mama, EMA 0.97, regrowth 0.1": Variant({"ema_decay": 0.97, "regrowth": 0.1}),
    "mama, an update every 5 steps": Variant({"update_every": 5}),
    "mama, an update every step": Variant({"update_every": 1}),
    "mama, values moved": Variant(MOVED),
    "mama, values moved, an update every 10 steps": Variant({**MOVED, "update_every": 10}),
    "mama, values moved, an update every 30 steps": Variant({**MOVED, "update_every": 30}),
    "mama, teacher from the start of pruning": Variant({"distillation_weight": 1.0}, teacher="snapshot"),
    "mama, teacher from before training": Variant({"distillation_weight": 1.0}, teacher="initial"),
    "mama, teacher trained without pruning": Variant({"distillation_weight": 1.0}, teacher="trained"),
    "mama, values moved, teacher from the start of pruning": Variant(
        {**MOVED, "distillation_weight": 1.0}, teacher="snapshot"
    ),
    "mama, recovery at 1/3 of the learning rate": Variant(recovery_rate=1 / 3),
    "mama, recovery at 3 x the learning rate": Variant(recovery_rate=3.0),
    "mama, recovery at 10 x the learning rate": Variant(recovery_rate=10.0),
}
DRAWN = ["mama", "mama, values moved", "magnitude", "wanda", "taylor", "random"]


@functools.cache
def trained(tokenizer: Any, seed: int, folder: Path, rewarded: str) -> Any:
    """The model of a seed after the GRPO run without pruning: the same one for all sparsities."""
    model = pretrained(tokenizer, seed, folder)
    post_train(model, tokenizer, seed, None, rewarded=rewarded)
    return model


def run(seed: int, sparsity: float, name: str, rewarded: str, tokenizer: Any, folder: Path) -> float:
    variant = VARIANTS[name]
    recipe = MamaPruningConfig(final_sparsity=sparsity, start=START, end=END, **variant.fields)
    teacher: Any = variant.teacher
    if teacher == "trained":
        teacher = trained(tokenizer, seed, folder, rewarded)
    criterion = variant.criterion or criteria.CRITERIA[recipe.criterion]
    changed = mock.patch.dict(criteria.CRITERIA, {recipe.criterion: criterion})
    with changed, mock.patch.object(masks, "GLOBAL_FLOOR", variant.floor):
        return post_train(
            pretrained(tokenizer, seed, folder),
            tokenizer,
            seed,
            recipe,
            rewarded=rewarded,
            trainer_class=RawRewardTrainer if variant.raw else MamaGRPOTrainer,
            teacher_model=teacher,
            callbacks=[RecoveryRate(variant.recovery_rate)],
        )[0]


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy over sparsity: means, and the range over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name in DRAWN:
        points = sorted((float(level), list(seeds.values())) for level, seeds in results.get(name, {}).items())
        if points:
            levels = [level for level, _ in points]
            means = [statistics.mean(values) for _, values in points]
            (line,) = axes.plot(levels, means, marker="o", label=name)
            low, high = [min(values) for _, values in points], [max(values) for _, values in points]
            axes.fill_between(levels, low, high, color=line.get_color(), alpha=0.15)
    axes.set(xlabel="zeros in the linear layers", ylabel="held-out accuracy", ylim=(-0.03, 1.03))
    axes.set_title("GRPO while pruning, demo task (mean and range of the seeds)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.85, 0.9])
    parser.add_argument("--variants", nargs="+", default=DRAWN, help='names of VARIANTS, or "all"')
    parser.add_argument("--rewarded", choices=list(mix6.OPERATIONS), default="a", help="the operation that is right")
    parser.add_argument("--models", type=Path, default=Path("outputs/mix6"), help="folder of the pre-trained models")
    parser.add_argument("--output", type=Path, help="one file a task; results of two are not to be mixed")
    args = parser.parse_args(argv)
    task = "" if args.rewarded == "a" else f"_{args.rewarded}"
    args.output = args.output or Path(f"benchmarks/results/reward_study{task}.json")
    tokenizer = prepare()
    variants = list(VARIANTS) if args.variants == ["all"] else args.variants
    runs = [(s, level, v) for s in args.seeds for level in args.sparsities for v in variants]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for seed, sparsity, variant in runs:
        row = oneshot.read(args.output).get(variant, {}).get(str(sparsity), {})
        if str(seed) in row:
            continue
        accuracy = run(seed, sparsity, variant, args.rewarded, tokenizer, args.models)
        print(f"{variant}, {sparsity}, seed {seed}: {accuracy:.3f}", flush=True)
        oneshot.write(args.output, variant, str(sparsity), {**row, str(seed): accuracy})
    results = oneshot.read(args.output)
    draw(results, args.output.with_suffix(".png"))
    return results


if __name__ == "__main__":
    main()
