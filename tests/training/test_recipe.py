"""Stop, change, resume: the recipes with the real embedded model, and the command line's exit codes and words."""

from __future__ import annotations

import json
import shutil
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from slimtune import plan, recipes
from slimtune.adapter.passport import read_passport
from slimtune.config import Config
from slimtune.errors import GuardStop, StopRequested, UserError
from slimtune.hardware import Hardware
from slimtune.recipes import finetune, resume
from slimtune.run.folder import RunFolder
from slimtune.run.lock import ask_to_stop, lock_run
from slimtune.run.screen import Screen
from slimtune.training import safety
from slimtune.training.resumable import ResumableTrainer
from slimtune.use import rehearse as rehearsal
from tests.campaigns import campaign


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return campaign.make_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return campaign.make_model(tmp_path_factory.mktemp("model") / "model")


def config(model: str, rows: Path, run: Path, **more: Any) -> Config:
    values: dict[str, Any] = {
        "gradient_accumulation": 2, "max_steps": 4, "max_length": 128, "save_steps": 2, "learning_rate": 1e-3,
        "compute_dtype": "fp32", "lora_dropout": 0.1,
    }  # fmt: skip
    return Config.make(model=model, data=(str(rows),), output=run, **{**values, **more})


@pytest.fixture
def stop_in_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A SIGTERM to this process while a step is under way."""
    original = ResumableTrainer._before_optimizer

    def arm(step: int) -> None:
        def before_optimizer(self: ResumableTrainer) -> None:
            if self.state.global_step + 1 == step:
                monkeypatch.setattr(ResumableTrainer, "_before_optimizer", original)
                signal.raise_signal(signal.SIGTERM)
                while self.safety.signals.requested is None:
                    time.sleep(0.01)
            original(self)

        monkeypatch.setattr(ResumableTrainer, "_before_optimizer", before_optimizer)

    return arm


def test_the_real_model_goes_on_bit_by_bit(rows: Path, tmp_path: Path, stop_in_step: Callable[[int], None]) -> None:
    short = {"max_length": 64, "gradient_accumulation": 1, "max_steps": 3, "save_steps": 1, "samples": 0}
    whole = finetune(config("smollm2-135m", rows, tmp_path / "whole", **short))
    stop_in_step(2)
    with pytest.raises(StopRequested, match=f"slimtune resume {tmp_path / 'run'}"):
        finetune(config("smollm2-135m", rows, tmp_path / "run", **short))
    run = resume(tmp_path / "run")
    assert campaign.trajectory(run.path) == campaign.trajectory(whole.path)
    assert campaign.adapter_sha256(run.path) == campaign.adapter_sha256(whole.path)
    verified = run.read_json(run.facts_file)["verified"]
    assert (verified["keys_match"], verified["all_finite"], verified["outputs_differ"]) == (True, True, True)


def test_a_run_in_fp8_goes_on_bit_by_bit_and_says_so(
    small: Path, rows: Path, tmp_path: Path, stop_in_step: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """On the kernels' reference: a CPU has no FP8, and this model's products are too small for it."""
    monkeypatch.setattr(Hardware, "without_fp8", None)
    monkeypatch.setattr("slimtune.engine.engine.pays", lambda *shape: True)
    monkeypatch.setattr("slimtune.engine.weights.channels", lambda *shape: 16)
    monkeypatch.setattr("slimtune.engine.memory._Shape.spare", 1e9)  # its head weighs more than FP8 spares
    asked = {"precision": "fp8", "compute_dtype": "bf16", "targets": "all-linear", "samples": 0, "save_steps": 1}
    whole = finetune(config(str(small), rows, tmp_path / "whole", **asked), screen=Screen())
    said = " ".join(capsys.readouterr().err.split())
    assert "100% of the layers' products are in FP8" in said
    assert "the head's gradient is in FP8 too" in said
    facts = whole.read_json(whole.facts_file)
    assert facts["training"]["engine"] == "fused, 100% of the layers' products and the head's gradient in FP8"
    assert whole.config().precision == "fp8"
    assert all(0 <= record["eval_fp8_lost"] < 0.05 for record in whole.metrics() if "eval_loss" in record)
    assert read_passport(whole.adapter).config["precision"] == "fp8"
    states = [json.loads(file.read_text(encoding="utf-8")) for file in whole.checkpoints.glob("*/state.json")]
    chosen = states[0]["engine"]["channels"]
    assert all(state["engine"]["channels"] == chosen for state in states)
    assert sum(each != list(range(16)) for each in chosen.values()) > len(chosen) // 2
    stop_in_step(2)
    with pytest.raises(StopRequested):
        finetune(config(str(small), rows, tmp_path / "run", **asked))
    shutil.copytree(tmp_path / "run", tmp_path / "without-room")
    capsys.readouterr()
    assert campaign.trajectory(resume(tmp_path / "run", screen=Screen()).path) == campaign.trajectory(whole.path)
    assert campaign.adapter_sha256(tmp_path / "run") == campaign.adapter_sha256(whole.path)
    assert "until here" not in capsys.readouterr().err
    monkeypatch.setattr("slimtune.engine.memory._Shape.spare", 0.0)
    resumed = resume(tmp_path / "without-room", screen=Screen())
    before, after = facts["training"]["engine"], "fused, 100% of the layers' products in FP8"
    said = " ".join(capsys.readouterr().err.split())
    assert f"engine: {before} until here, {after} from here" in said
    event = {"event": "engine", "step": 2, "before": before, "after": after}
    assert event in [{key: record.get(key) for key in event} for record in resumed.metrics()]


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"compute_dtype": "bf16"}, "FP8 is multiplied on an NVIDIA GPU, and here is none"),
        ({"compute_dtype": "bf16", "engine": "plain"}, "precision: fp8 is the engine's own"),
        ({"compute_dtype": "fp32"}, "precision: fp8 goes with compute_dtype: bf16, not fp32"),
        ({"compute_dtype": "bf16", "quantization": "none"}, "precision: fp8 is for weights of 4 bits"),
        ({"compute_dtype": "bf16", "dora": True}, "precision: fp8 can't be had: the engine has nothing for DoRA"),
    ],
    ids=lambda given: "+".join(given) if isinstance(given, dict) else "",
)
def test_fp8_that_cannot_be_had_is_refused_with_the_reason(
    small: Path, rows: Path, tmp_path: Path, asked: dict[str, Any], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "dora" in asked:
        monkeypatch.setattr(Hardware, "without_fp8", None)
    with pytest.raises(UserError, match=what):
        finetune(config(str(small), rows, tmp_path / "run", precision="fp8", **asked))
    assert not (tmp_path / "run").exists()


def test_the_same_run_elsewhere_and_watched_otherwise_gives_the_same_file(
    small: Path, rows: Path, tmp_path: Path
) -> None:
    finetune(config(str(small), rows, tmp_path / "one"))
    finetune(config(str(small), rows, tmp_path / "elsewhere" / "two", save_steps=3, logging_steps=2, watchdog=900.0))
    assert campaign.adapter_sha256(tmp_path / "one") == campaign.adapter_sha256(tmp_path / "elsewhere" / "two")


@pytest.mark.parametrize("engine", ["fused", "plain"])
def test_evaluations_leave_the_adapter_as_it_is(
    small: Path, rows: Path, tmp_path: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = campaign.make_rows(tmp_path / "held_out.jsonl", 8)
    held_out.write_text(held_out.read_text().replace("Say", "Tell"))
    finetune(config(str(small), rows, tmp_path / "without", engine=engine, lora_dropout=0.3, eval_share=0.0))
    with_them = config(
        str(small), rows, tmp_path / "with", engine=engine, lora_dropout=0.3, eval=(str(held_out),), eval_steps=1,
        memory="1GiB",
    )  # fmt: skip
    run = finetune(with_them, screen=Screen())
    said = " ".join(capsys.readouterr().err.split())
    assert "memory: 1GiB isn't kept: it limits a GPU's memory, and here is none" in said
    assert [record["step"] for record in run.samples()][:: len(run.samples()) - 1] == [0, 4]
    assert all(one["ended"] in ("stop", "length") for record in run.samples() for one in record["samples"])
    assert campaign.adapter_values(tmp_path / "with") == campaign.adapter_values(tmp_path / "without")
    assert sum("eval_loss" in line for line in (tmp_path / "with" / "metrics.jsonl").read_text().splitlines()) == 5


def test_the_stop_file_ends_the_step_and_the_run_goes_on(small: Path, rows: Path, tmp_path: Path) -> None:
    whole = finetune(config(str(small), rows, tmp_path / "whole", eval_share=0.0))
    asked = config(str(small), rows, tmp_path / "run", eval_share=0.0)
    with pytest.raises(StopRequested, match="stopped by the run's stop file") as stopped:
        finetune(asked, observe=lambda *_: ask_to_stop(tmp_path / "run"))
    assert f"slimtune resume {tmp_path / 'run'}" in str(stopped.value)
    assert [record["step"] for record in RunFolder(tmp_path / "run").metrics() if "loss" in record] == [1]
    ask_to_stop(tmp_path / "run")  # nobody works on it
    run = resume(tmp_path / "run")
    assert campaign.adapter_sha256(run.path) == campaign.adapter_sha256(whole.path)


@pytest.fixture
def stopped(small: Path, rows: Path, tmp_path: Path, stop_in_step: Callable[[int], None]) -> Path:
    stop_in_step(2)
    own_rows = shutil.copy(rows, tmp_path / "own.jsonl")
    own_model = shutil.copytree(small, tmp_path / "own-model")
    with pytest.raises(StopRequested):
        finetune(config(str(own_model), own_rows, tmp_path / "run"))
    return tmp_path / "run"


def changed_data(run: Path) -> None:
    file = run.parent / "own.jsonl"
    file.write_text(file.read_text("utf-8").replace("Say 3", "Say 4"), encoding="utf-8")


def changed_base(run: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = run.parent / "own-model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file, {"format": "pt"})


def changed_template(run: Path) -> None:
    file = run.parent / "own-model" / "chat_template.jinja"
    file.write_text(file.read_text("utf-8") + "{# other #}", encoding="utf-8")


def changed_tokenizer(run: Path) -> None:
    file = run.parent / "own-model" / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["z"], vocabulary["q"] = vocabulary["q"], vocabulary["z"]
    file.write_text(json.dumps(content), encoding="utf-8")


def changed_config(run: Path) -> None:
    file = run / "config.yaml"
    values = yaml.safe_load(file.read_text("utf-8"))
    file.write_text(yaml.safe_dump({**values, "learning_rate": 0.5}), encoding="utf-8")


def changed_version(run: Path) -> None:
    """As after an upgrade: the checkpoint was made with another version."""
    folder = max((run / "checkpoints").glob("checkpoint-*"))
    identity = json.loads((folder / "identity.json").read_text("utf-8"))
    identity["versions"]["torch"] = "2.0.0"
    from slimtune.run.durable import atomic_folder, write_file

    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "SHA256SUMS"}
    with atomic_folder(folder) as partial:
        for name, data in {**files, "identity.json": json.dumps(identity).encode()}.items():
            write_file(partial / name, data)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (changed_data, "data "),
        (changed_base, "base weights"),
        (changed_template, "chat template"),
        (changed_tokenizer, "tokenizer"),
        (changed_config, "config learning_rate"),
        (changed_version, "version of torch"),
    ],
)
def test_a_change_is_refused_and_can_be_accepted(stopped: Path, change: Callable[[Path], None], what: str) -> None:
    change(stopped)
    with pytest.raises(UserError) as refused:
        resume(stopped)
    assert refused.value.exit_code == 2
    assert any(line.strip().startswith(what) for line in str(refused.value).splitlines())
    run = resume(stopped, accept_changes=True)
    (event,) = [record for record in run.metrics() if record.get("event") == "resumed" and record["changes"]]
    assert any(changed["what"].startswith(what.strip()) for changed in event["changes"])


def test_what_is_accepted_holds_from_the_next_step_on(stopped: Path) -> None:
    """Rates and decay come from the config, and not from the checkpoint's optimizer."""
    before = Config.make(**yaml.safe_load((stopped / "config.yaml").read_text("utf-8")))
    changed = before.model_copy(update={"learning_rate": 0.5e-3, "lr_scheduler": "constant", "weight_decay": 0.25})
    run = resume(stopped, changed, accept_changes=True)
    rates = {record["step"]: record["learning_rate"] for record in run.metrics() if "learning_rate" in record}
    assert rates[1] == 1e-3
    assert [rates[step] for step in (3, 4)] == [0.5e-3] * 2
    state = json.loads((run.checkpoints / "checkpoint-4" / "state.json").read_text("utf-8"))
    assert '["weight_decay", 0.25]' in json.dumps(state)
    text = run.report_markdown.read_text("utf-8")
    assert "From step 3 on:" in text
    assert "After step 2 the run went on although 3 things had changed" in text


def test_what_the_checkpoint_was_made_with_stays(stopped: Path) -> None:
    before = Config.make(**yaml.safe_load((stopped / "config.yaml").read_text("utf-8")))
    for change, said in (({"lora_r": 4}, "another lora_r"), ({"engine": "plain"}, "what was changed")):
        with pytest.raises(UserError, match=f"can't go on with {said}"):
            resume(stopped, before.model_copy(update=change), accept_changes=True)


def test_free_keys_may_be_given(stopped: Path) -> None:
    before = Config.make(**yaml.safe_load((stopped / "config.yaml").read_text("utf-8")))
    resume(stopped, before.model_copy(update={"save_steps": 1, "watchdog": 60.0, "on_nonfinite": "skip"}))
    assert yaml.safe_load((stopped / "config.yaml").read_text("utf-8"))["save_steps"] == 1


def test_a_run_in_use_is_refused(stopped: Path) -> None:
    with lock_run(stopped), pytest.raises(UserError, match="in use by process"):
        resume(stopped)


def test_without_a_checkpoint_it_begins_at_the_first_step(
    small: Path, rows: Path, stopped: Path, tmp_path: Path
) -> None:
    shutil.rmtree(stopped / "checkpoints")
    resume(stopped)
    finetune(config(str(small), rows, tmp_path / "whole"))
    assert campaign.adapter_values(stopped) == campaign.adapter_values(tmp_path / "whole")


def test_a_finished_run_is_finished_again(small: Path, rows: Path, tmp_path: Path) -> None:
    finetune(config(str(small), rows, tmp_path / "run"))
    before = campaign.adapter_sha256(tmp_path / "run")

    def written() -> dict[Path, int]:
        files = (tmp_path / "run").rglob("*")
        return {file: file.stat().st_mtime_ns for file in files if file.is_file() and file.name != ".lock"}

    files = written()
    resume(tmp_path / "run")
    assert written() == files
    shutil.rmtree(tmp_path / "run" / "adapter")
    resume(tmp_path / "run")
    assert campaign.adapter_sha256(tmp_path / "run") == before


@pytest.mark.parametrize("engine", ["fused", "plain"])
def test_what_training_held_is_let_go_before_the_fresh_base_takes_its_room(
    small: Path, rows: Path, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Any]] = []
    alive: list[Any] = []
    original, fit = recipes.read_back, ResumableTrainer.fit

    def watched_fit(self: ResumableTrainer) -> None:
        held.extend(
            weakref.ref(thing) for thing in (self, self.model, self.optimizer, self.engine) if thing is not None
        )
        fit(self)

    def read_back(*arguments: Any) -> Any:
        alive.extend(type(thing()).__name__ for thing in held if thing() is not None)
        return original(*arguments)

    monkeypatch.setattr(ResumableTrainer, "fit", watched_fit)
    monkeypatch.setattr(recipes, "read_back", read_back)
    finetune(config(str(small), rows, tmp_path / "run", engine=engine))
    assert len(held) >= 2
    assert alive == []


def test_a_gpu_too_full_to_read_the_adapter_back_is_said_and_not_the_end(
    small: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    with monkeypatch.context() as patch:
        patch.setattr("slimtune.recipes.read_back", full)
        with pytest.raises(GuardStop, match="not yet proven") as stopped:
            finetune(config(str(small), rows, tmp_path / "run"))
    assert "slimtune resume" in str(stopped.value)
    before = campaign.adapter_sha256(tmp_path / "run")
    run = resume(tmp_path / "run")
    assert json.loads(run.facts_file.read_bytes())["verified"]["keys_match"]
    assert campaign.adapter_sha256(tmp_path / "run") == before


def test_a_new_run_can_start_from_an_adapter(small: Path, rows: Path, tmp_path: Path) -> None:
    first = finetune(config(str(small), rows, tmp_path / "first"))
    second = finetune(config(str(small), rows, tmp_path / "second", start_from=tmp_path / "first"))
    fresh = campaign.trajectory(first.path)[1][0]
    assert campaign.trajectory(second.path)[1][0] < fresh - 0.01
    with pytest.raises(UserError, match="doesn't fit this run"):
        finetune(config(str(small), rows, tmp_path / "third", start_from=tmp_path / "first", lora_r=4))
    for other in ({"lora_alpha": 8}, {"rslora": True}, {"alpha_pattern": {"q_proj": 8}}, {"lora_init": "olora"}):
        with pytest.raises(UserError, match="in another way"):
            finetune(config(str(small), rows, tmp_path / "third", start_from=tmp_path / "first", **other))
    with pytest.raises(UserError, match="can't be replaced by a run that starts from it"):
        finetune(config(str(small), rows, first.path, start_from=first.path, overwrite=True))
    with pytest.raises(UserError, match="holds no adapter to start from"):
        finetune(config(str(small), rows, first.path, start_from=first.checkpoints, overwrite=True))
    assert first.adapter.is_dir()
    other = shutil.copytree(small, tmp_path / "own-model")
    changed_base(tmp_path / "run")
    with pytest.raises(UserError, match="not the base"):
        finetune(config(str(other), rows, tmp_path / "fourth", start_from=tmp_path / "first"))
    before = campaign.adapter_sha256(second.path)
    for checkpoint in sorted(second.checkpoints.iterdir()):  # by hand, to names that no checkpoint has
        checkpoint.rename(checkpoint.with_name(checkpoint.name.replace("-", "-0")))
    shutil.rmtree(second.adapter)  # a finished run stays as it is
    assert campaign.adapter_sha256(resume(second.path).path) == before
    shutil.rmtree(first.path)  # the checkpoint of a run that started from it has all that it gave
    shutil.rmtree(second.adapter)  # a finished run stays as it is
    assert campaign.adapter_sha256(resume(second.path).path) == before


def test_what_a_run_rehearses_is_its_own_at_a_resume(
    small: Path, rows: Path, tmp_path: Path, stop_in_step: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def answer(model: Any, tokenizer: Any, config: Config, count: int, file: Path, beat: Callable[[], None]) -> None:
        asked.append(count)
        campaign.make_rows(file, count)

    monkeypatch.setattr(rehearsal, "answer", answer)
    monkeypatch.setattr(rehearsal, "LEAST", 8)
    rows = campaign.make_rows(tmp_path / "few.jsonl", 20)
    # Three passes over the rows to one over the answers; 14 epochs, to which these are rounded up, would have four.
    values: dict[str, Any] = {
        "rehearse": 0.25,
        "max_length": 256,
        "max_steps": None,
        "epochs": 13.9,
        "pack_tokens": 1024,
    }
    plain = finetune(config(str(small), rows, tmp_path / "plain", max_length=256))
    whole = finetune(config(str(small), rows, tmp_path / "whole", **values))
    stop_in_step(3)
    with pytest.raises(StopRequested):
        finetune(config(str(small), rows, tmp_path / "run", **values))
    answers = tmp_path / "run" / "rehearsed.jsonl"
    kept = answers.read_text()
    answers.write_text(kept.replace("Say 0", "Say 9"))
    with pytest.raises(UserError, match=r"data rehearsed\.jsonl"):
        resume(tmp_path / "run")
    answers.write_text(kept)
    with monkeypatch.context() as other:  # a slimtune whose runs go over their answers with every pass, and count them
        other.setattr(plan, "ANSWER_PASSES", 100)
        other.setattr(safety, "ANSWER_WEIGHT", 1.0)
        with pytest.raises(
            UserError, match=r"(?s)a token of an answer +counts 0\.25 +counts 1\n.*rows beside each answer"
        ):
            resume(tmp_path / "run")
    run = resume(tmp_path / "run")
    assert asked == [8, 8]  # a quarter of the 12 documents that aren't held out is fewer
    assert campaign.trajectory(run.path) == campaign.trajectory(whole.path)
    assert campaign.adapter_sha256(run.path) == campaign.adapter_sha256(whole.path)
    assert campaign.adapter_sha256(run.path) != campaign.adapter_sha256(plain.path)
    facts = run.read_json(run.facts_file)
    data = facts["data"]
    assert (data["rehearsed"]["documents"], data["rehearsed"]["rounds"]) == (8, 3)
    assert (run.config().epochs, facts["training"]["epochs"]) == (13.9, 14.0)
    # What is held out is the data's alone, and the same.
    assert data["held_out"] == plain.read_json(plain.facts_file)["data"]["held_out"]
