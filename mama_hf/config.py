"""The recipe: `MamaPruningConfig`. Everything about *how* to prune stands here; nothing in here imports torch."""

import dataclasses
import difflib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from huggingface_hub import hf_hub_download

from .version import __version__


CONFIG_NAME = "pruning_config.json"
FORMAT_VERSION = 1
AUTO_CEILING = 0.95  # what final_sparsity="auto" aims at; the reward check stops before it

ScheduleName = Literal["cubic", "linear", "one-shot"]
CriterionName = Literal[
    "mama", "magnitude", "movement", "displacement", "taylor", "fisher", "wanda", "random", "sparsegpt"
]
ScopeName = Literal["layer", "row", "global"]
AllocationName = Literal["uniform", "owl"]
MoveName = Literal["none", "mean", "bias", "least_squares"]
DirectionName = Literal["forward", "reverse", "jsd"]

STRUCTURED = ("neuron", "head", "neuron+head", "layer")  # granularities that can be cut out of a model

_N_OF_M = re.compile(r"(\d+):(\d+)")


@dataclass
class MamaPruningConfig:
    """
    A pruning recipe. It is handed to [`MamaPruningCallback`] or [`MamaGRPOTrainer`] and saved beside the weights.

    Args:
        final_sparsity (`float`, *optional*, defaults to 0.5):
            Fraction of zeros in the targeted weights when pruning ends, in [0, 1); or `"auto"`: as many as
            `reward_tolerance` allows, at most 0.95.
        initial_sparsity (`float`, *optional*, defaults to 0.0):
            Fraction of zeros right at `start`.
        schedule (`str`, *optional*, defaults to `"cubic"`):
            `"cubic"` (Zhu & Gupta 2017), `"linear"`, or `"one-shot"` (all at `start`).
        start (`int` or `float`, *optional*, defaults to 0.1):
            When pruning starts: an int is an optimizer step, a float a fraction of `max_steps`.
        end (`int` or `float`, *optional*, defaults to 0.7):
            When the final sparsity is reached and the masks are frozen; the rest of the run recovers.
        update_every (`int`, *optional*):
            Steps between mask updates. `None`: about 40 updates between start and end, but with `reward_tolerance` at
            least two steps apart.
        criterion (`str`, *optional*, defaults to `"mama"`):
            What a weight is worth: a key of [`CRITERIA`], or `"sparsegpt"` (only in [`prune_model`]).
        granularity (`str`, *optional*, defaults to `"unstructured"`):
            `"unstructured"`, `"N:M"` (N kept in each M neighbours along the input dimension), e.g. `"2:4"`, or what
            can be cut out of the model: `"neuron"` (of the FFN), `"head"` (a key-value head with its query heads),
            `"neuron+head"`, or `"layer"` (only in [`prune_model`]). For these, sparsity is the fraction of groups that
            are wholly zero, or of layers that are dropped. With `"neuron+head"` each kind loses that fraction: they
            don't compete, since an entry of an attention weight and one of an FFN weight are not worth the same.
        scope (`str`, *optional*):
            Which weights compete: `"layer"` (within each weight), `"row"` (within each output row) or `"global"` (all
            targets). `None`: the best scope measured for the criterion. An N:M pattern is always within its M. For
            neurons and heads, `"layer"` leaves every layer alike, so that what is cut out leaves a stock architecture,
            and `"global"` lets layers differ; `None` is `"layer"` in [`prune_model`].
        allocation (`str`, *optional*, defaults to `"uniform"`):
            How sparsity is shared among layers when the scope is not global: `"uniform"`, or `"owl"` (layers with more
            outliers keep more, arXiv 2310.05175; only in [`prune_model`]).
        target_modules (`str` or `list[str]`, *optional*, defaults to `"all-linear"`):
            `"all-linear"`, a list of module-name suffixes, or one regular expression for the whole name.
        exclude_modules (`str` or `list[str]`, *optional*):
            Suffixes, or one regular expression, of modules to leave dense. A layer's neurons (or heads) stay if one of
            their modules is excluded.
        multiple_of (`int`, *optional*, defaults to 8):
            The number of neurons that a layer keeps is rounded to a multiple of this, for shapes that hardware likes.
        move_values (`str`, *optional*, defaults to `"none"`):
            Where the value of a pruned weight goes: `"none"`, `"mean"` (its row's kept weights, evenly), `"bias"`
            (W_pruned E[x]) or `"least_squares"` (the kept weights of its row, such that the layer's output changes
            least).
        reward_tolerance (`float`, *optional*):
            How far, in units of the reward and in (0, 1], the mean reward on held-out prompts may lie below the best
            one so far: a mask update that goes beyond is taken back, and a smaller step is tried later; if training
            ends beyond it, the last state that was within is put back. `None`: no check. Only in [`MamaGRPOTrainer`].
        distillation_weight (`float`, *optional*, defaults to 0.0):
            What the trainer's loss gets on top: this times the divergence from the `teacher_model`, per token as the
            loss is. 0: no teacher. Only in [`MamaGRPOTrainer`], [`MamaSFTTrainer`] and [`MamaTrainer`].
        distillation_temperature (`float`, *optional*, defaults to 1.0):
            Both models' logits are divided by it before the divergence is taken (no factor of its square, as in TRL).
        distillation_direction (`str`, *optional*, defaults to `"forward"`):
            `"forward"` is KL(teacher || student), `"reverse"` KL(student || teacher), `"jsd"` the Jensen-Shannon
            divergence: TRL's `beta` of 0, 1 and 0.5.
        ema_decay (`float`, *optional*):
            Decay per step, in [0, 1), of the moving averages behind the gradient criteria. `None`: `mama` reads Adam's
            own second moment (no extra memory) in trainers with fixed data, and averages with 0.9 where rewards steer;
            `taylor`, `fisher` and `movement` are plain sums.
        regrowth (`float`, *optional*, defaults to 0.0):
            Fraction of the kept weights, in [0, 1), that each mask update before `end` swaps for pruned ones: those
            with the largest mean squared gradient come back, starting from 0 (RigL, arXiv 1911.11134). It falls
            linearly to 0 at `end`. With 0 a pruned weight never comes back.

    Raises:
        `ValueError`: for a value that can't work, with what was given and what to set instead.
    """

    # `str | None` beside the numbers makes HfArgumentParser hand over text, which tells the step 1 from the fraction
    # 1.0. None is refused.
    final_sparsity: float | str | None = field(
        default=0.5,
        metadata={"help": "Fraction of zeros when pruning ends, in [0, 1), or auto with reward_tolerance."},
    )
    initial_sparsity: float = field(default=0.0, metadata={"help": "Fraction of zeros right at `start`."})
    schedule: ScheduleName = field(
        default="cubic", metadata={"help": "How the sparsity rises from `start` to `end`: cubic, linear or one-shot."}
    )
    start: float | str | None = field(
        default=0.1, metadata={"help": "When pruning starts: a step (20) or a fraction of max_steps (0.1)."}
    )
    end: float | str | None = field(
        default=0.7, metadata={"help": "When the masks are frozen: a step (140) or a fraction of max_steps (0.7)."}
    )
    update_every: int | None = field(
        default=None, metadata={"help": "Steps between mask updates; about 40 updates in all if not set."}
    )
    criterion: CriterionName = field(default="mama", metadata={"help": "What a weight is worth."})
    granularity: str = field(
        default="unstructured", metadata={"help": "unstructured, N:M such as 2:4, neuron, head, neuron+head or layer."}
    )
    scope: ScopeName | None = field(
        default=None, metadata={"help": "Which weights compete; the best one for the criterion if not set."}
    )
    allocation: AllocationName = field(
        default="uniform", metadata={"help": "How sparsity is shared among layers when the scope is not global."}
    )
    # HfArgumentParser takes a list's default from a factory only, and of `X | None | Y` the X
    target_modules: str | list[str] = field(
        default_factory=lambda: "all-linear", metadata={"help": "all-linear, or module-name suffixes."}
    )
    exclude_modules: list[str] | None | str = field(  # noqa: RUF036
        default=None, metadata={"help": "Suffixes of module names to leave dense."}
    )
    move_values: MoveName = field(default="none", metadata={"help": "Where a pruned weight's value goes."})
    reward_tolerance: float | None = field(
        default=None, metadata={"help": "Largest fall of the reward that a mask update may cause."}
    )
    distillation_weight: float = field(default=0.0, metadata={"help": "Weight of the KL term to the teacher."})
    distillation_temperature: float = field(default=1.0, metadata={"help": "Temperature of the KL term."})
    distillation_direction: DirectionName = field(
        default="forward", metadata={"help": "forward: KL(teacher || student); reverse: the other way; jsd: between."}
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Decay per step of the gradient averages; see the documentation if not set."}
    )
    regrowth: float = field(
        default=0.0, metadata={"help": "Fraction of the kept weights that an update may swap for pruned ones."}
    )
    multiple_of: int = field(default=8, metadata={"help": "Neurons that a layer keeps are a multiple of this."})

    def __post_init__(self) -> None:
        self.start, self.end = _number(self.start), _number(self.end)
        self.final_sparsity = _number(self.final_sparsity)
        if self.target_modules == ["all-linear"]:  # the command line gives a list
            self.target_modules = "all-linear"
        if not isinstance(self.granularity, str):
            raise ValueError(
                f"granularity={self.granularity!r} must be text. In YAML, N:M needs quotes: granularity: '2:4'."
            )
        self._check_choices()
        self._check_combinations()
        self._check_reward_tolerance()
        self._check_structured()
        self._check_sparsity()
        self._check_steps()
        self._check_distillation()
        self._check_modules("target_modules", self.target_modules)
        if self.exclude_modules is not None:
            self._check_modules("exclude_modules", self.exclude_modules)
        for name in ("ema_decay", "regrowth"):
            value = getattr(self, name)
            if name == "ema_decay" and value is None:
                continue
            if not (_is_number(value) and 0 <= value < 1):
                raise ValueError(f"{name}={value!r} must be a fraction in [0, 1).")

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(N, M) for an N:M granularity, else `None`."""
        match = _N_OF_M.fullmatch(self.granularity)
        return (int(match[1]), int(match[2])) if match else None

    @property
    def is_structured(self) -> bool:
        """Whether what goes can be cut out of the model: neurons, heads or layers."""
        return self.granularity in STRUCTURED

    def _check_choices(self) -> None:
        _check_choice("schedule", self.schedule, get_args(ScheduleName))
        _check_choice("criterion", self.criterion, get_args(CriterionName))
        _check_choice("allocation", self.allocation, get_args(AllocationName))
        _check_choice("move_values", self.move_values, get_args(MoveName))
        _check_choice("distillation_direction", self.distillation_direction, get_args(DirectionName))
        if self.scope is not None:
            _check_choice("scope", self.scope, get_args(ScopeName))
        if self.n_of_m is None:
            choices = ("unstructured", *STRUCTURED, "2:4", "4:8", "1:4")
            _check_choice("granularity", self.granularity, choices, "or any other N:M")

    def _check_combinations(self) -> None:
        if self.criterion == "sparsegpt" and self.move_values != "none":
            raise ValueError(
                f"move_values={self.move_values!r} does not go with criterion='sparsegpt', which sets the values of "
                'the kept weights itself. Set move_values="none".'
            )
        if self.allocation == "owl" and (self.n_of_m is not None or self.scope == "global"):
            raise ValueError(
                "allocation='owl' shares a free sparsity among layers: it does not go with an N:M granularity, which "
                "fixes it, nor with scope='global', which shares it already. Set allocation=\"uniform\"."
            )

    def _check_reward_tolerance(self) -> None:
        tolerance = self.reward_tolerance
        if tolerance is not None and not (_is_number(tolerance) and 0 < tolerance <= 1):
            raise ValueError(
                f"reward_tolerance={tolerance!r} must be in (0, 1], in units of the reward, or None for no check. "
                "Rewards on a larger scale can be divided in the reward function."
            )
        if self.final_sparsity == "auto" and tolerance is None:
            raise ValueError(
                "final_sparsity='auto' prunes as far as the reward allows, and needs reward_tolerance to know how far "
                "it may fall. Set reward_tolerance, for example to 0.05, or final_sparsity to a number."
            )
        if self.final_sparsity == "auto" and self.n_of_m is not None:
            kept, group = self.n_of_m
            raise ValueError(
                f"final_sparsity='auto' does not go with granularity={self.granularity!r}, which fixes the sparsity. "
                f"Set final_sparsity={1 - kept / group:g}."
            )
        if tolerance is not None and self.schedule == "one-shot":
            raise ValueError(
                "reward_tolerance does not go with schedule='one-shot': after a roll-back there is no later update to "
                'try a smaller step in. Set schedule="cubic".'
            )

    def _check_structured(self) -> None:
        if isinstance(self.multiple_of, bool) or not isinstance(self.multiple_of, int) or self.multiple_of < 1:
            raise ValueError(f"multiple_of={self.multiple_of!r} must be a number of neurons >= 1.")
        if not self.is_structured:
            return
        is_layer = self.granularity == "layer"
        refused = {
            "scope": (self.scope == "row", 'None, "layer" or "global"'),
            "allocation": (self.allocation != "uniform", '"uniform", or scope="global" to let layers differ'),
            "target_modules": (self.target_modules != "all-linear", '"all-linear", and use exclude_modules'),
            "criterion": (self.criterion == "sparsegpt", '"mama" with move_values="least_squares"'),
            "regrowth": (self.regrowth != 0, "0.0: what is wholly zero gets no gradient to grow by"),
            "move_values": (is_layer and self.move_values != "none", '"none"'),
        }
        if is_layer:
            refused["scope"] = (self.scope is not None, "None")
        for name, (asked, instead) in refused.items():
            if asked:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} does not go with granularity={self.granularity!r}, which removes "
                    f"whole {self.granularity.replace('+', 's and ')}s. Set {name}={instead}."
                )

    def _check_sparsity(self) -> None:
        for name in ("final_sparsity", "initial_sparsity"):
            value = getattr(self, name)
            if name == "final_sparsity" and value == "auto":
                continue
            if not (_is_number(value) and math.isfinite(value) and 0 <= value < 1):
                hint = f" If you meant percent, set {value / 100:g}." if _is_number(value) and 1 < value <= 100 else ""
                raise ValueError(f"{name}={value!r} must be a fraction of zeros in [0, 1).{hint}")
        final = AUTO_CEILING if self.final_sparsity == "auto" else cast(float, self.final_sparsity)
        if self.initial_sparsity > final:
            raise ValueError(
                f"initial_sparsity={self.initial_sparsity} is above final_sparsity={final}: a pruned "
                "model does not get denser. Lower the first or raise the second."
            )
        if self.n_of_m is not None:
            kept, group = self.n_of_m
            if not 1 <= kept < group:
                raise ValueError(f"granularity={self.granularity!r} keeps N of M weights and needs 1 <= N < M.")
            if not math.isclose(final, 1 - kept / group):
                raise ValueError(
                    f"granularity={self.granularity!r} leaves {1 - kept / group:g} of the weights zero, but "
                    f"final_sparsity={self.final_sparsity}. Set final_sparsity={1 - kept / group:g}."
                )
            if self.scope is not None and self.scope != "layer":
                raise ValueError(
                    f"scope={self.scope!r} does not go with granularity={self.granularity!r}, where weights compete "
                    "within their group of M. Leave scope unset."
                )

    def _check_steps(self) -> None:
        for name in ("start", "end"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name}={value!r} must be a step (int >= 0) or a fraction of max_steps (float).")
            if isinstance(value, float) and value > 1:
                raise ValueError(
                    f"{name}={value!r} is a float, so a fraction of max_steps, and must be at most 1.0. "
                    f"For step {value:g}, give the int {int(value)}."
                )
        start, end = cast(float, self.start), cast(float, self.end)
        if isinstance(self.start, int) == isinstance(self.end, int) and start > end:
            raise ValueError(f"start={self.start} is after end={self.end}: pruning must start before it ends.")
        every = self.update_every
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"update_every={every!r} must be a number of steps >= 1, or None for about 40 updates.")

    def _check_distillation(self) -> None:
        weight, temperature = self.distillation_weight, self.distillation_temperature
        if not (_is_number(weight) and math.isfinite(weight) and weight >= 0):
            raise ValueError(f"distillation_weight={weight!r} must be a number >= 0; 0 is no distillation.")
        if not (_is_number(temperature) and math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"distillation_temperature={temperature!r} must be a number > 0.")
        if weight == 0 and (temperature, self.distillation_direction) != (1, "forward"):
            raise ValueError(
                f"distillation_temperature={temperature} and distillation_direction={self.distillation_direction!r} "
                "do nothing with distillation_weight=0. Set distillation_weight, e.g. to 1.0."
            )

    @staticmethod
    def _check_modules(name: str, value: Any) -> None:
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{name}={value!r} is not a regular expression: {error}.") from error
        elif not isinstance(value, list) or not value or not all(isinstance(entry, str) and entry for entry in value):
            raise ValueError(f"{name}={value!r} must be a list of module-name suffixes, or one regular expression.")

    def to_dict(self) -> dict[str, Any]:
        """The fields and the format version, as JSON types."""
        return {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MamaPruningConfig":
        """
        The recipe of `to_dict`.

        Raises:
            `ValueError`: for a key or a format version that this package does not know.
        """
        values = dict(values)
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ValueError(
                f"This pruning recipe has format_version={version!r}; mama-hf {__version__} reads {FORMAT_VERSION}. "
                "Use the mama-hf version that wrote it, or a newer one."
            )
        names = [entry.name for entry in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise ValueError(f"Unknown key {key!r} in the pruning recipe.{_nearest(key, names)}")
        return cls(**values)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `pruning_config.json` into `save_directory`, which is created if needed."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / f".{CONFIG_NAME}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, directory / CONFIG_NAME)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **hub_kwargs: Any
    ) -> "MamaPruningConfig":
        """
        Read `pruning_config.json` from a folder or a Hub repository.

        Args:
            hub_kwargs: passed to `huggingface_hub.hf_hub_download` (`revision`, `token`, `cache_dir`, ...).

        Raises:
            `FileNotFoundError`: for a folder without the file.
            `ValueError`: for a file that is not a recipe of this format.
        """
        if os.path.isdir(pretrained_model_name_or_path):
            path = Path(pretrained_model_name_or_path) / CONFIG_NAME
            if not path.is_file():
                raise FileNotFoundError(f"There is no {CONFIG_NAME} in {pretrained_model_name_or_path}.")
        else:
            path = Path(hf_hub_download(str(pretrained_model_name_or_path), CONFIG_NAME, **hub_kwargs))
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}.") from error
        return cls.from_dict(values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> Any:
    """A number given as text on the command line; anything else as it is."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


def _nearest(given: Any, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(given), valid, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _check_choice(name: str, value: Any, valid: Sequence[str], more: str = "") -> None:
    if value not in valid:
        choices = ", ".join(map(repr, valid)) + (f" {more}" if more else "")
        raise ValueError(f"{name}={value!r} does not exist. Choose from {choices}.{_nearest(value, valid)}")
