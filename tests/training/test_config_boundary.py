"""Only entry points take the Hydra configuration; other functions take plain, validated objects."""

import ast
from collections.abc import Iterator

import pytest

from tests.sources import PACKAGES, ROOT, list_imports, list_modules

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
            "image_folders",
            "splits",
            "record",
            "files",
            "loggers",
            "optim",
            "provenance",
            "run_directory",
            "validation",
        )
    ),
    *(path.relative_to(ROOT).as_posix() for package in ("acl", "models") for path in list_modules(package)),
]


def find_functions_with_cfg(source: str) -> Iterator[str]:
    """The ``name:line`` of each function and lambda in a source that has a parameter named ``cfg``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            arguments = node.args
            parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            parameters += [extra for extra in (arguments.vararg, arguments.kwarg) if extra is not None]
            if any(parameter.arg == "cfg" for parameter in parameters):
                yield f"{getattr(node, 'name', 'lambda')}:{node.lineno}"


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


def test_configuration_ends_at_the_script() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{function.partition(':')[0]}"
        for package in PACKAGES
        if package != "scripts"
        for path in list_modules(package)
        for function in find_functions_with_cfg(path.read_text())
    }
    assert found == {
        "training/config.py:resolve",
        "training/cli.py:job",
        "training/settings.py:parse_run",
        "reporting/table.py:open_table",
    }


@pytest.mark.parametrize("module", MODULES_WITHOUT_CONFIGURATION)
def test_module_takes_no_configuration(module: str) -> None:
    assert not list(find_functions_with_cfg((ROOT / module).read_text()))
    imported = {name.split(".")[0] for name, _ in list_imports(ROOT / module)}
    assert imported.isdisjoint({"hydra", "omegaconf"})
