"""A progress bar in bytes, on standard error, and only if that is a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(what: str, total_bytes: int | None) -> Iterator[Callable[[int], None]]:
    """Yield what to tell of bytes done; None: nobody knows how many there will be."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total_bytes or None)
        yield lambda done: progress.advance(task, done)
