"""Arguments that name a file, a folder or something that is neither, like a model of the hub."""

from __future__ import annotations

from click import Context, Parameter
from click.shell_completion import CompletionItem
from click.types import StringParamType

__all__ = ["PATH_OR_NAME"]


class _PathOrName(StringParamType):
    def shell_complete(self, ctx: Context, param: Parameter, incomplete: str) -> list[CompletionItem]:
        """The shell's own files and folders."""
        return [CompletionItem(incomplete, type="file")]


PATH_OR_NAME = _PathOrName()
"""Text as it is; shells complete it by files."""
