"""The one way in for every verb after training: a run, an adapter or a bare model becomes something that answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimtune.adapter.files import attach_adapter, find_adapter
from slimtune.adapter.passport import (
    Passport,
    check_base,
    check_tokenizer,
    is_hashed_whole,
    local_base,
    read_passport,
    tokenizer_hash,
)
from slimtune.adapter.settings import adapter_config
from slimtune.base.computes import check_computes
from slimtune.base.load import load_base
from slimtune.base.named import model_source
from slimtune.base.packed import unpack_
from slimtune.base.tokenizer import load_tokenizer, read_tokenizer
from slimtune.data.render import Manner, prompt_ids, renderer_for
from slimtune.errors import UserError, shown
from slimtune.hardware import detect
from slimtune.run.folder import RunFolder
from slimtune.run.replaced import tell_stranded

__all__ = ["Found", "Opened", "find", "open_model", "stop_ids", "turn_ends"]


@dataclass(frozen=True)
class Found:
    """What a person's RUN, ADAPTER or MODEL stands for, before anything heavy is loaded."""

    name: str
    """As the person wrote it."""
    base: Path
    """The folder with the base's files; checked to be the adapter's own."""
    adapter: Path | None
    """The adapter's folder; None for a bare model."""
    passport: Passport | None
    trust_remote_code: bool = False

    @property
    def base_name(self) -> str:
        """The base as the training named it; for an adapter of other tools and a bare model, its folder's name."""
        return self.passport.base if self.passport is not None else self.base.name

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The training's tokenizer and chat template; a bare model's own.

        Raises:
            UserError: There is none, or it isn't the training's.
        """
        if self.adapter is None or not (self.adapter / "tokenizer_config.json").is_file():
            tokenizer = load_tokenizer(str(self.base), template=self.template, trust_remote_code=self.trust_remote_code)
        else:
            tokenizer = read_tokenizer(str(self.adapter), trust_remote_code=self.trust_remote_code)
            if self.passport is not None and not is_hashed_whole(self.passport):
                tokenizer = self._trained_with(self.passport, tokenizer)
        if self.passport is not None:
            check_tokenizer(self.passport, tokenizer, str(self.adapter))
        return tokenizer

    def _trained_with(self, passport: Passport, copy: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """An old passport doesn't see where the copy beside the adapter has lost something in saving (Llama 2's
        ``legacy``): the base's own tokenizer is what was trained with, if the passport knows it."""
        if not any((self.base / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            return copy
        own = read_tokenizer(str(self.base), trust_remote_code=self.trust_remote_code)
        if tokenizer_hash(own, like=passport.tokenizer) != passport.tokenizer:
            return copy
        own.chat_template = copy.chat_template
        return own

    @property
    def manner(self) -> Manner:
        """How the training rendered conversations."""
        return Manner.recorded(self.passport.config) if self.passport is not None else Manner()

    @property
    def run(self) -> RunFolder | None:
        """The run that the adapter lies in; None for an adapter elsewhere and for a bare model."""
        if self.adapter is None or not (self.adapter.parent / "config.yaml").is_file():
            return None
        return RunFolder(self.adapter.parent)

    @property
    def template(self) -> Path | None:
        """The chat template that lies beside the adapter."""
        file = None if self.adapter is None else self.adapter / "chat_template.jinja"
        return file if file is not None and file.is_file() else None


@dataclass(frozen=True)
class Opened:
    """A model that answers: base, adapter if there is one, tokenizer, and the tokens that end its turn."""

    found: Found
    model: Any
    """A Transformers model, or PEFT's wrapping of one; in eval mode."""
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    format: str = "none"
    """What its base's 4-bit weights lie in, or lay in before they were unpacked; none of a base in 16 bits or more."""

    @property
    def device(self) -> torch.device:
        """Where its input belongs."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def pad_id(self) -> int:
        """The token that fills short rows; never attended to."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else self.stop_ids[0]

    @property
    def context(self) -> int:
        """Most tokens of prompt and reply together."""
        config = self.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 1 << 30)

    def prompt_ids(
        self, messages: Sequence[Any], tools: Any = None, variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """The ids that the model is asked with, by the training's own renderer.

        Raises:
            UserError: A message breaks a rule, or the template refuses the conversation.
        """
        return prompt_ids(self.tokenizer, messages, tools=tools, manner=self.found.manner, variables=variables)

    @contextmanager
    def as_tuned(self) -> Iterator[None]:
        """Within this, the model answers as what was opened: the counterpart of :meth:`as_base`."""
        yield

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Within this, the model answers as its base: the adapter is switched off.

        Raises:
            UserError: It trained biases of the base itself, which PEFT can't switch off.
        """
        if self.found.adapter is not None and self.model.active_peft_config.bias != "none":
            raise UserError(
                f"the adapter of {self.found.name} holds biases of the base itself, and can't be switched off",
                rule="What would answer in the base's name has the adapter's biases.",
                way_out=f"Ask the base by itself: {self.found.base}",
            )
        with self.model.disable_adapter() if self.found.adapter is not None else nullcontext():
            yield


def find(target: str, *, base: str | None = None, trust_remote_code: bool = False) -> Found:
    """Say what ``target`` stands for and where its base lies; no weights are loaded.

    Args:
        target: A run folder, an adapter folder, or a model (hub id, folder, smollm2-135m).
        base: Where the adapter's base lies now, if not where it was.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: ``target`` is none of these, or the base is missing or another one than the adapter's.
    """
    path = Path(target).expanduser()
    tell_stranded(path)
    adapter = find_adapter(path) if path.is_dir() else None
    if adapter is None:
        if (path / "config.yaml").is_file():
            raise UserError(
                f"run {target} has no adapter yet",
                rule="The adapter is saved when training is done.",
                way_out=f"Finish it: slimtune resume {target}",
            )
        if base is not None:
            raise UserError(f"--base goes with a run or an adapter; {target} is a bare model")
        return Found(target, local_base(model_source(target)), None, None, trust_remote_code)
    config = adapter_config(adapter)
    passport = read_passport(adapter)
    named = base or (passport.base if passport else config.get("base_model_name_or_path"))
    if not named:
        raise UserError(f"the adapter in {adapter} names no base", way_out="Say which it is: --base PATH.")
    try:
        revision = passport.revision if passport and base is None else None
        folder = local_base(model_source(named), revision)
    except UserError as error:
        way_out = error.way_out if base else f"If the base lies elsewhere now, say where: --base PATH. {error.way_out}"
        raise UserError(f"the base of {target}: {error.what}", rule=error.rule, way_out=way_out) from None
    if passport is not None:
        check_base(passport, folder)
    return Found(target, folder, adapter, passport, trust_remote_code)


def open_model(
    target: str,
    *,
    base: str | None = None,
    quantization: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Opened:
    """Load ``target``, ready to answer.

    The base is quantised as it was in training, for the adapter was fitted to that. On a CPU the 4-bit values are then
    unpacked once, where the memory allows it: the same numbers, without unpacking them for every token.

    Args:
        target: A run folder, an adapter folder, or a model.
        base: Where the adapter's base lies now.
        quantization: nf4 or none; as in training (nf4 for a bare model) unless given.
        dtype: bf16, fp16 or fp32; what is fastest here unless given.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: As :func:`find`; or the model or adapter can't be loaded, or can't compute a text as it is loaded.
    """
    found = find(target, base=base, trust_remote_code=trust_remote_code)
    hardware = detect()
    trained = found.passport.quantization if found.passport else {}
    tokenizer = found.tokenizer()
    loaded = load_base(
        str(found.base),
        hardware,
        compute_dtype=dtype or hardware.compute_dtype,
        quantization=quantization or trained.get("method", "nf4"),
        double_quant=trained.get("double_quant", True),
        template=found.template,
        trust_remote_code=trust_remote_code,
    )
    model: Any = loaded.model
    if hardware.device == "cpu" and loaded.quantized:
        model = _unpacked(model, hardware.memory_bytes)
    model.config.use_cache = True
    if found.adapter is not None:
        model = attach_adapter(model, found.adapter)
    model.eval().requires_grad_(False)
    text = tokenizer("A river rises in the hills.", add_special_tokens=False)["input_ids"]
    check_computes(model, torch.tensor([text], dtype=torch.int64), model.dtype)
    return Opened(found, model, tokenizer, stop_ids(model, tokenizer, found.manner), loaded.format)


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase, manner: Manner | None = None) -> tuple[int, ...]:
    """The tokens that end the assistant's turn: the model's own, and those that training teaches to end a reply with.

    A base model whose config names only ``<|endoftext|>`` would talk on after ``<|im_end|>`` otherwise.
    """
    named = getattr(model.generation_config, "eos_token_id", None)
    own = [token for token in (named if isinstance(named, list) else [named]) if token is not None]
    if not all(type(token) is int and token >= 0 for token in own):
        raise UserError(
            f"generation_config.json says eos_token_id: {shown(repr(named), 80)}",
            rule="It is a token's id, or a list of ids.",
            way_out="Mend it, or take the file out: what ends a reply is then the chat template's mark.",
        )
    ids = {*own, tokenizer.eos_token_id, *turn_ends(tokenizer, manner)}
    return tuple(sorted(token for token in ids if token is not None))


def turn_ends(tokenizer: PreTrainedTokenizerBase, manner: Manner | None = None) -> tuple[int, ...]:
    """The control tokens that end replies as training renders them, the common one first: a call may have another.
    Without a template, what ends raw text.

    Raises:
        UserError: The chat template is invalid, or ends no reply with a control token.
    """
    return renderer_for(tokenizer, manner).end_ids


def _unpacked(model: PreTrainedModel, memory_bytes: int) -> PreTrainedModel:
    """The model with its 4-bit values as plain numbers of its dtype, if half of the memory has room for them."""
    parameters: int = model.num_parameters()
    if parameters * model.dtype.itemsize > memory_bytes / 2:
        return model
    # Transformers' own way ends in an error where nothing is bitsandbytes', as in Falcon, whose linear layers aren't.
    if any(getattr(parameter, "quant_state", None) is not None for parameter in model.parameters()):
        model = model.dequantize(dtype=model.dtype)  # type: ignore[no-untyped-call]
    unpack_(model)
    return model
