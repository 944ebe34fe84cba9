"""The import arrows of the design: what each module may import. Found in the source, not by running it."""

import ast
from pathlib import Path

import pytest

import mama_hf


PACKAGE = Path(mama_hf.__file__).parent

# module -> modules of the package that it may import
ARROWS: dict[str, set[str]] = {
    "version": set(),
    "config": {"version"},
    "schedule": {"config"},
    "targets": {"config"},
    "modeling_mama": set(),
    "coupling": {"modeling_mama", "targets"},
    "inputs": {"targets"},
    "statistics": {"inputs", "targets"},
    "moving": {"inputs", "solvers", "statistics", "targets"},
    "criteria": set(),
    "masks": set(),
    "values": {"targets"},
    "groups": {"coupling", "masks"},
    "pools": {"config", "coupling", "groups", "masks", "targets"},
    "pruner": {
        *("config", "criteria", "kept", "moving", "pools", "reward_check", "schedule", "statistics", "targets"),
        "values",
    },
    "report": {"checkpoint", "config", "coupling", "groups", "modeling_mama", "packed", "targets"},
    "checkpoint": {"config", "pruner", "version"},
    "callback": {"checkpoint", "config", "pruner", "report", "reward_check", "shrink"},
    "cli": {"commands", "version"},
    "commands": {"calibration", "config", "evaluation", "oneshot", "report", "shrink"},
    "heads": set(),
    "divergence": {"config", "heads"},
    "teacher": {"callback", "config", "heads", "schedule", "targets"},
    "distillation": {"callback", "config", "divergence", "heads", "teacher"},
    "grpo": {"callback", "config", "distillation", "heldout", "targets"},
    "reward_check": set(),
    "kept": set(),
    "heldout": set(),
    "shrink": {"checkpoint", "coupling", "modeling_mama"},
    "solvers": set(),
    "allocation": set(),
    "evaluation": set(),
    "calibration": set(),
    "blocks": {"calibration", "targets"},
    "dense": {"blocks", "solvers", "targets"},
    "rules": {"config", "criteria", "masks", "solvers"},
    "structured": {"config", "coupling", "groups", "pools", "rules", "solvers", "targets"},
    "dropping": {"blocks", "calibration", "config", "groups", "report", "targets"},
    "resume": {"calibration", "config", "targets"},
    "engine": {
        *("allocation", "blocks", "calibration", "config", "dense", "report", "resume", "rules", "solvers"),
        *("structured", "targets"),
    },
    "oneshot": {
        *("blocks", "calibration", "checkpoint", "config", "dropping", "engine", "report", "resume", "rules"),
        *("structured", "targets"),
    },
    "packing": {"checkpoint"},
    "packed": {"config", "packing", "version"},
    "sparse_inference": set(),
    "card": {"packed", "report", "version"},
    "hub": {"card", "packed"},
    "__init__": {
        *("calibration", "callback", "config", "criteria", "distillation", "grpo", "masks"),
        *("modeling_mama", "oneshot", "packed", "report", "shrink", "sparse_inference", "version"),
    },
}

# module -> libraries that it may not import, or names in them
FORBIDDEN: dict[str, set[str]] = {
    "version": {"torch", "transformers", "trl", "numpy"},
    "config": {"torch", "transformers", "trl", "numpy"},
    "schedule": {"torch", "transformers", "trl", "numpy"},
    "targets": {"trl", "peft", "transformers.Trainer", "transformers.trainer"},
    "inputs": {"transformers", "trl"},
    "modeling_mama": {"trl", "peft"},
    "coupling": {"trl", "peft", "transformers.Trainer", "transformers.trainer"},
    "statistics": {"transformers", "trl"},
    "moving": {"transformers", "trl"},
    "criteria": {"transformers", "trl", "torch.nn"},
    "masks": {"transformers", "trl", "torch.nn"},
    "groups": {"transformers", "trl", "torch.nn"},
    "pools": {"trl", "transformers.Trainer", "transformers.trainer"},
    "values": {"transformers", "trl"},
    "report": {"trl", "transformers.Trainer", "transformers.trainer"},
    "reward_check": {"torch", "transformers", "trl", "numpy"},
    "heldout": {"torch.nn"},
    "kept": {"transformers", "trl", "pickle"},
    "pruner": {"transformers", "trl", "accelerate"},
    "checkpoint": {"trl", "transformers.Trainer", "transformers.trainer", "pickle"},
    "callback": {"trl", "transformers.Trainer", "transformers.trainer"},
    "heads": {"trl", "transformers.Trainer", "transformers.trainer"},
    "divergence": {"trl", "transformers"},
    "teacher": {"trl", "transformers.Trainer", "transformers.trainer", "pickle"},
    "distillation": set(),
    "grpo": set(),
    "shrink": {"trl", "peft", "transformers.Trainer", "transformers.trainer"},
    "cli": {"trl", "transformers", "torch"},
    "commands": {"trl", "torch"},
    "solvers": {"trl", "transformers", "torch.nn"},
    "allocation": {"trl", "transformers"},
    "evaluation": {"trl"},
    "calibration": {"trl"},
    "blocks": {"trl"},
    "dense": {"trl"},
    "rules": {"trl", "transformers"},
    "structured": {"trl"},
    "dropping": {"trl"},
    "resume": {"trl", "pickle"},
    "engine": {"trl"},
    "oneshot": {"trl"},
    "packing": {"trl", "transformers", "pickle"},
    "packed": {"trl", "transformers.Trainer", "transformers.trainer", "pickle"},
    "sparse_inference": {"trl", "transformers"},
    "card": {"trl", "transformers.Trainer", "transformers.trainer"},
    "hub": {"trl", "transformers.Trainer", "transformers.trainer"},
    "__init__": set(),
}


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def imports(module: str) -> tuple[set[str], set[str]]:
    """(modules of the package, dotted names of other libraries) imported anywhere in a module."""
    own: set[str] = set()
    other: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            other |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            own |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            other |= {f"{node.module}.{alias.name}" for alias in node.names}
    return own | {name.split(".")[1] for name in other if name.startswith("mama_hf.")}, other


def test_every_module_has_a_row() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert modules == set(ARROWS) == set(FORBIDDEN)


@pytest.mark.parametrize("module", ARROWS)
def test_imports_follow_the_arrows(module: str) -> None:
    assert imports(module)[0] <= ARROWS[module]


@pytest.mark.parametrize("module", FORBIDDEN)
def test_forbidden_libraries(module: str) -> None:
    for name in imports(module)[1]:
        assert not [bad for bad in FORBIDDEN[module] if f"{name}.".startswith(f"{bad}.")], name


def test_arrows_have_no_cycle() -> None:
    done: set[str] = set()
    while ready := {module for module, needs in ARROWS.items() if module not in done and needs <= done}:
        done |= ready
    assert done == set(ARROWS)


def test_version_imports_nothing() -> None:
    assert imports("version") == (set(), set())


@pytest.mark.parametrize("module", ARROWS)
def test_nothing_is_pickled_or_printed(module: str) -> None:
    calls = [ast.unparse(node.func) for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    assert not {"torch.save", "torch.load", "print", "eval", "exec"} & set(calls)
    assert not {"pickle", "dill", "joblib"} & imports(module)[1]
