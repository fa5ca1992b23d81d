"""What befalls a recovery, each with its defined end: kills, full disks, aborts, two at once. Real QEMU, as in
tests/test_rapid_recovery.py; one service for all.
"""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_rapid_recovery import SIZE, Vm, begin, copying, job_of, protect, wait
from tests.test_recovery_home import MIB, qemu_img, stream
from tests.test_service import ApiError, Server, connected, pattern, read, write
from tools.kit.processes import scratch, start
from tools.kit.processes import until as soon
from tools.kit.qmp import Qmp
from tools.kit.server import BIN

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
    with scratch("cdp-") as directory, Server(directory / "s") as running:
        yield running


def until_job(qmp: Qmp, job: str, status: str) -> None:
    """Returns at the very moment."""
    qmp.wait("JOB_STATUS_CHANGE", lambda found: found == {"id": job, "status": status})


@pytest.mark.parametrize("mode", ["mirror", "stream"])
def test_an_abort_of_an_overwrite_leaves_all_as_it_was(
    shared: Server, home: Path, short_path: Path, vm: str, mode: str
) -> None:
    content = protect(shared, vm=vm)
    old = home / "vda.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", old, "1M")
    inode = old.stat().st_ino

    def is_as_before() -> bool:
        with pytest.raises(ApiError, match="not protected"):
            shared.get(f"/v1/vms/{vm}")
        return [path.stat().st_ino for path in home.iterdir()] == [inode] and old.exists()

    more = {"mode": mode, "overwrite": True, "protect": True, "name": f"{vm}-n"}
    begun = begin(shared, home, short_path / "vm.qmp", f"{vm}/vda@good", **more)
    steps = f"/v1/recoveries/{begun['id']}"
    shared.post(f"{steps}:abort")
    assert is_as_before()
    with Vm(short_path, [str(old)], "old"), pytest.raises(ApiError, match=r"a QEMU has .* open: the VM runs"):
        shared.post(f"{steps}:retry")
    assert is_as_before()
    again = shared.post(f"{steps}:retry")
    with Vm(short_path, [again["disks"][0]["blockdev"]], "early") as running:
        source = "target-0" if mode == "mirror" else "export"
        with copying(shared, begun["id"], running, source, short_path / "vm.qmp"):
            write(running.uri(), pattern(7), 8192)
            content[8192:12288] = pattern(7)
            shared.post(f"{steps}:abort")
        assert is_as_before() == (mode == "mirror"), "a VM that writes at home keeps what it stands on"
        assert read(running.uri(), SIZE) == content
    if mode == "stream":
        shared.post(f"{steps}:undo", discard=True)
        assert is_as_before()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_a_chain_on_a_named_base_waits_for_room(
    shared: Server, home: Path, short_path: Path, vm: str
) -> None:
    """The base is of another disk: that costs room and nothing else."""
    content = protect(shared, vm=vm)
    base = short_path / "base.raw"
    base.write_bytes(bytes(content[: 4 * MIB]) + b"\x99" * MIB)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", home], check=True)
    try:
        begun = stream(shared, home, short_path / "vm.qmp", vm, shape="chain", base=str(base))
        target = begun["disks"][0]["target"]
        with Vm(short_path, [target]) as running:
            shown = wait(shared, begun["id"], "failed")
            assert "No space left" in shown["reason"]
            assert [path.name for path in home.iterdir()] == ["vda.qcow2"]
            assert read(running.uri(), SIZE) == content
            subprocess.run(["mount", "-o", "remount,size=200m", home], check=True)
            shared.post(f"/v1/recoveries/{begun['id']}:retry")
            wait(shared, begun["id"], "done")
            assert read(running.uri(), SIZE) == content
            chain = qemu_img("info", "-U", "--backing-chain", "--output=json", target)
            assert os.path.realpath(chain[-1]["filename"]) == str(base)
    finally:
        subprocess.run(["umount", home], check=True)


def test_two_recoveries_of_one_instant_are_both_home_and_undone_with_all_their_disks(
    shared: Server, home: Path, short_path: Path, vm: str
) -> None:
    """One is mirrored; the other is streamed, and undone after its QEMU was started anew from home."""
    points = [protect(shared, name, vm=vm, number=number) for number, name in enumerate(("vda", "vdb"))]
    for content in points:
        content[:MIB] = b"\xee" * MIB
    vms: dict[str, Vm] = {}
    begun: dict[str, Any] = {}
    held = {mode: [bytearray(one) for one in points] for mode in ("mirror", "stream")}

    def put(mode: str, place: int) -> None:
        for number, content in enumerate(held[mode]):
            with connected(vms[mode].uri(number)) as client:
                block = pattern(place + 7 * number + len(mode) + (mode == "mirror"))
                client.pwrite(block, place)
                client.flush()
            content[place : place + 4096] = block

    def check(mode: str) -> None:
        assert [read(vms[mode].uri(number), SIZE) for number in (0, 1)] == held[mode]

    with contextlib.ExitStack() as stack:
        for mode in held:
            (home / mode).mkdir()
            more = {"mode": mode, "name": f"{vm}-{mode}", "force": True}
            begun[mode] = begin(shared, home / mode, short_path / f"{mode}.qmp", f"{vm}@latest", **more)
        for mode, one in begun.items():
            disks = [disk["blockdev"] for disk in one["disks"]]
            vms[mode] = stack.enter_context(Vm(short_path, disks, mode))
            put(mode, 4096)
        for mode, one in begun.items():
            wait(shared, one["id"], "done")
            put(mode, 20 * MIB)
            check(mode)
        vms["stream"].end()
        disks = [disk["blockdev"] for disk in shared.get(f"/v1/recoveries/{vm}-stream")["disks"]]
        vms["stream"] = stack.enter_context(Vm(short_path, disks, "stream"))
        for mode in held:
            put(mode, 24 * MIB)
            shared.post(f"/v1/recoveries/{vm}-{mode}:undo")
        for mode, one in begun.items():
            shown = wait(shared, one["id"], "aborted")
            assert shown["phase"] == "undone" and [disk["at"] for disk in shown["disks"]] == ["fork", "fork"]
            put(mode, 28 * MIB)
            check(mode)
            forks = [shared.get(f"/v1/disks/{disk['fork']}")["uri"] for disk in one["disks"]]
            assert [read(uri, SIZE) for uri in forks] == held[mode]


def test_the_operators_commands_may_be_killed(shared: Server, home: Path, short_path: Path, vm: str) -> None:
    """The service does what was asked for; who asks again is told so."""
    content = protect(shared, vm=vm)
    log = short_path / "cdp.log"

    def cdp(*words: str | Path) -> Any:
        return start([BIN / "cdp", "--state-dir", shared.state_dir, "recover", *words], log)

    def begun() -> Any:
        with contextlib.suppress(ApiError):
            return shared.get(f"/v1/recoveries/{vm}-n")

    def killed(*words: str | Path, at: Callable[[], Any]) -> None:
        """A command that is killed as soon as the service is at it."""
        command = cdp(*words)
        soon(at, "what was asked for", every_s=0.001)
        command.kill()
        command.wait()

    where = ("--to", home, "--qmp", short_path / "vm.qmp", "--name", f"{vm}-n", "--no-protect")
    killed("start", f"{vm}/vda@good", *where, at=begun)
    id = begun()["id"]
    assert cdp("start", f"{vm}/vda@good", *where).wait(60) != 0
    assert f"cdp recover show {id}" in log.read_text()
    with Vm(short_path, [soon(lambda: begun()["uri"], "its fork")]) as running:
        follow = cdp("show", id, "--follow")
        wait(shared, id, "copying", "pivoting", "done")
        follow.kill()
        follow.wait()
        wait(shared, id, "done")
        write(running.uri(), pattern(9), 4096)
        content[4096:8192] = pattern(9)
        killed("undo", id, at=lambda: begun()["phase"] in ("undoing", "undone"))
        undone = cdp("undo", id).wait(60)  # under way, or over: either is said
        assert undone != 0 and "no undo now" in log.read_text()
        assert wait(shared, id, "aborted")["phase"] == "undone"
        assert cdp("retry", id).wait(60) == 0
        assert cdp("show", id, "--follow", "--json").wait(60) == 0
        shown = json.loads(log.read_text().splitlines()[-1])
        assert (shown["state"], shown["copied_bytes"]) == ("done", shown["total_bytes"])
        assert {"state", "phase", "copied_bytes", "total_bytes", "events"} <= shown.keys()
        assert read(running.uri(), SIZE) == content


def test_a_qemu_killed_in_the_pivot_of_two_disks_has_lost_nothing(
    shared: Server, home: Path, short_path: Path, vm: str
) -> None:
    """Killed while the guest's requests wait, then when the first disk is home and was written to there."""
    contents = [protect(shared, name, vm=vm, number=number) for number, name in enumerate(("vda", "vdb"))]
    for content in contents:
        content[:MIB] = b"\xee" * MIB

    def put(running: Vm, number: int, place: int) -> None:
        with connected(running.uri(number)) as client:
            client.pwrite(pattern(place + number), place)
            client.flush()
        contents[number][place : place + 4096] = pattern(place + number)

    def check(running: Vm) -> None:
        assert [read(running.uri(number), SIZE) for number in (0, 1)] == contents

    begun = begin(shared, home, short_path / "vm.qmp", f"{vm}@latest", force=True)
    id, steps = begun["id"], f"/v1/recoveries/{begun['id']}"
    forks = [disk["uri"] for disk in begun["disks"]]
    with Vm(short_path, forks, "early") as running, Qmp(running.other) as qmp:
        put(running, 0, 4096)
        put(running, 1, 8192)
        running.qmp.rename(short_path / "vm.qmp")
        until_job(qmp, job_of(id, 1), "ready")
        os.kill(shared.process.pid, signal.SIGSTOP)
        for job in (job_of(id), job_of(id, 1)):
            qmp.call("job-complete", id=job)  # in the place of the service, which looks five times a second
            until_job(qmp, job, "pending")
        running.end()
        os.kill(shared.process.pid, signal.SIGCONT)
    shown = wait(shared, id, "failed")
    assert [disk["at"] for disk in shown["disks"]] == ["fork", "fork"]
    with Vm(short_path, [disk["blockdev"] for disk in shown["disks"]], "early") as running:
        check(running)
        with Qmp(running.other) as qmp:
            running.qmp.rename(short_path / "vm.qmp")
            shared.post(f"{steps}:retry")
            until_job(qmp, job_of(id), "concluded")
            os.kill(shared.process.pid, signal.SIGSTOP)
            try:
                put(running, 0, 20 * MIB)
                running.end()
            finally:
                os.kill(shared.process.pid, signal.SIGCONT)
    shown = wait(shared, id, "failed")
    assert shown["phase"] == "pivoting" and [disk["at"] for disk in shown["disks"]] == ["home", "home"]
    with Vm(short_path, forks):
        shared.post(f"{steps}:retry")
        assert "its newest content is in" in wait(shared, id, "failed")["reason"]
    with Vm(short_path, [disk["blockdev"] for disk in shown["disks"]]) as running:
        shared.post(f"{steps}:retry")
        wait(shared, id, "done")
        check(running)


def test_what_is_open_or_no_base_image_is_refused_before_anything_is_written(
    shared: Server, home: Path, short_path: Path, vm: str
) -> None:
    protect(shared, vm=vm)
    large, used = short_path / "large.raw", short_path / "used.qcow2"
    with large.open("wb") as file:
        file.truncate(SIZE + MIB)
    for path in (used, home / "vda.qcow2"):
        qemu_img("create", "-q", "-f", "qcow2", path, str(SIZE))
    bases = {
        "no image file": short_path / "none.raw",
        "more than the disk's": large,
        "in the state directory": shared.state_dir / "version",
        "cannot be a base image and what is written": home / "vda.qcow2",
        "which must not change": used,
    }
    with Vm(short_path, [str(used)], "other"):
        with pytest.raises(ApiError, match=f"a QEMU has {used} open"):
            begin(shared, used, short_path / "vm.qmp", f"{vm}/vda@good", overwrite=True)
        for match, base in bases.items():
            with pytest.raises(ApiError, match=match):
                stream(shared, home, short_path / "vm.qmp", vm, shape="chain", base=str(base), overwrite=True)
    assert {path.name for path in home.iterdir()} == {"vda.qcow2"}
    assert not [fork for fork in shared.get("/v1/forks") if fork["base"].startswith(f"{vm}/")]
