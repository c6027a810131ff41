"""Long files that cannot be cut by their bytes, as parts of whole documents.

A packed file, a table or a tar is one part, however long, and a worker holds what it makes of a
part. So those over 16 MiB are read once to find the documents at which 128 MiB of text begin, and
become several parts: more workers take them, and memory stays bounded. Each part reads its file
from the start. Cost: one more reading, and in every pass over 1 GB of text 5 GB read instead of 1,
at 100 to 200 MB/s; pack corpora in files of up to 1 GB of text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from data.documents import Document, Extent, InputFile, Part, Reading
from data.readers import read_extent
from data.warc import page_sizes

LONG_BYTES = 2**24
RANGE_BYTES = 2**27


def long_files(parts: Sequence[Part]) -> set[InputFile]:
    """The files that are a long part of their own."""
    return {part[0].file for part in parts if _is_long(part)}


def cut_long(parts: Sequence[Part], ranges: Mapping[InputFile, Sequence[int]]) -> list[Part]:
    """The parts, with those of one long file cut where `find_ranges` said, and nothing else."""
    return [
        piece
        for part in parts
        for piece in (_cut(part[0].file, ranges[part[0].file]) if _is_long(part) else [part])
    ]


def find_ranges(file: InputFile, *, reading: Reading, range_bytes: int) -> list[int]:
    """Offsets of the documents at which a new range begins; the first range begins before all."""
    starts: list[int] = []
    size = 0
    for offset, num_bytes in _sizes(file, reading):
        if size >= range_bytes:
            starts.append(offset)
            size = 0
        size += num_bytes
    return starts


def _sizes(file: InputFile, reading: Reading) -> Iterator[tuple[int, int]]:
    """Offset and bytes of every document; of pages a guess, since their text costs most."""
    if file.format == "warc":
        yield from page_sizes(file)
        return
    for item in read_extent(Extent(file, 0, file.num_bytes), reading):
        yield item.offset, len(item.text) if isinstance(item, Document) else 0


def _is_long(part: Part) -> bool:
    file = part[0].file
    can_be_cut = file.is_lines or file.has_byte_places
    return len(part) == 1 and not can_be_cut and file.num_bytes > LONG_BYTES


def _cut(file: InputFile, starts: Sequence[int]) -> list[Part]:
    """One part per range; each counts as an equal share of the file's bytes."""
    firsts, lasts = [0, *starts], [*starts, None]
    count = len(firsts)
    marks = [file.num_bytes * i // count for i in range(count + 1)]
    return [(Extent(file, marks[i], marks[i + 1], firsts[i], lasts[i]),) for i in range(count)]
