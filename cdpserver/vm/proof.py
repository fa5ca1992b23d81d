"""Whether a target is what a mirror, or a dirty bitmap, at the source belongs to. Pure.

QEMU does not notice a target that comes back older, empty, or as another disk. What tells is the journal itself: the name of the
bitmap that it was anchored to is in its records, is gone with any that are cut or missing, and is known to no other journal.
"""

from collections.abc import Sequence

from cdpserver.vm.bitmaps import Bitmap
from cdpserver.vm.record import Method
from cdpserver.vm.target import TargetState

OLDER = "the target came back with an older state: everything is copied anew"


def worse(said: TargetState, before: TargetState) -> str:
    """Why a target cannot be what it was a moment ago; nothing if it can."""
    if said.session < before.session or said.last_seq < before.last_seq:
        return OLDER
    if said.gap_ns != before.gap_ns:
        return "the target lost what it had acknowledged: everything is copied anew"
    return ""


def foreign(said: TargetState, found: Sequence[Bitmap], *, marked: bool = False) -> str:
    """Why a target is not what a mirror that runs already belongs to; nothing if it may be.

    `marked`: QEMU keeps a mark of what the target held, which is asked of the target as well. Then a bitmap that no target is
    anchored to yet, as in the first seconds of being in sync, says nothing against it.
    """
    if said.session == 0:
        return "the target has nothing of what a running mirror sent: everything is copied anew"
    if said.anchor not in {bitmap.name for bitmap in found} and (said.anchor or (found and not marked)):
        return "the target is not what a running mirror was in sync with: everything is copied anew"
    return ""


def bitmap_for(
    said: TargetState, found: Sequence[Bitmap], *, node: str, method: Method, trusted: str
) -> tuple[str, str]:
    """(the bitmap that marks all that differs, or nothing; why that, or why the whole disk).

    `trusted` is a bitmap that was proven before, by who has not lost sight of target and QEMU since.
    """
    bitmap = next((one for one in found if one.name == said.anchor), None)
    if said.last_seq == 0:
        why = "the first copy"
    elif method == "drive-mirror":
        why = "drive-mirror knows no bitmaps"
    elif not found:
        why = "the source has no dirty bitmap: it is no QCOW2 file, or its QEMU was killed"
    elif bitmap is None:
        why = "the target is not what the source's dirty bitmap belongs to"
    elif bitmap.inconsistent:
        why = "the source's dirty bitmap was not closed: its QEMU was killed"
    elif bitmap.node != node:
        why = "the dirty bitmap is of another image"
    elif not said.anchored and bitmap.name != trusted:
        why = "a resync did not end, or something else wrote to the target"
    else:
        return bitmap.name, "the source's dirty bitmap marks what changed"
    return "", why
