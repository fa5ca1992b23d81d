"""The files of a small test guest, made from Debian's packages and kept for the next run.

The packages that are not installed (a kernel, the guest agent) lie in .venv/guest, where tools/setup puts them.

    kernel      Debian's cloud kernel; NVMe and ext4 are built in
    initrd      loads virtio and goes on with the root file system (tests/guest/initrd-init)
    root.img    ext4: busybox, sqlite3, qemu-ga and tests/guest/*; /data is for the test
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = HERE / "guest"
PACKAGES = HERE.parent / ".venv/guest"
ROOT_BYTES = 64 << 20

MODULES = (
    "virtio/virtio_ring",
    "virtio/virtio",
    "virtio/virtio_pci_legacy_dev",
    "virtio/virtio_pci_modern_dev",
    "virtio/virtio_pci",
    "block/virtio_blk",
    "char/virtio_console",
)
"""Below kernel/drivers, in the order in which they load."""


@dataclass(frozen=True, slots=True)
class GuestImage:
    """What `qemu-system-x86_64 -kernel -initrd` takes, and a root disk to copy."""

    kernel: Path
    initrd: Path
    root: Path

    def copy_root(self, path: Path, *, size_bytes: int = ROOT_BYTES) -> Path:
        """A root disk of one's own, sparse; a larger one keeps its small file system."""
        run("cp", "--sparse=always", "--reflink=auto", self.root, path)
        os.truncate(path, max(size_bytes, ROOT_BYTES))
        return path


def guest_image() -> GuestImage:
    """Made at the first call on this machine, by whoever comes first."""
    packages = sorted(PACKAGES.glob("*.deb"))
    assert len(packages) == 2, f"{PACKAGES} lacks packages of the test guest: run tools/setup"
    place = PACKAGES / fingerprint(packages)
    with (PACKAGES / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            with tempfile.TemporaryDirectory(dir=PACKAGES) as scratch:
                made = Path(scratch) / "made"
                made.mkdir()
                make(packages, Path(scratch), made)
                made.rename(place)
    return GuestImage(place / "kernel", place / "initrd", place / "root.img")


def fingerprint(packages: list[Path]) -> str:
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in [*packages, *sorted(PARTS.iterdir())]:
        digest.update(path.name.encode() + b"\0")
    for path in sorted(PARTS.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def make(packages: list[Path], scratch: Path, made: Path) -> None:
    unpacked = scratch / "unpacked"
    for package in packages:
        run("dpkg-deb", "-x", package, unpacked)
    (kernel,) = unpacked.glob("boot/vmlinuz-*")
    shutil.copy(kernel, made / "kernel")
    make_initrd(unpacked, scratch / "initrd", made / "initrd")
    make_root(unpacked, scratch / "root", made / "root.img")


def make_initrd(unpacked: Path, tree: Path, output: Path) -> None:
    for name in ("bin", "modules", "proc", "sys", "dev", "new"):
        (tree / name).mkdir(parents=True)
    add_busybox(tree)
    (drivers,) = unpacked.glob("lib/modules/*/kernel/drivers")
    for module in MODULES:
        shutil.copy(drivers / f"{module}.ko", tree / "modules")
    add_script(PARTS / "initrd-init", tree / "init")
    names = sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))
    archive = subprocess.run(
        ["cpio", "-o", "-H", "newc", "-R", "0:0", "--quiet"],
        cwd=tree, input="\n".join(names).encode(), stdout=subprocess.PIPE, check=True,
    ).stdout  # fmt: skip
    output.write_bytes(archive)


def make_root(unpacked: Path, tree: Path, output: Path) -> None:
    for name in ("bin", "sbin", "proc", "sys", "dev", "tmp", "data", "etc", "lib64"):
        (tree / name).mkdir(parents=True)
    add_busybox(tree)
    add_program(Path("/usr/bin/sqlite3"), tree)
    add_program(unpacked / "usr/sbin/qemu-ga", tree)
    for script in PARTS.iterdir():
        if script.name not in ("init", "initrd-init"):
            add_script(script, tree / "bin" / script.name)
    add_script(PARTS / "init", tree / "sbin/init")
    with output.open("wb") as file:
        file.truncate(ROOT_BYTES)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-E", "root_owner=0:0", "-d", tree, output)


def add_busybox(tree: Path) -> None:
    busybox = tree / "bin/busybox"
    shutil.copy("/bin/busybox", busybox)
    for applet in run(busybox, "--list").split():
        if not (tree / "bin" / applet).exists():
            (tree / "bin" / applet).symlink_to("busybox")


def add_program(program: Path, tree: Path) -> None:
    """A program of this machine's Debian, with the libraries that it needs."""
    shutil.copy(program, tree / "bin")
    for library in re.findall(r"(/\S+) \(0x", run("ldd", program)):
        target = tree / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(library).resolve(), target)


def add_script(source: Path, target: Path) -> None:
    shutil.copy(source, target)
    target.chmod(0o755)


def run(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True).stdout
