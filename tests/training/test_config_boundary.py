"""The configuration ends at the entry points; the functions below them take plain, validated objects."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("acl", "models", "training", "reporting", "scripts")
MAX_FUNCTIONS_WITH_CFG = 12
MODULES_WITHOUT_CONFIGURATION = [
    *(
        f"training/{name}.py"
        for name in (
            "checkpoint",
            "data",
            "datasets",
            "distributed",
            "evaluate",
            "image_cache",
            "loggers",
            "optim",
            "provenance",
            "run_directory",
            "validation",
        )
    ),
    *(path.relative_to(ROOT).as_posix() for package in ("acl", "models") for path in (ROOT / package).rglob("*.py")),
]


def find_functions_with_cfg(source: str) -> Iterator[str]:
    """The names of the functions and lambdas in a source that take a parameter named ``cfg``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            arguments = node.args
            parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            parameters += [extra for extra in (arguments.vararg, arguments.kwarg) if extra is not None]
            if any(parameter.arg == "cfg" for parameter in parameters):
                yield f"{getattr(node, 'name', 'lambda')}:{node.lineno}"


def find_imports(source: str) -> Iterator[str]:
    """The top-level packages that a source imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module.split(".")[0]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(cfg): pass", ["f:1"]),
        ("def f(a, /, *, cfg=None): pass", ["f:1"]),
        ("class A:\n    async def f(self, **cfg): pass", ["f:2"]),
        ("f = lambda cfg: cfg", ["lambda:1"]),
        ("def f(config, cfg_path): cfg = config", []),
    ],
)
def test_functions_with_cfg_are_found(source: str, expected: list[str]) -> None:
    assert list(find_functions_with_cfg(source)) == expected


def test_few_functions_take_configuration() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{function}"
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for function in find_functions_with_cfg(path.read_text())
    ]
    assert any(name.startswith("training/loop.py:run:") for name in found)  # the scan works
    assert len(found) <= MAX_FUNCTIONS_WITH_CFG, found


@pytest.mark.parametrize("module", MODULES_WITHOUT_CONFIGURATION)
def test_module_takes_no_configuration(module: str) -> None:
    source = (ROOT / module).read_text()
    assert not list(find_functions_with_cfg(source))
    assert {"hydra", "omegaconf"}.isdisjoint(find_imports(source))
