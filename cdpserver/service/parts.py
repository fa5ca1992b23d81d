"""The service's parts, as the API is given them."""

from dataclasses import dataclass

from cdpserver.service.attached import Attached
from cdpserver.service.backups import Backups
from cdpserver.service.children import Children
from cdpserver.service.disks import Disks
from cdpserver.service.jobs import Jobs
from cdpserver.service.marks import Marks
from cdpserver.service.protection import Protection
from cdpserver.service.recoveries import Recoveries
from cdpserver.service.sampler import Sampler


@dataclass(frozen=True, slots=True)
class Parts:
    """What runs, or does what an operator asks."""

    children: Children
    disks: Disks
    protection: Protection
    jobs: Jobs
    recoveries: Recoveries
    marks: Marks
    sampler: Sampler
    attached: Attached
    backups: Backups
