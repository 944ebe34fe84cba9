"""The teacher of a distilling trainer: where it comes from, and how a run that is resumed finds it again."""

import copy
import hashlib
import json
import logging
import os
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import cached_file

from .callback import checkpoint_folder, generation_alignment, resume_folder
from .config import MamaPruningConfig
from .heads import OutputHead, check_head, same_random_state
from .schedule import resolve_schedule
from .targets import LoraTarget, matching_targets, plain_name


logger = logging.getLogger(__name__)

POINTER_NAME = "teacher.json"
MOMENTS = ("initial", "snapshot")


class TeacherCallback(TrainerCallback):
    """
    Holds the frozen teacher in `model`, `None` as long as there is none.

    `"initial"` and `"snapshot"` are copies of the student: before the first step, and at the end of the step at which
    pruning starts, just before its first mask. With the first checkpoint the copy is written once to the output
    folder, as `_teacher-{hash}.safetensors`; each checkpoint names it in `teacher.json`. A file with
    a leading underscore is never uploaded by the trainer.

    Args:
        teacher_model (`PreTrainedModel`, `str` or `os.PathLike`):
            a model, a path or Hub id, `"initial"` or `"snapshot"`.
        config (`MamaPruningConfig`): the recipe.
        student (`nn.Module`): the model to train, PEFT's wrapper included.
        processing_class (*optional*): the trainer's, to compare with the teacher's tokenizer.

    Raises:
        `ValueError`: for a teacher that can't be found or does not share the student's vocabulary.
    """

    def __init__(
        self,
        teacher_model: PreTrainedModel | str | os.PathLike,
        config: MamaPruningConfig,
        student: nn.Module,
        processing_class: Any = None,
    ) -> None:
        self.config, self.student = config, student
        self.moment = str(teacher_model) if teacher_model in MOMENTS else None
        self.model: PreTrainedModel | None = None
        self.first_step = 0
        self.file: dict[str, str] | None = None
        check_head(unwrap(student))
        if self.moment is None:
            self.model = _load(teacher_model, processing_class).eval().requires_grad_(False)
            _check_teacher(self.model, unwrap(student), teacher_model)
            self.model.to(unwrap(student).device)  # type: ignore[arg-type]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.moment is None:
            return
        self.model, self.file, self.first_step = None, None, 0
        if self.moment == "snapshot":
            self.first_step = resolve_schedule(self.config, state.max_steps, generation_alignment(args)).start
        if state.global_step > 0 and state.global_step >= self.first_step:
            self.model, self.file = _restore(Path(resume_folder(args, state)), self.student)
        elif self.first_step == 0:
            self.model = frozen_copy(self.student, effective_weights(self.student))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # the step is counted after this event, and its masks come after that
        if self.moment == "snapshot" and state.global_step + 1 == self.first_step:
            self.model = frozen_copy(self.student, effective_weights(self.student))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.moment is None or self.model is None or not state.is_world_process_zero:
            return
        if self.file is None or not (Path(str(args.output_dir)) / self.file["file"]).is_file():
            self.file = _store(self.model, Path(str(args.output_dir)))
        _write_json(self.file, Path(checkpoint_folder(args, state)) / POINTER_NAME)


def unwrap(model: Any) -> PreTrainedModel:
    """The model inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def effective_weights(model: nn.Module) -> dict[str, Tensor]:
    """Name -> copy of each parameter and buffer as it acts in the forward pass: LoRA's product is in its base."""
    inner = unwrap(model)
    weights = {
        plain_name(name): tensor.detach().clone()
        for name, tensor in chain(inner.named_parameters(), inner.named_buffers())
        if ".lora_" not in name and ".original_module." not in name
    }
    adapted = (each for each in matching_targets(inner, MamaPruningConfig()) if isinstance(each, LoraTarget))
    return weights | {target.name: target.weight for target in adapted}


def frozen_copy(model: nn.Module, weights: dict[str, Tensor]) -> PreTrainedModel:
    """
    A model of the same class with these weights, in evaluation mode and without gradients.

    Not by `copy.deepcopy`: trainers patch `forward` of the instance, and a copy of that runs the original.

    Raises:
        `ValueError`: if the weights are not those of the class, as with adapters other than LoRA.
    """
    inner = unwrap(model)
    with same_random_state(inner.device):
        twin = type(inner)(copy.deepcopy(inner.config)).eval().requires_grad_(False)
    places = dict(chain(twin.named_parameters(), twin.named_buffers()))
    if places.keys() != weights.keys():
        differing = ", ".join(sorted(places.keys() ^ weights.keys())[:4])
        raise ValueError(
            f"No teacher can be made of this {type(inner).__name__}: {differing} are not in both the model and its "
            "class. Adapters other than LoRA on Linear layers can't be copied; give a model or a path as "
            "teacher_model."
        )
    for name, place in places.items():
        place.data = weights[name].to(inner.device)
    return twin


def _load(teacher_model: PreTrainedModel | str | os.PathLike, processing_class: Any) -> PreTrainedModel:
    if isinstance(teacher_model, PreTrainedModel):
        return teacher_model
    if not isinstance(teacher_model, str | os.PathLike):
        raise ValueError(
            f"teacher_model is a {type(teacher_model).__name__}. Give a transformers model without wrapper, a path or "
            'Hub id, "initial" or "snapshot".'
        )
    try:
        with same_random_state(torch.device("cpu")):
            teacher = AutoModelForCausalLM.from_pretrained(teacher_model, dtype="auto")
    except OSError as error:
        raise ValueError(
            f"teacher_model={str(teacher_model)!r} can't be loaded ({error}). Give a folder or Hub id with a causal "
            'language model, a model, "initial" (the model before training) or "snapshot" (at the start of pruning).'
        ) from error
    if isinstance(processing_class, PreTrainedTokenizerBase):
        _check_tokenizer(str(teacher_model), processing_class)
    return teacher


def _check_tokenizer(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if cached_file(path, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False) is None:
        logger.warning("teacher_model=%r has no tokenizer: only the sizes of the vocabularies were compared.", path)
        return
    theirs, ours = AutoTokenizer.from_pretrained(path).get_vocab(), tokenizer.get_vocab()
    differing = [token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token)]
    if differing:
        raise ValueError(
            f"teacher_model={path!r} has another tokenizer: {len(differing)} tokens have another id or none, such as "
            f"{min(differing)!r}. Token by token, distillation needs the same vocabulary: use a teacher of the same "
            "family."
        )


def _check_teacher(teacher: PreTrainedModel, student: PreTrainedModel, given: Any) -> None:
    check_head(teacher)
    name = given if isinstance(given, str | os.PathLike) else type(teacher).__name__
    theirs, ours = OutputHead.of(teacher).weight, OutputHead.of(student).weight
    if len(theirs) != len(ours):
        raise ValueError(
            f"The teacher {str(name)!r} has a vocabulary of {len(theirs)} tokens and the model one of {len(ours)}. "
            "Token by token, distillation needs the same vocabulary: use a teacher of the same family."
        )
    if {id(parameter) for parameter in teacher.parameters()} & {id(parameter) for parameter in student.parameters()}:
        raise ValueError(
            'The teacher shares weights with the model to train, so that it would be pruned too. Give "initial" for '
            "the model before training."
        )


def _store(teacher: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Write the teacher under a name that tells its content, so that runs in the same folder can't mix them up."""
    tensors = {name: tensor.contiguous() for name, tensor in effective_weights(teacher).items()}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".teacher.{os.getpid()}.tmp"
    save_file(tensors, temporary)
    digest = _digest(temporary)
    name = f"_teacher-{digest[:12]}.safetensors"
    os.replace(temporary, folder / name)
    return {"file": name, "sha256": digest}


def _restore(checkpoint: Path, student: nn.Module) -> tuple[PreTrainedModel, dict[str, str]]:
    pointer = checkpoint / POINTER_NAME
    if not pointer.is_file():
        raise ValueError(
            f"{pointer} is missing, so the teacher of that run is not known. Resume from an earlier checkpoint, or "
            "with the recipe and the teacher_model that wrote it."
        )
    file = json.loads(pointer.read_text(encoding="utf-8"))
    path = checkpoint.parent / file["file"]
    if not path.is_file():
        raise ValueError(
            f"{path}, the teacher of {checkpoint}, is missing. Put it there: it moves with the checkpoints."
        )
    if _digest(path) != file["sha256"]:
        raise ValueError(f"{path} is damaged: it is not the teacher that {pointer} names. Start the run anew.")
    return frozen_copy(student, load_file(path)), file


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_json(values: dict[str, str], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
