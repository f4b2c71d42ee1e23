"""The report: one file that asks for nothing, well-formed, in two languages, for any run."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from slimtune.run.explain import explain
from slimtune.run.folder import RunFolder
from slimtune.run.report import write_report

VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """Checks the nesting of tags; collects the text of each language, the attributes and the SVGs."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = {"en": "", "zh": ""}
        self.lang = ""
        self.feed(source)
        self.close()
        assert self.open == []
        self.svgs = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", source, re.DOTALL)]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag == "main":
            self.lang = dict(attrs)["class"] or ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.lang:
            self.text[self.lang] += data


def squeezed(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def run(finished_run: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy that a test may change."""
    copy = RunFolder(tmp_path / "copy")
    copy.path.mkdir()
    for file in (
        finished_run.config_file,
        finished_run.environment_file,
        finished_run.facts_file,
        finished_run.metrics_file,
    ):
        shutil.copy(file, copy.path / file.name)
    return copy


def page_of(run: RunFolder) -> Page:
    write_report(run)
    return Page(run.report_html.read_text("utf-8"))


def test_a_real_run_in_both_languages(run: RunFolder) -> None:
    page = page_of(run)
    facts = run.read_json(run.facts_file)
    for lang in ("en", "zh"):
        shown = squeezed(page.text[lang])
        for section in explain(facts, lang).sections:
            assert section.title in shown
            for statement in section.statements:
                assert squeezed(statement.text.replace("`", "")) in shown
        assert str(run.config().learning_rate) in shown
        assert facts["versions"]["torch"] in shown
    # Loss twice (wide and narrow), learning rate, gradient norm, speed, memory: in each language.
    assert len(page.svgs) == 12


def test_the_page_asks_for_nothing(run: RunFolder) -> None:
    page = page_of(run)
    source = run.report_html.read_text("utf-8")
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "video", "form", "base"})
    assert not [
        name for name, _ in page.attributes if name in ("src", "href", "action", "srcset") or name.startswith("on")
    ]
    assert not re.search(r"https?:|url\(|@import|@font-face", source)
    assert "default-src 'none'" in source


def test_the_markdown_is_whole(run: RunFolder) -> None:
    for lang in ("en", "zh"):
        write_report(run, lang)
        text = run.report_markdown.read_text("utf-8")
        for section in explain(run.read_json(run.facts_file), lang).sections:
            assert section.title in text
        for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            rows = [line.strip() for line in block.strip().splitlines()]
            assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1, block
        assert "```yaml\nmodel:" in text
        assert "\n\n\n" not in text


def write_metrics(run: RunFolder, steps: int, *, bad: set[int] = frozenset(), evals: int = 0, resume: int = 0) -> None:  # type: ignore[assignment]
    run.metrics_file.unlink()
    order = [*range(1, resume + 6), *range(resume + 1, steps + 1)] if resume else list(range(1, steps + 1))
    for position, step in enumerate(order):
        if resume and position == resume + 5:
            run.append_metrics({"event": "resumed", "step": resume})
        loss = math.nan if step in bad else 1 + 2 * math.exp(-5 * step / steps)
        run.append_metrics(
            {"step": step, "loss": loss, "grad_norm": 0.5, "learning_rate": 2e-4 * (1 - step / steps)}
            | {"tokens_per_second": 5e4, "memory_bytes": 3e9, "logged_steps": 1}
        )
        if evals and step % evals == 0:
            run.append_metrics({"step": step, "eval_loss": 1.5})


@pytest.mark.parametrize("steps", [1, 2, 20, 5000])
def test_any_length_of_run(run: RunFolder, steps: int) -> None:
    write_metrics(run, steps, evals=max(1, steps // 4))
    page = page_of(run)
    assert len(page.svgs) == 12
    assert run.report_html.stat().st_size < 500_000


def test_nans_evaluations_resumes_and_events_are_seen(run: RunFolder) -> None:
    write_metrics(run, 200, bad={50, 51, 120}, evals=40, resume=100)
    run.append_metrics({"event": "skipped", "step": 50, "what": "loss is nan", "rows": ["rows.jsonl:7"]})
    page = page_of(run)
    loss = page.svgs[0]
    kinds = [path.get("class") for path in loss.iter("path")]
    assert (kinds.count("nonfinite"), kinds.count("mark resume"), kinds.count("mark event")) == (3, 1, 1)
    assert sum("eval" in (circle.get("class") or "") for circle in loss.iter("circle")) >= 5
    assert "not finite: 3" in page.text["en"]
    assert "rows.jsonl:7" in page.text["zh"]


def test_a_run_of_nothing_but_nan(run: RunFolder) -> None:
    write_metrics(run, 30, bad=set(range(1, 31)))
    assert len(page_of(run).svgs) == 8  # all but the losses


@pytest.mark.parametrize("gone", ["facts_file", "environment_file", "metrics_file", "config_file"])
def test_a_run_that_lacks_a_file(run: RunFolder, gone: str) -> None:
    getattr(run, gone).unlink()
    page = page_of(run)
    assert ("did not come to its end" in page.text["en"]) == (gone == "facts_file")


def test_a_run_stopped_before_its_end_says_so(run: RunFolder) -> None:
    facts = run.read_json(run.facts_file) | {"training": None, "optimizer": None, "verified": None, "adapter": None}
    run.write_json(run.facts_file, facts)
    page = page_of(run)
    assert "did not come to its end" in page.text["en"]
    assert "没有走到终点" in page.text["zh"]


def test_what_others_wrote_stays_text(run: RunFolder) -> None:
    hostile = "<script>alert(1)</script> & `x` | *y*"
    facts: dict[str, Any] = run.read_json(run.facts_file)
    facts["base"]["model"] = hostile
    facts["data"]["dropped"], facts["data"]["examples"] = {hostile: 1}, {hostile: hostile}
    run.write_json(run.facts_file, facts)
    run.config_file.write_text(f"model: {json.dumps(hostile)}\n", encoding="utf-8")
    run.append_metrics({"event": hostile, "step": 2, "what": hostile})
    page = page_of(run)
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text["en"]
