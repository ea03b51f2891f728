"""Contract E7: paths only under a mounted root; outside and absent are the same 404."""

import contextlib
import os
import socket
from pathlib import Path

import pytest

from sightline.errors import NotFound, PayloadTooLarge, SourceRefused
from sightline.settings import ImageSettings
from sightline.sources import Sources, read_below
from sightline.wire import ImagePath


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a picture, a folder, links and oddities; beside it what must stay unseen."""
    root = tmp_path / "images"
    (root / "deep").mkdir(parents=True)
    (root / "a.png").write_bytes(b"a")
    (root / "deep" / "b c+ü%20.png").write_bytes(b"b")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "images-secret").mkdir()
    (tmp_path / "images-secret" / "x").write_bytes(b"secret")
    (root / "inner-link.png").symlink_to("deep/../a.png")
    (root / "outer-link.png").symlink_to("../secret")
    (root / "absolute-link.png").symlink_to(tmp_path / "secret")
    (root / "folder-link").symlink_to(tmp_path)
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("nowhere")
    (root / "device").symlink_to("/dev/zero")
    os.mkfifo(root / "fifo")
    return root


def settings(root: Path | None, **more: object) -> ImageSettings:
    return ImageSettings(_env_file=None, image_root=root, **more)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.png", b"a"),
        ("./a.png", b"a"),
        ("deep/b c+ü%20.png", b"b"),
        ("deep/../a.png", b"a"),
        ("deep//b c+ü%20.png", b"b"),
        ("inner-link.png", b"a"),
        ("../images/a.png", b"a"),
    ],
)
def test_files_below_are_read(root, path, expected):
    assert read_below(settings(root), path) == expected


def test_an_absolute_path_below_the_root_is_one_of_its_files(root):
    assert read_below(settings(root), str(root / "a.png")) == b"a"


def test_the_root_may_be_a_link(root, tmp_path):
    (tmp_path / "mount").symlink_to(root)
    assert read_below(settings(tmp_path / "mount"), "a.png") == b"a"
    assert read_below(settings(tmp_path / "mount"), str(tmp_path / "mount" / "a.png")) == b"a"


@pytest.mark.parametrize(
    "path",
    ["absent.png", "../secret", "deep/../../secret", "../images-secret/x", "/etc/passwd", "//etc/passwd", "~/secret",
     "outer-link.png", "absolute-link.png", "folder-link/secret", "loop", "dangling", "deep", ".", "", "/", "..",
     "fifo", "device", "/dev/zero", "a.png/x", "a\0.png", "a.png\0", "x" * 300, "x/" * 3000, "\ud800", "file:a.png",
     "s3://b/k", "/proc/self/environ"],
)  # fmt: skip
def test_everything_else_is_the_same_404(root, path):
    with pytest.raises(NotFound) as caught:
        read_below(settings(root), path)
    assert (caught.value.status, caught.value.code, caught.value.message) == (
        404, "image_not_found", "There is no such image."
    )  # fmt: skip


def test_a_socket_is_no_image(root):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket"))
        with pytest.raises(NotFound):
            read_below(settings(root), "socket")


def test_a_link_put_there_after_the_check_is_not_followed(root, tmp_path, monkeypatch):
    resolve = Path.resolve

    def resolve_then_swap(self, strict=False):
        real = resolve(self, strict=strict)
        if real.name == "a.png":
            real.unlink()
            real.symlink_to(tmp_path / "secret")
        return real

    monkeypatch.setattr(Path, "resolve", resolve_then_swap)
    with pytest.raises(NotFound):
        read_below(settings(root), "a.png")


def test_no_descriptor_is_left_open(root):
    before = len(os.listdir("/proc/self/fd"))
    for path in ("a.png", "absent.png", "deep", "fifo", "deep/absent", "outer-link.png"):
        for _ in range(5):
            with contextlib.suppress(NotFound):
                read_below(settings(root), path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_large_file_is_413(root):
    (root / "large").write_bytes(b"x" * 11)
    assert read_below(settings(root, max_image_bytes=11), "large")
    with pytest.raises(PayloadTooLarge):
        read_below(settings(root, max_image_bytes=10), "large")


async def test_without_a_root_paths_are_refused(root):
    sources = Sources(settings(None))
    with pytest.raises(SourceRefused) as caught:
        await sources.fetch(ImagePath(str(root / "a.png")))
    assert caught.value.code == "path_not_allowed"
    await sources.aclose()


async def test_fetch_reads_beside_the_loop(root):
    sources = Sources(settings(root))
    assert await sources.fetch(ImagePath("a.png")) == b"a"
    await sources.aclose()
