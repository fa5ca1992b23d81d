"""The rules of the house that a machine can keep: what may import what, and how a module looks."""

import ast
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cdpserver", "nbdplugin", "recovery")

STAGES = (
    (
        "cdpserver.errors",
        "cdpserver.limits",
        "cdpserver.names",
        "cdpserver.durable",
        "cdpserver.mapped",
        "cdpserver.messages",
        "cdpserver.priority",
        "cdpserver.progress",
    ),
    (
        "cdpserver.config",
        "cdpserver.config_values",
        "cdpserver.retention.backups",
        "cdpserver.retention.policy",
        "cdpserver.retention.slots",
        "cdpserver.retention.steps",
        "cdpserver.clock",
        "cdpserver.state",
        "cdpserver.sealed",
        "cdpserver.tls",
        "cdpserver.tokens",
        "cdpserver.catalog",
        "cdpserver.events",
        "cdpserver.memory",
        "cdpserver.timeline",
        "cdpserver.qemu",
        "cdpserver.images",
    ),
    (
        "cdpserver.journal",
        "cdpserver.nodes",
        "cdpserver.sums",
        "cdpserver.leases",
        "cdpserver.locks",
        "cdpserver.offtime",
        "cdpserver.forks",
        "cdpserver.groups",
    ),
    (
        "cdpserver.index",
        "cdpserver.copying",
        "cdpserver.repository.clock",
        "cdpserver.repository.configuration",
        "cdpserver.repository.content",
        "cdpserver.repository.damaged",
        "cdpserver.repository.format",
        "cdpserver.repository.held",
        "cdpserver.repository.index",
        "cdpserver.repository.keys",
        "cdpserver.repository.lease",
        "cdpserver.repository.patches",
        "cdpserver.repository.place",
        "cdpserver.repository.places",
        "cdpserver.repository.record",
        "cdpserver.repository.registered",
        "cdpserver.repository.repository",
        "cdpserver.repository.s3",
        "cdpserver.repository.seal",
        "cdpserver.repository.sessions",
        "cdpserver.repository.unsynced",
    ),
    ("cdpserver.view",),
    (
        "cdpserver.cuts",
        "cdpserver.rpo",
        "cdpserver.point",
        "cdpserver.points",
        "cdpserver.stretches",
        "cdpserver.check",
        "cdpserver.readback",
        "cdpserver.basepoint",
        "cdpserver.upgrade",
        "cdpserver.chain",
    ),
    ("cdpserver.retention",),
    ("cdpserver.held", "cdpserver.files"),
    ("cdpserver.repository",),
    ("cdpserver.target",),
    ("cdpserver.vm",),
    ("nbdplugin",),
    ("cdpserver.service",),
    ("recovery",),
)
"""The data flow of docs/architecture.md. A module imports from its own stage and from earlier ones."""

SERVICE_ONLY = {"trio", "fastapi", "starlette", "hypercorn"}
TRIO_TOO = ("cdpserver.vm.", "recovery.agent")
"""Outside the service: the agent beside QEMU, and what it uses."""

MAX_LINES = 450
FOREIGN_PATH = re.compile(rb"(?<![\w.})])/(?:work|root|home)/")
SKIPPED_DIRECTORIES = {"__pycache__", "build"}


@dataclass(frozen=True, slots=True)
class Module:
    """One parsed source file; `name` is dotted, a package's `__init__` has the package's name."""

    name: str
    path: Path
    tree: ast.Module

    def at(self, node: ast.AST, what: str) -> str:
        """`path:line: what`, as an editor understands it."""
        return f"{self.path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: {what}"


def source_paths() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def dotted_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Module]:
    """All modules that parse; `test_every_module_parses` reports the others."""
    found = {}
    for path in source_paths():
        try:
            tree = ast.parse(path.read_bytes(), str(path))
        except SyntaxError:
            continue
        found[dotted_name(path)] = Module(dotted_name(path), path, tree)
    return found


def imports(module: Module) -> Iterator[tuple[ast.stmt, str]]:
    """Every import of a module, wherever it stands, as (statement, dotted name of the module imported).

    `from package import name` gives `package.name` where that is a module of ours, else `package`.
    """
    ours = {dotted_name(path) for path in source_paths()}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = imported_base(module, node)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node, full if full in ours else base


def imported_base(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    is_package = module.path.name == "__init__.py"
    kept = parts[: len(parts) - node.level + is_package]
    return ".".join([*kept, node.module] if node.module else kept)


def stage_of(name: str) -> int | None:
    for number, prefixes in enumerate(STAGES):
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes):
            return number
    return None


def is_swallowed(handler: ast.ExceptHandler) -> bool:
    """The handler does nothing at all: `pass`, `...` or a mere string."""
    return all(
        isinstance(statement, ast.Pass)
        or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        for statement in handler.body
    )


def text_files() -> Iterator[Path]:
    """The project's own files: what is hidden (but for .ci), generated or cached is left out."""
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name == ".ci"
            or not (name.startswith(".") or name in SKIPPED_DIRECTORIES or name.endswith(".egg-info"))
        ]
        # A worktree's .git is a file.
        yield from (Path(folder, name) for name in files if name != ".git")


def test_every_module_parses() -> None:
    broken = []
    for path in source_paths():
        try:
            ast.parse(path.read_bytes(), str(path))
        except SyntaxError as error:
            broken.append(f"{path.relative_to(ROOT)}:{error.lineno}: {error.msg}")
    assert not broken


def test_every_module_has_a_docstring() -> None:
    assert not [
        module.at(module.tree, name)
        for name, module in modules().items()
        if not ast.get_docstring(module.tree)
    ]


def test_every_module_has_a_place_in_the_data_flow() -> None:
    """A new module at the top gets its line in docs/architecture.md and its place in STAGES."""
    assert not [name for name in modules() if name != "cdpserver" and stage_of(name) is None]


def test_imports_follow_the_data_flow() -> None:
    against = []
    for module in modules().values():
        # The bare package comes first; a module without a place is reported above.
        own = 0 if module.name == "cdpserver" else stage_of(module.name)
        for node, target in imports(module):
            stage = stage_of(target)
            if own is not None and stage is not None and stage > own:
                against.append(module.at(node, target))
    assert not against


def test_the_server_does_not_import_its_plugins_or_the_command_line() -> None:
    assert not [
        module.at(node, target)
        for module in modules().values()
        if module.name.split(".")[0] == "cdpserver"
        for node, target in imports(module)
        if target.split(".")[0] in {"nbdplugin", "recovery"}
    ]


def test_imports_have_no_cycles() -> None:
    graph = {module.name: {target for _, target in imports(module)} for module in modules().values()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_only_the_service_knows_trio_and_the_web() -> None:
    assert not [
        module.at(node, target)
        for module in modules().values()
        if not f"{module.name}.".startswith("cdpserver.service.")
        for node, target in imports(module)
        if target.split(".")[0] in SERVICE_ONLY
        and not (target == "trio" and f"{module.name}.".startswith(TRIO_TOO))
    ]


def test_no_error_is_swallowed() -> None:
    assert not [
        module.at(node, "bare except" if node.type is None else "except: pass")
        for module in modules().values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ExceptHandler) and (node.type is None or is_swallowed(node))
    ]


def test_only_the_command_line_prints() -> None:
    assert not [
        module.at(node, "print")
        for module in modules().values()
        if module.name.split(".")[0] != "recovery"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def test_no_module_is_long() -> None:
    lengths = {path: len(path.read_bytes().splitlines()) for path in source_paths()}
    assert not {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n >= MAX_LINES}


def test_no_file_names_a_path_of_one_machine() -> None:
    assert not [
        f"{path.relative_to(ROOT)}:{number}: {line.decode(errors='replace').strip()}"
        for path in text_files()
        for number, line in enumerate(path.read_bytes().splitlines(), start=1)
        if FOREIGN_PATH.search(line)
    ]
