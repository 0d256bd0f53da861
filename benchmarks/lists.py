"""Seeded Do-Not-Call lists of national size, with the density of real ones: numbers, and the text that is given out.

Of the United States' some 350 area codes about 195,000 exchanges of 10,000 numbers are assigned, and the 258.5 million
listed numbers fill them unevenly: here by a beta distribution around 13 %, from next to none to more than half.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

US_NUMBERS = 258_500_000
US_EXCHANGES = 195_000
AREA_CODES = 350
_PLACES = np.array([0, 1, 2, 4, 5, 6, 7, 8, 9, 10])  # of the digits in `areacode,number`


def us_numbers(count: int, seed: int = 1, exchanges: int | None = None) -> Iterator[np.ndarray]:
    """Yield `count` different E.164 numbers (without `+`) of the United States, ascending, some 100,000 at a time.

    Fewer numbers have fewer exchanges, so that the density stays.
    """
    rng = np.random.default_rng(seed)
    exchanges = exchanges or max(1, round(US_EXCHANGES * count / US_NUMBERS))
    codes = [code for code in range(200, 1000) if code % 100 != 11 and code // 10 % 10 != 9]
    codes = rng.choice(codes, AREA_CODES, replace=False)
    possible = (codes[:, None] * 1000 + np.arange(200, 1000)).ravel()
    chosen = np.sort(rng.choice(possible, exchanges, replace=False))
    fill = rng.beta(1.2, 7.8, exchanges)
    fill = np.minimum(0.95, fill * (1.01 * count / 10_000 / fill.sum()) + 5 / 10_000)
    left = count
    for at in range(0, exchanges, 100):
        some = chosen[at : at + 100]
        listed = rng.random((len(some), 10_000), np.float32) < fill[at : at + 100, None]
        exchange, line = np.nonzero(listed)
        numbers = 10_000_000_000 + some[exchange].astype(np.int64) * 10_000 + line
        yield numbers[:left]
        left -= min(left, len(numbers))
    if left:
        yield 19_990_000_000 + np.arange(left, dtype=np.int64)  # an area code that is not chosen


def us_text(numbers: np.ndarray) -> np.ndarray:
    """Return lines `areacode,number` as bytes, twelve a number."""
    lines = np.empty((len(numbers), 12), np.uint8)
    lines[:, 3], lines[:, 11] = ord(","), ord("\n")
    rest = numbers - 10_000_000_000
    high, low = (rest // 100_000).astype(np.uint32), (rest % 100_000).astype(np.uint32)
    for half, places in ((high, _PLACES[:5]), (low, _PLACES[5:])):
        left = half
        for place in places[::-1]:
            left, digit = np.divmod(left, np.uint32(10))
            lines[:, place] = digit + ord("0")
    return lines


def write_us(path: Path, count: int, seed: int = 1) -> int:
    """Write such a list as text, and return its bytes."""
    with path.open("wb") as file:
        for numbers in us_numbers(count, seed):
            file.write(us_text(numbers).data)
    return path.stat().st_size
