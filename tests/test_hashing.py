"""The digest of a large payload, taken beside its copying."""

import threading

import pytest

from cdpserver.journal.hashing import LARGE, Digest, beside
from cdpserver.journal.record import payload_digest


def payload(fill: int) -> memoryview:
    """One that is as long as those that it is done for."""
    return memoryview(bytes([fill]) * LARGE)


def test_what_is_copied_has_its_own_digest() -> None:
    copied: list[memoryview] = []

    def copy(part: memoryview) -> int:
        copied.append(part)
        return len(copied)

    found = [beside(payload(fill), copy) for fill in range(50)]
    assert found == [(fill + 1, payload_digest(payload(fill))) for fill in range(50)]


def test_the_digests_of_many_writers() -> None:
    found: dict[int, bytes] = {}

    def write(fill: int) -> None:
        found[fill] = beside(payload(fill), len)[1]

    writers = [threading.Thread(target=write, args=(fill,)) for fill in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert found == {fill: payload_digest(payload(fill)) for fill in range(8)}


def test_whoever_comes_first_takes_it_and_the_other_waits() -> None:
    one = Digest(payload(1))
    one.take()
    one.take()  # the thread that was asked, later
    assert one.result() == payload_digest(payload(1))


def test_a_copy_that_fails_leaves_nobody_with_the_payload() -> None:
    held = bytearray(payload(7))

    def full(part: memoryview) -> int:
        raise OSError(28, "no space")

    with memoryview(held) as view, pytest.raises(OSError, match="no space"):
        beside(view, full)
    assert beside(payload(8), len) == (LARGE, payload_digest(payload(8)))
    held.append(1)  # BufferError, were the payload still being read
