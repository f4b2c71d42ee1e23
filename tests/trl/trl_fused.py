"""TRL's own tests with every model fused that can be: what passes as it is, must pass fused.

    python tests/trl/trl_fused.py CHECKOUT [ARGUMENTS OF PYTEST]

CHECKOUT is one of TRL, of the installed version, whose tests fetch small models and data from the hub. They run twice,
as they are and with this module as a plugin, which fuses a trainer's model when its training begins. Exits with 1 if a
test passes as it is and fails fused, or if nothing was fused.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

DEFAULT = ("tests", "-k", "peft or lora")
_FUSIONS: list[Any] = []
_REFUSED: Counter[str] = Counter()


def pytest_configure() -> None:
    from transformers import Trainer

    from slimtune.engine import CannotFuse, fuse

    own = Trainer.train

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            _FUSIONS.append(fuse(self.model))
        except CannotFuse as refusal:
            _REFUSED[refusal.what] += 1
        return own(self, *args, **kwargs)

    Trainer.train = train


def pytest_terminal_summary(terminalreporter: Any) -> None:
    left = sum((fusion.left for fusion in _FUSIONS), Counter())
    terminalreporter.write_line(f"fused: {len(_FUSIONS)} models, {sum(each.computed for each in _FUSIONS)} calls")
    for title, counts in (("left to the model", left), ("not fused", _REFUSED)):
        for reason, count in counts.most_common():
            terminalreporter.write_line(f"{title}: {count} x {reason}")


def _passed(checkout: Path, arguments: list[str], *, fused: bool) -> set[str]:
    """The tests that pass."""
    path = os.pathsep.join([str(Path(__file__).parent.resolve()), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.xml")
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", f"--junitxml={result}", *arguments]
            + (["-p", "trl_fused"] if fused else []),
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
        cases = ElementTree.parse(result).iter("testcase")
    return {f"{case.get('classname')}::{case.get('name')}" for case in cases if len(case.findall("*")) == 0}


def main() -> int:
    """Compare; the exit code."""
    checkout, arguments = Path(sys.argv[1]), sys.argv[2:] or list(DEFAULT)
    plain = _passed(checkout, arguments, fused=False)
    lost = plain - _passed(checkout, arguments, fused=True)
    print(f"{len(plain)} tests pass as they are, {len(plain) - len(lost)} of them fused")
    for name in sorted(lost):
        print("only as it is:", name)
    return int(bool(lost) or not plain)


if __name__ == "__main__":
    sys.exit(main())
