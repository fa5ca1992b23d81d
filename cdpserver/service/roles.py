"""Who may do what over the API. On its socket a role follows from the Unix groups of the process that connected.

    viewer < operator < admin       `[roles]` in the configuration: role = "group"

The service's own user and root are admins. Without `[roles]` nobody else gets at the socket. What the kernel noted of the peer
when it connected counts (SO_PEERCRED, SO_PEERGROUPS), so a group that somebody joins counts from the next login on.
"""

import enum
import errno
import grp
import os
import pwd
import socket
import struct
from dataclasses import dataclass

import trio

from cdpserver.config import Config
from cdpserver.errors import ForbiddenError, UsageError
from cdpserver.state import StateDir

SO_PEERGROUPS = 59
"""Linux 4.13; Python has no name for it."""

GROUPS_BYTES = 1024
"""What Python's getsockopt takes: 256 groups."""


class Role(enum.IntEnum):
    """What somebody may do; each includes what stands before it, but for PROTECT: an agent's, which has its own routes alone."""

    PROTECT = -1
    NONE = 0
    VIEWER = 1
    OPERATOR = 2
    ADMIN = 3


@dataclass(frozen=True)
class Roles:
    """The roles of a service. `groups` maps a group's number to its role."""

    groups: dict[int, Role]
    names: dict[Role, str]

    @classmethod
    def of(cls, config: Config) -> "Roles":
        """What the configuration says. UsageError for a group that does not exist."""
        chosen = {
            Role.VIEWER: config.role_viewer,
            Role.OPERATOR: config.role_operator,
            Role.ADMIN: config.role_admin,
        }
        names = {role: name for role, name in chosen.items() if name is not None}
        groups: dict[int, Role] = {}
        for role, name in names.items():
            try:
                gid = grp.getgrnam(name).gr_gid
            except KeyError:
                raise UsageError(
                    f"roles.{role.name.lower()}: there is no group {name}", hint=f"make it: groupadd {name}"
                ) from None
            groups[gid] = max(role, groups.get(gid, Role.NONE))
        return cls(groups, names)

    def of_peer(self, connection: trio.socket.SocketType) -> Role:
        """The role of the process at the other end of a Unix socket."""
        uid, gid = peer(connection)
        if uid in (0, os.geteuid()):
            return Role.ADMIN
        gids = {gid, *_peer_groups(connection, uid, gid)}
        return max((role for gid, role in self.groups.items() if gid in gids), default=Role.NONE)

    def check(self, role: Role, least: Role, doing: str) -> None:
        """ForbiddenError if the role is below the least one."""
        if role < least:
            enough = [name for other, name in sorted(self.names.items()) if other >= least]
            hint = f"join the group {' or '.join(enough)}" if enough else "ask root, or cdpserver's own user"
            raise ForbiddenError(f"{doing} takes the role {least.name.lower()}", hint=hint)

    def open_up(self, state: StateDir) -> None:
        """Let the groups reach the API's socket, and nobody anything else in the state directory; or only us, without roles."""
        if not self.groups:
            state.path.chmod(0o700)
            return
        for path in state.path.iterdir():
            # The API's socket may be kept from before, with clients that wait; `serve` sees to it.
            if path != state.api_socket and not path.is_symlink() and path.stat().st_uid == os.geteuid():
                path.chmod(path.stat().st_mode & 0o700)
        state.path.chmod(0o711)


def peer(connection: trio.socket.SocketType) -> tuple[int, int]:
    """(uid, gid) of the process at the other end of a Unix socket."""
    _, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return uid, gid


def user_name(uid: int) -> str:
    """The name of a user; the number of one without."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _peer_groups(connection: trio.socket.SocketType, uid: int, gid: int) -> list[int]:
    try:
        packed = connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, GROUPS_BYTES)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        # More groups than Python can ask for: what the system's lists say of the user.
        try:
            return os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
        except KeyError:
            return []
    return [number for (number,) in struct.iter_unpack("I", packed)]
