"""What a person can ask for: one flat, strict, documented set of keys.

The same keys are the YAML file's keys, the command line's flags (in kebab case) and :class:`Config`'s fields. A value
of ``"auto"`` is decided by :mod:`slimtune.plan` on the machine that runs, and the decision is written into the run's
``config.yaml``: what ran is what was recorded. This module imports no torch, so ``slimtune --help`` stays fast.
"""

from __future__ import annotations

import datetime
import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PositiveFloat,
    ValidationError,
    field_validator,
    model_validator,
)

from slimtune.errors import UserError, check_utf8, shown
from slimtune.foreign import recognised, translated
from slimtune.values import must_be

__all__ = [
    "FREE_KEYS",
    "SMALL_BASE",
    "SMALL_RATE",
    "TARGET_WORDS",
    "USUAL_ACCUMULATION",
    "USUAL_EPOCHS",
    "USUAL_RATE",
    "Config",
    "load_config",
    "read_yaml",
]

USUAL_EPOCHS = 3.0
USUAL_ACCUMULATION = 2
"""What ``auto`` is where the data makes enough steps."""
USUAL_RATE = 2e-4
SMALL_BASE, SMALL_RATE = 200_000_000, 1e-3
"""Measured at 135 million parameters (benchmarks/defaults.py); larger bases take the usual rate, unmeasured here."""

FREE_KEYS = frozenset(
    {
        # where it is written and what it is called
        "output", "overwrite", "report_to",
        # how often something is written or looked at
        "save_steps", "keep_checkpoints", "logging_steps", "watchdog", "samples",
        # what a guard does when something goes wrong
        "on_nonfinite", "max_skipped", "divergence_factor", "divergence_steps", "on_divergence",
        # what is made of the adapter afterwards
        "export",
    }
)  # fmt: skip
"""Keys that no step's numbers depend on: they may change at a resume, and don't stand in the adapter's file."""

TARGET_WORDS = ("attention", "mlp", "experts")
"""Words among ``targets`` for parts of a model; ``all-linear`` is the three of them."""

Count = Annotated[int, Field(ge=1, lt=2**31)]
Rank = Annotated[int, Field(ge=1, le=65_536)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Config(BaseModel):
    """Everything a fine-tuning run can be told. Immutable; checks itself when it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True,
                              allow_inf_nan=False)  # fmt: skip

    # -- what ---------------------------------------------------------------------------------------------------------
    model: str = "Qwen/Qwen1.5-1.8B-Chat"
    """The base: a hub id, a local folder, or smollm2-135m (the embedded default of the demo)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    data: tuple[str, ...] = ()
    """Training data: files (json, jsonl, csv, tsv, txt, parquet, arrow, also .gz and .zst), folders, patterns
    (rows/*.jsonl), hub ids (owner/name:split), or - for standard input. `file#500` takes a seeded sample of 500 rows,
    `file*2` counts a source twice, `folder:name` takes one part of a folder."""
    output: Path | None = None
    """The run's folder; runs/<time>-<model> when not given."""
    overwrite: bool = False
    """Replace the run folder if it exists and is not empty."""

    start_from: Path | None = None
    """A run or adapter whose values the new adapter starts with (`slimtune train --from RUN`); all else begins anew."""

    # -- the base in 4 bits -------------------------------------------------------------------------------------------
    quantization: Literal["nf4", "none"] = "nf4"
    """nf4: 4 bits by bitsandbytes; none: plain LoRA on the 16- or 32-bit base."""
    double_quant: bool = True
    """Quantise the quantisation's own scales too: 0.4 bits less for each parameter."""
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """The dtype that the 4-bit weights are computed in; auto: bf16 where it is native, fp16 on a T4-class GPU, on a
    CPU what is fastest there."""
    precision: Literal["auto", "bf16", "fp8"] = "auto"
    """What the 4-bit weights are multiplied in while training. fp8: 8 bits where that is faster, by slimtune's engine,
    on a GPU of compute capability 8.9 or more; an experiment: the loss that trains is that of rounded numbers, 0.45 %
    above bf16's on a model of 135 M; the held-out loss of the adapter that comes of it is bf16's there. Adapters,
    attention, the head's logits and every evaluation stay in bf16. auto: as compute_dtype."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless asked for; nothing ever prompts for it."""

    # -- LoRA ---------------------------------------------------------------------------------------------------------
    lora_r: Rank = 8
    """Rank of the adapter."""
    lora_alpha: Count | None = None
    """Scale numerator of the adapter; 2 x lora_r unless set."""
    lora_dropout: Fraction = 0.05
    """Dropout on the adapter's input."""
    targets: tuple[str, ...] | Literal["auto", "all-linear"] = "auto"
    """Modules of the text part that get an adapter, by the end of their names. auto: the projections of whatever mixes
    tokens (q, k, v and o in Llama). all-linear: every linear layer and the experts, no router and no head. Words for
    parts: attention (as auto), mlp (dense and shared feed-forwards), experts (all experts of a mixture)."""
    lora_bias: Literal["none", "all", "lora_only"] = "none"
    """none: PEFT's other ways train biases of the base itself, which no adapter can switch off; they are refused."""
    lora_init: (
        Literal["default", "gaussian", "orthogonal", "olora", "pissa", "loftq"]
        | Annotated[str, Field(pattern=r"^pissa_niter_\d+$")]
    ) = "default"
    """How the adapter starts (PEFT's init_lora_weights)."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""
    dora: bool = False
    """Weight-decomposed LoRA."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained and saved whole beside the adapter (embed_tokens, lm_head)."""
    add_tokens: Path | None = None
    """A file of tokens, one a line, that the tokenizer gets; only their rows of embedding and head train."""
    layers: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(min_length=1)] | None = None
    """Only these layers get an adapter (PEFT's layers_to_transform)."""
    rank_pattern: dict[str, Rank] = {}
    """Other ranks for some modules, by name or regular expression."""
    alpha_pattern: dict[str, Count] = {}
    """Other alphas for some modules, by name or regular expression."""

    # -- data ---------------------------------------------------------------------------------------------------------
    format: Literal[
        "auto", "alpaca", "sharegpt", "messages", "prompt-completion", "text", "text-lines", "text-whole"
    ] = "auto"
    """The rows' shape; auto detects it. Of a text file (.txt) each stretch between blank lines is a row; text-lines
    makes each line one, text-whole the whole file."""
    map: dict[str, str] = {}
    """field=column, for files whose columns have other names."""
    prefer: Literal["chosen"] | None = None
    """Of preference data (chosen and rejected, or a label) take the better replies; unless set, it is refused."""
    template: Path | None = None
    """A Jinja chat template to use instead of the tokenizer's."""
    template_vars: dict[str, JsonValue] = {}
    """Variables of the chat template, as enable_thinking=false; a row's own chat_template_kwargs go over them."""
    date: datetime.date | None = None
    """The date (YYYY-MM-DD) that a chat template writes which writes one; the day of the run's start unless given."""
    max_length: Count = 2048
    """Most tokens that one conversation may have."""
    overlong: Literal["drop", "error", "split", "keep-end"] = "drop"
    """What happens to a conversation longer than max_length. No choice cuts a reply short without a word."""
    train_on: Literal["assistant", "last", "all", "completion"] = "assistant"
    """The tokens that are supervised: every assistant turn, the last one, all text, or the completion."""
    packing: bool = True
    """Fill micro-batches with whole conversations (documents), kept apart from each other; off: micro_batch of them."""
    layout: Literal["auto", "packed", "padded", "alone"] = "auto"
    """How the conversations of a micro-batch go through the model: packed one after the other, padded as rows, or each
    alone. auto: packed if it is proven before the first step that this model keeps them apart, else padded: as many of
    about one length as hold a pack's tokens; alone where rows touch each other."""
    allow_control_tokens: bool = False
    """Let control-token text inside a person's content become control tokens."""
    max_dropped: Fraction = 0.01
    """The share of rows that may be dropped before the run is refused."""
    eval: tuple[str, ...] = ()
    """Held-out data to evaluate on while training; the same notation as data."""
    eval_share: Fraction | Literal["auto"] = "auto"
    """Hold this share of the rows out of the training, to say what the run is worth on rows that it hasn't seen. auto:
    5 %, but 8 rows at least and 200 at most; none of fewer than 20 rows, and none where eval names data. 0: none."""
    rehearse: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Mix in general prompts, as many as this share of the rows (0.1 or 10%) and 96 at least, with the base's own
    answers to them before the training, so that the adapter keeps what the base could. In a run of six epochs or
    more each is seen about four times; a token of theirs counts a quarter. They stand in RUN/rehearsed.jsonl."""

    # -- training -----------------------------------------------------------------------------------------------------
    epochs: Annotated[float, Field(gt=0.0, le=1e6)] | Literal["auto"] = "auto"
    """Passes over the data. auto: 3, and more where the data makes few steps."""
    max_steps: Count | None = None
    """Optimizer steps; wins over epochs."""
    learning_rate: PositiveFloat | Literal["auto"] = "auto"
    """Peak learning rate. auto: 2e-4; 1e-3 for a base of up to 200 million parameters."""
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """Shape of the learning rate over the run."""
    warmup: Fraction = 0.03
    """Share of the steps that the learning rate rises over."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    micro_batch: Count = 1
    """Sequences of max_length tokens in one forward and backward pass; packed, micro_batch x max_length tokens."""
    pack_tokens: Count | Literal["auto"] = "auto"
    """Tokens of a pack. auto: micro_batch x max_length; where the data makes few steps and micro_batch is 1, fewer."""
    gradient_accumulation: Count | Literal["auto"] = "auto"
    """Micro-batches to an optimizer step. auto: 2, and 1 where the data makes few steps."""
    optim: str = "auto"
    """auto: paged_adamw_8bit on CUDA, adamw_8bit on a CPU; else any name that Transformers knows."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of everything random: initial adapter, dropout, order of the data."""
    deterministic: bool = False
    """On CUDA, take deterministic kernels, some of them slower; the run is refused where it needs one that doesn't
    exist. On a CPU every run repeats to the bit anyway."""
    router_aux_loss: Annotated[float, Field(gt=0.0)] | None = None
    """Weight of the auxiliary loss that balances a mixture's experts; none: it isn't added, as routers are frozen."""
    engine: Literal["auto", "fused", "plain"] = "auto"
    """fused: slimtune's own engine; plain: Transformers and PEFT as they are; auto: fused where it fits the model
    and its loss on a document is the model's own."""
    memory: Annotated[str, Field(pattern=r"^(auto|\d+(\.\d+)?\s?(GiB|MiB|GB|MB))$")] = "auto"
    """Most GPU memory that training may take, as 4GiB; it decides how much is recomputed, and what goes to RAM: of
    long documents, and of a base that doesn't fit. auto: what the card has, less a margin."""

    # -- saving, watching, stopping -----------------------------------------------------------------------------------
    save_steps: Count | Literal["auto"] = "auto"
    """Optimizer steps from one checkpoint to the next; auto: ten in a run."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Checkpoints kept; never under two."""
    eval_steps: Count | Literal["auto"] = "auto"
    """Optimizer steps from one evaluation to the next; auto: as many as a tenth of the run's work
    allows, ten at most; ten with early_stopping."""
    samples: Annotated[int, Field(ge=0, le=20)] = 3
    """Held-out prompts that are answered at evaluations, to see the model learn; 0: none. That takes 5 s at most the
    first time and the last, and a twentieth of the run's time between them."""
    early_stopping: Count | None = None
    """Stop after this many evaluations without a better loss."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a NaN or an infinity in a step does: stop the run, or skip the batch and count it."""
    max_skipped: Count = 10
    """Most batches that on_nonfinite: skip may skip."""
    divergence_factor: Annotated[float, Field(gt=1.0)] = 3.0
    """The loss counts as diverging when it is over this many times its running median."""
    divergence_steps: Count = 20
    """for this many steps in a row."""
    on_divergence: Literal["warn", "stop"] = "warn"
    """What divergence does."""
    watchdog: Annotated[float, Field(ge=0.0, le=1e9)] = 1800.0
    """Seconds without progress after which all stacks are written and the run stops, resumable; 0 turns it off."""
    logging_steps: Count = 1
    """Optimizer steps from one line of metrics to the next."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Loggers; none unless named."""

    # -- after training -----------------------------------------------------------------------------------------------
    export: tuple[Literal["f16", "q8_0", "q4_k_m"], ...] = ()
    """GGUF precisions that the result is exported in, each to RUN/export/<precision>; what they need is checked
    before the training."""

    @model_validator(mode="before")
    @classmethod
    def _one_or_many(cls, values: Any) -> Any:
        """A single string stands for a tuple of one; `q_proj,k_proj` for a tuple of two."""
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        for key in ("data", "eval"):
            if isinstance(values.get(key), str | Path):
                values[key] = (str(values[key]),)
        for key in ("targets", "modules_to_save", "report_to", "export", "layers"):
            if isinstance(values.get(key), str) and values[key] not in ("auto", "all-linear"):
                values[key] = tuple(part.strip() for part in values[key].split(",") if part.strip())
        return values

    @field_validator("rehearse", "eval_share", mode="before")
    @classmethod
    def _percent(cls, value: Any) -> Any:
        """``10%`` is 0.1."""
        number = value.strip().removesuffix("%") if isinstance(value, str) else ""
        return float(number) / 100 if isinstance(value, str) and "%" in value and _is_number(number) else value

    @field_validator("lora_bias")
    @classmethod
    def _biases_stay(cls, value: str) -> str:
        if value != "none":
            raise ValueError("it trains biases of the base itself, which PEFT can't switch off: leave it at none")
        return value

    @model_validator(mode="after")
    def _names_can_be_files(self) -> Self:
        for key in ("model", "data", "eval", "output", "start_from", "template", "add_tokens"):
            value = getattr(self, key)
            for name in map(str, value if isinstance(value, tuple) else () if value is None else [value]):
                check_utf8(key, name)
                if "\0" in name or max(len(part.encode(errors="replace")) for part in name.split("/")) > 255:
                    raise ValueError(f"{key}: no file system has such a name: {shown(name, 60)}")
        if not _is_finite(self.template_vars):
            raise ValueError("template_vars: JSON has no infinity and no NaN")
        return self

    @model_validator(mode="after")
    def _options_go_together(self) -> Self:
        if self.eval and self.eval_share not in ("auto", 0.0):
            raise ValueError("eval and eval_share exclude each other: name held-out data, or split a share off")
        if self.layout == "packed" and not self.packing:
            raise ValueError("layout: packed needs packing: on")
        if self.pack_tokens != "auto" and not self.packing:
            raise ValueError("pack_tokens needs packing: on")
        self._precision_goes_with_the_rest()
        if self.early_stopping and not (self.eval or self.eval_share):
            raise ValueError("early_stopping needs an evaluation: give eval or eval_share")
        if self.lora_init.startswith(("pissa", "loftq")) and self.quantization != "none":
            raise ValueError(f"lora_init: {self.lora_init} starts from unquantised weights: set quantization: none")
        if self.add_tokens is not None and {"embed_tokens", "lm_head"} & set(self.modules_to_save):
            raise ValueError("add_tokens trains single rows, and modules_to_save trains all of embed_tokens or lm_head")
        return self

    def _precision_goes_with_the_rest(self) -> None:
        if self.precision != "auto" and self.compute_dtype not in ("auto", "bf16"):
            raise ValueError(f"precision: {self.precision} goes with compute_dtype: bf16, not {self.compute_dtype}")
        if self.precision == "fp8" and self.quantization != "nf4":
            raise ValueError("precision: fp8 is for weights of 4 bits: leave quantization at nf4")
        if self.precision == "fp8" and self.engine == "plain":
            raise ValueError("precision: fp8 is the engine's own: leave engine at auto")

    @property
    def shape(self) -> str:
        """The rows' shape: format, without what one row of a text file is."""
        return "text" if self.format.startswith("text") else self.format

    @property
    def alpha(self) -> int:
        """The adapter's alpha: what was asked for, or 2 x lora_r."""
        return 2 * self.lora_r if self.lora_alpha is None else self.lora_alpha

    @property
    def batch_tokens(self) -> int:
        """Tokens in one micro-batch."""
        return self.micro_batch * self.max_length if self.pack_tokens == "auto" else self.pack_tokens

    @property
    def passes(self) -> float:
        """Passes over the data: as they were asked for or decided, else the usual ones."""
        return USUAL_EPOCHS if self.epochs == "auto" else self.epochs

    @property
    def rate(self) -> float:
        """Peak learning rate: as it was asked for or decided, else the usual one."""
        return USUAL_RATE if self.learning_rate == "auto" else self.learning_rate

    @property
    def accumulation(self) -> int:
        """Micro-batches to an optimizer step: as they were asked for or decided, else the usual ones."""
        return USUAL_ACCUMULATION if self.gradient_accumulation == "auto" else self.gradient_accumulation

    @classmethod
    def make(cls, **values: Any) -> Config:
        """Build a config; a person's mistake becomes one :class:`UserError` that names the key, the rule and a fix."""
        unknown = [key for key in values if key not in cls.model_fields]
        if unknown:
            raise UserError(
                f"unknown config key {shown(unknown[0], 100)!r}",
                rule=did_you_mean(unknown[0], cls.model_fields),
                way_out="`slimtune config` prints every key with its default.",
            )
        try:
            return cls(**values)
        except ValidationError as error:
            found = error.errors()
            first = found[0]
            key = ".".join(str(part) for part in first["loc"][:1])
            rule = must_be([each for each in found if each["loc"][:1] == first["loc"][:1]])
            if rule.startswith("String should match pattern"):
                rule = " ".join((cls.model_fields[key].description or "").split())
            what = (
                f"config key {key!r} can't be {shown(repr(first['input']), 300)}"
                if key
                else "the config contradicts itself"
            )
            raise UserError(what, rule=rule, way_out="`slimtune config` prints every key with its meaning.") from None

    def to_yaml(self) -> str:
        """This config as YAML that :func:`load_config` reads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def did_you_mean(word: str, known: Mapping[str, Any] | list[str]) -> str:
    """The sentence that proposes the nearest known word, or none."""
    near = difflib.get_close_matches(word[:100], list(known), n=1)
    return f"Did you mean {near[0]!r}?" if near else ""


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, but a key given twice is an error instead of a silent last-one-wins."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE or not isinstance(key_node, yaml.ScalarNode):
                continue  # merged keys give way to the mapping's own, and may come twice
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_MERGE = "tag:yaml.org,2002:merge"
_MOST_NODES = 10_000


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, merge keys (``<<``) carried out.

    A mapping that is merged somewhere is not itself a key, unless it has a key's name: ``defaults: &d {…}`` beside
    ``<<: *d`` only holds what is merged.

    Raises:
        UserError: The file can't be read, is no mapping, has a key twice, or grows without bound by its aliases.
    """
    try:
        loader = _UniqueKeyLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            kind = {yaml.SequenceNode: "list", yaml.ScalarNode: "single value"}[type(root)]
            raise UserError(f"config file {path} holds a {kind}", rule="It must hold key: value lines.")
        if _expanded_size(root, {}) > _MOST_NODES:
            raise UserError(
                f"config file {path} is too large with its aliases (*name) written out",
                rule=f"A config has at most {_MOST_NODES:,} values.",
            )
        merged = _merged_nodes(root)
        root.value = [
            (key, value)
            for key, value in root.value
            if id(value) not in merged or key.tag == _MERGE or str(key.value) in Config.model_fields
        ]
        loaded: dict[Any, Any] = loader.construct_document(root)
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist", way_out="`slimtune init` writes one.") from None
    except OSError as error:
        raise UserError(f"config file {path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"config file {path} can't be read: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # a date that doesn't exist is a ValueError
        raise UserError(f"config file {path} is no valid YAML: {error}") from None
    except RecursionError:
        raise UserError(f"config file {path} is nested too deeply", rule="It must hold key: value lines.") from None
    return {str(key): value for key, value in loaded.items()}


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _expanded_size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values under a node with each alias written out; each node is looked at once. A node within itself is endless."""
    if id(node) not in known:
        known[id(node)] = _MOST_NODES + 1
        known[id(node)] = 1 + sum(_expanded_size(child, known) for child in _children(node))
    return known[id(node)]


def _merged_nodes(root: yaml.MappingNode) -> set[int]:
    """The mappings that a merge key names, by identity."""
    found: set[int] = set()
    waiting: list[yaml.Node] = [root]
    seen = {id(root)}
    while waiting:
        node = waiting.pop()
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag == _MERGE:
                found.update(id(part) for part in (value.value if isinstance(value, yaml.SequenceNode) else [value]))
        waiting += (new := [child for child in _children(node) if id(child) not in seen])
        seen.update(map(id, new))
    return found


def load_config(path: Path | None, **flags: Any) -> Config:
    """Read a YAML file and lay flags over it; flags win.

    Raises:
        UserError: The file is missing or isn't a mapping, or a key or value is refused.
    """
    values = {} if path is None else read_yaml(path)
    if path is not None and not values.keys() <= Config.model_fields.keys():
        _refuse_foreign(path, values)
    return Config.make(**{**values, **flags})


def _refuse_foreign(path: Path, values: Mapping[str, Any]) -> None:
    """Name the tool whose config a file is, and slimtune's word for each key.

    Raises:
        UserError: It is another tool's.
    """
    tool = recognised(values)
    if tool is None:
        return
    raise UserError(
        f"config file {path} is {tool.name}'s",
        table=[(line.key, line.word) for line in translated(values, tool) if not line.is_default],
        rule="slimtune's config has keys of its own (`slimtune config`).",
        way_out=f"`slimtune config --from {path}` translates it.",
    )
