"""A libvirtd of one's own, and a domain under TCG: nothing of the machine's own libvirt is touched or seen.

What libvirt has at fixed paths (configuration, state, its users) is ours in a mount namespace of its own, which ends with it.
"""

import os
import signal
import subprocess
from pathlib import Path
from typing import Self

from tools.kit.processes import listens, stop, until

OURS = ("etc/libvirt", "run/libvirt", "var/lib/libvirt", "var/cache/libvirt", "var/log/libvirt")

QEMU_CONF = """user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
cgroup_controllers = []
namespaces = []
seccomp_sandbox = 0
stdio_handler = "file"
max_core = 0
"""

USERS = {
    "passwd": "libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin\n",
    "group": "libvirt-qemu:x:64055:\n",
}
"""libvirt's QEMU driver does not load without this user, whichever it is told to use."""

LIBVIRTD_CONF = """listen_tls = 0
listen_tcp = 0
unix_sock_group = "root"
unix_sock_rw_perms = "0700"
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_dir = "{run}"
log_filters = "3:*"
log_outputs = "1:file:{log}"
"""

DOMAIN = """<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>64</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='{image}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
  <seclabel type='none'/>
</domain>
"""


GUEST_WORDS = (
    "console=ttyS0 quiet panic=-1 nokaslr mitigations=off no_timer_check tsc=reliable random.trust_cpu=on"
)

GUEST_DOMAIN = """<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>192</memory>
  <vcpu>1</vcpu>
  <cpu mode='maximum'/>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initrd}</initrd>
    <cmdline>{words} root=/dev/vda</cmdline>
  </os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' discard='unmap'/>
      <source file='{image}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <serial type='file'><source path='{console}'/><target port='0'/></serial>
    <serial type='null'><target port='1'/></serial>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
  <seclabel type='none'/>
</domain>
"""
"""A guest of tests/guest: its console goes to a file, and nobody writes to its shell."""


class Libvirtd:
    """The daemon. Needs root."""

    def __init__(self, directory: Path) -> None:
        self._root = directory / "lv"
        self._log = directory / "libvirtd.log"
        run = directory / "lvrun"
        for path in OURS:
            (self._root / path).mkdir(parents=True)
        run.mkdir()
        (self._root / "etc/libvirt/qemu.conf").write_text(QEMU_CONF)
        for name, line in USERS.items():
            (self._root / "etc" / name).write_text(Path("/etc", name).read_text() + line)
        (self._root / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(run=run, log=self._log))
        self._socket = run / "libvirt-sock"
        self.uri = f"qemu:///system?socket={self._socket}"
        self._domains: set[int] = set()
        self.start()

    def start(self) -> None:
        """Start it; again, it finds its domains as they are."""
        self._socket.unlink(missing_ok=True)
        mounts = [f"mkdir -p /{path} && mount --bind {self._root}/{path} /{path}" for path in OURS]
        mounts += [f"mount --bind {self._root}/etc/{name} /etc/{name}" for name in USERS]
        daemon = f"exec /usr/sbin/libvirtd --config {self._root}/libvirtd.conf --pid-file {self._root}/pid"
        command = ["unshare", "--mount", "sh", "-ec", "\n".join([*mounts, daemon])]
        with open(self._log.with_suffix(".out"), "ab") as out:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        listens(self.process, self._socket, self._log.with_suffix(".out"))

    def kill(self) -> None:
        """SIGKILL the daemon; its domains go on."""
        self.process.kill()
        self.process.wait()

    def virsh(self, *arguments: str) -> str:
        """What virsh answers. CalledProcessError for a refusal."""
        command = ["virsh", "-q", "-c", self.uri, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    def define(self, name: str, image: Path) -> None:
        """Define a domain with one disk, `vda`, and start it."""
        self.define_xml(name, DOMAIN.format(name=name, image=image))

    def define_guest(self, name: str, image: Path, *, kernel: Path, initrd: Path, console: Path) -> None:
        """The same with a guest of tests/guest, whose agent's channel libvirt holds."""
        places = {
            "image": image,
            "kernel": kernel,
            "initrd": initrd,
            "console": console,
            "words": GUEST_WORDS,
        }
        self.define_xml(name, GUEST_DOMAIN.format(name=name, **places))

    def define_xml(self, name: str, xml: str) -> None:
        """Define a domain by its description, and start it."""
        description = self._root / f"{name}.xml"
        description.write_text(xml)
        self.virsh("define", str(description))
        self.start_domain(name)

    def start_domain(self, name: str) -> None:
        """Start a domain that is defined."""
        self.virsh("start", name)
        self._domains.add(self.pid(name))

    def adopt(self, name: str) -> None:
        """A domain that somebody else has started ends with this libvirtd."""
        self._domains.add(self.pid(name))

    def pid(self, name: str) -> int:
        """The process of a domain's QEMU."""
        return int((self._root / f"run/libvirt/qemu/{name}.pid").read_text())

    def io(self, name: str, command: str) -> None:
        """A write as of the guest: `write -P 0x5a 0 1M`."""
        hmp = f'qemu-io -d virtio-disk0/virtio-backend "{command}"'
        said = self.virsh("qemu-monitor-command", name, "--hmp", hmp)
        if "rror" in said or "ailed" in said:
            raise RuntimeError(f"qemu-io {command}: {said.strip()}")

    def close(self) -> None:
        """The daemon and its domains end."""
        stop(self.process)
        for pid in self._domains:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
                until(lambda pid=pid: not is_running(pid), "end of a domain")  # type: ignore[misc]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_running(pid: int) -> bool:
    """Is there such a process, other than a dead one that nobody has asked for?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
