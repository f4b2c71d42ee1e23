"""slimtune: fine-tune a chat model in 4 bits on one's own GPU.

From Python::

    import slimtune

    run = slimtune.finetune(slimtune.Config.make(model="smollm2-135m", data="chats.jsonl", output="run"))
    slimtune.fuse(trainer.model)  # in a script of one's own, after its SFTTrainer is made

Importing this package imports no torch and changes nothing outside it: the names below are loaded when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["Config", "__version__", "finetune", "fuse", "load_config", "resume"]

if TYPE_CHECKING:
    from slimtune.config import Config, load_config
    from slimtune.engine import fuse
    from slimtune.recipes import finetune, resume

    __version__: str

_HOMES = {
    "Config": "slimtune.config",
    "load_config": "slimtune.config",
    "fuse": "slimtune.engine",
    "finetune": "slimtune.recipes",
    "resume": "slimtune.recipes",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("slimtune")
    if name not in _HOMES:
        raise AttributeError(f"module 'slimtune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
