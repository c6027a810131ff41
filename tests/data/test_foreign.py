"""Foreign tars become datasets; what cannot be training data is refused, by its own name."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import foreign
from data.config import DataError, DataUsageError
from data.foreign import Indexed, index
from data.manifest import read_manifest
from data.tokens import TokenSource
from data.verify import verify
from launcher.cli import run_command
from tests.data.tiny import flip_bit

EOS = 2


@pytest.fixture
def tokenizer(dataset: Path) -> Path:
    """Of 400 pieces."""
    return dataset / "tokenizer.model"


def test_arrays_of_every_type_become_documents_in_order(tmp_path: Path, tokenizer: Path) -> None:
    arrays = {
        "a.npy": np.array([5, 6, 7], "<u1"),
        "dir/b.tokens.npy": np.array([300, EOS], "<u2"),
        "b.npy": np.array([9], "<u4"),
        "c.npy": np.array([8, EOS, 8], "<i4"),
        "d.npy": np.array([11, 12], "<i8"),
        "e.bin": np.array([13, 14], "<u2").tobytes(),
        "a.json": b"{}",
    }
    found = _index(tmp_path, tokenizer, arrays, dtype="<u2")
    expected = [5, 6, 7, 2, 300, 2, 9, 2, 8, 2, 8, 2, 11, 12, 2, 13, 14, 2]
    assert _tokens(found, "train") == expected
    assert (found.eos_appended, found.eos_inside, found.ignored) == (5, 1, {"json": 1})
    assert read_manifest(found.output).counts["documents"] == 6
    assert verify(found.output, full=True).ok


def test_a_tar_of_webdataset_is_read(tmp_path: Path, tokenizer: Path) -> None:
    from webdataset.writer import TarWriter

    with TarWriter(str(tmp_path / "0.tar")) as writer:
        for i in range(20):
            writer.write({"__key__": f"{i:04d}", "npy": np.arange(i, i + 9), "cls": i})
    found = index([tmp_path / "0.tar"], tmp_path / "out", tokenizer=tokenizer)
    tokens = _tokens(found, "train")
    assert tokens[-10:] == [*range(19, 28), EOS]
    assert len(tokens) == 20 * 10 and found.ignored == {"cls": 20}


def test_the_bytes_depend_on_the_input_alone_and_a_finished_index_is_kept(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign, "SHARD_TOKENS", 50)
    arrays = {f"{i}.npy": np.arange(4, 5 + i % 90) + 1 for i in range(1, 100)}
    tar = _tar(tmp_path / "a.tar", arrays)
    first = index([tar], tmp_path / "x", tokenizer=tokenizer, val_fraction=0.2)
    second = index([tar], tmp_path / "y", tokenizer=tokenizer, val_fraction=0.2)
    assert _bytes(first.output) == _bytes(second.output)
    assert len(first.manifest.shards) > 20
    assert 5 < first.manifest.counts["documents_val"] < 40
    again = index([tar], tmp_path / "x", tokenizer=tokenizer, val_fraction=0.2)
    assert again.was_complete and again.manifest == first.manifest
    # A kill before the commit: the same command begins again and ends in the same bytes.
    (tmp_path / "x" / "manifest.json").unlink()
    assert not index([tar], tmp_path / "x", tokenizer=tokenizer, val_fraction=0.2).was_complete
    assert _bytes(first.output) == _bytes(second.output)
    with pytest.raises(
        DataUsageError, match=r"another command:\n  --val-fraction: was 0\.2, is 0\.3"
    ):
        index([tar], tmp_path / "x", tokenizer=tokenizer, val_fraction=0.3)


OBJECTS = np.array([{}, 1], dtype=object)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", OBJECTS, "holds Python objects, which are never loaded: unpickling can run code"),
        ("a.npy", np.ones((2, 3), "<u2"), r"has shape \(2, 3\), a document has one dimension"),
        ("a.npy", np.array(5, "<u2"), r"has shape \(\), a document has one dimension"),
        ("a.npy", np.ones(3, "<f4"), r"has type <f4, token ids have one of <u1 <u2 <u4 <i4 <i8"),
        ("a.npy", np.ones(3, ">u2"), r"has type >u2, token ids have one of"),
        ("a.npy", np.array([4, -1], "<i4"), "id -1 at place 1 is negative; padding and masks are"),
        ("a.npy", np.array([4, 400], "<i8"), "id 400 at place 1 is outside the vocabulary of 400"),
        ("a.npy", np.array([2**40], "<i8"), "id 1099511627776 at place 0 is outside the vocab"),
        ("a.npy", np.array([], "<u2"), "is empty; leave out documents without tokens"),
        ("a.npy", b"\x93NUMPY", "is no .npy file"),
        ("a.npy", b"hello", "is no .npy file"),
        ("a.npy", "cut", "is damaged: 5 bytes of numbers, its header says 6"),
        ("a.bin", b"123", r"has 3 bytes, no multiple of the 2 of <u2; give the --dtype"),
        ("a.bin", b"", "is empty; leave out"),
        ("a.lens.npy", np.ones(3, "<u4"), "this is a token shard of headrace, no foreign tar"),
        ("a.txt", b"text", r"holds no token arrays: members end in \.npy.*; it holds \.txt"),
    ],
)
def test_a_bad_member_is_refused_and_nothing_is_written(
    tmp_path: Path, tokenizer: Path, name: str, content: Any, message: str
) -> None:
    if isinstance(content, str):
        content = _npy(np.arange(3, dtype="<u2"))[:-1]
    with pytest.raises(DataError, match=message) as refused:
        _index(tmp_path, tokenizer, {"x/" + name: content}, dtype="<u2")
    assert "a.tar" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_bad_tars_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    good = _tar(tmp_path / "good.tar", {f"{i}.npy": np.arange(4, 99) for i in range(9)})
    raw = good.read_bytes()
    for content, message in [
        (gzip.compress(raw), "is compressed, so no place in it can be addressed; unpack it with"),
        (b"", "is empty; leave it out, or fetch it again"),
        (b"no tar at all" * 100, "is damaged or no tar"),
        (raw[:1536], "neither a member nor the mark that ends a tar, so it was cut"),
        (raw[: 1536 + 700], "is damaged or no tar|is cut after"),
        (raw[:1536] + bytes([raw[1536] ^ 1]) + raw[1537:], "a header was lost; fetch it again"),
        (raw[:1536] + bytes(512) + raw[2048:], "a header was lost; fetch it again"),
    ]:
        path = tmp_path / "bad.tar"
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            index([path], tmp_path / "out", tokenizer=tokenizer)
        assert not (tmp_path / "out").exists()


def test_every_flipped_header_bit_is_refused_or_harmless(tmp_path: Path, tokenizer: Path) -> None:
    """No damage of a header loses a document in silence, as tarfile alone would."""
    tar = _tar(tmp_path / "a.tar", {f"{i}.npy": np.arange(4, 20) for i in range(3)})
    whole = _tokens(index([tar], tmp_path / "whole", tokenizer=tokenizer), "train")
    intact = tar.read_bytes()
    random = np.random.default_rng(0)
    for trial in range(60):
        flip_bit(tar, 1024 + int(random.integers(512)), bit=int(random.integers(8)))
        try:
            out = tmp_path / f"out-{trial}"
            assert _tokens(index([tar], out, tokenizer=tokenizer), "train") == whole
        except DataError:
            pass
        tar.write_bytes(intact)


def test_a_key_that_comes_twice_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    arrays = {"k.npy": np.array([5]), "k.tokens.npy": np.array([6])}
    with pytest.raises(DataUsageError, match=r"member k\.tokens\.npy: the key 'k' comes twice"):
        _index(tmp_path, tokenizer, arrays)


def test_bad_requests_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    tar = _tar(tmp_path / "a.tar", {"k.bin": b"1234", "l.npy": np.array([5])})
    out = tmp_path / "out"
    for arguments, message in [
        ({"dtype": None}, r"member k\.bin holds raw numbers; say of which type: --dtype"),
        ({"dtype": "float"}, "--dtype 'float' is none of <u1"),
        ({"dtype": "<u2", "val_fraction": 1.5}, "--val-fraction 1.5 is no share"),
        ({"dtype": "<u2", "source": "../x"}, "cannot name a folder"),
    ]:
        with pytest.raises(DataUsageError, match=message):
            index([tar], out, tokenizer=tokenizer, **arguments)  # type: ignore[arg-type]
    with pytest.raises(DataUsageError, match="is named twice"):
        index([tar, tar], out, tokenizer=tokenizer, dtype="<u2")
    with pytest.raises(DataUsageError, match=r"none\.tar: no such file"):
        index([tmp_path / "none.tar"], out, tokenizer=tokenizer)
    assert not out.exists()


class Slow(list[Path]):
    """Tars that are counted, hashed and surveyed; during the survey something else happens."""

    num_reads = 0

    def __init__(self, tars: list[Path], meanwhile: Callable[[], object]) -> None:
        super().__init__(tars)
        self.meanwhile = meanwhile

    def __iter__(self) -> Iterator[Path]:
        self.num_reads += 1
        if self.num_reads == 3:
            self.meanwhile()
        return super().__iter__()


def test_an_output_that_another_index_finishes_meanwhile_is_kept(
    tmp_path: Path, tokenizer: Path
) -> None:
    one = _tar(tmp_path / "1.tar", {"a.npy": np.array([5, 6, 7])})
    two = _tar(tmp_path / "2.tar", {"b.npy": np.array([8, 9, 10])})

    def other() -> None:
        index([two], tmp_path / "out", tokenizer=tokenizer)

    slow = Slow([one], other)
    with pytest.raises(
        DataUsageError, match=r"begun by another command:\n  other tars, or other con"
    ):
        index(slow, tmp_path / "out", tokenizer=tokenizer)
    assert slow.num_reads == 3
    assert _bytes(tmp_path / "out") == _bytes(
        index([two], tmp_path / "again", tokenizer=tokenizer).output
    )
    assert index(Slow([two], other), tmp_path / "new", tokenizer=tokenizer).was_complete is False


def test_the_command_reports_what_it_copied(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = _tar(tmp_path / "a.tar", {"k.npy": np.array([5, 6]), "k.cls": b"1"})
    argv = ["data", "index", str(tar), "--tokenizer", str(tokenizer)]
    argv += ["--output", str(tmp_path / "out")]
    run_command(argv, standalone=False)
    out = capsys.readouterr().out
    assert "warning: 1 members .cls are no token arrays and were left alone" in out
    assert "3 training and 0 validation tokens in 1 documents, EOS appended to 1" in out
    run_command([*argv, "--json"], standalone=False)
    again = json.loads(capsys.readouterr().out)
    assert (again["was_complete"], again["train_tokens"], again["ignored"]) == (True, 3, {"cls": 1})


def _npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=array.dtype.hasobject)
    return file.getvalue()


def _tar(path: Path, members: Mapping[str, Any]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            raw = content if isinstance(content, bytes) else _npy(content)
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path


def _index(
    folder: Path, tokenizer: Path, members: Mapping[str, Any], *, dtype: str | None = None
) -> Indexed:
    tar = _tar(folder / "a.tar", members)
    return index([tar], folder / "out", tokenizer=tokenizer, dtype=dtype)


def _tokens(found: Indexed, split: str) -> list[int]:
    source = TokenSource(found.output, read_manifest(found.output), split, "main")
    return source.read(0, source.num_tokens).tolist()  # type: ignore[no-any-return]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
