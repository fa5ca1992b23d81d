"""tools/install: the server into a prefix, or out of it again.

The order matters: everything is built and tried beside what runs, then put in place by renames, so that a failure leaves
the installed version as it was. The state directory is named in units and never touched.
"""

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tools.packaging import manifest as manifests
from tools.packaging import tree
from tools.packaging.errors import InstallError
from tools.packaging.layout import CHECKOUT, Layout, default_configuration
from tools.packaging.manifest import Manifest, at

SERVICE = "cdpserver.service"


def say(text: str) -> None:
    """Talk goes to stderr."""
    sys.stderr.write(f"install: {text}\n")


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="tools/install",
        description="Install cdpserver, upgrade it in place, or remove it and leave data alone.",
    )
    parser.add_argument("--prefix", default="/usr/local", metavar="DIR", help="default: /usr/local")
    parser.add_argument("--state-dir", metavar="DIR", help="default: as installed, else /var/lib/cdpserver")
    parser.add_argument(
        "--destdir",
        default="/",
        metavar="DIR",
        help="a staging root, for packages; nothing outside is touched",
    )
    parser.add_argument(
        "--site-packages", type=Path, metavar="DIR", help="use the dependencies in DIR, download nothing"
    )
    parser.add_argument("--remove", action="store_true", help="take away what was installed, and no data")
    return parser.parse_args()


def install(layout: Layout, root: Path, site_packages: Path | None) -> None:
    """Install, or upgrade what is there."""
    before = manifests.read(at(root, layout.manifest))
    static = layout.static()
    _refuse_foreign(layout, root, before, list(static))
    final = at(root, layout.tree)
    new = final.with_name(".cdpserver.new")
    now = Manifest(layout.prefix, layout.state_dir, _version())
    missing = _missing_directories(final.parent)
    environment = {"PATH": f"{new}/bin:{tree.SYSTEM_PATH}", "HOME": "/nonexistent"}
    try:
        python = tree.build(new, site_packages)
        tree.check(python, environment)
        files = static | layout.generated(python, environment)
        default = default_configuration(python, environment)
        for path, is_directory in tree.walk(new):
            name = f"{layout.tree}/{path.relative_to(new)}".removesuffix("/.")
            (now.directories if is_directory else now.files).append(name)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        for directory in missing:
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise
    _refuse_foreign(layout, root, before, list(files))
    written = before.configuration.get(layout.configuration) if before else None
    for name in [*files, layout.configuration]:
        missing += _missing_directories(at(root, name).parent)
    now.files += [*files, layout.manifest]
    now.directories += [f"/{path.relative_to(root)}" for path in missing]
    if before is not None:
        now.directories += before.directories
    # From here on an interrupted installation is completed, or taken away, by another one.
    _swap(new, final)
    mark, said = manifests.put_configuration(at(root, layout.configuration), default, written)
    now.configuration[layout.configuration] = mark
    now.write(at(root, layout.manifest))
    for name, (content, mode) in files.items():
        manifests.put(at(root, name), content, mode)
    for name in set(before.files if before else ()) - set(now.files):
        at(root, name).unlink(missing_ok=True)
    if said:
        say(said)


def _refuse_foreign(layout: Layout, root: Path, before: Manifest | None, names: list[str]) -> None:
    """Nothing that somebody else put there is overwritten."""
    ours = set(before.files) if before else set()
    foreign = [name for name in names if name not in ours and at(root, name).exists()]
    if before is None and at(root, layout.tree).exists():
        foreign.append(layout.tree)
    if foreign:
        raise InstallError(f"{foreign[0]} is there and not ours: move it away, or choose another --prefix")


def _missing_directories(directory: Path) -> list[Path]:
    """Those that will be made with `directory`."""
    missing = []
    while not directory.exists():
        missing.append(directory)
        directory = directory.parent
    return missing


def _swap(new: Path, final: Path) -> None:
    old = final.with_name(".cdpserver.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _version() -> str:
    found = re.search(r'__version__ = "(.+)"', (CHECKOUT / "cdpserver/__init__.py").read_text())
    assert found is not None
    return found[1]


def remove(layout: Layout, root: Path) -> None:
    """Take away what the manifest lists."""
    path = at(root, layout.manifest)
    found = manifests.read(path)
    if found is None:
        raise InstallError(f"nothing is installed in {layout.prefix}: name it with --prefix (and --destdir)")
    if root == Path("/") and _systemctl("is-active", "--quiet", SERVICE):
        raise InstallError(f"the service runs: systemctl disable --now {SERVICE} cdpserver-api.socket")
    for sentence in manifests.take_away(found, root):
        say(sentence)
    say(f"data in {found.state_dir} stays, and so does the user cdp; remove them yourself if you mean it")


# --- the running system


def settle(layout: Layout) -> None:
    """After an installation into the running system: its user and directory exist, and systemd knows the units."""
    lib = (
        f"{layout.prefix}/lib" if Path(f"{layout.prefix}/lib/sysusers.d/cdpserver.conf").exists() else "/etc"
    )
    for command in (
        ["systemd-sysusers", f"{lib}/sysusers.d/cdpserver.conf"],
        ["systemd-tmpfiles", "--create", f"{lib}/tmpfiles.d/cdpserver.conf"],
    ):
        if shutil.which(command[0]) is None:
            say(
                f"{command[0]} is missing: make the user cdp and {layout.state_dir} (mode 0700, its own) yourself"
            )
        elif subprocess.run(command, check=False).returncode:
            raise InstallError(
                f"{' '.join(command)} failed: put right what it says, then run tools/install again"
            )
    if _systemctl("daemon-reload"):
        running = _systemctl("is-active", "--quiet", SERVICE)
        say(f"next: systemctl reload {SERVICE}" if running else f"next: systemctl enable --now {SERVICE}")
    else:
        say(
            f"systemd does not run here; start it with: {layout.prefix}/bin/cdpserver --state-dir {layout.state_dir}"
        )


def _systemctl(*arguments: str) -> bool:
    if not Path("/run/systemd/system").is_dir():
        return False
    return subprocess.run(["systemctl", *arguments], check=False).returncode == 0


def main() -> None:
    """Entry point."""
    chosen = options()
    root = Path(os.path.abspath(chosen.destdir))
    os.umask(0o022)
    try:
        layout = Layout(chosen.prefix.rstrip("/"), "/var/lib/cdpserver")
        before = manifests.read(at(root, layout.manifest))
        state_dir = chosen.state_dir or (before.state_dir if before else layout.state_dir)
        layout = Layout(layout.prefix, state_dir.rstrip("/"))
        if chosen.remove:
            remove(layout, root)
            return
        install(layout, root, chosen.site_packages)
        say(f"cdpserver {_version()} is installed in {at(root, layout.prefix)}")
        if root == Path("/"):
            settle(layout)
    except InstallError as error:
        sys.exit(f"install: {error}")
    except OSError as error:
        sys.exit(f"install: {error.filename}: {error.strerror}: run it as a user who may write there")


if __name__ == "__main__":
    main()
