"""``slimtune`` and ``python -m slimtune``: the command line, and a Ctrl-C that comes before it is there."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """As :func:`slimtune.cli.main`, which ends the process. Nothing but Python is imported before this is called."""
    try:
        from slimtune.cli import main as command
    except KeyboardInterrupt:
        import signal

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # people press it twice; the process is on its way out
        from slimtune.words import told

        print(f"\nslimtune: {told('interrupted')}", file=sys.stderr)
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
