"""What slimtune says, found in its source: the texts that :func:`slimtune.words.told` is given."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click

SOURCE = Path(__file__).parents[1] / "src" / "slimtune"
ERRORS = {"UserError", "GuardStop", "StopRequested", "SlimtuneError", "CannotFuse", "_stop_by_guard", "_unfit",
          "UsageError"}  # fmt: skip
_ARGUMENTS = ("rule", "way_out")
_FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
_Scope = dict[str, list[ast.expr]]
"""What names stand for: what they are assigned, and what functions of the file return."""


def texts(node: ast.expr, scope: _Scope | None = None) -> list[str]:
    """The texts that an expression may be, with {} for what isn't known; none where all of it isn't."""
    match node:
        case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)) if scope and name in scope:
            rest = {known: values for known, values in scope.items() if known != name}
            return [text for value in scope[name] for text in texts(value, rest)]
        case ast.Call(func=ast.Attribute(value=inner, attr="strip")):
            return [text.strip() for text in texts(inner, scope)]
        case ast.BoolOp(values=values):
            return [text for value in values for text in texts(value, scope)]
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr():
            made = "".join(
                str(part.value).replace("{", "{{").replace("}", "}}") if isinstance(part, ast.Constant) else "{}"
                for part in node.values
            )
            return [made.replace("{}{}", "{}")]
        case ast.IfExp():
            return [*texts(node.body, scope), *texts(node.orelse, scope)]
        case ast.BinOp(op=ast.Add()):
            sides = [texts(side, scope) or ["{}"] for side in (node.left, node.right)]
            return [(left + right).replace("{}{}", "{}") for left in sides[0] for right in sides[1]]
    return []


@cache
def trees() -> dict[Path, ast.Module]:
    """The source, parsed."""
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(SOURCE.rglob("*.py"))}


def everything() -> set[str]:
    """Every text of the source."""
    return {text for tree in trees().values() for node in ast.walk(tree) if isinstance(node, ast.expr)
            for text in texts(node)}  # fmt: skip


def _scope(around: ast.AST) -> _Scope:
    """What names stand for right in a module or a function."""
    found: _Scope = {}
    body = [node for part in ast.iter_child_nodes(around) for node in _of_it(part)]
    for node in body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                pairs = (
                    zip(target.elts, node.value.elts, strict=True)
                    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                    else [(target, node.value)]
                )
                for each, value in pairs:
                    if isinstance(each, ast.Name):
                        found.setdefault(each.id, []).append(value)
        elif isinstance(node, _FUNCTION):
            found[node.name] = [
                each.value for part in node.body for each in _of_it(part) if isinstance(each, ast.Return) and each.value
            ]
    return found


def _of_it(node: ast.AST) -> Iterator[ast.AST]:
    """The node and what is in it, but not what is in its functions and classes."""
    yield node
    if not isinstance(node, _FUNCTION | ast.ClassDef | ast.Lambda):
        for part in ast.iter_child_nodes(node):
            yield from _of_it(part)


@cache
def _calls_in_scope() -> list[tuple[Path, ast.Call, str, _Scope]]:
    """Every call in a function: its file, what is called, and what names stand for there."""
    found = []
    for file, tree in trees().items():
        module = _scope(tree)
        for function in ast.walk(tree):
            if isinstance(function, _FUNCTION):
                scope = module | _scope(function)
                for call in ast.walk(function):
                    if isinstance(call, ast.Call):
                        called = call.func
                        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                        found.append((file, call, name, scope))
    return found


def of_errors() -> dict[str, Path]:
    """What errors say, and the file."""
    found: dict[str, Path] = {}
    for file, call, name, scope in _calls_in_scope():
        if name in ERRORS or (name == "ValueError" and file.name == "config.py"):
            given = [*call.args[:1], *(word.value for word in call.keywords if word.arg in _ARGUMENTS)]
        else:
            given = call.args[1:2] if name == "check_same" else []
        found |= {text: file for each in given for text in texts(each, scope)}
    return {text: file for text, file in found.items() if any(map(str.isalpha, text.replace("{}", "")))}


def of_rows() -> set[str]:
    """Why rows aren't trained on."""
    return {
        text
        for _, call, name, scope in _calls_in_scope()
        if len(call.args) > (at := {"RowRefused": 1, "_need_choice": 1, "_too_long": 1, "drop": 2}.get(name, 99))
        for text in texts(call.args[at], scope)
        if any(map(str.isalpha, text.replace("{}", "")))
    }


def of_notes() -> set[str]:
    """Why keys of other tools' configs have no counterpart."""
    tree = trees()[SOURCE / "foreign.py"]
    inner = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr | ast.Expr)
        for part in (node.values if isinstance(node, ast.JoinedStr) else [node.value])
    }
    found = {
        text
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in inner
        for text in texts(node)
    }
    return {text for text in found if " " in text and re.search("[a-z]", text) and "|" not in text}


def of_stops() -> set[str]:
    """What may have stopped a run, besides signals."""
    return {
        text
        for tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and {"requested", "stop_agreed"} & {getattr(target, "attr", "") for target in node.targets}
        for text in texts(node.value)
    }  # fmt: skip


def of_watched() -> set[str]:
    """What a run's watchdog says that nothing came of."""
    return {
        text
        for _, call, name, scope in _calls_in_scope()
        if name in ("watching", "beat") and call.args
        for text in texts(call.args[0], scope)
    }


def of_screens() -> set[str]:
    """What a run's screen says, labels and texts, and what verbs say of themselves by ``told``."""
    found: set[str] = set()
    lines = _scope(trees()[SOURCE / "run" / "lines.py"])
    for file, call, name, scope in _calls_in_scope():
        if name in ("say", "warn", "working", "_line") and isinstance(call.func, ast.Attribute):
            of = ast.unparse(call.func.value)
            if of.endswith(("screen", "self", "safety")):
                found |= {text for each in call.args for text in texts(each, lines | scope)}
        elif name in ("told", "in_chinese", "screen_say") or (name == "say" and file.parent.name == "cli"):
            found |= {text for each in call.args[:1] for text in texts(each, lines | scope)}
    return {text for text in found if any(map(str.isalpha, text.replace("{}", "")))}


def of_help() -> set[str]:
    """What ``--help`` of every verb says: its paragraphs, and its flags' lines."""
    from slimtune.cli import VERBS, slimtune_command
    from slimtune.cli.help import TOPICS
    from slimtune.cli.options import _GROUPS
    from slimtune.config import Config

    found = {*VERBS.values(), *TOPICS.values(), *_GROUPS.values()}
    commands = [slimtune_command, *(importlib.import_module(f"slimtune.cli.{verb}").command for verb in VERBS)]
    for command in commands:
        found |= set(paragraphs(command.help or ""))
        found |= {param.help for param in command.params if isinstance(param, click.Option) and param.help}
    found |= {" ".join((field.description or "").split()) for field in Config.model_fields.values()}
    return {re.sub(r"(  \[[^\]]*\])+$", "", text) for text in found}


def paragraphs(text: str) -> list[str]:
    """Of a help text, each on one line; of lines that \\b keeps the last column."""
    made = []
    for part in text.strip().split("\n\n"):
        if part.strip().startswith("\b"):
            made += [re.split(r"\s{2,}", line.strip(), maxsplit=1)[-1] for line in part.strip().splitlines()[1:]]
        else:
            made.append(" ".join(part.split()))
    return made
