"""``python -m slimtune``: the command line."""

from slimtune.cli import main

main()
