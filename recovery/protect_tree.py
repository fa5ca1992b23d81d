"""`cdp protect` in the tree of commands."""

from cdpserver import names
from recovery.tree import Commands, lazy


def add_protect(commands: Commands) -> None:
    """`cdp protect`."""
    protect = commands.leaf(
        "protect",
        lazy("protect", "protect"),
        "Protect a running VM, through every restart, until --remove. Again, it changes how, or where the VM migrates to.",
        "cdp protect web --qmp /run/qemu/web.qmp --wait-synced\n  cdp protect web --libvirt qemu:///system --disk vda",
    )
    protect.add_argument(
        "vm", metavar="VM", type=names.check_name, help="what its disks are named by: VM/DISK"
    )
    protect.add_argument("--qmp", metavar="PATH", help="the socket of a QMP monitor of its QEMU")
    protect.add_argument("--libvirt", metavar="URI", help="the libvirt that owns the monitor")
    protect.add_argument("--domain", metavar="NAME", help="its domain, if its name is not VM")
    protect.add_argument(
        "--by",
        metavar="NAME",
        type=names.check_name,
        help="QEMU is on this host, the service on another: the `cdp agent` of this name looks after it",
    )
    protect.add_argument(
        "--disk",
        metavar="DISK",
        action="append",
        default=[],
        help="a drive name, libvirt's target (vda), device id or node name; can be given again; else all that the guest has",
    )
    protect.add_argument(
        "--wait",
        action="store_true",
        help="the guest waits for a target that is gone, or has no room, rather than leave a gap",
    )
    protect.add_argument("--drive-mirror", action="store_true", help="use drive-mirror, not blockdev-mirror")
    protect.add_argument(
        "--agent",
        metavar="PATH",
        help="the socket of its guest agent, for cdp point mark --freeze; else libvirt's, with --libvirt",
    )
    protect.add_argument("--wait-synced", action="store_true", help="return when all disks are in sync")
    protect.add_argument(
        "--remove", action="store_true", help="end the protection; the disks keep their history"
    )


def add_agent(commands: Commands) -> None:
    """`cdp agent`."""
    agent = commands.leaf(
        "agent",
        lazy("agent", "agent"),
        "Look after the mirrors of VMs on this host, for a service on another one, until ended.",
        "cdp agent hv1 --nbd 127.0.0.1:10809\n  cdp agent hv1 --tls /etc/pki/cdp",
    )
    agent.add_argument("name", metavar="NAME", type=names.check_name, help="what `cdp protect --by` calls it")
    agent.add_argument(
        "--nbd", metavar="HOST:PORT", help="where the service's NBD is reached from here, if not at its URIs"
    )
    agent.add_argument(
        "--tls",
        metavar="DIR",
        help="this host's ca-cert.pem, client-cert.pem and client-key.pem, or keys.psk; QEMU reads them as well",
    )
    agent.add_argument("--tls-user", metavar="NAME", help="whose key it is in keys.psk; default: qemu")


ROLES = ("viewer", "operator", "admin", "protect")
"""As in cdpserver.tokens, which is loaded only when it is needed."""


def add_tokens(commands: Commands) -> None:
    """`cdp token`."""
    token = commands.group("token", "who may use the control API over TCP (docs/security.md)")
    add = token.leaf(
        "add",
        lazy("tokens", "add"),
        "Make a token for the API, and print it, this once; on the service's host, as root or its user.",
        "cdp token add hv1 --role protect --out hv1.token",
    )
    add.add_argument(
        "name", metavar="NAME", type=names.check_name, help="whose it is; of the role protect the agent's"
    )
    add.add_argument(
        "--role",
        required=True,
        choices=ROLES,
        help="viewer, operator or admin as in docs/configuration.md; protect: what an agent asks, and no more",
    )
    add.add_argument("--out", metavar="FILE", help="put it into a new file (mode 0600) instead")
    token.leaf("list", lazy("tokens", "list_"), "List the tokens, without what they are.", "cdp token list")
    remove = token.leaf("remove", lazy("tokens", "remove"), "End a token, at once.", "cdp token remove hv1")
    remove.add_argument("name", metavar="NAME", type=names.check_name)
