"""Files of a point: every file system that is read against the tree that it was made from."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdpserver.errors import NotFoundError, RefusedError, UsageError
from cdpserver.files.browser import Browser
from tests import filesystems as make
from tests.filesystems import ImageDisk

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make.source_tree(tmp_path_factory.mktemp("files") / "tree")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make.source_tree(tmp_path_factory.mktemp("plain") / "tree", posix=False)


@pytest.fixture(scope="module")
def ext4(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.setxattr(tree / "large", "user.note", b"kept")
    return make.make_ext(tmp_path_factory.mktemp("image") / "ext4.img", tree)


@pytest.fixture
def browser(ext4: Path) -> Iterator[Browser]:
    with Browser(ImageDisk(ext4)) as opened:
        yield opened


def compare(image: Path, tree: Path, *, exact: bool = True, left_out: int = 0) -> None:
    """Everything in the image is as in the tree; `exact`ly so in mode and time."""
    seen = 0
    with Browser(ImageDisk(image)) as browser:
        volume = browser.choose(None)
        browser.open(volume)
        for file in browser.walk(volume, b"/"):
            assert not file.why, file
            if not file.path or file.path[0] == b"lost+found":
                continue
            path = Path(os.fsdecode(b"/".join([bytes(tree), *file.path])))
            known = path.lstat()
            seen += 1
            assert file.type == kind(known.st_mode), path
            if exact:
                assert (file.mode, file.mtime_ns) == (stat.S_IMODE(known.st_mode), known.st_mtime_ns), path
            if file.type == "link":
                assert file.target == os.readlink(os.fsencode(path))
            if file.type == "file":
                assert file.size == known.st_size
                assert make.is_same(browser.content(file), path), path
    assert seen == sum(len(folders) + len(files) for _, folders, files in os.walk(tree)) - left_out


def kind(mode: int) -> str:
    return (
        "dir"
        if stat.S_ISDIR(mode)
        else "link"
        if stat.S_ISLNK(mode)
        else "fifo"
        if stat.S_ISFIFO(mode)
        else "file"
    )


@pytest.mark.parametrize(
    ("version", "options"),
    [
        ("ext2", ("-b", "1024")),
        ("ext3", ("-b", "4096")),
        ("ext4", ()),
        ("ext4", ("-O", "inline_data,^has_journal", "-I", "256")),
        ("ext4", ("-b", "1024", "-O", "^64bit,^metadata_csum")),
    ],
)
def test_ext(version: str, options: tuple[str, ...], tree: Path, tmp_path: Path) -> None:
    compare(make.make_ext(tmp_path / "image", tree, *options, kind=version), tree)


@pytest.mark.parametrize("options", [(), ("-m", "crc=0"), ("-n", "size=8192"), ("-i", "nrext64=1")])
def test_xfs(options: tuple[str, ...], tree: Path, tmp_path: Path) -> None:
    # A prototype knows no times, no strange names, no pipes; hard links become files.
    strange = [name for name in os.listdir(os.fsencode(tree)) if not _a_word(name)]
    compare(make.make_xfs(tmp_path / "image", tree, *options), tree, exact=False, left_out=len(strange) + 2)


def _a_word(name: bytes) -> bool:
    text = os.fsdecode(name)
    return text.isascii() and text.isprintable() and " " not in text


def test_xfs_shows_nothing_of_what_was_never_written(tree: Path, tmp_path: Path) -> None:
    """An extent that was allocated and never written holds what was deleted there before."""
    image = make.make_xfs(tmp_path / "image", tree)
    with Browser(ImageDisk(image)) as browser:
        number = browser.stat("", b"/large").id
        before = make.content_of(browser, "", b"/large")
    make.run("xfs_db", "-x", "-c", f"inode {number}", "-c", "write -d u3.bmx[0].extentflag 1", image)
    with Browser(ImageDisk(image)) as browser:
        now = make.content_of(browser, "", b"/large")
    assert len(now) == len(before) and not any(now)


def test_btrfs(tree: Path, tmp_path: Path) -> None:
    compare(make.make_btrfs(tmp_path / "image", tree), tree)


@pytest.mark.parametrize("bits", [16, 32])
def test_fat(bits: int, plain: Path, tmp_path: Path) -> None:
    compare(make.make_fat(tmp_path / "image", plain, bits), plain, exact=False)


def test_a_fat_chain_that_goes_backwards(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a").write_bytes(b"1" * 512 + b"2" * 512)
    held = bytearray(make.make_fat(tmp_path / "image", tree, 16, 16 << 20).read_bytes())
    sector, cluster, reserved, tables, roots = (
        int.from_bytes(held[11:13], "little"), held[13], int.from_bytes(held[14:16], "little"), held[16],
        int.from_bytes(held[17:19], "little"),
    )  # fmt: skip
    table, table_size = reserved * sector, int.from_bytes(held[22:24], "little") * sector
    data = table + tables * table_size + roots * 32
    size = sector * cluster
    entry = held.index(b"A          ", data - roots * 32, data)
    # The file is the clusters 6, then 5.
    held[entry + 26 : entry + 28] = (6).to_bytes(2, "little")
    held[entry + 28 : entry + 32] = (2 * size).to_bytes(4, "little")
    held[table + 12 : table + 14], held[table + 10 : table + 12] = b"\x05\x00", b"\xff\xff"
    held[data + 4 * size : data + 5 * size] = b"6" * size
    held[data + 3 * size : data + 4 * size] = b"5" * size
    with Browser(ImageDisk(bytes(held))) as browser:
        assert make.content_of(browser, "", b"/A") == b"6" * size + b"5" * size
        assert make.content_of(browser, "", b"/a") == b"6" * size + b"5" * size
    held[table + 10 : table + 12] = b"\x06\x00"
    with Browser(ImageDisk(bytes(held))) as browser:
        file = browser.stat("", b"/a")
        assert len(b"".join(data or b"" for _, _, data in browser.content(file))) == 2 * size


def test_ntfs(plain: Path, tmp_path: Path) -> None:
    files = [path for path in plain.iterdir() if path.is_file()]
    image = make.make_ntfs(tmp_path / "image", files)
    with Browser(ImageDisk(image)) as browser:
        assert {file.name for file in browser.entries("", b"/")} == {os.fsencode(path.name) for path in files}
        for path in files:
            assert make.content_of(browser, "", os.fsencode(path.name)) == path.read_bytes()
        assert make.content_of(browser, "", b"LARGE") == (plain / "large").read_bytes()


def test_exfat(tmp_path: Path) -> None:
    with Browser(ImageDisk(make.make_exfat(tmp_path / "image"))) as browser:
        (file,) = browser.entries("", b"/")
        assert (file.name, file.size, file.mtime_ns) == (b"file", 2000, 1_699_963_200 * 10**9)
        assert make.content_of(browser, "", b"/FILE") == b"e" * 1000 + bytes(1000), (
            "what was never written is zeros"
        )


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/fuse").exists(),
    reason="a FUSE mount by ntfs-3g needs root and /dev/fuse",
)
@pytest.mark.parametrize("kind", ["ntfs", "exfat"])
def test_trees_written_through_fuse(kind: str, plain: Path, tmp_path: Path) -> None:
    """By the drivers that others use; NTFS also with links, holes and a compressed file."""
    mount = tmp_path / "mnt"
    mount.mkdir()
    device = ""
    if kind == "ntfs":
        image = make.make_ntfs(tmp_path / "image", [])
        make.run("ntfs-3g", "-o", "compression", image, mount)
    else:
        image = make.make_exfat(tmp_path / "image", 64 << 20, empty=True)
        device = make.run("losetup", "-f", "--show", image).decode().strip()
        make.run("mount.exfat-fuse", device, mount)
    try:
        make.run("cp", "-r", "--preserve=timestamps", f"{plain}/.", mount)
        if kind == "ntfs":
            os.link(mount / "large", mount / "hard")
            os.symlink("many/file-1", mount / "link")
            make.run("truncate", "-s", "30M", mount / "hole")
            (mount / "packed").mkdir()
            os.setxattr(mount / "packed", "system.ntfs_attrib_be", (0x800).to_bytes(4, "big"))
            (mount / "packed" / "text").write_bytes(b"compress me " * 20000)
    finally:
        make.run("umount", mount)
        if device:
            make.run("losetup", "-d", device)
    with Browser(ImageDisk(image)) as browser:
        found = {file.path: file for file in browser.walk("", b"/")}
        assert not [file for file in found.values() if file.why]
        for folder, _, names in os.walk(plain):
            for name in names:
                path = Path(folder, name)
                file = browser.stat("", os.fsencode(path.relative_to(plain)))
                assert make.is_same(browser.content(file), path), path
                assert abs(file.mtime_ns - path.stat().st_mtime_ns) <= 2 * 10**9
        if kind == "ntfs":
            assert found[(b"hard",)].id == found[(b"large",)].id
            assert found[(b"link",)].target == b"many/file-1"
            assert found[(b"hole",)].size == 30 << 20
            assert make.content_of(browser, "", b"/packed/text") == b"compress me " * 20000


# --- paths


def test_paths_stay_inside(browser: Browser, tree: Path) -> None:
    assert browser.stat("", b"/relative", follow=True).path == (b"many", b"file-1")
    assert browser.stat("", b"/many/../../../large").size == 2_000_000
    with pytest.raises(NotFoundError):
        browser.stat("", b"/outside", follow=True)
    with pytest.raises(NotFoundError):
        browser.stat("", b"/large/below")
    assert browser.xattrs(browser.stat("", b"/large")) == {"user.note": b"kept"}


def test_finding(browser: Browser) -> None:
    found = {file.path for file in browser.find("", b"/", name=b"file-1*")}
    assert found == {(b"many", f"file-{n}".encode()) for n in range(400) if str(n).startswith("1")}
    assert [file.path for file in browser.find("", b"/level0", regex=rb"/bottom$")] == [
        (*(f"level{n}".encode() for n in range(1, 30)), b"bottom")
    ]
    assert not list(browser.find("", b"/", newer_ns=make.MTIME_NS, type="file"))
    with pytest.raises(UsageError):
        list(browser.find("", b"/", regex=b"("))


def test_holes_are_told_not_read(browser: Browser) -> None:
    sparse = browser.stat("", b"/sparse")
    assert [(start, end) for start, end, place in browser.extents(sparse) if place == -1] == [(0, 40 << 20)]
    assert browser.head(sparse, 10) == bytes(10)


# --- partitions


@pytest.mark.parametrize("label", ["gpt", "dos"])
def test_partitions(label: str, ext4: Path, plain: Path, tmp_path: Path) -> None:
    fat = make.make_fat(tmp_path / "fat", plain, 16, 16 << 20).read_bytes()
    disk = make.disk_with(bytes(1 << 20), fat, ext4.read_bytes(), label=label)
    with Browser(ImageDisk(disk)) as browser:
        assert [(volume.name, volume.holds) for volume in browser.volumes()] == [
            ("p1", ""), ("p2", "fat"), ("p3", "ext"),
        ]  # fmt: skip
        assert [volume.size for volume in browser.volumes()] == [1 << 20, len(fat), ext4.stat().st_size]
        with pytest.raises(UsageError, match="p2, p3"):
            browser.choose(None)
        assert len(make.content_of(browser, "p3", b"/large")) == 2_000_000
        with pytest.raises(NotFoundError):
            browser.open("p4")
        with pytest.raises(RefusedError):
            browser.open("p1")


@pytest.mark.skipif(os.geteuid() != 0, reason="lvm wants a block device: a loop device needs root")
def test_logical_volumes(ext4: Path, tmp_path: Path) -> None:
    """In two pieces that are not neighbours."""
    held = make.disk_with_lvm(tmp_path / "disk", ext4.read_bytes())
    with Browser(ImageDisk(held)) as browser:
        assert [(v.name, v.holds) for v in browser.volumes()] == [
            ("", "lvm"), ("lv/cdpfiles/other", ""), ("lv/cdpfiles/root", "ext"),
        ]  # fmt: skip
        assert browser.choose(None) == "lv/cdpfiles/root"
        assert len(make.content_of(browser, "lv/cdpfiles/root", b"/large")) == 2_000_000
