"""Encrypted volumes: refused without a key; with one, what a LUKS volume holds is read like any other."""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import filesystems as make
from tests.test_files_out import cdp
from tests.test_service import Server
from tests.test_volume_export import protect

pytestmark = pytest.mark.real


def make_luks(image: Path, plain: Path) -> bytes:
    """LUKS 1 with what `plain` holds; the passphrase is `open sesame`.

    QEMU fills it and cryptsetup makes it: QEMU first measures how quick this machine is, which it cannot on every machine.
    """
    header = 2 << 20
    with image.open("wb") as empty:
        empty.truncate(header + plain.stat().st_size)
    make.run(
        *("cryptsetup", "luksFormat", "--batch-mode", "--type", "luks1", "--pbkdf-force-iterations", "1000"),
        *("--key-file", "-", image),
        stdin=b"open sesame",
    )
    secret = ("--object", "secret,id=key,data=open sesame")
    filled = f"driver=luks,key-secret=key,file.filename={image}"
    make.run("qemu-img", "convert", *secret, "-n", "--target-image-opts", plain, filled)
    return image.read_bytes()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("locked")
    tree = make.source_tree(directory / "tree", 20)
    luks = make_luks(directory / "luks", make.make_ext(directory / "ext4", tree, size="16M"))
    parts = make.disk_with(make.make_ext(directory / "boot", tree, size="8M").read_bytes()[:4096], luks)
    with tempfile.TemporaryDirectory(prefix="cdp-") as path, Server(Path(path) / "s") as running:
        protect(running, "luks", luks)
        protect(running, "parts", parts)
        newer = bytearray(luks[: 1 << 20])
        newer[6:8] = b"\0\2"
        protect(running, "newer", bytes(newer))
        protect(running, "bitlocker", (b"\xeb\x58\x90-FVE-FS-").ljust(1 << 20, b"\0"))
        yield running


@pytest.fixture
def key(tmp_path: Path) -> str:
    path = tmp_path / "key"
    path.write_text("open sesame\n")
    return str(path)


def test_without_a_key_it_is_refused(server: Server) -> None:
    said = cdp(server.state_dir, "ls", "luks@latest", "/", code=3).stderr
    assert b"encrypted (luks)" in said and b"--key-file" in said
    assert b"encrypted (bitlocker)" in cdp(server.state_dir, "ls", "bitlocker@latest", code=3).stderr
    volumes = json.loads(cdp(server.state_dir, "ls", "parts@latest", "--json").stdout)
    assert [volume["holds"] for volume in volumes] == ["ext", "luks"]


def test_with_its_key_it_is_read(server: Server, key: str, tmp_path: Path) -> None:
    state = server.state_dir
    for point in ("luks@latest", "parts@latest/p2", "parts@latest"):
        rows = json.loads(cdp(state, "ls", point, "/many", "--json", "--key-file", key).stdout)
        assert len(rows) == 20
    out = tmp_path / "out"
    cdp(state, "get", "luks@latest", "/large", "--output", str(out), "--key-file", key)
    assert os.path.getsize(out / "large") == 2_000_000
    assert (
        cdp(state, "cat", "luks@latest", "/level0/level1/../../hard", "--key-file", key).stdout
        == (out / "large").read_bytes()
    )


def test_what_a_key_cannot_do(server: Server, key: str, tmp_path: Path) -> None:
    state = server.state_dir
    wrong, several, endless = tmp_path / "wrong", tmp_path / "several", tmp_path / "endless"
    wrong.write_text("open barley")
    several.write_bytes(b"a\nb")
    endless.write_bytes(b"x" * 9999)
    cases = (
        ("luks@latest", str(wrong), 3, b"does not open"),
        ("luks@latest", str(several), 2, b"no passphrase"),
        ("luks@latest", str(endless), 2, b"no passphrase"),
        ("luks@latest", str(tmp_path / "none"), 2, b"cannot be read"),
        ("newer@latest", key, 3, b"LUKS 2"),
        ("bitlocker@latest", key, 2, b"LUKS is in: none"),
    )
    for point, file, code, said in cases:
        assert said in cdp(state, "ls", point, "/", "--key-file", file, code=code).stderr, (point, file)


def test_without_the_service(server: Server, key: str) -> None:
    """Last: it ends it."""
    server.stop()
    rows = json.loads(
        cdp(server.state_dir, "ls", "parts@latest", "/many", "--json", "--key-file", key).stdout
    )
    assert len(rows) == 20
