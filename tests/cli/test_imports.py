from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc
from slimtune.cli.imports import fast_imports
with fast_imports():
    import slimtune.recipes
assert gc.isenabled() and gc.get_freeze_count() > 100_000
"""


def test_what_was_imported_is_left_alone_until_the_end_and_nothing_is_said_then() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr  # what libraries say at the end of objects that are frozen still
