"""The verbs: parse, call a recipe, turn errors into exit codes."""


def main() -> None:
    """Entry point of the ``slimtune`` command."""
