"""Ship a run as GGUF, for llama.cpp and Ollama, with the proof that it says the same."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from gguf import GGUFReader
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from slimtune.adapter.change import why_not_mergeable
from slimtune.adapter.files import UnpackedFiles
from slimtune.adapter.merged import MergedWeights, read_model_config
from slimtune.base.bars import without_bars
from slimtune.base.source import upstream_errors
from slimtune.config import Config
from slimtune.data.render import renderer_for
from slimtune.errors import UserError
from slimtune.run.folder import RunFolder
from slimtune.run.quiet import upstream_to_log
from slimtune.run.screen import Screen
from slimtune.use.gguf_file import ROPE_FACTORS, check_family, longest_text, write_gguf
from slimtune.use.load import Found, Opened, find, open_model, stop_ids, turn_ends
from slimtune.use.merge import free_room, new_folder
from slimtune.use.ollama import modelfile
from slimtune.use.parity import Certificate, Reference, Voice, certify, reference, transformers_voice
from slimtune.use.rounding import round_once_

__all__ = ["KINDS", "Kind", "check_exportable", "check_needs", "export_gguf", "export_run", "prove_merged"]

Kind = Literal["f16", "q8_0", "q4_k_m"]
KINDS: tuple[Kind, ...] = ("f16", "q8_0", "q4_k_m")
KL_ALLOWED: dict[str, float] = {"merged": 2e-3, "f16": 2e-3, "q8_0": 1e-2, "q4_k_m": 1e-1}
"""Mean divergence, in nats for a token, that a copy may have; docs/decisions/ says where the numbers come from."""
FIRST_TOKEN_ALLOWED: dict[str, float] = {"merged": 1.0, "f16": 1.0, "q8_0": 1.0, "q4_k_m": 0.8}
_QUANTIZER = "llama-quantize"
_ROUNDINGS = 4
"""Most draws of what rounding makes; a token that goes to another expert is rare, and counts for many that don't."""


def check_needs(kind: Kind) -> None:
    """Refuse an export whose tools aren't there, before any work is done for it.

    Raises:
        UserError: q4_k_m is asked for, and llama.cpp's quantizer isn't on the PATH.
    """
    if kind == "q4_k_m" and shutil.which(_QUANTIZER) is None:
        raise UserError(
            f"{_QUANTIZER} is not installed",
            rule="Q4_K_M is made by llama.cpp's own tool.",
            way_out="Install llama.cpp and put it on the PATH, or export as q8_0.",
        )


def export_run(config: Config, run: RunFolder, screen: Screen) -> None:
    """The exports that the config names, of a run that is done and whole whatever becomes of them."""
    for kind in config.export:
        folder = run.path / "export" / kind
        if folder.exists():
            continue  # made before this run was resumed
        with screen.working(f"exporting as {kind}"), upstream_to_log(run.log_file):
            certificate = export_gguf(find(str(run.path)), folder, kind, name=run.path.resolve().name)
        screen.say("exported", f"{folder}" + (f" · {certificate.line()}" if certificate else ""))


def check_exportable(found: Found, kinds: Sequence[Kind], init: str | None = None) -> None:
    """Refuse exports that can't be made of ``found``, before it is trained or its weights are read.

    Args:
        found: The run, adapter or bare model.
        kinds: The exports.
        init: How an adapter that is to be trained starts, in PEFT's words; None if there is one already, or none.

    Raises:
        UserError: A tool is missing, the model's family or tokenizer can't be written as GGUF, or the adapter that
            would be trained couldn't be merged.
    """
    for kind in kinds:
        check_needs(kind)
    if not kinds:
        return
    check_family(read_model_config(found.base), found.tokenizer())
    if reason := why_not_mergeable({"init_lora_weights": init}):
        raise UserError(
            f"what this run trains can't be exported: {reason}",
            rule="An export holds base and adapter merged.",
            way_out="Leave the export, or train with lora_init: default.",
        )


def export_gguf(
    found: Found, output: Path, kind: Kind, *, name: str | None = None, parity: bool = True
) -> Certificate | None:
    """Write ``<output>/<name>-<kind>.gguf``, ``Modelfile`` and, with ``parity``, ``parity.json``.

    Args:
        found: The run, adapter or bare model.
        output: The new folder; it appears whole or not at all.
        kind: f16, q8_0 or q4_k_m.
        name: The model's name in the file and of the file; the output folder's unless given.
        parity: Compare what was written with the adapter on its base.

    Raises:
        UserError: A tool is missing, or the model can't be exported.
        GuardStop: What was written doesn't say the same; nothing is left of it.
    """
    check_exportable(found, (kind,))
    weights = MergedWeights(found.base, found.adapter, trust_remote_code=found.trust_remote_code)
    tokenizer = found.tokenizer()
    if not tokenizer.chat_template:
        raise UserError(
            f"{found.name} has no chat template",
            rule="An exported model is asked, and certified, by its template.",
            way_out="Train with one: --template FILE.jinja",
        )
    name = name or output.name
    file_name = f"{name}-{kind}.gguf"
    ends = turn_ends(tokenizer, found.manner)
    certificate = None
    with new_folder(output) as folder:
        free_room(folder, weights.nbytes if kind == "f16" else int(0.6 * weights.nbytes))
        if kind == "q4_k_m":
            _quantize(weights, tokenizer, folder / file_name, name, ends[0])
        else:
            write_gguf(weights, tokenizer, folder / file_name, kind, name=name, turn_end=ends[0])
        trained = found.passport.config.get("max_length", 0) if found.passport else 0
        context = min(max(2048, int(trained)), longest_text(weights.config))
        text = modelfile(file_name, tokenizer, ends, context, found.manner)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
        if parity:
            certificate = _prove(reference(_on_16_bits(found)), found, folder / file_name, kind)
            certificate.write(folder / "parity.json")
            certificate.require()
    return certificate


def prove_merged(found: Found, folder: Path) -> Certificate:
    """The certificate of a merged folder: against the adapter on the same base's own weights.

    Where it doesn't hold, the copy is held to what rounding alone makes of this model (``docs/decisions/0096``): a
    mixture whose experts' scores are near sends tokens elsewhere.
    """
    said = reference(_on_16_bits(found))
    merged = open_model(str(folder), quantization="none", dtype="fp32", trust_remote_code=found.trust_remote_code)
    copy = transformers_voice(merged, f"{found.name}, merged into its base")
    certificate = certify(
        said, copy, kl_mean_allowed=KL_ALLOWED["merged"], first_token_allowed=FIRST_TOKEN_ALLOWED["merged"]
    )
    del merged, copy
    stored = {spec.dtype for spec in UnpackedFiles(folder).specs.values()}
    rounded_to = [dtype for dtype in (torch.bfloat16, torch.float16) if dtype in stored]
    for seed in range(_ROUNDINGS):
        if certificate.holds or not rounded_to:
            break
        opened = _on_16_bits(found)
        round_once_(opened.model, rounded_to[0], seed)
        certificate = certificate.beside(certify(said, transformers_voice(opened, ""), kl_mean_allowed=0.0))
    return certificate


def _on_16_bits(found: Found) -> Opened:
    """The adapter on its base's own weights, computed in fp32: what merging and exporting should preserve."""
    return open_model(
        found.name,
        base=None if found.adapter is None else str(found.base),
        quantization="none",
        dtype="fp32",
        trust_remote_code=found.trust_remote_code,
    )


def _prove(said: Reference, found: Found, file: Path, kind: Kind) -> Certificate:
    voice = _llama_cpp_voice(found, file) if importlib.util.find_spec("llama_cpp") else _read_back_voice(file)
    return certify(said, voice, kl_mean_allowed=KL_ALLOWED[kind], first_token_allowed=FIRST_TOKEN_ALLOWED[kind])


def _read_back_voice(file: Path) -> Voice:
    """The GGUF file, weights and tokenizer, as Transformers reads it."""
    with upstream_errors(str(file)), without_bars():  # its reader of GGUF knows fewer tokenizers than llama.cpp does
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    _check_reader(file, tokenizer, model)
    model.eval()  # type: ignore[no-untyped-call]
    opened = Opened(Found(str(file), file.parent, None, None), model, tokenizer, stop_ids(model, tokenizer))
    return transformers_voice(opened, f"{file.name}, read back by Transformers")


def _check_reader(file: Path, tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """See that all of the file was read: a reply's end as a token, which Transformers 5.17 takes of a Qwen's with marks
    of its own alone, and every number, of which it leaves a Llama's biases out."""
    reader = GGUFReader(file)
    end = reader.fields["tokenizer.ggml.eos_token_id"].contents()
    token = reader.fields["tokenizer.ggml.tokens"].contents(end)
    read = model.num_parameters()
    held = sum(int(tensor.n_elements) for tensor in reader.tensors if tensor.name != ROPE_FACTORS)
    if tokenizer.get_added_vocab().get(token) != end:
        raise UserError(
            f"Transformers {transformers.__version__} doesn't read {token} in {file.name} as the control token it is",
            rule="What the export says is proven by reading it back, which this version can't do rightly.",
            way_out="Install a newer Transformers or llama-cpp-python, or export without the proof: --no-parity",
        )
    if read != held:
        raise UserError(
            f"Transformers {transformers.__version__} reads {read:,} of {held:,} numbers in {file.name}",
            rule="What the export says is proven by reading it back, which this version can't do rightly.",
            way_out="Install a newer Transformers or llama-cpp-python, or export without the proof: --no-parity",
        )


def _llama_cpp_voice(found: Found, file: Path) -> Voice:
    """The GGUF file as llama.cpp runs and tokenises it."""
    from llama_cpp import Llama

    llama = Llama(str(file), n_ctx=2048, logits_all=True, verbose=False)
    tokenizer = found.tokenizer()

    def prompt_ids(messages: Sequence[Any]) -> list[int]:
        text = renderer_for(tokenizer, found.manner).text(list(messages), prompt=True)
        return [int(token) for token in llama.tokenize(text.encode(), add_bos=False, special=True)]

    def log_probabilities(ids: list[int], first: int) -> Tensor:
        llama.reset()
        llama.eval(ids)
        return torch.tensor(llama.scores[first : len(ids)]).float().log_softmax(-1)

    return Voice(f"{file.name}, run by llama.cpp", prompt_ids, log_probabilities)


def _quantize(weights: MergedWeights, tokenizer: Any, file: Path, name: str, end: int) -> None:
    whole = file.with_name("whole.gguf")
    write_gguf(weights, tokenizer, whole, "f16", name=name, turn_end=end)
    done = subprocess.run([_QUANTIZER, str(whole), str(file), "Q4_K_M"], capture_output=True, text=True, check=False)
    whole.unlink()
    if done.returncode or not file.is_file():
        raise UserError(
            f"the precision by {_QUANTIZER} failed: {(done.stderr or done.stdout).strip().splitlines()[-1:]}"
        )
