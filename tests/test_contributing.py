"""What CONTRIBUTING.md asks of files and of the lock, where no tool asks it."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "src").rglob("*.py"))
LONGER = {
    "engine/kernels/lora.py:_down_backward": "one kernel of Triton's, which can't call another function's loads",
}
"""What is longer than the rule, and why."""


def name(path: Path) -> str:
    return path.relative_to(ROOT / "src" / "slimtune").as_posix()


def test_files_are_shorter_than_600_lines() -> None:
    assert len(FILES) > 100
    long = [name(path) for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) >= 600]
    assert set(long) <= LONGER.keys()


def test_functions_are_shorter_than_90_lines() -> None:
    long = [
        f"{name(path)}:{node.name}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno >= 90
    ]
    assert set(long) <= LONGER.keys()


def test_nobody_is_shouted_at() -> None:
    """English with an exclamation mark, but for those of the demo's data and of a probe for tokenizers."""
    shouted = {
        name(path)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and re.search(r"\w\w!(\s|$)", str(node.value))
    }
    assert shouted <= {"data/words.py", "demo/__init__.py"}


def test_the_lock_holds_what_pyproject_asks_for_with_hashes_and_no_index() -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links", lock)
    pins = re.findall(r"^([a-z0-9-]+)==([^ ;]+)[^\n]*\\\n    --hash=sha256:[0-9a-f]{64}", lock, flags=re.MULTILINE)
    assert len(pins) == len(re.findall(r"^\S+==", lock, flags=re.MULTILINE)) > 50
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    locked = [*project["dependencies"], *extras["demo"], *extras["serve"], *extras["json"], *extras["dev"]]
    for requirement in map(Requirement, locked):
        if requirement.name != "slimtune":
            versions = [version for of, version in pins if of == requirement.name.lower()]
            assert versions, requirement
            assert all(requirement.specifier.contains(version) for version in versions), requirement
