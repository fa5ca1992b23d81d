"""Every named maximum of the project in one place, with its reason."""

BLOCK = 4096
"""Unit of the journal: payload alignment, smallest index piece, page of the page cache."""

SECTOR = 512
"""Unit of disk sizes and of lengths in records."""

MAX_DISK_SIZE = 256 << 40
"""256 TiB: far beyond any disk that is mirrored, far below what block numbers (5 bytes) can address."""

MAX_EXTENT = 1 << 40
"""Longest extent in one record: lengths count sectors in 32 bits."""

SEGMENT_RECORDS = 262_144
"""Records in a segment: its header log stays at 16 MiB, and rebuilding reads it in one go."""

SEGMENT_BYTES = 512 << 20
"""Payload in a segment: small enough to drop in steps, large enough that a busy disk opens one every few seconds."""

WINDOW_BYTES = 256 << 10
"""Header log allocated and mapped at a time (4096 records): what an idle disk costs."""

INTERVAL_SEGMENTS = 4096
"""Segments in an interval before the writer closes it without a cut: bounds one index environment."""

MAX_CONTROL_BYTES = 64 << 10
"""A control record's payload; all are a few hundred bytes."""

TAIL_RECORDS = 262_144
"""Un-indexed records past which writes slow down: a view folds this many in well under a second."""

TAIL_DELAY_S = 0.002
"""How long a write waits when the tail is over its limit: slows a flood, never hurts a guest for long."""

COMMIT_INTERVAL_S = 0.5
"""Group commit: a second is promised, so one starts twice as often."""

COMMIT_LAG_NS = 5_000_000_000
"""Durable lag past which writes slow down: the store's disk cannot keep up."""

COMMIT_DELAY_S = 0.01
"""How long a write waits when the durable lag is over its limit."""

INDEX_BATCH = 20_000
"""Records indexed in one transaction: about 50 ms, so that a reader's snapshot is never old."""

INDEX_MAP_BYTES = 64 << 30
"""Address space of one interval's index; never resized under readers."""

INDEX_READERS = 1024
"""LMDB reader slots: every connection of the export process may hold one."""

SEQ_JUMP = 1 << 32
"""Added to the durable seq after an unclean boot, so that a lost seq is never given twice."""

NBD_CLIENTS = 64
"""Of one disk in one process at once: nbdcopy opens 16. A slow one holds the buffer of one request, 64 MiB at most."""

NAME_LENGTH = 64
EXPORT_NAME_LENGTH = 4096
"""NBD's own limit for an export name."""

REPLAY_LOG_BYTES = 1 << 30
"""Changes in a file system's journal that are replayed for browsing: as large as mke2fs and mkfs.xfs make one for most disks."""

REPLAY_CHANGED_BYTES = 128 << 20
"""What replay holds in memory: a worker that reads files has little, and such a log is a matter for the kernel."""

REPLAY_BLOCKS = 1 << 20
"""Blocks written or revoked that a journal names, of which each takes some 200 bytes to remember."""

REPLAY_OPEN_BYTES = 384 << 20
"""Transactions of a log that are held until their commit: several times the largest checkpoint that XFS writes."""

REPLAY_OPERATIONS = 8 << 20
"""Of an XFS log, which are some 100 bytes each: they take some 2 us to read, twice."""
