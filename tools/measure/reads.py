"""4 KiB random reads of a point, against qemu-nbd on one QCOW2 file with the same content."""

from recovery.opened import alone
from tools.kit.processes import FailedError, run
from tools.measure import fio
from tools.measure.context import Context
from tools.measure.result import Goal, Measure
from tools.measure.servers import qemu_nbd

OURS, VERIFIED, QCOW2 = "cdpserver point", "cdpserver point, verified", "qemu-nbd QCOW2"
DEPTHS = (16, 1)


def random_4k(context: Context) -> list[Measure]:
    """The disk is written whole in random order, so that neighbours of the point lie far apart in the journal."""
    size, directory, ours = context.sizes.read_disk, context.directory, context.ours
    goal = (Goal(OURS, QCOW2, 1.0, "1.0x qemu-nbd"),)
    measures = {
        depth: Measure(
            f"read-4k-{depth}", f"4 KiB random read of a point, depth {depth}", "IOPS", "higher", goal
        )
        for depth in DEPTHS
    }
    image = directory / "same.qcow2"
    with ours.disk(size) as name:
        job = fio.Job("randwrite", 4096, 16, size, io_bytes=size)
        ours.fill(name, job, directory)
        point = ours.server.uri(f"{name}@latest")
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-W", point, image)
        if run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", point, image, accept=(0, 1)).returncode:
            raise FailedError("the point and its copy differ")
        context.settle()
        verifying = directory / "verified.sock"
        alone_ = alone("export", [f"state_dir={ours.server.path}", "alone=1", "verify=reads"], verifying)
        verified = f"nbd+unix:///{name}@latest?socket={verifying}"
        with qemu_nbd(image, directory / "qemu-nbd.sock", "-r") as other, alone_:
            for number in range(context.rounds):
                for depth, measure in measures.items():
                    reading = fio.Job("randread", 4096, depth, size, seconds=context.sizes.read_seconds)
                    for subject, uri in ((OURS, point), (VERIFIED, verified), (QCOW2, other)):
                        figures = fio.read(uri, reading, directory)
                        measure.add(subject, figures.iops)
                        context.say(
                            f"{measure.name} {number + 1}/{context.rounds} {subject}: {figures.iops:,.0f} IOPS"
                        )
    image.unlink()
    return list(measures.values())
