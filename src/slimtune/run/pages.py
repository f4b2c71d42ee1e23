"""What the report and the live page share: their templates, their language, and how events are told."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from slimtune.errors import written_out
from slimtune.run.show import inline_html, markdown_text
from slimtune.run.statement import Lang, Say

__all__ = ["events_told", "in_language", "template"]

TEMPLATES = Path(__file__).parent / "templates"


@cache
def template(name: str) -> Any:
    """One of the pages' templates; in HTML everything is escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["written"] = written_out
    environment.filters["inline"] = lambda text: Markup(inline_html(text))
    environment.filters["markdown"] = markdown_text
    environment.filters["fence"] = lambda text: "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return environment.get_template(name)


def in_language(lang: Lang) -> Say:
    """What chooses a language's words."""
    return lambda english, chinese: chinese if lang == "zh" else english


def events_told(events: Iterable[Mapping[str, Any]], say: Say) -> list[tuple[str, str, str]]:
    """(step, event, details) of what the guards and the saves had to say, as :attr:`History.events` has it."""
    return [
        (
            f"{event['step']:,}",
            str(event["event"]),
            ", ".join(
                f"{key}: {_short(value)}"
                for key, value in event.items()
                if key not in ("event", "step") and value not in ([], {}, "", None)
            ),
        )
        for event in events
    ]


def _short(value: Any, longest: int = 160) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= longest else text[: longest - 1] + "…"
