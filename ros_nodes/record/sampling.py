"""Frames of an episode at the policy's rate, from messages with stamps. Free of ROS and of clocks.

A frame at time t has the newest sample of every input with a stamp up to t, and its action leads to
what was commanded one period later. Only stamps decide, so that a bag gives the frames that the
recorder wrote; a message that arrives after its frame is counted and not used.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

KEPT = 2.0  # samples older than this before the next frame are dropped [s]
_ROUNDING = 1e-6  # stamps are doubles of seconds since 1970 [s]


class Series:
    """The samples of one input, in the order of their stamps."""

    def __init__(self) -> None:
        self.stamps: list[float] = []
        self._values: list[Any] = []

    def put(self, stamp: float, value: Any) -> None:
        """Insert a sample; of two with one stamp, the later one is used."""
        place = bisect.bisect_right(self.stamps, stamp)
        self.stamps.insert(place, stamp)
        self._values.insert(place, value)

    def at(self, time: float) -> tuple[float, Any] | None:
        """The newest sample up to a time: its stamp, and its value; None if there is none."""
        place = bisect.bisect_right(self.stamps, time + _ROUNDING) - 1
        return None if place < 0 else (self.stamps[place], self._values[place])

    def first(self, time: float) -> float | None:
        """Stamp of the first sample from `time` on; None if there is none."""
        place = bisect.bisect_left(self.stamps, time)
        return self.stamps[place] if place < len(self.stamps) else None

    def after(self, time: float) -> list[float]:
        """Stamps of the samples from `time` on."""
        return self.stamps[bisect.bisect_left(self.stamps, time) :]

    def reaches(self, time: float) -> bool:
        """Whether no sample with a stamp up to `time` is to be expected any more."""
        return bool(self.stamps) and self.stamps[-1] > time + _ROUNDING

    def drop_before(self, time: float) -> None:
        """Drop samples that no frame from `time` on needs."""
        place = bisect.bisect_right(self.stamps, time) - 1
        if place > 0:
            del self.stamps[:place]
            del self._values[:place]


@dataclass(frozen=True)
class Frame:
    """One frame.

    Attributes:
        time: On the messages' clock [s].
        values: Input -> newest value up to that time.
        following: Input -> newest value one period later, of the inputs that frames need so.
        repeated: Inputs whose value is that of the frame before.
    """

    time: float
    values: Mapping[str, Any]
    following: Mapping[str, Any]
    repeated: tuple[str, ...]


@dataclass
class Losses:
    """What a recording lacked.

    Attributes:
        repeated: Input -> frames that repeat the sample of the frame before.
        late: Input -> samples that arrived after their frame.
        oldest: Input -> largest age of a sample at its frame [s].
    """

    repeated: Counter[str] = field(default_factory=Counter)
    late: Counter[str] = field(default_factory=Counter)
    oldest: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = [
            f"{name}: {', '.join(words)}"
            for name in sorted({*self.repeated, *self.late})
            if (words := self._words(name))
        ]
        return "; ".join(counts)

    def _words(self, name: str) -> list[str]:
        words = []
        if self.repeated[name]:
            words.append(
                f"missing in {self.repeated[name]} frames (at most {self.oldest[name]:.2f} s old)"
            )
        if self.late[name]:
            words.append(f"{self.late[name]} too late")
        return words


class FrameSampler:
    """Joins samples to frames.

    Args:
        period: Time between two frames [s].
        inputs: Names of the inputs; every frame needs a sample of each.
        following: Those of which a frame also needs the next value, one period later.
        counted: Those of which a repeated sample is a loss.
        patience: Time for which a frame waits for samples that are still on their way [s].
        longest_gap: Age of a sample above which no frame is made: the episode then ends [s].

    Attributes:
        losses: Of the present episode.
        gap: Why the episode has ended by itself; "" if it has not.
        frames: Number of frames so far.
    """

    def __init__(
        self,
        period: float,
        inputs: Sequence[str],
        *,
        following: Sequence[str] = (),
        counted: Sequence[str] = (),
        patience: float = 0.2,
        longest_gap: float = 0.5,
    ) -> None:
        self._period = period
        self._inputs = tuple(inputs)
        self._following = tuple(following)
        self._counted = tuple(counted)
        self._patience = patience
        self._longest_gap = longest_gap
        self._series = {name: Series() for name in inputs}
        self._start: float | None = None
        self._asked = math.nan  # time at which the recording was started
        self._end = math.inf
        self._reset()

    def _reset(self) -> None:
        self.losses = Losses()
        self.gap = ""
        self.frames = 0
        self._last: dict[str, float] = {}  # stamps of the last frame's samples
        self._used: dict[str, float] = {}  # or of the samples that follow them

    def silent(self, since: float) -> list[str]:
        """Inputs without a sample since a time."""
        return [name for name, series in self._series.items() if series.first(since) is None]

    def start(self, time: float) -> None:
        """Begin an episode at a time, or as soon as every input has a sample."""
        self._reset()
        self._asked = time
        self._start = None
        self._end = math.inf

    def stop(self, time: float) -> None:
        """End the episode: no frame ends later than `time`, or than an earlier end."""
        self._end = min(self._end, time)

    def put(self, name: str, stamp: float, value: Any) -> None:
        """Take a sample of an input."""
        if self._start is not None and self.frames:
            # up to here the last frame has looked for this input
            looked = self._time(self.frames if name in self._following else self.frames - 1)
            used = self._used.get(name, -math.inf)
            self.losses.late[name] += used < stamp <= looked + _ROUNDING
        if stamp > self._end + KEPT:
            return  # of no frame; the end may be long ago until somebody stores the episode
        self._series[name].put(stamp, value)
        if self._start is None or self.gap:
            self._series[name].drop_before(stamp - KEPT)

    def finish(self) -> None:
        """Make no more frames until `start`; only recent samples are kept from now on."""
        self._start = None
        self._asked = math.nan
        self._end = math.inf

    def ready(self, now: float) -> Iterator[Frame]:
        """Yield the frames that are complete at the time `now`; `math.inf`: all."""
        if self._start is None and not self._begin():
            return
        while not self.gap and self._complete(now):
            frame = self._frame()
            if frame is None:
                return
            yield frame

    def done(self, now: float) -> bool:
        """Whether the episode has no more frames at the time `now`."""
        if self.gap:
            return True
        if self._start is None:
            return now >= self._end + self._patience
        return self._time(self.frames + 1) > self._end + _ROUNDING

    def _begin(self) -> bool:
        """Find the time of the first frame; return False if an input has no fresh sample yet.

        It lies in the middle between two samples of the first of the inputs that are counted, so
        that a camera with the rate of the frames has one image for each, in spite of its jitter.
        """
        if math.isnan(self._asked):
            return False
        firsts = [series.first(self._asked - self._longest_gap) for series in self._series.values()]
        known = [first for first in firsts if first is not None]
        if len(known) < len(firsts):
            return False
        start = max(self._asked, *known)
        for name in self._counted[:1]:
            samples = self._series[name].after(start)[:2]
            if len(samples) < 2:
                return False
            start = samples[0] + 0.5 * min(samples[1] - samples[0], self._period)
        self._start = start
        return True

    def _time(self, frame: int) -> float:
        assert self._start is not None
        return self._start + frame * self._period

    def _complete(self, now: float) -> bool:
        """Whether nothing that the next frame needs is still on its way."""
        time = self._time(self.frames)
        end = self._time(self.frames + 1)
        if end > self._end + _ROUNDING:
            return False
        if now >= end + self._patience:
            return True
        return all(
            series.reaches(end if name in self._following else time)
            for name, series in self._series.items()
        )

    def _frame(self) -> Frame | None:
        """Make the next frame; return None at a gap."""
        time = self._time(self.frames)
        found = {name: self._series[name].at(time) for name in self._inputs}
        samples = {name: sample for name, sample in found.items() if sample is not None}
        assert len(samples) == len(found)  # every series begins before the first frame
        for name, (stamp, _) in samples.items():
            age = time - stamp
            if age > self._longest_gap:
                self.gap = f"{name} sent nothing for {age:.2f} s after frame {self.frames}"
                return None
            self.losses.oldest[name] = max(self.losses.oldest.get(name, 0.0), age)
        repeated = tuple(name for name in self._counted if samples[name][0] == self._last.get(name))
        self.losses.repeated.update(repeated)
        later = {name: self._series[name].at(time + self._period) for name in self._following}
        self._last = {name: stamp for name, (stamp, _) in samples.items()}
        following = {name: sample[0] for name, sample in later.items() if sample is not None}
        self._used = self._last | following
        self.frames += 1
        for series in self._series.values():
            series.drop_before(self._time(self.frames) - KEPT)
        return Frame(
            time,
            {name: value for name, (_, value) in samples.items()},
            {name: sample[1] for name, sample in later.items() if sample is not None},
            repeated,
        )
