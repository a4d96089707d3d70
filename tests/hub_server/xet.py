"""The Xet storage: xorbs of compressed chunks, shards that say which chunks make a file.

Source: the formats that https://huggingface.co/docs/xet describes.
"""

import hashlib
import struct
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import lz4.frame


_ENTRY = 48  # bytes of every record of a shard
_LAST = b"\xff" * 32
_VERIFIED, _DESCRIBED = 1 << 31, 1 << 30  # a file's flags: more records follow its terms


class Term(NamedTuple):
    """A run of chunks, first to last, of a xorb."""

    xorb: str
    size: int
    first: int
    last: int  # not included


class Xorb:
    """Chunks, each behind a header: version, compressed size (3 bytes), scheme, size (3 bytes)."""

    def __init__(self, data: bytes) -> None:
        self.data, self.offsets, place = data, [0], 0
        while place + 8 <= len(data):
            if data[place] != 0:
                break  # a footer
            place += 8 + int.from_bytes(data[place + 1 : place + 4], "little")
            self.offsets.append(place)

    def read(self, first: int, last: int) -> bytes:
        """Return the chunks first to last, decompressed."""
        return b"".join(self._chunk(low, high) for low, high in pairwise(self.offsets[first : last + 1]))

    def _chunk(self, low: int, high: int) -> bytes:
        scheme, size = self.data[low + 4], int.from_bytes(self.data[low + 5 : low + 8], "little")
        data = self.data[low + 8 : high]
        if scheme:
            data = lz4.frame.decompress(data)
        if scheme == 2:  # every fourth byte stands together
            grouped, data, place = data, bytearray(size), 0
            for byte in range(4):
                width = len(range(byte, size, 4))
                data[byte::4] = grouped[place : place + width]
                place += width
        if len(data) != size:
            raise ValueError(f"a chunk has {len(data)} bytes, its header says {size}")
        return bytes(data)


def name_of(digest: bytes) -> str:
    """Return a hash as Xet writes it: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


def files_of(shard: bytes) -> dict[str, list[Term]]:
    """Return the terms of each file that a shard names."""
    found: dict[str, list[Term]] = {}
    place = _ENTRY
    while shard[place : place + 32] != _LAST:
        name = name_of(shard[place : place + 32])
        flags, number = struct.unpack_from("<II", shard, place + 32)
        place += _ENTRY
        records = [shard[start : start + _ENTRY] for start in range(place, place + number * _ENTRY, _ENTRY)]
        found[name] = [Term(name_of(record[:32]), *struct.unpack_from("<III", record, 36)) for record in records]
        place += _ENTRY * (number + (number if flags & _VERIFIED else 0) + bool(flags & _DESCRIBED))
    return found


@dataclass
class XetStorage:
    """Xorbs by their hash, files by theirs, and the hash of what has a sha256."""

    xorbs: dict[str, Xorb] = field(default_factory=dict)
    files: dict[str, list[Term]] = field(default_factory=dict)
    by_sha256: dict[str, str] = field(default_factory=dict)

    def add_shard(self, shard: bytes) -> list[bytes]:
        """Take what a shard says; return the contents of its files."""
        contents = []
        for name, terms in files_of(shard).items():
            data = b"".join(self.xorbs[term.xorb].read(term.first, term.last) for term in terms)
            self.files[name] = terms
            self.by_sha256[hashlib.sha256(data).hexdigest()] = name
            contents.append(data)
        return contents

    def reconstruction(self, name: str, start: int, end: int | None, url: str) -> dict | None:
        """Return where the bytes start to end of a file lie; None past its end.

        Args:
            name: Its hash.
            start: First byte.
            end: Last byte, included; None for the file's.
            url: Where xorbs are, without their hash.
        """
        place, terms, fetch, skipped = 0, [], {}, None
        for term in self.files[name]:
            xorb = self.xorbs[term.xorb]
            if place + term.size > start and (end is None or place <= end):
                skipped = start - place if skipped is None else skipped
                chunks = {"start": term.first, "end": term.last}
                terms.append({"hash": term.xorb, "unpacked_length": term.size, "range": chunks})
                span = {"start": xorb.offsets[term.first], "end": xorb.offsets[term.last] - 1}
                fetch.setdefault(term.xorb, []).append({"range": chunks, "url": f"{url}/{term.xorb}", "url_range": span})
            place += term.size
        return {"offset_into_first_range": skipped, "terms": terms, "fetch_info": fetch} if terms else None
