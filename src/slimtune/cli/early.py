"""What can be said of a command's words before torch is loaded: most mistakes are known by then."""

from __future__ import annotations

from pathlib import Path

from slimtune.base.named import base_of_adapter, check_name
from slimtune.cli.hub import check_model, look_for_hub
from slimtune.config import Config
from slimtune.run.folder import RunFolder, check_free
from slimtune.run.replaced import is_stranded

__all__ = ["check_files", "check_target", "check_training"]


def check_training(config: Config) -> None:
    """See that a run could begin: its model and data have names that stand for something, its folder is free.

    Raises:
        UserError: One of them is not so.
    """
    check_name(config.model)
    if config.output is not None:
        check_free(config.output, overwrite=config.overwrite)
    # Here, as it loads pyarrow, and --help is to answer at once.
    from slimtune.data.sources import check_sources

    data = check_sources(config)
    check_model(config.model)
    look_for_hub(*data)


def check_target(target: str) -> None:
    """See that ``target`` may stand for a run, an adapter or a model, as :func:`slimtune.use.load.find` has it.

    Raises:
        UserError: It doesn't.
    """
    path = Path(target).expanduser()
    adapters = (path / "adapter_config.json", path / "adapter" / "adapter_config.json")
    if not RunFolder(path).config_file.is_file() and not is_stranded(path) and not any(map(Path.is_file, adapters)):
        check_model(target)
    else:
        look_for_hub(*filter(None, (base_of_adapter(file.parent) for file in adapters)))


def check_files(*names: str) -> None:
    """See that there is something of each name, as for training's data.

    Raises:
        UserError: There is nothing of that name.
    """
    from slimtune.data.sources import check_sources

    if names:
        look_for_hub(*check_sources(Config.make(data=names)))
