"""Samples of a WebDataset tar are texts; a link or a sample without text is named."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import webdataset

from data.config import DataUsageError
from tests.data.files import TEXTS, bad, read, tar, texts, write


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_link_in_a_tar_is_no_text_that_vanishes(tmp_path: Path, kind: bytes) -> None:
    def packed(name: str) -> Path:
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            folder, link = tarfile.TarInfo("train"), tarfile.TarInfo(f"train/{name}")
            folder.type, link.type, link.linkname = tarfile.DIRTYPE, kind, "train/a.txt"
            archive.addfile(folder)
            archive.addfile(link)
        return tmp_path / "a.tar"

    with pytest.raises(DataUsageError, match=r"a\.tar: member 'train/b\.txt' is a link or device"):
        read(packed("b.txt"))
    (none,) = bad(read(packed("b.png")))
    assert (none.reason, none.detail) == ("no text member", "it has .png")


def test_a_sample_of_a_tar_is_its_text_and_says_when_it_has_none(tmp_path: Path) -> None:
    members = [
        ("a.json", b'{"text": "no", "url": "u"}'),
        ("a.txt", b"one"),
        ("b.jpg", b"\xff"),
        ("b.cls", b"7"),
        ("c.json", b'{"text": "three"}'),
    ]
    items = read(write(tmp_path / "a.tar", tar(members)))
    assert texts(items) == ["one", "three"]
    (none,) = bad(items)
    assert (none.place, none.reason) == (f"{tmp_path}/a.tar, sample 'b'", "no text member")
    assert none.detail == "it has .jpg, .cls"


def test_what_webdataset_writes_is_read(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar.gz", "c.tgz"):
        packed = name != "a.tar"
        with webdataset.TarWriter(str(tmp_path / name), compress=packed) as writer:
            for index, text in enumerate(TEXTS):
                writer.write({"__key__": f"{index:06d}", "txt": text, "json": {"n": index}})
        assert texts(read(tmp_path / name)) == TEXTS
