"""Tests of `mama_hf.config`."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser
from trl import GRPOConfig, TrlParser

import mama_hf
from mama_hf import MamaPruningConfig
from mama_hf.config import CONFIG_NAME


RECIPES: list[dict[str, Any]] = [
    {},
    {"final_sparsity": 0, "start": 0, "end": 0},
    {"final_sparsity": 0.75, "initial_sparsity": 0.25, "schedule": "linear", "start": 20, "end": 140},
    {"granularity": "1:4", "final_sparsity": 0.75, "criterion": "wanda", "update_every": 5},
    {"granularity": "3:5", "final_sparsity": 0.4, "scope": "layer"},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.q_proj"], "scope": "global"},
    {"target_modules": r".*\.(up|down)_proj", "exclude_modules": r".*\.0\..*", "schedule": "one-shot"},
    {"distillation_weight": 0.5, "distillation_temperature": 2, "distillation_direction": "jsd"},
    {"final_sparsity": "auto", "reward_tolerance": 0.05, "initial_sparsity": 0.5},
    {"final_sparsity": 0.8, "reward_tolerance": 1},
    {"ema_decay": 0.0, "regrowth": 0.3, "criterion": "fisher", "scope": "row", "start": 1, "end": 1.0},
]


@pytest.mark.parametrize("values", RECIPES)
def test_dict_round_trip(values: dict[str, Any]) -> None:
    recipe = MamaPruningConfig(**values)
    stored = json.loads(json.dumps(recipe.to_dict()))
    again = MamaPruningConfig.from_dict(stored)
    assert again == recipe
    for key, value in values.items():
        assert getattr(again, key) == value
        assert type(getattr(again, key)) is type(value), key  # step 1 stays apart from fraction 1.0


@pytest.mark.parametrize("values", RECIPES)
def test_file_round_trip(values: dict[str, Any], tmp_path: Path) -> None:
    recipe = MamaPruningConfig(**values)
    recipe.save_pretrained(tmp_path / "new" / "folder")
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [CONFIG_NAME]
    assert MamaPruningConfig.from_pretrained(tmp_path / "new" / "folder") == recipe
    assert MamaPruningConfig.from_pretrained(str(tmp_path / "new" / "folder")) == recipe


def test_to_dict_holds_each_field_and_the_version() -> None:
    names = {field.name for field in dataclasses.fields(MamaPruningConfig)}
    assert set(MamaPruningConfig().to_dict()) == names | {"format_version"}


def test_to_dict_is_a_copy() -> None:
    recipe = MamaPruningConfig(target_modules=["q_proj"])
    values = recipe.to_dict()
    values["target_modules"].append("k_proj")
    assert recipe.target_modules == ["q_proj"]
    MamaPruningConfig.from_dict(values)
    assert "format_version" in values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format_version": 1, "final_sparsty": 0.5}, "Unknown key 'final_sparsty'.*Did you mean 'final_sparsity'"),
        ({"format_version": 1, "zzz": 1}, r"Unknown key 'zzz' in the pruning recipe\.$"),
        ({"format_version": 99}, "format_version=99; mama-hf .* reads 1"),
        ({}, "format_version=None"),
        ({"format_version": 1, "final_sparsity": 2}, "final_sparsity=2"),
    ],
)
def test_from_dict_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MamaPruningConfig.from_dict(values)


def test_from_pretrained_refuses(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=CONFIG_NAME):
        MamaPruningConfig.from_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_text('{"format_version": 1, "start"')
    with pytest.raises(ValueError, match=rf"{CONFIG_NAME} is not valid JSON"):
        MamaPruningConfig.from_pretrained(tmp_path)


BAD: list[tuple[dict[str, Any], str]] = [
    *[({"final_sparsity": value}, rf"final_sparsity={value!r} must be .* in \[0, 1\)") for value in (1, 1.0, -0.1)],
    *[({"final_sparsity": value}, "final_sparsity=") for value in (math.nan, math.inf, -math.inf, None, True, "half")],
    ({"final_sparsity": 50}, "If you meant percent, set 0.5"),
    ({"initial_sparsity": 10}, "If you meant percent, set 0.1"),
    *[({"initial_sparsity": value}, "initial_sparsity=") for value in (math.nan, -0.1, 1.0, None, "0")],
    ({"initial_sparsity": 0.6}, "initial_sparsity=0.6 is above final_sparsity=0.5"),
    ({"schedule": "cubik"}, "schedule='cubik' does not exist.*'cubic', 'linear', 'one-shot'.*Did you mean 'cubic'"),
    ({"schedule": "oneshot"}, "Did you mean 'one-shot'"),
    ({"criterion": "magnitud"}, "criterion='magnitud' does not exist.*'wanda'.*Did you mean 'magnitude'"),
    ({"criterion": "Mama"}, "Did you mean 'mama'"),
    ({"criterion": "qqq"}, r"'sparsegpt'\.$"),
    ({"criterion": None}, "criterion=None does not exist"),
    ({"scope": "rows"}, "scope='rows' does not exist.*Did you mean 'row'"),
    ({"scope": "globl"}, "Did you mean 'global'"),
    ({"allocation": "unifrom"}, "allocation='unifrom' does not exist.*Did you mean 'uniform'"),
    ({"move_values": "non"}, "move_values='non' does not exist.*Did you mean 'none'"),
    ({"granularity": "unstructed"}, "granularity='unstructed' does not exist.*Did you mean 'unstructured'"),
    ({"granularity": "2/4"}, "granularity='2/4' does not exist.*any other N:M"),
    ({"granularity": 124}, "granularity=124"),  # 2:4 in YAML 1.1, without quotes: base 60
    *[({"granularity": value}, f"granularity='{value}' keeps N of M") for value in ("4:2", "4:4", "0:4", "0:0")],
    ({"granularity": "1:4"}, "leaves 0.75 of the weights zero, but final_sparsity=0.5. Set final_sparsity=0.75"),
    ({"granularity": "2:4", "scope": "global"}, "scope='global' does not go with granularity='2:4'"),
    ({"granularity": "2:4", "scope": "row"}, "scope='row' does not go with granularity='2:4'"),
    *[({"start": value}, "start=.* must be a step") for value in (-1, -0.1, math.nan, math.inf, None, "x", True)],
    *[({"end": value}, "end=.* must be a step") for value in (-1, -0.1, math.nan, math.inf, None, [1], False)],
    ({"start": 20.0}, "start=20.0 is a float.*at most 1.0.*For step 20, give the int 20"),
    ({"end": 1.5}, "end=1.5 is a float"),
    ({"start": 0.8}, "start=0.8 is after end=0.7"),
    ({"start": 30, "end": 20}, "start=30 is after end=20"),
    *[({"update_every": value}, "update_every=.* must be a number of steps >= 1") for value in (0, -1, 2.0, True)],
    ({"target_modules": "(q_proj"}, r"target_modules='\(q_proj' is not a regular expression"),
    ({"exclude_modules": "*"}, "exclude_modules='\\*' is not a regular expression"),
    *[({"target_modules": value}, "target_modules=.* must be a list") for value in ([], [1], [""], None, ("a",))],
    *[({"exclude_modules": value}, "exclude_modules=.* must be a list") for value in ([], [None], 3)],
    *[
        ({"reward_tolerance": value}, rf"reward_tolerance={value!r} must be in \(0, 1\]")
        for value in (0, 0.0, -0.1, 1.5, math.nan, math.inf, "0.1", True)
    ],
    ({"final_sparsity": "auto"}, "needs reward_tolerance.* Set reward_tolerance"),
    (
        {"final_sparsity": "auto", "reward_tolerance": 0.1, "granularity": "2:4"},
        r"'auto' does not go with granularity='2:4'.* Set final_sparsity=0\.5",
    ),
    (
        {"final_sparsity": "auto", "reward_tolerance": 0.1, "initial_sparsity": 0.96},
        r"initial_sparsity=0\.96 is above final_sparsity=0\.95",
    ),
    ({"reward_tolerance": 0.1, "schedule": "one-shot"}, 'one-shot.* Set schedule="cubic"'),
    *[({"ema_decay": value}, r"ema_decay=.* in \[0, 1\)") for value in (1, -0.1, math.nan, "0.9", True)],
    *[
        ({"distillation_weight": value}, "distillation_weight=.* >= 0")
        for value in (-1, math.nan, math.inf, None, True)
    ],
    *[
        ({"distillation_weight": 1, "distillation_temperature": value}, "distillation_temperature=.* > 0")
        for value in (0, -1.0, math.nan, None, "warm")
    ],
    ({"distillation_weight": 1, "distillation_direction": "revers"}, "Did you mean 'reverse'"),
    ({"distillation_temperature": 2.0}, "distillation_temperature=2.0 .*do nothing with distillation_weight=0"),
    ({"distillation_direction": "jsd"}, "distillation_direction='jsd' do nothing"),
    *[({"multiple_of": value}, r"multiple_of=.* >= 1") for value in (0, -8, 8.0, True, None)],
    ({"granularity": "neuron", "scope": "row"}, r"scope='row'.*granularity='neuron'.*whole neurons.*\"global\""),
    ({"granularity": "head", "allocation": "owl"}, r"allocation='owl'.*whole heads.*scope=\"global\""),
    ({"granularity": "neuron+head", "target_modules": ["up_proj"]}, "target_modules=.*exclude_modules"),
    ({"granularity": "neuron", "criterion": "sparsegpt"}, "criterion=.*least_squares"),
    ({"granularity": "neuron", "regrowth": 0.1}, "regrowth=.*no gradient"),
    ({"granularity": "layer", "move_values": "bias"}, "move_values=.*whole layers.*none"),
    ({"granularity": "layer", "scope": "global"}, "scope='global'.*whole layers.*None"),
    *[({"regrowth": value}, r"regrowth=.* in \[0, 1\)") for value in (1.0, -0.1, math.nan, None)],
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[str(values) for values, _ in BAD])
def test_bad_value(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MamaPruningConfig(**values)


@pytest.mark.parametrize(
    ("granularity", "final", "expected"),
    [("unstructured", 0.5, None), ("2:4", 0.5, (2, 4)), ("3:5", 0.4, (3, 5)), ("1:16", 0.9375, (1, 16))],
)
def test_n_of_m(granularity: str, final: float, expected: tuple[int, int] | None) -> None:
    assert MamaPruningConfig(granularity=granularity, final_sparsity=final).n_of_m == expected


# The command line.

COMMANDS: list[tuple[str, dict[str, Any]]] = [
    ("", {}),
    ("--start 20 --end 140", {"start": 20, "end": 140}),
    ("--start 0.1 --end 1.0", {"start": 0.1, "end": 1.0}),
    ("--start 1 --end 1.0", {"start": 1, "end": 1.0}),
    ("--final_sparsity 0.75 --initial-sparsity 0.25", {"final_sparsity": 0.75, "initial_sparsity": 0.25}),
    ("--target_modules q_proj v_proj", {"target_modules": ["q_proj", "v_proj"]}),
    ("--target_modules all-linear --exclude_modules gate up", {"exclude_modules": ["gate", "up"]}),
    ("--granularity 1:4 --final_sparsity 0.75", {"granularity": "1:4", "final_sparsity": 0.75}),
    ("--scope row --criterion wanda --schedule one-shot", {"scope": "row", "criterion": "wanda"}),
    ("--update_every 5 --ema_decay 0.99 --regrowth 0.1", {"update_every": 5, "ema_decay": 0.99, "regrowth": 0.1}),
]


@pytest.mark.parametrize(("command", "values"), COMMANDS)
def test_hf_argument_parser(command: str, values: dict[str, Any]) -> None:
    (recipe,) = HfArgumentParser(MamaPruningConfig).parse_args_into_dataclasses(command.split())
    for key, value in {"target_modules": "all-linear", "exclude_modules": None, **values}.items():
        assert getattr(recipe, key) == value
        assert type(getattr(recipe, key)) is type(value), key
    if not command:
        assert recipe == MamaPruningConfig()


@pytest.mark.parametrize(("command", "values"), COMMANDS[:6])
def test_trl_parser_beside_grpo(command: str, values: dict[str, Any], tmp_path: Path) -> None:
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", "--beta", "0.1"]
    parser = TrlParser((GRPOConfig, MamaPruningConfig))
    grpo, recipe = parser.parse_args_and_config([*arguments, *command.split()])
    assert grpo.beta == 0.1
    assert recipe == MamaPruningConfig(**values)


def test_yaml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text('start: 20\nend: 0.9\ngranularity: "2:4"\ntarget_modules: [q_proj, v_proj]\n')
    (recipe,) = TrlParser(MamaPruningConfig).parse_args_and_config(["--config", str(path), "--criterion", "wanda"])
    expected = {"start": 20, "end": 0.9, "granularity": "2:4", "target_modules": ["q_proj", "v_proj"]}
    assert recipe == MamaPruningConfig(**expected, criterion="wanda")


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("--criterion nope", SystemExit),
        ("--start soon", ValueError),
        ("--final_sparsity 80", ValueError),
        ("--final_sparsity auto", ValueError),
    ],
)
def test_command_line_refuses(command: str, error: type[BaseException]) -> None:
    with pytest.raises(error):
        HfArgumentParser(MamaPruningConfig).parse_args_into_dataclasses(command.split())


def test_every_field_has_help() -> None:
    for field in dataclasses.fields(MamaPruningConfig):
        assert field.metadata["help"].endswith(".")
        assert f"        {field.name} (" in (MamaPruningConfig.__doc__ or "")


def test_works_without_torch() -> None:
    code = (
        "import sys, types\n"
        "sys.modules['torch'] = None  # importing it is an error now\n"
        "package = types.ModuleType('mama_hf')\n"
        f"package.__path__ = [{str(Path(mama_hf.__file__).parent)!r}]\n"
        "sys.modules['mama_hf'] = package\n"
        "from mama_hf.config import MamaPruningConfig\n"
        "print(MamaPruningConfig(start=3, end=9).start)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("3\n", 0), result.stderr
