"""Every file of an installation beside the Python tree: launchers, units, completion, configuration, each as bytes."""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tools.packaging.errors import InstallError

CHECKOUT = Path(__file__).resolve().parent.parent.parent

LAUNCHER = """\
#!/bin/sh
exec "${{0%/*}}/../lib/cdpserver/bin/python" -I -m {module} "$@"
"""
"""Finds its tree by itself, so a staging root can be tried; -I: modules in the current directory are not ours."""

PROGRAMS = {"cdp": "recovery.cli", "cdpserver": "cdpserver.service.command"}

UNIT_PREFIXES = ("/usr", "/usr/local")
"""systemd reads PREFIX/lib of these; for others, units go to /etc."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The final paths, without a staging root."""

    prefix: str
    state_dir: str

    def __post_init__(self) -> None:
        for option, path in (("--prefix", self.prefix), ("--state-dir", self.state_dir)):
            if not re.fullmatch(r"(/[A-Za-z0-9._+-]+)+", path) or ".." in path.split("/"):
                raise InstallError(
                    f"{option} {path!r} will not do: an absolute path of letters, digits and . _ + -"
                )

    @property
    def tree(self) -> str:
        """The Python tree."""
        return f"{self.prefix}/lib/cdpserver"

    @property
    def manifest(self) -> str:
        """What is installed."""
        return f"{self.tree}/manifest.json"

    @property
    def configuration(self) -> str:
        """The server's configuration file."""
        return "/etc/cdpserver/cdpserver.toml"

    def static(self) -> dict[str, tuple[bytes, int]]:
        """path -> (content, mode) of launchers, units, and what systemd makes users and directories from."""
        found = {
            f"{self.prefix}/bin/{name}": (LAUNCHER.format(module=module).encode(), 0o755)
            for name, module in PROGRAMS.items()
        }
        lib = f"{self.prefix}/lib" if self.prefix in UNIT_PREFIXES else "/etc"
        for path in sorted((CHECKOUT / "systemd").iterdir()):
            place = {
                "sysusers.conf": "sysusers.d/cdpserver.conf",
                "tmpfiles.conf": "tmpfiles.d/cdpserver.conf",
            }.get(path.name, f"systemd/system/{path.name}")
            found[f"{lib}/{place}"] = self.render(path.read_text()).encode(), 0o644
        return found

    def render(self, text: str) -> str:
        """A file of systemd/ with this layout's paths in it."""
        text = text.replace("/usr/local/bin/", f"{self.prefix}/bin/")
        state = PurePosixPath(self.state_dir)
        if state.is_relative_to("/var/lib"):
            text = text.replace(
                "StateDirectory=cdpserver\n", f"StateDirectory={state.relative_to('/var/lib')}\n"
            )
        else:
            # StateDirectory= is always below /var/lib; tmpfiles makes this one, and only it may be written.
            text = text.replace("StateDirectory=cdpserver\n", f"ReadWritePaths={state}\n")
            text = text.replace("StateDirectoryMode=0700\n", "")
        return text.replace("/var/lib/cdpserver", self.state_dir)

    def generated(self, python: Path, environment: dict[str, str]) -> dict[str, tuple[bytes, int]]:
        """Completion and man pages, from the installed programs themselves."""
        share = f"{self.prefix}/share"
        cli = "recovery.cli"
        bash, zsh, fish = (
            run([str(python), "-I", "-m", cli, "completion", shell], environment)
            for shell in ("bash", "zsh", "fish")
        )
        script = f"import sys; sys.path.append({str(CHECKOUT)!r}); from tools import man; man.main()"
        with tempfile.TemporaryDirectory() as directory:
            run([str(python), "-I", "-c", script, directory], environment)
            pages = {path.name: path.read_bytes() for path in Path(directory).iterdir()}
        # bash-completion and fish load a file when its command is typed for the first time: one for each name.
        return {
            **{f"{share}/bash-completion/completions/{name}": (bash, 0o644) for name in PROGRAMS},
            **{f"{share}/fish/vendor_completions.d/{name}.fish": (fish, 0o644) for name in PROGRAMS},
            f"{share}/zsh/site-functions/_cdp": (zsh, 0o644),
            **{f"{share}/man/man{name[-1]}/{name}": (page, 0o644) for name, page in pages.items()},
        }


def default_configuration(python: Path, environment: dict[str, str]) -> bytes:
    """Every key with its explanation and its default, commented out: a later version's defaults then count."""
    text = run([str(python), "-I", "-m", "cdpserver.service.command", "--show-config"], environment).decode()
    _, _, text = text.partition("\n\n")
    lines = [
        "# cdpserver's configuration. Every key has its default here; docs/configuration.md says more.",
        "",
    ]
    for line in text.splitlines():
        if line.startswith("# Set by:"):
            continue
        lines.append(f"# {line}" if re.match(r"[a-z_]+ =", line) else line)
    return "\n".join(lines).encode() + b"\n"


def run(command: list[str], environment: dict[str, str] | None = None) -> bytes:
    """What a program answers; InstallError with its last words."""
    try:
        return subprocess.run(
            command,
            env=environment or dict(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
        ).stdout
    except FileNotFoundError:
        raise InstallError(f"{command[0]} is missing: install its package") from None
    except subprocess.CalledProcessError as error:
        words = error.stderr.decode(errors="replace").strip().splitlines() or [f"status {error.returncode}"]
        raise InstallError(f"{' '.join(command)[:120]}: {words[-1]}") from None
