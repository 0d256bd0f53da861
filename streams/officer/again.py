"""Does a destruction again while another process is in its way, such as a reader or another destruction."""

import asyncio
import time
from collections.abc import Callable
from typing import Final, TypeVar

from schemas.errors import KeysBusy

PATIENCE_S: Final = 30.0
_PAUSE_S: Final = 0.05
_T = TypeVar("_T")


async def again(destroy: Callable[[], _T]) -> _T:
    """Return what `destroy` returns, which is called again for up to `PATIENCE_S` while the key store is busy.

    For what is idempotent only. Raises KeysBusy after that, and at once whatever else it raises.
    """
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            return destroy()
        except KeysBusy:
            if time.monotonic() > deadline_s:
                raise
        await asyncio.sleep(_PAUSE_S)
