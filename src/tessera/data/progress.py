"""Progress of long work outside of Lightning's loops: a bar on a terminal, plain lines in a log file."""

import logging
import sys
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


class Progress:
    """Shows how much of some work is done, by all processes that share it.

    Args:
        count: gives how many units are done; asked for no more often than it is shown.
        total: number of units.
        unit: their name, in the plural.
        plain: lines instead of a bar; None: where standard error is no terminal.
        every_seconds: between two lines.
    """

    def __init__(
        self,
        count: Callable[[], int],
        total: int,
        unit: str,
        plain: bool | None = None,
        every_seconds: float = 20.0,
    ):
        self.count, self.total, self.unit = count, total, unit
        self.plain = not sys.stderr.isatty() if plain is None else plain
        self.interval = every_seconds if self.plain else 0.5
        self.start_count = count()
        self.start = self.last = time.monotonic()

    def __enter__(self) -> "Progress":
        if not self.plain:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (MofNCompleteColumn(), TextColumn(self.unit), BarColumn(), TimeRemainingColumn())
            self.bar = Bar(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task(self.unit, total=self.total, completed=self.start_count)
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.plain:
            self.bar.update(self.task, completed=self.count())
            self.bar.stop()

    def __call__(self) -> None:
        """Call whenever something was done."""
        now = time.monotonic()
        if now - self.last < self.interval:
            return
        self.last, done = now, self.count()
        if not self.plain:
            self.bar.update(self.task, completed=done)
            return
        speed = (done - self.start_count) / (now - self.start)
        left = f", {(self.total - done) / speed / 60:.0f} min left" if speed else ""
        log.info("%d of %d %s, %.1f per second%s", done, self.total, self.unit, speed, left)
