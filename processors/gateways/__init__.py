"""Gateway formats: bytes of a gateway's file → inbound v1 records. Pure; files are opened elsewhere.

`split_records` cuts the file, `open_format` gives the converter of one format. A record that cannot be
understood is `Poison` with a reason code; the caller publishes its raw bytes, so that workers seal them into
quarantine.
"""

from collections.abc import Iterable, Iterator

from processors.gateways.asterisk import Asterisk
from processors.gateways.base import Format, Source
from processors.gateways.mapped_csv import MappedCsv
from processors.gateways.ndjson import Ndjson
from schemas.errors import InputInvalid
from schemas.fields import MAX_RECORD_BYTES

__all__ = ["FORMATS", "Format", "Source", "guess_format", "open_format", "split_records"]

FORMATS = ("ndjson", "asterisk", "asterisk-custom", "mapped")
_BOM = b"\xef\xbb\xbf"


def split_records(
    chunks: Iterable[bytes], *, quoted: bool, line: int = 1, position: int = 0
) -> Iterator[tuple[int, int, bytes]]:
    """Yield (number of the record's first line, position after it in bytes, raw record without its line end).

    `chunks` are raw lines with their ends, as a binary file gives them, from `position` on, where `line`
    begins. To resume, pass a yielded position, and 1 plus the number of line ends before it. With `quoted`, a
    record with an odd number of double quotes goes on in the next line; past `MAX_RECORD_BYTES` it is given
    up as it is. Lines end in LF or CRLF, the last one need not; a byte order mark at position 0 is dropped. A
    line handed over in pieces becomes a record a piece (unless quotes are open), all with its number.
    """
    held: list[bytes] = []
    held_bytes, first, odd = 0, line, False
    for chunk in chunks:
        raw = chunk.removeprefix(_BOM) if position == 0 else chunk
        position += len(chunk)
        line += chunk.endswith(b"\n")
        if quoted:
            held.append(raw)
            held_bytes += len(raw)
            odd ^= raw.count(b'"') & 1 == 1
            if odd and held_bytes <= MAX_RECORD_BYTES:
                continue
            raw = b"".join(held)
            held, held_bytes, odd = [], 0, False
        yield first, position, _without_end(raw)
        first = line
    if held:
        yield first, position, _without_end(b"".join(held))


def _without_end(raw: bytes) -> bytes:
    return raw.removesuffix(b"\n").removesuffix(b"\r")


def open_format(name: str, mapping: str | None, source_name: str) -> Format:
    """Return the converter of a format of `FORMATS`; `mapping` is the text of the mapping or settings file.

    `source_name` names that file in errors. Raises InputInvalid with the wrong key and what is allowed.
    """
    if name == "ndjson":
        if mapping is not None:
            raise InputInvalid("the format ndjson takes no mapping file", file=source_name)
        return Ndjson()
    if name in ("asterisk", "asterisk-custom"):
        return Asterisk(mapping, source_name, custom=name == "asterisk-custom")
    if name != "mapped":
        raise InputInvalid(f"no such format; use one of {', '.join(FORMATS)}", file=source_name)
    if mapping is None:
        raise InputInvalid("the format mapped needs a mapping file: pass --map FILE", file=source_name)
    return MappedCsv(mapping, source_name)


def guess_format(filename: str, has_mapping: bool) -> str:
    """Return the format that a file's name, or else a mapping, speaks for. Raises InputInvalid if none."""
    folder, _, base = filename.replace("\\", "/").lower().rpartition("/")
    if base.endswith((".ndjson", ".jsonl", ".json")):
        return "ndjson"
    if base == "master.csv":
        return "asterisk-custom" if folder.endswith("cdr-custom") else "asterisk"
    if has_mapping:
        return "mapped"
    raise InputInvalid(f"cannot tell the format by the name; pass --format {'|'.join(FORMATS)}", file=filename)
