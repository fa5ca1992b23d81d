"""A way for a backup to come from QEMU to us."""

from collections.abc import Sequence
from typing import Any, Protocol


class Transport(Protocol):
    """`receiver.Receiver` by NBD, `staged.Staged` by files over sshfs."""

    closes_first: bool
    """Must QEMU close its targets before the commit? They may not be there at once, either."""

    def target(self, number: int) -> dict[str, Any]:
        """What `blockdev-add` is told for disk number `number`, but for the node's name."""
        ...

    async def much(self) -> bool:
        """Has it much to do still, so that the jobs are to pause? The error that ended the backup, if one did."""
        ...

    async def abandon(self) -> None:
        """No request of QEMU's is to wait for us any longer; its targets are open still."""
        ...

    async def commit(self, *, time_ns: int, grade: str, sent: Sequence[int]) -> dict[str, Any]:
        """Publish the backup; what `cdp backup show` tells of it. The error if there is none.

        `sent`: so many bytes QEMU's job says that it wrote of each disk, zeros included.
        """
        ...
