"""Where the time of an epoch goes: data, forward, losses, backward, optimizer."""

from __future__ import annotations

import time

import torch

__all__ = ["SECTIONS", "Stopwatch"]

SECTIONS = ("data", "forward", "losses", "backward", "optimizer")


class Stopwatch:
    """Seconds by section.

    On a CPU the clock is read at every lap. On a GPU a lap records an event, and the events are only read by
    :meth:`seconds`: measuring does not make the host wait. A section then is what passed on the device between two
    events, so that "data" is the time for which the device had nothing to do, plus the copy of the batch.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._events: list[tuple[str, torch.cuda.Event]] | None = [] if device.type == "cuda" else None
        self._seconds = dict.fromkeys(SECTIONS, 0.0)
        self._last = time.perf_counter()
        self.lap("data")

    def lap(self, section: str) -> None:
        """What has passed since the last lap belongs to ``section``."""
        if self._events is not None:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((section, event))
            return
        now = time.perf_counter()
        self._seconds[section] += now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Seconds of every section so far; on a GPU this waits for the device."""
        if self._events:
            self._events[-1][1].synchronize()
            for (_, before), (section, after) in zip(self._events, self._events[1:], strict=False):
                self._seconds[section] += before.elapsed_time(after) / 1000
            self._events = self._events[-1:]
        return dict(self._seconds)
