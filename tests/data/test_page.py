"""The proof as a page: what a row holds is text, and the page neither runs nor asks for anything."""

from __future__ import annotations

from html.parser import HTMLParser

from slimtune.data.page import page
from slimtune.data.view import Sample, Segment

HOSTILE = "</pre></title></style><script>alert(1)</script><img src=x onerror=alert(1)>\" onclick='x'"
UNSEEN = "\x1b[2J\u202e"


def test_whatever_a_row_holds_is_text() -> None:
    shown = Sample(HOSTILE, [Segment(HOSTILE, True, 1), Segment(HOSTILE, False, 1)])
    made = page(HOSTILE, HOSTILE, [(HOSTILE, HOSTILE)], [HOSTILE + UNSEEN], shown)
    tags: list[str] = []
    texts: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)

        def handle_data(self, data: str) -> None:
            texts.append(data)

    Reader().feed(made)
    assert not set(UNSEEN[:1] + UNSEEN[-1]) & set(made)
    assert not {"script", "img"} & set(tags)
    assert "".join(texts).count(HOSTILE) == 9
    assert "Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">" in made
