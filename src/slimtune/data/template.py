"""Chat templates, rendered as Transformers renders them, but bounded in time and size.

A chat template comes with a model that a stranger published: it is a program. Jinja's sandbox keeps it from reaching
Python's internals, but bounds neither nested loops nor huge strings. This module adds both, deterministically:
every loop pass and macro call counts against a budget, and every operation that could make a long string or list checks
its size first. Filters, globals and tags are those of Transformers' ``apply_chat_template``
(transformers/utils/chat_template_utils.py); ``generation`` tags render as their content.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes as n
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

__all__ = ["MAX_OUTPUT", "MAX_STEPS", "ChatTemplate", "TemplateRefused", "common_length"]

MAX_STEPS = 400_000
"""Most loop passes and macro calls in one rendering."""
MAX_OUTPUT = 96 * 2**20
"""Most characters that a string may have while a template is rendered."""
_MAX_SOURCE = 2**20
_MAX_NUMBER = 10**5
_MAX_ITEMS = 10**6
_LONG_FORMAT = re.compile(r"\d{5,}|\{[^{}]*\{|%[^a-zA-Z%]*\*")
"""A format with a width of five digits or more, or one that takes its width from an argument."""


_LOOP_NAMES = frozenset(
    {"first", "last", "index", "index0", "revindex", "revindex0", "length", "depth", "depth0", "previtem", "nextitem"}
)


class TemplateRefused(Exception):
    """The template raised, isn't valid, or went over its bounds."""


class _Generation(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}`` renders as its body: the mask is derived from the turns."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own protocol

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return n.Scope(body, lineno=line)


def _too_long(what: str) -> NoReturn:
    raise TemplateRefused(f"{what} goes over the bounds of a chat template")


def _checked(value: Any) -> Any:
    if isinstance(value, str):
        if len(value) > MAX_OUTPUT:
            _too_long("a string")
    elif isinstance(value, list | tuple | dict) and len(value) > _MAX_ITEMS:
        _too_long("a list")
    return value


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 1


def _check_arguments(name: str, subject: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse calls that would make a huge value in one step: padding, joining, replacing, formatting."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > _MAX_NUMBER:
            _too_long(f"{name}({value})")
    values = (subject, *args, *kwargs.values())
    texts = [value for value in values if isinstance(value, str)]
    if name in ("format", "format_map", "__mod__") and any(_LONG_FORMAT.search(text) for text in texts[:1]):
        _too_long(name)
    if name in ("replace", "wordwrap", "indent", "translate"):
        longest = sorted(map(len, texts), reverse=True)
        if len(longest) > 1 and longest[0] * longest[1] > MAX_OUTPUT and min(longest[0], longest[1]) > 64:
            _too_long(name)


def _join(value: Any, d: str = "", attribute: Any = None) -> str:
    """Jinja's ``join`` that counts while it goes: what it joins may be a generator."""
    parts: list[str] = []
    size = 0
    for item in value:
        part = str(item[attribute] if isinstance(item, Mapping) and attribute is not None else item)
        size += len(part) + len(d)
        if size > MAX_OUTPUT:
            _too_long("join")
        parts.append(part)
    return str(d).join(parts)


def _plus(left: Any, right: Any) -> Any:
    if type(left) is str and type(right) is str:
        if len(left) + len(right) > MAX_OUTPUT:
            _too_long("a sum")
        return left + right
    if isinstance(left, str | list) and len(left) + _length(right) > MAX_OUTPUT:
        _too_long("a sum")
    return left + right


def _sum(*terms: Any) -> Any:
    """``a + b + c`` at once; texts, which nearly all terms are, without the sums in between."""
    if set(map(type, terms)) == {str}:
        if sum(map(len, terms)) > MAX_OUTPUT:
            _too_long("a sum")
        return "".join(terms)
    return functools.reduce(_plus, terms)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self, today: datetime.date | None) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        self.filters = {name: self._bounded_filter(name, function) for name, function in self.filters.items()}
        self.filters["tojson"] = _tojson
        self.filters["join"] = _join
        self.filters["_bounded"] = _checked
        self.filters["_counted"] = self._counted
        self.filters["_sum"] = _sum
        self.globals = {
            "range": self._range,
            "dict": dict,
            "namespace": _Namespace,
            "raise_exception": _raise,
            "strftime_now": lambda layout: _strftime_now(layout, today),
            "cycler": jinja2.utils.Cycler,
            "joiner": jinja2.utils.Joiner,
            "_step": self._step,
        }
        self._budget = threading.local()

    # -- budget

    def start(self) -> None:
        self._budget.left = MAX_STEPS

    def _step(self) -> str:
        self._budget.left -= 1
        if self._budget.left < 0:
            _too_long("its number of loop passes")
        return ""

    def _counted(self, value: Any) -> Any:
        """What a loop goes over: its passes are paid for when the loop is entered."""
        if isinstance(value, str | list | tuple | dict | range):
            self._budget.left -= len(value)
            if self._budget.left < 0:
                _too_long("its number of loop passes")
            return value
        return self._counted_stream(value) if hasattr(value, "__iter__") else value

    def _counted_stream(self, value: Any) -> Any:
        for item in value:
            self._step()
            yield item

    @staticmethod
    def _range(*args: int) -> range:
        made = range(*args)
        if len(made) > _MAX_NUMBER:
            _too_long(f"range({', '.join(map(str, args))})")
        return made

    # -- compilation: loops and macros count, joined text is checked

    def _parse(self, source: str, name: str | None, filename: str | None) -> n.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(n.For)):
            loop.iter = n.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
        bodies = [macro.body for macro in tree.find_all(n.Macro)]
        for body in bodies + [block.body for block in tree.find_all(n.CallBlock)]:
            count = n.Call(n.Name("_step", "load"), [], [], None, None)
            body.insert(0, n.ExprStmt(count, lineno=1))
        _wrap_joins_and_sums(tree)
        for block in tree.find_all(n.AssignBlock):
            inner = block.filter
            block.filter = n.Filter(inner, "_bounded", [], [], None, None)
        tree.set_environment(self)
        for node in tree.find_all(n.Node):
            if node.lineno is None:
                node.lineno = 1  # type: ignore[unreachable]
        return tree

    # -- what every row does again and again, without the detours

    def make_globals(self, d: Any) -> dict[str, Any]:
        """A plain dict: each rendering copies it, and Jinja's chain of maps is slow to copy."""
        return {**self.globals, **(d or {})}

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As the sandbox does; ``loop.first`` and its like, safe by their names, without its questions."""
        if type(obj) is jinja2.runtime.LoopContext and attribute in _LOOP_NAMES:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    # -- operations

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            return _plus(left, right)
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(other, int) and len(one) * other > _MAX_NUMBER:
                    _too_long("a product")
                if isinstance(one, int) and one.bit_length() > 256:
                    _too_long("a product")
            return left * right
        if operator == "**":
            if not (isinstance(left, int | float) and isinstance(right, int | float)) or abs(right) > 64:
                _too_long("a power")
            if isinstance(left, int) and left.bit_length() > 64:
                _too_long("a power")
            return left**right
        if isinstance(left, str):
            _check_arguments("__mod__", left, right if isinstance(right, tuple) else (right,), {})
        return _checked(left % right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if type(value) is str or type(value) is bool:
            return None
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        layout = value.__self__

        def bounded(*args: Any, **kwargs: Any) -> str:
            if _LONG_FORMAT.search(layout):
                _too_long("format")
            return str(wrapped(*args, **kwargs))

        return bounded

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - Jinja's signature
        subject = getattr(__obj, "__self__", None)
        if isinstance(subject, str):
            _check_arguments(getattr(__obj, "__name__", ""), subject, args, kwargs)
        return _checked(super().call(__context, __obj, *args, **kwargs))

    @staticmethod
    def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        passes_context = getattr(function, "jinja_pass_arg", None) is not None

        def bounded(*args: Any, **kwargs: Any) -> Any:
            plain = args[1:] if passes_context else args
            _check_arguments(name, plain[0] if plain else None, plain[1:], kwargs)
            return _checked(function(*args, **kwargs))

        if passes_context:
            bounded.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return bounded


def _wrap_joins_and_sums(tree: n.Template) -> None:
    """Put each ``a ~ b`` under a filter that checks its size, and make each ``a + b + c`` one filter's."""

    def wrapped(value: Any) -> Any:
        if isinstance(value, list):
            return [wrapped(item) for item in value]
        if isinstance(value, tuple):
            return tuple(wrapped(item) for item in value)
        if isinstance(value, n.Add) and len(terms := _terms(value)) > 2:
            first, *others = wrapped(terms)
            return n.Filter(first, "_sum", others, [], None, None, lineno=value.lineno)
        if isinstance(value, n.Node):
            visit(value)
            if isinstance(value, n.Concat):
                return n.Filter(value, "_bounded", [], [], None, None, lineno=value.lineno)
        return value

    def visit(node: n.Node) -> None:
        for name, value in list(node.iter_fields()):
            if isinstance(value, n.Node | list | tuple):
                setattr(node, name, wrapped(value))

    visit(tree)


def _terms(node: n.Expr) -> list[n.Expr]:
    """What is added up from left to right; a term in brackets that is a sum itself is one."""
    return [*_terms(node.left), node.right] if isinstance(node, n.Add) else [node]


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without underscored names, through which a template could reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        names = dict(*args[1:], **kwargs)
        for name in names:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if str(name).startswith("_"):
        raise TemplateRefused(f"the namespace attribute {name!r} begins with an underscore")


def _raise(message: str) -> NoReturn:
    raise TemplateRefused(str(message)[:500])


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    if isinstance(indent, int) and indent > 16:
        _too_long("tojson's indent")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(layout: str, today: datetime.date | None) -> str:
    """``now`` as Transformers' templates know it; of a fixed day, its first moment."""
    if len(layout) > 100:
        _too_long("strftime_now")
    now = datetime.datetime.now() if today is None else datetime.datetime.combine(today, datetime.time())
    return now.strftime(layout)


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: The Jinja source.
        variables: What it may use beside messages and tools: ``bos_token``, ``eos_token``, ``enable_thinking``, …
        today: The date that ``strftime_now`` writes; the present moment's if None.

    Raises:
        TemplateRefused: It is no valid template, or too long.
    """

    def __init__(self, source: str, variables: Mapping[str, Any], today: datetime.date | None = None) -> None:
        if len(source) > _MAX_SOURCE:
            _too_long("its source")
        self.source = source
        self._environment = _Environment(today)
        self._environment.start()
        try:
            self._template = self._environment.from_string(source, globals={**variables, "documents": None})
        except jinja2.TemplateSyntaxError as error:
            raise TemplateRefused(f"line {error.lineno}: {error.message}") from None
        except (RecursionError, MemoryError, jinja2.TemplateError, SyntaxError, ValueError, TypeError) as error:
            raise TemplateRefused(f"{type(error).__name__}: {error}") from None

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The variables that stand in it."""
        return frozenset(node.name for node in self._environment.parse(self.source).find_all(n.Name))

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, *, add_generation_prompt: bool
    ) -> str:
        """The conversation as text.

        Raises:
            TemplateRefused: The template raised an error or went over its bounds.
        """
        self._environment.start()
        variables = {"messages": messages, "tools": tools or None, "add_generation_prompt": add_generation_prompt}
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.root_render_func(self._template.new_context(variables)):
                size += len(part)
                if size > MAX_OUTPUT:
                    _too_long("its output")
                parts.append(part)
        except TemplateRefused:
            raise
        except (
            jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError,
            RecursionError, MemoryError,
        ) as error:  # fmt: skip
            raise TemplateRefused(f"{type(error).__name__}: {error}") from None
        return "".join(parts)


def common_length(one: str, other: str) -> int:
    """Length of the longest common prefix of two texts."""
    if one.startswith(other) or other.startswith(one):
        return min(len(one), len(other))
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low
