"""The command line of `cdpserver`; light, so that help and the shell's completion are quick."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import cdpserver
from cdpserver.config import add_options


def build_parser() -> argparse.ArgumentParser:
    """What `cdpserver` takes."""
    parser = argparse.ArgumentParser(prog="cdpserver", description=cdpserver.__doc__)
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        help="where everything is kept; default: $CDP_STATE_DIR, then a usual place",
    )
    add_options(parser)
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="see docs/configuration.md")
    parser.add_argument(
        "--show-config", action="store_true", help="print the configuration in effect as TOML, and stop"
    )
    parser.add_argument("--version", action="version", version=f"cdpserver {cdpserver.__version__}")
    return parser


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    return build_parser().parse_args(arguments)
