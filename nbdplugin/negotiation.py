"""Connections that never end their negotiation are ended: nbdkit 1.32 waits for them for ever, with a thread each.

nbdkit tells its plugin neither a connection's socket nor of a negotiation that fails, but calls `preconnect` in its own
thread before it greets the client, and `open` in the same thread when the client has chosen an export. What the thread of a
connection that is late waits for is in /proc, and so its socket is known: shut down, it reads as ended by the client.

    preconnect -> began      open -> choosing      close -> left      a thread that is gone: forgotten at the next look

A client that only asks about an export (NBD_OPT_INFO) has it opened and closed again, and negotiates on: that is why `close`
counts. Needs `-t 1`: then all of a connection runs in one thread. A session is never touched, however long it is silent.
"""

import contextlib
import ctypes
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator

from cdpserver import memory

NEGOTIATION_S = 15.0
"""A client asks for an export within milliseconds; one on another continent, by TLS, within a few seconds."""

LOOK_S = 1.0
"""Between two looks while somebody negotiates. With nobody there is none."""

_LIBRARY = ctypes.CDLL(None, use_errno=True)
_TASKS = "/proc/self/task"


class Negotiations:
    """Which threads negotiate, and since when. `limit_s`: how long they may."""

    def __init__(self, limit_s: float = NEGOTIATION_S) -> None:
        self.limit_s = limit_s
        self._changed = threading.Condition()
        self._since: dict[int, tuple[float, bytes]] = {}
        """By thread: since when, and when the thread itself began, as the kernel counts; ids are given again."""
        self._chosen: dict[int, tuple[float, bytes]] = {}
        """The same of those whose client has an export open."""

    def begin(self, say: Callable[[int], None]) -> None:
        """Look after them from now on; call it in the process that serves. `say` is told how many were ended, if any."""
        threading.Thread(target=self._look, args=(say,), daemon=True, name="negotiations").start()

    def began(self) -> None:
        """The thread that calls has a new client."""
        thread = threading.get_native_id()
        with self._changed:
            self._since[thread] = time.monotonic(), _begun(thread)
            self._changed.notify()

    @contextlib.contextmanager
    def choosing(self) -> Iterator[None]:
        """The client of the thread that calls has chosen an export. Where it is refused, its negotiation goes on as before."""
        thread = threading.get_native_id()
        with self._changed:
            held = self._since.pop(thread, None)
        try:
            yield
        except BaseException:
            with self._changed:
                if held is not None:
                    self._since[thread] = held
                    self._changed.notify()
            raise
        if held is not None:
            with self._changed:
                self._chosen[thread] = held

    def left(self) -> None:
        """The export of the client of the thread that calls is closed: either he only asked about it, or he is gone."""
        with self._changed:
            held = self._chosen.pop(threading.get_native_id(), None)
            if held is not None:
                self._since[threading.get_native_id()] = held
                self._changed.notify()

    def _look(self, say: Callable[[int], None]) -> None:
        while True:
            # Without memory the next look does it, if there is one: whoever serves a request ends the process then.
            with contextlib.suppress(*memory.NONE):
                self._look_once(say)

    def _look_once(self, say: Callable[[int], None]) -> None:
        with self._changed:
            while not self._since:
                self._changed.wait()
        time.sleep(min(LOOK_S, self.limit_s))
        if ended := self.end_late(time.monotonic()):
            say(ended)

    def end_late(self, now_s: float) -> int:
        """End the connections that have negotiated for too long, at a time of the monotonic clock; how many."""
        done = 0
        with self._changed:  # nobody's negotiation ends meanwhile, so that no session is cut
            for thread, (since_s, begun) in list(self._since.items()):
                if _begun(thread) != begun:
                    del self._since[thread]
                elif now_s >= since_s + self.limit_s:
                    done += _shut(_waits_for(thread))
        return done


def _begun(thread: int) -> bytes:
    """When a thread of this process began, in the kernel's ticks; empty if it is gone."""
    with contextlib.suppress(OSError), open(f"{_TASKS}/{thread}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[19]
    return b""


def _waits_for(thread: int) -> int:
    """The connected socket that a thread waits for in a system call; -1 if it waits for none.

    The first argument of what receives and sends is the file; that of `poll`, by which TLS waits, points to it.
    """
    with contextlib.suppress(OSError, ValueError, OverflowError, IndexError):
        with open(f"{_TASKS}/{thread}/syscall", "rb") as file:
            words = file.read().split()  # "running", or the number and the arguments
        first, second = int(words[1], 16), int(words[2], 16)
        if _is_connection(first):
            return first
        if second == 1:
            with open("/proc/self/mem", "rb", buffering=0) as memory:
                memory.seek(first)
                polled = int.from_bytes(memory.read(4), "little")
            if _is_connection(polled):
                return polled
    return -1


def _is_connection(fd: int) -> bool:
    if fd >= 1 << 20:
        return False
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return False
    except OSError:
        return False
    listens, length = ctypes.c_int(1), ctypes.c_uint(ctypes.sizeof(ctypes.c_int))
    failed = _LIBRARY.getsockopt(
        fd, socket.SOL_SOCKET, socket.SO_ACCEPTCONN, ctypes.byref(listens), ctypes.byref(length)
    )
    return failed == 0 and listens.value == 0


def _shut(fd: int) -> bool:
    """By the library, which needs no file of its own: there may be none left."""
    return fd >= 0 and _LIBRARY.shutdown(fd, socket.SHUT_RDWR) == 0
