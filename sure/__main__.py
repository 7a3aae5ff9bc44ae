"""`python -m sure` is the `sure` command."""

import sys


def command() -> int:
    """The exit status of the command line, also where Ctrl-C comes while modules are loaded."""
    try:
        from sure.cli import main

        return main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(command())
