"""Printing for people, when the people leave."""

from __future__ import annotations

import subprocess
import sys

PRINTS = """
from slimtune.cli.page import Page
page = Page()
for number in range(5000):
    page.print(number)
print("printed by other means")
raise SystemExit(2)
"""


def test_a_reader_that_leaves_changes_no_exit_code() -> None:
    writer = subprocess.Popen([sys.executable, "-c", PRINTS], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stderr is not None
    assert writer.stdout.readline() == b"0\n"
    writer.stdout.close()
    assert writer.wait(60) == 2
    assert writer.stderr.read() == b""
