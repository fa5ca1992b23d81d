"""The command line of `cdpserver`; light, so that help and the shell's completion are quick."""

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

import cdpserver
from cdpserver.config import add_options
from cdpserver.errors import exit_codes_line

EXAMPLES = """\
examples:
  cdpserver --state-dir /srv/cdp --listen 127.0.0.1:10809
  cdpserver --config /etc/cdpserver/cdpserver.toml --show-config"""


def build_parser() -> argparse.ArgumentParser:
    """What `cdpserver` takes."""
    parser = argparse.ArgumentParser(
        prog="cdpserver",
        description=cdpserver.__doc__,
        epilog=f"{EXAMPLES}\n\n{textwrap.fill(exit_codes_line(), 78, subsequent_indent='  ')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    upgrading = parser.add_mutually_exclusive_group()
    upgrading.add_argument(
        "--upgrade-only",
        action="store_true",
        help="bring the state directory to this version's format, and stop",
    )
    upgrading.add_argument(
        "--no-upgrade", action="store_true", help="refuse a state directory of an older format"
    )
    parser.add_argument("--version", action="version", version=f"cdpserver {cdpserver.__version__}")
    return parser


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    return build_parser().parse_args(arguments)
