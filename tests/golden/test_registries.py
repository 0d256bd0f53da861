"""Frozen registry files of both encodings: what was written by version 2 is read, and written again, as it was.

`registries_v2.json` was made once by `python -m tests.golden.test_registries registries_v2.json`; no test writes it.
"""

import base64
import sys
import zlib
from pathlib import Path

import numpy as np
import orjson
import pytest

from processors.screen.registry import RegistryFile
from processors.screen.registry_build import RegistryBuilder

FOLDER = Path(__file__).parent
GOLDEN = orjson.loads((FOLDER / "registries_v2.json").read_bytes()) if __name__ != "__main__" else {}
FIELDS = ("name", "country", "as_of_s", "loaded_at_s")


def written(exemplar):
    builder = RegistryBuilder()
    builder.add(np.array(exemplar["numbers"], np.int64))
    return b"".join(builder.finish(**{field: exemplar[field] for field in FIELDS}).chunks())


def frozen(exemplar):
    return zlib.decompress(base64.b64decode(exemplar["file"]))


@pytest.mark.parametrize("encoding", ["pages", "buckets"])
def test_a_frozen_file_still_lists_what_it_listed(encoding):
    exemplar = GOLDEN[encoding]
    registry = RegistryFile(frozen(exemplar))
    assert (registry.encoding, registry.count) == (encoding, len(exemplar["numbers"]))
    assert (registry.name, registry.country, registry.as_of_s) == tuple(exemplar[field] for field in FIELDS[:3])
    for number in exemplar["numbers"]:
        assert registry.lists(f"+{number}")
    for number in exemplar["others"]:
        assert not registry.lists(f"+{number}")


@pytest.mark.parametrize("encoding", ["pages", "buckets"])
def test_the_frozen_numbers_still_give_the_frozen_bytes(encoding):
    assert written(GOLDEN[encoding]) == frozen(GOLDEN[encoding])


def freeze(name):
    """Write a new file of exemplars; fails if there is one of that name."""
    full = [*range(442_079_460_000, 442_079_461_500), 442_079_479_999, *range(44_169_772_000, 44_169_773_000)]
    few = [14_155_550_100, 14_155_550_101, 442_079_460_000, 6_591_234_567, 1_234_567, 999_999_999_999_999]
    lists = {"pages": ("uk-tps", "GB", full), "buckets": ("xx-list", "US", few)}
    golden = {}
    for encoding, (registry, country, numbers) in lists.items():
        exemplar = {
            "name": registry, "country": country, "as_of_s": 1_793_534_400, "loaded_at_s": 1_793_620_800,
            "numbers": numbers, "others": [number + 2_000 for number in numbers[:20] if number < 10**14],
        }  # fmt: skip
        content = written(exemplar)
        golden[encoding] = exemplar | {"file": base64.b64encode(zlib.compress(content, 9)).decode()}
    with (FOLDER / name).open("xb") as file:
        file.write(orjson.dumps(golden) + b"\n")


if __name__ == "__main__":
    freeze(sys.argv[1])
