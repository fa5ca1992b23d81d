"""How many cases a run went through: added up for docs/reliability.md by `tools/figures`."""

import json
import os


def tally(what: str, **counts: int) -> None:
    """Note counts, where somebody asks for them (CDP_FIGURES names a file)."""
    if path := os.environ.get("CDP_FIGURES"):
        with open(path, "a") as file:
            file.write(json.dumps({"what": what, **counts}) + "\n")
