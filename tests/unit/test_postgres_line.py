"""What goes to the server is what the driver would send."""

import os

import pytest
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq import Format

from streams.keys.postgres_line import Ids, _IdsDumper


@pytest.mark.parametrize("count", [1, 2, 5000])
def test_an_array_of_ids_is_byte_for_byte_the_one_of_the_driver(count):
    ids = [os.urandom(16) for _ in range(count)]
    theirs = Transformer().get_dumper(ids, PyFormat.BINARY)
    ours = _IdsDumper(Ids)
    assert ours.dump(Ids(ids)) == theirs.dump(ids)
    assert (ours.oid, ours.format) == (theirs.oid, Format.BINARY)
