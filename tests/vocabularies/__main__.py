"""``make tokenizers``: real vocabularies, held against official encoders and against Transformers.

For each: trained ids are those of Transformers on the template's text; the inference prompt is a prefix of them; the
reply's ids decode to all that the template writes behind that prompt, and to nothing else; a saved copy gives the same
ids; and a plain text's ids are those of the vocabulary's own encoder where there is one (SentencePiece, tekken,
tiktoken on the same ranks). The counts go to build/tokenizers.json.

usage: python -m tests.vocabularies [NAME...]
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.vocabularies.fetch import FOLDER, PYTHON, fetch

Encode = Callable[[str], list[int]]
TEXTS = (
    "A boat floats.", "    def f(a):\n        return a\n\n\treturn 1", " it", "\n\nit", "It's 12345.678, isn't it?",
    "Grüße aus Zürich: 你好世界，こんにちは, Привет, مرحبا 👩‍💻", "a  b   c    d", "x=[1, 22, 333];  // ok\r\n",
    "[INST] <s> <|end|>", "trailing  \n", "việc hợp nhiều điều jeho Việt",
)  # fmt: skip


def main() -> int:
    """Check all; the exit code is 1 if one fails."""
    folders = fetch()
    sys.path.append(str(PYTHON))  # before Transformers is imported: it asks once what is installed
    results = {name: check(name, folders[name]) for name in sys.argv[1:] or folders}
    (FOLDER.parent / "tokenizers.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", "utf-8")
    width = max(map(len, results))
    for name, found in results.items():
        counts = " · ".join(f"{what} {n['right']}/{n['of']}" for what, n in found["checks"].items())
        print(f"{name:<{width}}  {counts}" + (f"  ({found['remark']})" if found["remark"] else ""))
        for failure in found["failures"][:3]:
            print(f"{'':<{width}}  {failure}")
    return int(any(found["failures"] for found in results.values()))


def check(name: str, folder: Path) -> dict[str, Any]:
    """What holds for one vocabulary."""
    from slimtune.base.tokenizer import load_tokenizer, read_tokenizer, save_tokenizer, spm_difference
    from slimtune.data.conversation import normalise
    from slimtune.data.render import ChatRenderer, prompt_ids

    tokenizer = load_tokenizer(str(folder))
    renderer = ChatRenderer(tokenizer)
    official = _official(name, folder)
    told = spm_difference(tokenizer)
    with tempfile.TemporaryDirectory() as made:
        save_tokenizer(tokenizer, Path(made))
        copy = read_tokenizer(made)
    checks: dict[str, dict[str, int]] = {}
    failures: list[str] = []

    def holds(what: str, fine: bool, text: str) -> None:
        count = checks.setdefault(what, {"right": 0, "of": 0})
        count["of"] += 1
        count["right"] += fine
        if not fine:
            failures.append(f"{what}: {text!r}")

    for reply in TEXTS:
        for before in TEXTS:
            turns = [{"role": "user", "content": before}, {"role": "assistant", "content": reply}]
            [draft] = renderer.drafts(normalise({"messages": turns}))
            encoded, mask = renderer.encoder.encode([draft.pieces])[0]
            ids, start = encoded.tolist(), mask.tolist().index(True)
            text = str(tokenizer.apply_chat_template(turns, tokenize=False))
            plain = not any(control in reply + before for control in renderer.encoder.controls)
            keeps = reply == reply.lstrip() or not renderer.encoder._eats_right
            if plain and keeps:
                adds = renderer.adds_bos and not text.startswith(str(tokenizer.bos_token))
                holds("as Transformers", ids == tokenizer(text, add_special_tokens=adds).input_ids, text)
                holds("copy", ids == copy(text, add_special_tokens=adds).input_ids, text)
            holds("prompt", ids[:start] == prompt_ids(tokenizer, turns[:1]), text)
            shown = [tokenizer.decode(part, skip_special_tokens=False) for part in (ids[:start], ids)]
            asked = str(tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True))
            written, said = text[len(asked) :], shown[1][len(shown[0]) :]
            if renderer.encoder._eats_right:
                # Phi-3's: a control token takes the white space behind it, and text there gets the prefix space, which
                # Transformers' ids have too.
                written = f" {written}".rstrip()
            holds("reply", shown[1].startswith(shown[0]) and said == written, text)
        if official is not None and told is None:
            holds("official", renderer.encoder.text_ids(reply).tolist() == official(reply), reply)
    remark = "its SentencePiece model cuts otherwise, and it is said" if told is not None else ""
    return {"checks": checks, "failures": failures, "remark": remark}


def _official(name: str, folder: Path) -> Encode | None:
    """The vocabulary's own encoder of plain text."""
    if (folder / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        spm = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        return lambda text: list(spm.encode(text))
    if (folder / "tekken.json").is_file():
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        tekken = Tekkenizer.from_file(str(folder / "tekken.json"))
        return lambda text: list(tekken.encode(text, bos=False, eos=False))
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    steps = (spec["pre_tokenizer"] or {}).get("pretokenizers", [])
    if len(steps) != 2 or steps[0]["type"] != "Split" or not spec["model"].get("ignore_merges"):
        return None
    return _tiktoken(spec, steps[0]["pattern"]["Regex"])


def _tiktoken(spec: dict[str, Any], pattern: str) -> Encode:
    """tiktoken on the vocabulary's ranks, as OpenAI and Meta encode with them."""
    import tiktoken

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    byte_of = {chr(byte) if byte in printable else chr(next(spare)): byte for byte in range(256)}
    ranks = {bytes(map(byte_of.__getitem__, text)): at for text, at in spec["model"]["vocab"].items()}
    encoding = tiktoken.Encoding("vocabulary", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return lambda text: encoding.encode(text, disallowed_special=())


if __name__ == "__main__":
    sys.exit(main())
