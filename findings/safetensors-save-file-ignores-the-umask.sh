#!/usr/bin/env bash
# Question: which mode has a file that safetensors' save_file writes?
#
# One would guess: that of any new file, 0666 without the umask's bits, 0644 as a rule; others on the machine, or a
# server that runs as another user, can read the model.
# Behaviour: 0600 whatever the umask is. A file that was there is replaced by a new one of that mode, so what was made
# readable before is closed again.
# Why it matters: a folder of an adapter or a model that is shared by group or by all has weights that only its writer
# reads, beside a config that everybody does.
# Seen on 2026-11-29 with safetensors 0.8.0 and numpy 2.3.5, on Linux.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/ask.py" <<'PYTHON'
import os
import sys
from pathlib import Path

import numpy
import safetensors
from safetensors.numpy import save_file

folder = Path(sys.argv[1])
seen = {}
for umask in (0o022, 0o002):
    os.umask(umask)
    plain, weights = folder / f"plain-{umask}", folder / f"weights-{umask}.safetensors"
    plain.write_bytes(b"")
    save_file({"a": numpy.zeros(3, dtype=numpy.float32)}, weights)
    seen[f"{umask:03o}"] = (f"{plain.stat().st_mode & 0o777:o}", f"{weights.stat().st_mode & 0o777:o}")
weights.chmod(0o664)
save_file({"a": numpy.ones(3, dtype=numpy.float32)}, weights)
again = f"{weights.stat().st_mode & 0o777:o}"
print(f"safetensors {safetensors.__version__}")
for umask, (plain_mode, mode) in seen.items():
    print(f"  umask {umask}: a plain file {plain_mode}, save_file {mode}")
print(f"  saved again over a file of 664: {again}")
raise SystemExit(seen != {"022": ("644", "600"), "002": ("664", "600")} or again != "600")
PYTHON
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.3.5
"$work/venv/bin/python" "$work/ask.py" "$work" || { echo "CHANGED since 2026-11-29"; exit 1; }
echo "as seen on 2026-11-29"
