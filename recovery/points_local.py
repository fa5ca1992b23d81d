"""The URI of a point where no service answers: from a copy or read-only media, too."""

from argparse import Namespace
from typing import Any

from cdpserver import names
from cdpserver.errors import UnreachableError
from cdpserver.state import StateDir, default_state_dir
from recovery.offline import readable
from recovery.output import say


def uri(options: Namespace, error: UnreachableError) -> dict[str, Any]:
    """The URI of an export made for it, which ends with its last client."""
    from recovery.opened import PATIENCE_S, serve_once

    state = StateDir(default_state_dir(options.state_dir))
    readable(state, error)
    whole, volume = names.split_volume(options.point)
    found = serve_once(state, whole, volume)
    say(f"it is served until its last client has gone, and for {PATIENCE_S} s before the first comes")
    return {"uri": found.uri, "timeline": found.timeline, "seq": found.seq, "time_ns": found.time_ns}
