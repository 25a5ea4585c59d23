"""Reads the frames, pages and blocks of audio files where the decoder would trust a header: MP3, Ogg, WAV and FLAC.

libsndfile reads an MP3 up to the length that it guesses from the first frames, an Ogg up to the end of its first
stream, and what is left of a WAV that was cut. What is here finds all of the sound, and whether some of it is missing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

_UNKNOWN = 0x7FFF0000
"""A program that writes WAV into a pipe cannot know sizes, and promises nothing, or about as much as a number holds."""
_MISSING_S = 0.02
"""Sound that may be missing at the end of a WAV without its being cut."""
_OGG_FIRST, _OGG_LAST = 2, 4
_PLAIN_BLOCKS, _TAGS = (0, 1, 3), 4
"""Of a FLAC: stream information, padding and seek table; and tags."""
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
"""Sample rates by the version of MPEG audio, in the bits of a header."""
_KBITS = {
    3: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_ROOMY = 9
"""Of the bit rates, one whose frames have room for a header that tells the length."""


def pieces(data: bytes) -> list[bytes]:
    """The same sound in files that libsndfile reads to their end, one after the other; mostly the file itself.

    The streams of a chained Ogg are taken apart. An MP3 that does not tell its length, or tells that of its first part
    alone, gets a header that tells it. A WAV of unknown length gets that of its bytes.
    """
    if data[:4] == b"OggS":
        return _ogg_streams(data)
    if data[:4] == b"RIFF":
        return [_with_size(data)]
    frames = _mp3(data)
    return [data if frames is None else frames.told(data)]


def is_cut(data: bytes) -> bool:
    """Whether the end of the file is missing, by the file's own structure; False for formats not known here."""
    if data[:4] == b"OggS":
        return _ogg_is_cut(data)
    if data[:4] == b"RIFF":
        return _wav_is_cut(data)
    frames = _mp3(data)
    return frames is not None and (frames.broken or len(frames.audio) < 0.98 * frames.promised)


def is_bare_flac(data: bytes) -> bool:
    """Whether a FLAC holds sound and nothing else: no tags, no pictures, no data of other programs."""
    at, last = 4, data[:4] != b"fLaC"
    while not last and at + 4 <= len(data):
        kind, size = data[at] & 0x7F, int.from_bytes(data[at + 1 : at + 4], "big")
        if kind not in _PLAIN_BLOCKS and not (kind == _TAGS and _no_tags(data[at + 4 : at + 4 + size])):
            return False
        last, at = bool(data[at] & 0x80), at + 4 + size
    return data[:4] == b"fLaC"


def _no_tags(block: bytes) -> bool:
    name = int.from_bytes(block[:4], "little")
    return block[4 + name : 8 + name] == bytes(4)


class _Chunk(NamedTuple):
    """The samples of a WAV: where they begin, how many bytes the header promises, and how many make a second."""

    start: int
    size: int
    per_second: int


def _wav_data(data: bytes) -> _Chunk | None:
    at, per_second = 12, 0
    while at + 8 <= len(data):
        name, (size,) = data[at : at + 4], struct.unpack_from("<I", data, at + 4)
        if name == b"fmt " and at + 20 <= len(data):
            (per_second,) = struct.unpack_from("<I", data, at + 16)
        if name == b"data":
            return _Chunk(at + 8, size, per_second)
        at += 8 + size + size % 2
    return None


def _wav_is_cut(data: bytes) -> bool:
    chunk = _wav_data(data)
    if chunk is None or chunk.size >= _UNKNOWN:
        return False
    return chunk.start + chunk.size - len(data) > chunk.per_second * _MISSING_S


def _with_size(data: bytes) -> bytes:
    chunk = _wav_data(data)
    if chunk is None or chunk.size or chunk.start == len(data):
        return data
    size = struct.pack("<I", len(data) - chunk.start)
    return data[: chunk.start - 4] + size + data[chunk.start :]


class _Page(NamedTuple):
    """A page of an Ogg: its first and last byte, whether it is whole, its flags, and the stream it belongs to."""

    start: int
    end: int
    whole: bool
    flags: int
    stream: int


def _ogg_pages(data: bytes) -> Iterator[_Page]:
    at = 0
    while data[at : at + 4] == b"OggS" and at + 27 <= len(data):
        flags, segments = data[at + 5], data[at + 26]
        (stream,) = struct.unpack_from("<I", data, at + 14)
        body = at + 27 + segments
        end = body + sum(data[at + 27 : body])
        yield _Page(at, end, end <= len(data), flags, stream)
        at = end if data[end : end + 4] in (b"OggS", b"") else data.find(b"OggS", at + 4)
        if at < 0:
            return


def _ogg_is_cut(data: bytes) -> bool:
    open_streams: set[int] = set()
    for page in _ogg_pages(data):
        if not page.whole:
            return True
        (open_streams.discard if page.flags & _OGG_LAST else open_streams.add)(page.stream)
    return bool(open_streams)


def _ogg_streams(data: bytes) -> list[bytes]:
    """Streams that follow one another; those that lie side by side, such as a video's, stay together."""
    starts, began = [0], False
    for page in _ogg_pages(data):
        first = bool(page.flags & _OGG_FIRST)
        if first and began:
            starts.append(page.start)
        began = not first
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]


class _Header(NamedTuple):
    """Of an MP3 frame.

    Attributes:
        bits: the four bytes.
        size: of the frame with its header, bytes.
        side: bytes between the header and the place of a Xing header.
        kind: what all frames of a stream share.
    """

    bits: bytes
    size: int
    side: int
    kind: tuple[int, int]


@dataclass
class _Frames:
    """The frames of an MP3.

    Attributes:
        audio: first and last byte of each frame that sounds.
        promised: frames that sound, by the headers of its parts; 0 where none tells.
        headers: how many tell.
        broken: the last frame is not whole.
        first: header of the first frame.
    """

    first: _Header
    audio: list[tuple[int, int]] = field(default_factory=list)
    promised: int = 0
    headers: int = 0
    broken: bool = False

    def told(self, data: bytes) -> bytes:
        """The file with a header that tells its length; itself if it has one."""
        if self.headers == 1 and self.promised == len(self.audio):
            return data
        bits = bytearray(self.first.bits)
        bits[1] |= 1  # no checksum
        bits[2] = (_ROOMY << 4) | (bits[2] & 0x0C)
        header = _header(bytes(bits), 0)
        assert header is not None
        tag = b"Xing" + struct.pack(">II", 1, len(self.audio))
        frame = (bytes(bits) + bytes(header.side) + tag).ljust(header.size, b"\0")
        return frame + b"".join(data[start:end] for start, end in self.audio)


def _header(data: bytes, at: int) -> _Header | None:
    """The header of an MP3 frame (MPEG audio layer III) that begins there; None if none does."""
    bits = data[at : at + 4]
    if len(bits) < 4 or bits[0] != 0xFF or bits[1] & 0xE6 != 0xE2:
        return None
    version, rate, bitrate = (bits[1] >> 3) & 3, (bits[2] >> 2) & 3, bits[2] >> 4
    if version == 1 or rate == 3 or bitrate in (0, 15):
        return None
    mono = bits[3] >> 6 == 3
    kbits = _KBITS[3 if version == 3 else 2][bitrate - 1]
    size = (144 if version == 3 else 72) * kbits * 1000 // _RATES[version][rate] + ((bits[2] >> 1) & 1)
    side = (17 if mono else 32) if version == 3 else (9 if mono else 17)
    return _Header(bits, size, side, (version, rate))


def _mp3(data: bytes) -> _Frames | None:
    """The frames of an MP3, of all parts if several files were joined; None if the file is no MP3."""
    at = _after_tag(data, 0)
    header = _header(data, at)
    if header is None:
        return None
    second = at + header.size
    if second + 4 <= len(data) and _after_tag(data, second) == second and _header(data, second) is None:
        return None
    found, at = _Frames(header), at
    while at + 4 <= len(data):
        if (after := _after_tag(data, at)) != at:
            at = after
            continue
        header = _header(data, at)
        if header is None or header.kind != found.first.kind:
            at = _next_frame(data, at + 1, found.first.kind)
            continue
        if at + header.size > len(data):
            found.broken = True
            break
        told = _told(data, at, header)
        if told is None:
            found.audio.append((at, at + header.size))
        else:
            found.promised, found.headers = found.promised + told, found.headers + 1
        at += header.size
    return found


def _next_frame(data: bytes, at: int, kind: tuple[int, int]) -> int:
    """Where the next frame of the same kind begins that another one follows; the end of the data if none does."""
    while (at := data.find(b"\xff", at)) >= 0:
        header = _header(data, at)
        if header is not None and header.kind == kind and _header(data, at + header.size) is not None:
            return at
        at += 1
    return len(data)


def _after_tag(data: bytes, at: int) -> int:
    """First byte after a tag (ID3 or APE) that begins there, or `at`."""
    if data[at : at + 3] == b"ID3" and at + 10 <= len(data):
        size = 0
        for byte in data[at + 6 : at + 10]:
            size = size << 7 | byte & 0x7F
        return at + 10 + size + (10 if data[at + 5] & 0x10 else 0)
    if data[at : at + 3] == b"TAG":
        return at + 128
    if data[at : at + 8] == b"APETAGEX" and at + 32 <= len(data):
        return at + 32 + int.from_bytes(data[at + 12 : at + 16], "little")
    return at


def _told(data: bytes, at: int, header: _Header) -> int | None:
    """Frames that a header frame promises, 0 where it does not say; None for a frame that sounds."""
    place = at + 4 + header.side
    if data[place : place + 4] in (b"Xing", b"Info"):
        flags, count = struct.unpack_from(">II", data, place + 4)
        return int(count) if flags & 1 else 0
    if data[at + 36 : at + 40] == b"VBRI":
        return int(struct.unpack_from(">I", data, at + 36 + 14)[0])
    return None
