"""The commands of retention in the tree: policies, and locks on points."""

from cdpserver import names
from recovery.arguments import take_disk, take_point
from recovery.tree import Commands, Group, lazy

POLICY_OPTIONS = (
    ("rp_every", "SPAN", "how far apart recovery points are listed: 1s"),
    ("bp_every", "SPAN", "how often a base point is cut: 20m"),
    ("keep_rp", "SPAN", "how long instants are kept: 24h, or in steps '1h 24h/1m 7d/1h'"),
    ("keep_bp", "SLOTS", "how many base points after that: '48h 7d 4w 12m' (months), or none"),
    ("max_chain", "N", "how many files a base point and what it stands on may be: 128"),
    ("size_cap", "SIZE", "how much room the history may take: 500G, or none"),
    ("at_cap", "WHAT", "what happens at the cap: shorten (history), or refuse (writes)"),
    ("mark_every", "SPAN", "how often a bookmark of the VM is set: 1h, or none"),
    ("freeze", "yes|no", "whether the guest is frozen for these bookmarks"),
    ("drill", "TIME", "when the newest point is drilled each day, on the host's clock: 03:00, or none"),
    ("drill_command", "FILE", "the QEMU command line that drills start, or none"),
    ("drill_marker", "REGEX", "the serial line that they wait for, or none"),
    ("drill_check", "SCRIPT", "the program that has to end with 0, or none"),
    (
        "backup",
        "WHEN",
        "when the newest good point is backed up, and how many are kept: 'daily 02:00 keep 7d 4w 12m', or none",
    ),
    ("backup_to", "PATH", "the repository, which cdp repo add has registered, or none"),
    ("backup_copy", "PATH", "a second one, to which backups are copied, or none"),
)
"""As in cdpserver.retention.policy, which is loaded only when it is needed."""


def add_retention(commands: Commands) -> None:
    """`cdp policy`, `cdp prune`."""
    policy = commands.group("policy", "how long history is kept")
    set_ = policy.leaf(
        "set",
        lazy("policies", "policy_set"),
        "Change values of a disk's policy, or of a VM's for all its disks. In effect at once.",
        "cdp policy set web/vda --keep-rp 3d --keep-bp '7d 4w 12m' --size-cap 500G",
    )
    show = policy.leaf(
        "show",
        lazy("policies", "policy_show"),
        "Show a policy as it works, and where each value comes from.",
        "cdp policy show web/vda",
    )
    clear = policy.leaf(
        "clear",
        lazy("policies", "policy_clear"),
        "Take back what was said of a disk or VM: what stands above it holds again.",
        "cdp policy clear web/vda",
    )
    for command in (set_, show, clear):
        command.add_argument("name", metavar="DISK|VM", type=names.check_disk_name)
    for name, metavar, summary in POLICY_OPTIONS:
        # `--freeze` alone says yes.
        alone = "yes" if name == "freeze" else None
        set_.add_argument(
            f"--{name.replace('_', '-')}",
            metavar=metavar,
            help=summary,
            const=alone,
            nargs="?" if alone else None,
        )
    prune = commands.leaf(
        "prune",
        lazy("pruning", "prune"),
        "Drop history that no policy keeps, which the service also does by itself.",
        "cdp prune web/vda --dry-run",
    )
    take_disk(prune, optional=True)
    prune.add_argument("--dry-run", action="store_true", help="only show what would go, and why")


def add_locks(point: Group) -> None:
    """`cdp point lock`, `unlock`, `locks`."""
    lock = point.leaf(
        "lock",
        lazy("locks", "lock"),
        "Hold a point: it outlives every policy. A point that is locked already gets the new terms.",
        "cdp point lock web/vda@before-upgrade --until 90d --reason 'ticket 4711'",
    )
    take_point(lock)
    lock.add_argument(
        "--until", metavar="TIME", help="2027-01-31T00:00:00Z, or from now: 30d; else until it is unlocked"
    )
    lock.add_argument("--reason", metavar="TEXT", help="shown beside it")
    lock.add_argument("--immutable", action="store_true", help="nobody can end it before --until")
    unlock = point.leaf(
        "unlock", lazy("locks", "unlock"), "Take a lock back.", "cdp point unlock lock-5a0c93d1"
    )
    unlock.add_argument("lock", metavar="LOCK|DISK@WHEN", help="its id, or the point that it holds")
    listing = point.leaf("locks", lazy("locks", "locks"), "List the locks.", "cdp point locks web/vda")
    take_disk(listing, optional=True)


USAGE_FIELDS = """
fields of --json (bytes on the file system, times in ns):
  time_ns   now, by the server's clock
  disks     disk, id, state; bytes, and of these base (the first copy), data and headers (the journal), index,
            base_points, maps (with notes), other; per_hour (growth in the last 24 hours, null where history is
            shorter than a minute), of this journal_per_hour, base_points_per_hour; held_ns (how far back the
            journal reaches without a break); error (null, or what cannot be read)
  images    base images, which disks share
  free      what the file system has left
  caps      of ("disk NAME", "store", "file system"), bytes, cap_bytes, then (shorten, refuse, full), in_ns (how
            long until the cap is reached, at the soonest; 0 is now, null never at this growth)
"""

FORECAST_FIELDS = """
fields of --json (bytes, times in ns):
  disk, time_ns, keep, keep_bp, bp_every   what was asked, with the disk's policy for the rest
  held_ns    how far back the journal reaches without a break
  rp         every instant of the first step of keep (every_instant_ns): bytes; of these measured (in the journal
             now), extrapolated (by the write rate, per_hour); thinned (of each further step span_ns, every_ns,
             count of instants, bytes)
  bp         base points, their content without the files' own tables: bytes, count; gaps (gap_ns, count,
             bytes_each: so many base points, that far from the one below); oldest_bytes (the oldest one holds all
             that was written before it); measured_ns (longer gaps are extrapolated, never past the disk's size)
  base       the first copy
  bytes      rp, bp and base together; bytes_now; size_cap and fits (null without a cap)
  samples    what the estimate was measured from: window_ns, bytes (distinct bytes written within it, on average),
             least, most, places (windows looked at), records
"""


def add_capacity(commands: Commands) -> None:
    """`cdp usage`, `cdp forecast`."""
    usage = commands.leaf(
        "usage",
        lazy("capacity", "show_usage"),
        "Show what each disk takes by kind, how fast it grows and when a cap is reached. Needs no server.",
        "cdp usage web/vda",
    )
    take_disk(usage, optional=True)
    usage.epilog = f"{usage.epilog}{USAGE_FIELDS}"
    forecast = commands.leaf(
        "forecast",
        lazy("capacity", "show_forecast"),
        "Estimate from a disk's journal what another policy would need. Needs no server, and changes nothing.",
        "cdp forecast web/vda --keep 24h --keep-bp '48h 7d 4w'",
    )
    take_disk(forecast)
    forecast.add_argument(
        "--keep", metavar="SPAN", help="how long instants are kept: 24h, or in steps '1h 24h/1m 7d/1h'"
    )
    forecast.add_argument("--keep-bp", metavar="SLOTS", help="how many base points after that: '48h 7d 4w'")
    forecast.add_argument("--bp-every", metavar="SPAN", help="how often a base point is cut: 20m")
    forecast.epilog = f"{forecast.epilog}{FORECAST_FIELDS}"
    for command in (usage, forecast):
        command.add_argument(
            "--config", metavar="FILE", help="cdpserver's configuration, for its [policy] and [store]"
        )
