"""The Python tree: a virtual environment with the dependencies and the three packages, compiled."""

import os
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tools.packaging.errors import InstallError
from tools.packaging.layout import CHECKOUT, run

PACKAGES = ("cdpserver", "nbdplugin", "recovery")

SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


def python_of_nbdkit() -> Path:
    """Debian's interpreter that nbdkit embeds: the plugins run in that one, so everything does."""
    needed = "apt-get install nbdkit nbdkit-plugin-python python3-libnbd python3-venv qemu-utils"
    try:
        said = run(["nbdkit", "python", "--dump-plugin"], {"PATH": SYSTEM_PATH}).decode()
    except InstallError as error:
        raise InstallError(f"nbdkit's Python plugin does not run ({error}): {needed}") from None
    version = re.search(r"^python_version=(\d+\.\d+)", said, re.MULTILINE)
    if version is None:
        raise InstallError(f"nbdkit does not say which Python it embeds: {needed}")
    python = Path(f"/usr/bin/python{version[1]}")
    if not python.exists():
        raise InstallError(f"nbdkit embeds Python {version[1]}, but there is no {python}: {needed}")
    return python


def build(tree: Path, site_packages: Path | None) -> Path:
    """Make `tree` anew; its interpreter. With `site_packages` the dependencies stay where they are, else pip fetches them."""
    if site_packages is not None and not site_packages.is_dir():
        raise InstallError(
            f"--site-packages {site_packages} is no directory: name one, or leave it out to download"
        )
    shutil.rmtree(tree, ignore_errors=True)
    tree.parent.mkdir(parents=True, exist_ok=True)
    # The module nbd is Debian's and not on PyPI, hence the system's packages.
    venv = [str(python_of_nbdkit()), "-I", "-m", "venv", "--system-site-packages"]
    run([*venv, *(["--without-pip"] if site_packages else []), str(tree)])
    python = tree / "bin/python"
    (packages,) = tree.glob("lib/python3.*/site-packages")
    if site_packages is not None:
        (packages / "dependencies.pth").write_text(f"{site_packages}\n")
    else:
        pip = [str(python), "-I", "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        # Everything goes into the tree itself: an old copy among Debian's packages must not count as there.
        run([*pip, "--ignore-installed", *dependencies()])
    for name in PACKAGES:
        shutil.copytree(CHECKOUT / name, packages / name, ignore=shutil.ignore_patterns("__pycache__"))
    # Who runs it later may not write here, and would compile at every start.
    run([str(python), "-I", "-m", "compileall", "-q", *(str(packages / name) for name in PACKAGES)])
    _drop_scripts(tree / "bin")
    return python


def dependencies() -> list[str]:
    """The requirements of pyproject.toml, and of generating the man pages."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    manual = [name for name in project["optional-dependencies"]["dev"] if name.startswith("argparse-manpage")]
    return [*project["dependencies"], *manual]


def _drop_scripts(directory: Path) -> None:
    """Programs of the dependencies: they name the place where the tree was built, and nobody asked for them."""
    for path in directory.iterdir():
        if not path.name.startswith("python"):
            path.unlink()


def walk(tree: Path) -> Iterator[tuple[Path, bool]]:
    """Everything below `tree`, itself too, as (path, whether it is a directory)."""
    yield tree, True
    for folder, folders, files in os.walk(tree):
        for name in folders:
            path = Path(folder, name)
            yield path, not path.is_symlink()
        yield from ((Path(folder, name), False) for name in files)


def check(python: Path, environment: dict[str, str]) -> None:
    """What is installed runs, and is what was installed."""
    names = ", ".join(PACKAGES)
    script = f"import sys, nbd, lmdb, numpy, trio, {names}; sys.stdout.write(cdpserver.__file__)"
    place = Path(run([str(python), "-I", "-c", script], environment).decode())
    if not run([str(python), "-I", "-m", "cdpserver.service.command", "--version"], environment):
        raise InstallError(f"{python} does not run the server: install again")
    if not place.is_relative_to(python.parent.parent):
        raise InstallError(
            f"{python} takes cdpserver from {place}: a broken virtual environment; install again"
        )
