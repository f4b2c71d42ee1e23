"""doctor: what it finds here, and nothing of what libraries say on the way."""

from __future__ import annotations

import json
import subprocess
import sys


def test_it_finds_this_machine_and_prints_nothing_else() -> None:
    words = [sys.executable, "-m", "slimtune", "doctor", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = {finding["what"]: finding for finding in json.loads(done.stdout)}
    assert {"torch", "transformers", "trl", "peft", "bitsandbytes", "cache", "4-bit bases"} <= found.keys()
    assert {"CPU", "GPU"} & found.keys()
    assert all(finding["well"] for finding in found.values())
