"""A client that writes to one disk as QEMU's mirror does: what was not acknowledged is sent again first, whatever happened."""

import contextlib
import threading
import time
from collections import Counter
from random import Random

import nbd

from cdpserver.errors import CdpError
from recovery.client import Client
from tools.soaking.oracle import Oracle, Write

PAUSE_S = 0.2
"""Before it connects anew, or says again that it is in sync."""


class Writer:
    """Writes until it is told to end, about `rate` times a second. It says *synced* after each connection's first write."""

    def __init__(self, client: Client, disk: str, oracle: Oracle, *, dice: Random, rate: float) -> None:
        self.disk, self.oracle = disk, oracle
        self.cut_off: Counter[str] = Counter()
        """How often a write was not answered, or answered with an error, by what was said."""
        self.longest_s = 0.0
        """From a write's first sending to its acknowledgement."""
        self._client, self._dice, self._pause_s = client, dice, 1 / rate
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"writer-{disk}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def tell_to_end(self) -> None:
        """It ends once its last write is acknowledged."""
        self._over.set()

    def join(self, seconds: float) -> bool:
        """Has it ended?"""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        pending: Write | None = None
        while pending or not self._over.is_set():
            handle = nbd.NBD()
            try:
                handle.connect_uri(str(self._client.disk(self.disk)["uri"]))
                synced = False
                while pending or not self._over.is_set():
                    if pending is None:
                        self._over.wait(self._pause_s * self._dice.expovariate(1))
                        pending = self.oracle.next(self._dice)
                        self.oracle.sent(pending)
                        sent = time.monotonic()
                    send(handle, self.oracle, pending)
                    self.oracle.acknowledged()
                    self.longest_s = max(self.longest_s, time.monotonic() - sent)
                    pending = None
                    if not synced:
                        self._client.synced(self.disk, session=None, write_blocking=True)
                        synced = True
            except (nbd.Error, CdpError) as error:
                self.cut_off[said(error)] += 1
                time.sleep(PAUSE_S)
            finally:
                with contextlib.suppress(nbd.Error):
                    handle.shutdown()


def send(handle: nbd.NBD, oracle: Oracle, write: Write) -> None:
    """Do a write."""
    if write.is_zero:
        handle.zero(write.length, write.offset)
    else:
        handle.pwrite(oracle.data(write), write.offset)


def said(error: Exception) -> str:
    """An error's kind, so that equal ones are counted together."""
    if isinstance(error, nbd.Error):
        return f"nbd: {error.errno or error.string.rpartition(': ')[2]}"
    return f"{type(error).__name__}: {''.join(c for c in str(error) if not c.isdigit())[:100]}"
