"""What is taken for proof that a target is what a mirror or a dirty bitmap belongs to; each case by itself."""

from dataclasses import replace

import pytest

from cdpserver.journal import control
from cdpserver.journal.control import FIRST_WRITE, State
from cdpserver.vm.bitmaps import Bitmap
from cdpserver.vm.proof import bitmap_for, foreign, worse
from cdpserver.vm.target import TargetState

MINE, OTHER = "cdp-0-since-a", "cdp-0-since-b"
SAID = TargetState(session=3, synced=True, last_seq=100, anchor=MINE, anchored=True)
BITMAP = Bitmap("disk0", MINE, 65536, inconsistent=False)


def chosen(
    said: TargetState = SAID,
    found: tuple[Bitmap, ...] = (BITMAP,),
    *,
    drive_mirror: bool = False,
    trusted: str = "",
) -> tuple[str, str]:
    method = "drive-mirror" if drive_mirror else "blockdev-mirror"
    return bitmap_for(said, found, node="disk0", method=method, trusted=trusted)  # type: ignore[arg-type]


def test_a_bitmap_that_is_proven() -> None:
    assert chosen()[0] == MINE
    assert chosen(replace(SAID, anchored=False), trusted=MINE)[0] == MINE
    assert chosen(found=(replace(BITMAP, name=OTHER), BITMAP))[0] == MINE


@pytest.mark.parametrize(
    ("said", "found", "why"),
    [
        (TargetState(session=1, synced=False), (BITMAP,), "the first copy"),
        (SAID, (), "no dirty bitmap"),
        (replace(SAID, anchor=OTHER), (BITMAP,), "not what the source's dirty bitmap belongs to"),
        (replace(SAID, anchor="", anchored=False), (BITMAP,), "not what the source's"),
        (replace(SAID, anchored=False), (BITMAP,), "something else wrote"),
        (SAID, (replace(BITMAP, inconsistent=True),), "its QEMU was killed"),
        (SAID, (replace(BITMAP, node="overlay"),), "of another image"),
    ],
)
def test_what_is_no_proof(said: TargetState, found: tuple[Bitmap, ...], why: str) -> None:
    bitmap, said_why = chosen(said, found)
    assert bitmap == "" and why in said_why


def test_drive_mirror_uses_none() -> None:
    assert chosen(drive_mirror=True) == ("", "drive-mirror knows no bitmaps")


def test_a_running_mirror_is_taken_over_with_proof_only() -> None:
    assert foreign(SAID, [BITMAP]) == ""
    assert foreign(replace(SAID, anchored=False), [BITMAP]) == "", "a worker was killed: nothing was lost"
    assert foreign(replace(SAID, anchor="", anchored=False), []) == "", "its first copy"
    assert foreign(replace(SAID, anchor=OTHER), [BITMAP])
    assert foreign(SAID, [])
    assert foreign(replace(SAID, anchor=""), [BITMAP])
    assert foreign(replace(SAID, anchor=""), [BITMAP], marked=True) == "", (
        "in sync for so short that nothing is anchored"
    )
    assert foreign(replace(SAID, anchor=OTHER), [BITMAP], marked=True)
    assert foreign(replace(SAID, session=0), [BITMAP])
    assert foreign(replace(SAID, session=0), [BITMAP], marked=True)


def test_a_target_that_is_worse_than_it_was() -> None:
    assert worse(SAID, SAID) == worse(replace(SAID, session=4, last_seq=101), SAID) == ""
    assert "older" in worse(replace(SAID, session=2), SAID)
    assert "older" in worse(replace(SAID, last_seq=99), SAID)
    assert "lost" in worse(replace(SAID, gap_ns=5, last_seq=1 << 33), SAID)


def test_what_becomes_of_an_anchor() -> None:
    def after(*messages: dict[str, object]) -> State:
        state = State(session=1)
        for seq, message in enumerate(messages, 1):
            state = control.fold(state, message, seq=seq, time_ns=seq)
        return state

    anchored = control.synced(1, write_blocking=True, bitmap=MINE)
    assert (after(anchored).anchor, after(anchored).anchored) == (MINE, True)
    assert after(anchored, control.session(2, "connection lost")).anchored
    assert after(anchored, control.synced(1, write_blocking=True)).anchored
    for message in (control.session(2, FIRST_WRITE), control.grow(1 << 20)):
        state = after(anchored, message, control.synced(2, write_blocking=True))
        assert (state.anchor, state.anchored) == (MINE, False), "a controller must anchor it anew"
    state = after(anchored, control.gap(from_seq=1, from_time_ns=1, reason="unclean host boot"))
    assert (state.anchor, state.anchored) == ("", False)
    assert control.unpack(control.pack(after(anchored))) == after(anchored)
    assert "anchor" not in control.pack(State())
