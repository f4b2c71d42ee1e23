#!/usr/bin/env bash
# Question: does installing mistral-common change what AutoTokenizer makes of a folder that has tokenizer.json, a chat
# template and, as Mistral's folders do, tekken.json?
#
# One would guess: no; the folder's tokenizer.json and template are what is loaded, whatever else is installed.
# Behaviour: with mistral-common installed the same call gives another class, made of tekken.json, without the template.
# Why it matters: a fine-tuning environment that also holds a server's requirements renders chats otherwise, or not at all.
# Seen on 2026-11-29 with transformers 5.23.0, tokenizers 0.23.3, mistral-common 1.13.1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3 numpy==2.3.5 jinja2==3.1.6
cat > "$work/ask.py" <<'PYTHON'
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

folder = Path(sys.argv[1])
if not folder.exists():
    folder.mkdir()
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
installed = find_spec("mistral_common") is not None
if installed:
    data = Path(find_spec("mistral_common").origin).parent / "data"
    shutil.copy(data / "tekken_240911.json", folder / "tekken.json")
elif not (folder / "tekken.json").exists():
    (folder / "tekken.json").write_text("{}")
tokenizer = AutoTokenizer.from_pretrained(folder)
has_template = bool(getattr(tokenizer, "chat_template", None))
print(f"mistral-common installed: {installed}; class {type(tokenizer).__name__}; has the template: {has_template}")
sys.exit(has_template == installed)
PYTHON
export HF_HUB_OFFLINE=1
"$work/venv/bin/python" "$work/ask.py" "$work/folder" 2>/dev/null || { echo "CHANGED since 2026-11-29"; exit 1; }
"$work/venv/bin/pip" install --quiet --disable-pip-version-check mistral-common==1.13.1
"$work/venv/bin/python" "$work/ask.py" "$work/folder" 2>/dev/null || { echo "CHANGED since 2026-11-29"; exit 1; }
echo "as seen on 2026-11-29"
