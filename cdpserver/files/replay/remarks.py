"""What is told of a replay: the file system as it reads now, and sentences for the operator's screen."""

from dataclasses import dataclass

from cdpserver.files.source import Reader

MOUNT = "`cdp mount --kernel` shows it exactly"


@dataclass(frozen=True, slots=True)
class Replayed:
    """The file system to read, and short sentences; none where there was nothing to do."""

    reader: Reader
    remarks: tuple[str, ...] = ()


def done(reader: Reader, transactions: int, *more: str) -> Replayed:
    """It reads as after a mount, but for what the further sentences say."""
    if not transactions:
        return Replayed(reader, ("it was in use at this instant; its journal holds nothing more", *more))
    count = "1 transaction was" if transactions == 1 else f"{transactions} transactions were"
    return Replayed(reader, (f"it was in use at this instant: {count} replayed from its journal", *more))


def not_replayed(reader: Reader, why: str) -> Replayed:
    """It reads as it lies on the disk."""
    return Replayed(
        reader,
        (
            f"its journal could not be replayed: {why}; what was changed in the last minutes before this instant may be "
            f"missing, older or damaged: {MOUNT}",
        ),
    )
