"""The project's modules and their imports."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ["acl", "models", "training", "evaluation", "reporting", "scripts"]
"""In order of dependency: each package may import only those before it."""


def list_modules(package: str) -> list[Path]:
    modules = sorted((ROOT / package).rglob("*.py"))
    assert modules, package
    return modules


def list_imports(path: Path) -> list[tuple[str, str]]:
    """The (module, name) pairs that a file imports, also inside functions; ``import module`` has an empty name."""
    imports = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imports += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} has a relative import"
            imports += [(node.module, alias.name) for alias in node.names]
    return imports
