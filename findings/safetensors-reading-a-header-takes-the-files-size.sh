#!/usr/bin/env bash
# Question: can the names and shapes in a safetensors file be read on a machine whose RAM is smaller than the file?
#
# A file begins with a header of all names, types and shapes; safe_open promises to load tensors one at a time.
# One would guess: opening it costs a few kilobytes, whatever the file's size and the framework asked for.
# Behaviour: with framework="pt" the whole file is mapped privately and writable, which Linux counts as memory that may be
# needed: a file larger than RAM and swap is refused with "Cannot allocate memory" before a name is read. With
# framework="np" the same file opens at once.
# Why it matters: what a model would need is asked of its files on the small machine, before it is decided where to train.
# Linux with the usual vm.overcommit_memory of 0. Seen on 2026-11-29 with safetensors 0.8.0, torch 2.13.0, on a CPU.
set -euo pipefail
[ "$(cat /proc/sys/vm/overcommit_memory)" = 0 ] || { echo "vm.overcommit_memory isn't 0: nothing to be seen here"; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/ask.py" <<'PYTHON'
import json
import struct
import sys
from pathlib import Path

from safetensors import safe_open

known = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines()}
size = 2 * (known["MemTotal"] + known["SwapTotal"])
header = json.dumps({"weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
file = Path(sys.argv[1]) / "large.safetensors"
with file.open("wb") as stream:  # sparse: it takes no room on the disk
    stream.write(struct.pack("<Q", len(header)) + header)
    stream.truncate(8 + len(header) + size)
said = {}
for framework in ("np", "pt"):
    try:
        with safe_open(file, framework=framework) as opened:
            said[framework] = f"shape {opened.get_slice('weight').get_shape()}"
    except Exception as error:
        said[framework] = f"{type(error).__name__}: {str(error)[-60:]}"
    print(f"{size / 2**30:.0f} GiB, framework {framework}: {said[framework]}")
raise SystemExit(not (said["np"].startswith("shape") and "Cannot allocate memory" in said["pt"]))
PYTHON
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 safetensors==0.8.0
"$work/venv/bin/python" "$work/ask.py" "$work" || { echo "CHANGED since 2026-11-29"; exit 1; }
echo "as seen on 2026-11-29"
