"""Pictures are written whole or not at all, never over another file, and say how they were made."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dit_accel.errors import ConfigError
from dit_accel.pipelines import media
from dit_accel.pipelines.media import Media
from dit_accel.pipelines.provenance import check_target, read, write

PICTURE = Media.picture(Image.new("RGB", (16, 12), "red"))
MADE_WITH = {"prompt": 'taco "ñ" 玉 \x1b[31m\n', "seed": 7, "recipe_settings": {"density": 0.5, "none": None}}


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.jpeg", "a.webp", "A.PNG"])
def test_settings_survive_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write(PICTURE, path, MADE_WITH)
    assert read(path) == MADE_WITH
    with Image.open(path) as image:
        assert image.size == PICTURE.image.size
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        write(PICTURE, tmp_path / "a.png", {})
    finally:
        os.umask(previous)
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o640


def test_existing_file_is_kept_and_force_replaces_it(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists already; --force"):
        write(PICTURE, path, {})
    assert path.read_bytes() == b"mine"
    write(PICTURE, path, MADE_WITH, force=True)
    assert read(path) == MADE_WITH


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_file_that_appears_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    path = tmp_path / "a.png"
    monkeypatch.setattr(os, "fsync", lambda _: path.write_bytes(b"theirs"))
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    with pytest.raises(ConfigError, match="exists already"):
        write(PICTURE, path, {})
    assert path.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", _no_links)
    write(PICTURE, tmp_path / "a.png", MADE_WITH)
    assert read(tmp_path / "a.png") == MADE_WITH


def _no_links(*_: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("force", [True, False])
def test_failure_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, force: bool
) -> None:
    path = tmp_path / "a.png"
    if force:
        path.write_bytes(b"old")

    def fail(_: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((KeyboardInterrupt, ConfigError)) as raised:
        write(PICTURE, path, {}, force=force)
    assert isinstance(raised.value, KeyboardInterrupt) or "No space left" in str(raised.value)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([b"old"] if force else [])


def test_good_target_is_accepted_and_left_alone(tmp_path: Path) -> None:
    check_target(tmp_path / "a.png", force=False)
    (tmp_path / "a.png").write_bytes(b"mine")
    check_target(tmp_path / "a.png", force=True)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"mine"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.pgn", "no picture or clip format is called '.pgn'. Did you mean '.png'?"),
        ("a", "no picture or clip format is called ''. Known: .gif, .jpeg, .jpg, .mp4, .png, .webp."),
        ("missing/a.png", "missing does not exist"),
        ("x" * 300 + ".png", "cannot be written (File name too long)"),
        ("folder.png", "is a folder"),
        ("here.png", "exists already; --force overwrites it"),
        ("dangling.png", "exists already; --force overwrites it"),
    ],
)
def test_bad_target_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "here.png").touch()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError) as raised:
        check_target(tmp_path / name, force=False)
    assert message in str(raised.value)


def test_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # a real folder would not refuse the superuser
    with pytest.raises(ConfigError, match=r"a.png: cannot be written \(Permission denied\)"):
        check_target(tmp_path / "a.png", force=False)


def test_too_much_text_for_exif_is_an_error(tmp_path: Path) -> None:
    made_with = {"prompt": "x" * 70_000}
    with pytest.raises(ConfigError, match="PNG takes longer texts"):
        write(PICTURE, tmp_path / "a.jpg", made_with)
    write(PICTURE, tmp_path / "a.png", made_with)
    assert read(tmp_path / "a.png") == made_with


def _picture_without_settings(path: Path) -> None:
    PICTURE.image.save(path)


def _broken_settings(path: Path) -> None:
    info = media.PngInfo()
    info.add_text(media.KEY, "[" * 200_000)
    PICTURE.image.save(path, pnginfo=info)


def _cut_off(path: Path) -> None:
    write(PICTURE, path, MADE_WITH)
    path.write_bytes(path.read_bytes()[:60])


def _huge_text(path: Path) -> None:
    info = media.PngInfo()
    info.add_text(media.KEY, "x" * (8 << 20), zip=True)
    PICTURE.image.save(path, pnginfo=info)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "no such file"),
        (lambda path: path.write_bytes(b""), "no picture"),
        (lambda path: path.write_bytes(os.urandom(4096)), "no picture"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 64), "no picture"),
        (lambda path: path.write_bytes(b"\xff\xd8\xff\xe1\xff\xffExif\0\0" + b"\xff" * 64), "no picture"),
        (_cut_off, "a.png"),
        (_huge_text, "no picture"),
        (_picture_without_settings, "carries no settings"),
        (_broken_settings, "carries no settings"),
    ],
)
def test_reading_what_is_not_ours(tmp_path: Path, make: Any, message: str) -> None:
    path = tmp_path / "a.png"
    make(path)
    with pytest.raises(ConfigError, match=message):
        read(path)


def test_reading_a_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(PICTURE, tmp_path / "a.png", MADE_WITH)
    monkeypatch.setattr(media, "READ_LIMIT", 10)
    with pytest.raises(ConfigError, match="larger than"):
        read(tmp_path / "a.png")
