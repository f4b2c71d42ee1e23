"""The proof as one self-contained HTML page."""

from __future__ import annotations

import html

from slimtune.data.view import Sample
from slimtune.errors import written_out
from slimtune.language import language
from slimtune.words import told

__all__ = ["POLICY", "page", "quoted"]

POLICY = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">"""
"""Every page that slimtune writes says it: it asks for nothing and runs nothing, whatever a row or a reply holds."""
_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --back: #ffffff;
  --learn: #dafbe1; --learn-ink: #0a3d1a; --bad: #cf222e; --good: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --back: #0d1117;
  --learn: #12391f; --learn-ink: #aff5b4; --bad: #ff7b72; --good: #3fb950; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 60rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.verdict { font-weight: 600; } .good { color: var(--good); } .bad { color: var(--bad); white-space: pre-wrap; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; vertical-align: top;
  border-top: 1px solid var(--line); padding: .4rem .75rem .4rem 0; overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 500; width: 8rem; white-space: nowrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.6 ui-monospace, monospace;
  border: 1px solid var(--line); border-radius: 6px; padding: 1rem; color: var(--soft); }
mark { background: var(--learn); color: var(--learn-ink); text-decoration: underline var(--good);
  text-underline-offset: 3px; }
.legend { color: var(--soft); }
"""


def quoted(text: str) -> str:
    """Text that somebody else wrote, as HTML: all of it is to be seen, in the order in which it stands."""
    return html.escape(written_out(text))


def page(title: str, refusal: str | None, lines: list[tuple[str, str]], said: list[str], shown: Sample | None) -> str:
    """The page's HTML: verdict, table, hints, and the conversation with its supervised tokens marked."""
    verdict = (
        f'<p class="verdict good">{told("Every row is accounted for; training may begin.")}</p>'
        if refusal is None
        else f'<p class="verdict bad">{told("Training is refused: ")}{quoted(refusal)}</p>'
    )
    rows = "\n".join(f"<tr><th>{quoted(told(label))}</th><td>{quoted(told(text))}</td></tr>" for label, text in lines)
    notes = "".join(f"<li>{quoted(told(hint))}</li>" for hint in said)
    parts = [verdict, f"<table>{rows}</table>", f"<ul>{notes}</ul>" if notes else ""]
    if shown is not None:
        text = "".join(
            f"<mark>{quoted(segment.text)}</mark>" if segment.supervised else quoted(segment.text)
            for segment in shown.segments
        )
        parts += [
            f"<h2>{quoted(told(f'One conversation, as the model sees it ({shown.place})'))}</h2>",
            f'<p class="legend">{told("The <mark>marked</mark> tokens are learnt; the others are only read.")}</p>',
            f"<pre>{text}</pre>",
        ]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="{"zh-CN" if language() == "zh" else "en"}">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{POLICY}\n'
        f"<title>{quoted(title)}</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{quoted(title)}</h1>\n{body}\n</body>\n</html>\n"
    )
