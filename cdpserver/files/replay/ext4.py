"""ext3 and ext4 as after recovery: the journal's blocks in their places, the journal empty, the file system not in need of it."""

from cdpserver.errors import CorruptError
from cdpserver.files.replay.ext import (
    SUPERBLOCK_AT,
    SUPERBLOCK_BYTES,
    Superblock,
    open_journal,
)
from cdpserver.files.replay.jbd2 import (
    SUPER_BYTES,
    Blocks,
    JournalSuper,
    Scan,
    content,
    fast_commits,
    newest_tags,
)
from cdpserver.files.replay.overlay import Replaced, exactly
from cdpserver.files.replay.remarks import MOUNT, Replayed, done
from cdpserver.files.source import Reader


def replay_ext(reader: Reader) -> Replayed:
    """CorruptError or NotReplayedError where the kernel would not recover it either, or this module doesn't know how."""
    superblock = Superblock.parse(exactly(reader, SUPERBLOCK_AT, SUPERBLOCK_BYTES))
    if not superblock.has_journal and not superblock.clean:
        return Replayed(
            reader,
            ("it was in use at this instant and has no journal: what was being written may be damaged",),
        )
    if not superblock.has_journal or not superblock.needs_recovery:
        return Replayed(reader)
    journal = open_journal(reader, superblock)
    first = journal.read(0)
    head = JournalSuper.parse(first[:SUPER_BYTES], journal)
    scan = Scan(journal, head)
    if head.start:
        scan.run()
    tags = newest_tags(journal, head, scan.transactions)
    if any(place >= superblock.blocks for place in tags):
        raise CorruptError("it names blocks that the file system does not have")
    made = {journal.place(0): head.emptied(scan.next_sequence + 1) + first[SUPER_BYTES:]}
    number, within = divmod(SUPERBLOCK_AT, superblock.block_size)
    size = superblock.block_size
    block = content(journal, tags[number]) if number in tags else exactly(reader, number * size, size)
    recovered = Superblock.parse(block[within : within + SUPERBLOCK_BYTES]).recovered()
    made[number] = block[:within] + recovered + block[within + SUPERBLOCK_BYTES :]
    replaced = Replaced(reader, unit=size, blocks=Blocks(journal, tags, made))
    return done(replaced, len(scan.transactions), *_missed(fast_commits(journal, head, scan.next_sequence)))


def _missed(commits: int) -> tuple[str, ...]:
    if not commits:
        return ()
    return (f"{commits} fast commits after them were not: what was fsynced last may be missing: {MOUNT}",)
