"""A network between clients and one server that can be cut, slow, or torn: every connection passes through `Proxy`.

What was sent into a cut network is not gone: it arrives when the network is whole again, or a moment later, also if its
sender has given up by then. So a server gets requests late that its client has repeated on another connection.
"""

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Callable, Container, Coroutine
from contextlib import suppress
from typing import Any, Self

LOOPBACK = "127.0.0.1"


class _Link:
    """One connection, from here on in both directions."""

    def __init__(self, client: asyncio.StreamWriter, *, whole: bool) -> None:
        self.port: int = client.get_extra_info("peername")[1]
        self.writers = [client]
        self.whole = asyncio.Event()
        if whole:
            self.whole.set()


class Proxy:
    """Passes on what comes in at a port of this machine to another one, in a thread of its own."""

    def __init__(self, port: int, to: int, chance: random.Random | None = None) -> None:
        """Take the two ports; nothing listens before the context is entered."""
        self._port, self._to = port, to
        self._chance = chance or random.Random(0)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: asyncio.Server
        self._whole = True
        self._delay_s = self._late_s = 0.0
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task] = set()
        self.passed_bytes = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._within(asyncio.start_server(self._accepted, LOOPBACK, self._port))
        self.heal()
        return self

    def __exit__(self, *_: object) -> None:
        self._within(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- what can be done to it

    def cut(self) -> None:
        """Let nothing through, in either direction; connections stay, and new ones get no further than here."""
        self._whole = False
        self._within(self._stall(lambda _: True))

    def stall(self, ports: Container[int]) -> None:
        """Let nothing through on the connections of these client ports; all others are as good as ever."""
        self._within(self._stall(lambda link: link.port in ports))

    def stall_some(self) -> None:
        """Let nothing through on each second one, by chance, of the connections that there are."""
        self._within(self._stall(lambda _: self._chance.random() < 0.5))

    def slow(self, delay_s: float) -> None:
        """Keep back everything for so long, in either direction."""
        self._delay_s = delay_s

    def tear(self) -> int:
        """Reset all connections, and return how many."""
        return self._within(self._tear())

    def heal(self, late_s: float = 0.0) -> None:
        """Be a good network again; what was kept back arrives, each connection's up to so much later."""
        self._whole, self._delay_s, self._late_s = True, 0.0, late_s
        self._within(self._heal())

    # --- inside

    def _within(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _stall(self, stalls: Callable[[_Link], bool]) -> None:
        for link in filter(stalls, self._links):
            link.whole.clear()

    async def _heal(self) -> None:
        for link in self._links:
            link.whole.set()

    async def _close(self) -> None:
        self._server.close()
        await self._tear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _tear(self) -> int:
        torn = list(self._links)
        for link in torn:
            for writer in link.writers:
                with suppress(OSError):
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
        self._links.clear()
        return len(torn)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        link = _Link(writer, whole=self._whole)
        self._tasks.add(task)
        self._links.add(link)
        try:
            await link.whole.wait()
            there, out = await asyncio.open_connection(LOOPBACK, self._to)
            link.writers.append(out)
            await asyncio.gather(self._pump(link, reader, out), self._pump(link, there, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for one in link.writers:
                one.transport.abort()
            self._links.discard(link)
            self._tasks.discard(task)

    async def _pump(self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on in one direction, up to the end; a half that has ended leaves the other one open."""
        while data := await reader.read(65_536):
            if self._delay_s:
                await asyncio.sleep(self._delay_s)
            if not link.whole.is_set():
                await link.whole.wait()
                await asyncio.sleep(self._late_s * self._chance.random())
            writer.write(data)
            self.passed_bytes += len(data)
            await writer.drain()
        await link.whole.wait()
        with suppress(OSError):
            writer.write_eof()
