#!/usr/bin/env bash
# Question: can a column of lists that datasets writes as CSV be read back?
#
# One would guess: a list is written as JSON or as Python writes it, so that json.loads or ast.literal_eval gives it back.
# Behaviour: it is written as numpy prints arrays, without commas: ['a' 'b' 'c']. Python reads that as one string 'abc',
# without an error; a list of objects becomes no syntax at all.
# Why it matters: conversations saved by to_csv come back with all turns run together, or not at all.
# Seen on 2026-11-29 with datasets 5.2.0, pyarrow 26.0.1, pandas 3.1.1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
HF_HUB_OFFLINE=1 HF_HOME="$work/cache" "$work/venv/bin/python" - "$work/rows.csv" <<'PYTHON'
import ast
import csv
import sys

from datasets import Dataset

turns = ["Where?", "Here.", "Thanks.", "Welcome."]
Dataset.from_list([{"turns": turns}]).to_csv(sys.argv[1])
with open(sys.argv[1], encoding="utf-8", newline="") as file:
    text = list(csv.DictReader(file))[0]["turns"]
read = ast.literal_eval(text)
print("written:", turns)
print("in the file:", text)
print("read back by ast.literal_eval:", read)
as_seen = read == ["".join(turns)]
print("as seen on 2026-11-29" if as_seen else "CHANGED since 2026-11-29")
sys.exit(not as_seen)
PYTHON
