"""How far a measurement is, on stderr: by rich, by tqdm, or as lines where neither is installed."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """A bar from 0 to 1, filled part by part; inside a part by the time that it was given."""

    def __init__(self, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._rich: Any = None
        self._tqdm: Any = None
        self._task: Any = None
        self._part = ("", 0.0, 0.0, 0.0, 0.0)

    def __enter__(self) -> Progress:
        if not self._is_shown:
            return self
        try:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn())
            text = TextColumn("{task.description}")
            self._rich = RichProgress(*columns, text, console=Console(stderr=True), transient=True)
            self._rich.start()
            self._task = self._rich.add_task("", total=1.0)
            return self
        except ImportError:
            pass
        try:
            from tqdm import tqdm

            self._tqdm = tqdm(total=100, leave=False, bar_format="{l_bar}{bar}| {elapsed} {postfix}")
        except ImportError:
            pass
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()
        if self._tqdm is not None:
            self._tqdm.close()

    def begin(self, name: str, done: float, share: float, seconds: float) -> None:
        """Start a part that takes the bar from ``done`` to ``done + share`` in about ``seconds``."""
        self._part = (name, done, share, seconds, time.perf_counter())
        if self._is_shown and self._rich is None and self._tqdm is None:
            print(f"measuring {name} ({done:.0%})", file=sys.stderr, flush=True)
        self.update("")

    def update(self, name: str) -> None:
        """Say what runs now."""
        part, done, share, seconds, began = self._part
        inside = min(1.0, (time.perf_counter() - began) / seconds) if seconds > 0 else 0.0
        text = f"{part}, {name}" if name else part
        if self._rich is not None:
            self._rich.update(self._task, completed=done + share * inside, description=text)
        elif self._tqdm is not None:
            self._tqdm.n = round(100 * (done + share * inside))
            self._tqdm.set_postfix_str(text)
