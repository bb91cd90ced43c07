"""What an engine has said of itself in its log: how far its load is, and what each of its slots does."""

from __future__ import annotations

from llamarunner.engines.llama_log import LogReader
from llamarunner.engines.log_events import Activity, LoadProgress, LoadStarted, OffloadedLayers


class LogView:
    """Of one process at a time. Engines whose log is not known tell nothing."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A new process: what the one before it said is void."""
        self._reader = LogReader()
        self.progress: float | None = None  # of the load, 0..1; None until it is known to have moved
        self.activity = Activity()
        self.is_whole_on_gpu = False  # every layer of its model

    def take(self, line: str) -> None:
        for event in self._reader.feed(line):
            if isinstance(event, LoadProgress):
                # every build tells that a load begins, by no means each of them how it goes on
                self.progress = event.fraction or None
            elif isinstance(event, LoadStarted):
                self.progress = None
            elif isinstance(event, OffloadedLayers):
                self.is_whole_on_gpu = 0 < event.total == event.done
            self.activity = self.activity.after(event)
