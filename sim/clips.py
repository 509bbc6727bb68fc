"""Video clips of single episodes: camera images, instruction and decoding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ceed_vla.errors import SimulationError
from ceed_vla.files import replacing
from ceed_vla.outputs import MADE_BY
from ceed_vla.sim.decoders import Row
from ceed_vla.sim.environment import EnvPool
from ceed_vla.sim.rollout import PolicyRunner, drive

Frame = NDArray[np.uint8]

# Sides in pixels; the encoder needs a width and height that are multiples of 16.
VIEW = 384
INSET = 192
HEADER = 48
WIDTH = VIEW + INSET
HEIGHT = VIEW + HEADER
_INK = (236, 239, 244)
_PAPER = (24, 27, 33)
_FAINT = (140, 148, 160)
_ACCENT, _GOOD = (230, 159, 0), (86, 180, 233)
_MARGIN, _SIDE_MARGIN = 14, 5
_MOST_SQUARES = 12
END_FRAMES = 12  # repeats of the last frame, so that the outcome can be read
_font = ImageFont.load_default


def compose_frame(
    views: Sequence[Frame],
    *,
    instruction: str,
    decoder: str,
    forwards: int,
    mean_forwards: float,
    unit: str,
    step: int,
    status: str = "",
    sides: tuple[str, str] = ("", ""),
) -> Frame:
    """Compose one picture (`HEIGHT`, `WIDTH`, 3) of a clip.

    The first two `views` (H, W, 3) uint8 are shown as the policy receives them, enlarged without
    smoothing; `sides` label the left and right border of the first view. `forwards` counts the
    forwards of the current chunk, each of a "block" or a "token" (`unit`).
    """
    picture = Image.new("RGB", (WIDTH, HEIGHT), _PAPER)
    for view, side, x in zip(views, (VIEW, INSET), (0, VIEW), strict=False):
        picture.paste(
            ImageOps.pad(Image.fromarray(view), (side, side), Image.Resampling.NEAREST), (x, HEADER)
        )
    draw = ImageDraw.Draw(picture)
    # The largest font in which the instruction fits the width.
    fonts = map(_font, range(22, 11, -1))
    font = next(
        (font for font in fonts if font.getlength(instruction) <= WIDTH - 2 * _MARGIN), _font(11)
    )
    draw.text((_MARGIN, HEADER // 2), instruction, fill=_INK, font=font, anchor="lm")
    for text, x, anchor in zip(
        sides, (_SIDE_MARGIN, VIEW - _SIDE_MARGIN), ("ld", "rd"), strict=True
    ):
        where = (x, HEIGHT - _SIDE_MARGIN)
        draw.text(where, text, _INK, _font(12), anchor, stroke_width=2, stroke_fill=_PAPER)

    left = VIEW + _MARGIN
    top = HEADER + INSET + _MARGIN
    draw.text((left, top), decoder, fill=_INK, font=_font(22))
    draw.text(
        (left, top + 36),
        f"chunk: {forwards} {unit} forward{'s' if forwards != 1 else ''}",
        _FAINT,
        _font(13),
    )
    squares = [(left + 14 * i, left + 14 * i + 10) for i in range(forwards)]
    # one bar if they are many
    for start, end in squares if forwards <= _MOST_SQUARES else [(left, WIDTH - _MARGIN)]:
        draw.rectangle((start, top + 58, end, top + 68), fill=_ACCENT)
    draw.text((left, top + 84), f"mean so far: {mean_forwards:.1f}", fill=_FAINT, font=_font(13))
    draw.text((left, top + 106), f"step {step}", fill=_FAINT, font=_font(13))
    if status:
        draw.text(
            (left, top + 136), status, fill=_GOOD if status == "solved" else _ACCENT, font=_font(22)
        )
    return np.asarray(picture)


def write_clip(path: Path, frames: Iterable[Frame], fps: int = 10) -> Path:
    """Encode pictures (`HEIGHT`, `WIDTH`, 3) as H.264 in MP4.

    Raises:
        SimulationError: The encoder failed; an existing file is unchanged.
    """
    with replacing(path) as file:
        writer = imageio_ffmpeg.write_frames(
            str(file),
            (WIDTH, HEIGHT),
            fps=fps,
            codec="libx264",
            quality=7,
            macro_block_size=16,
            ffmpeg_log_level="quiet",
            output_params=["-preset", "veryfast", "-metadata", f"comment={MADE_BY}"],
        )
        writer.send(None)
        try:
            with closing(writer):
                for frame in frames:
                    writer.send(np.ascontiguousarray(frame))
            whole = b"moov" in file.read_bytes()  # the index, which is written last
        except OSError:  # imageio's message is only the ffmpeg command
            whole = False
        if not whole:
            raise SimulationError(f"{path} could not be written; check the free disk space.")
    return path


def record_clip(
    path: Path, row: Row, runner: PolicyRunner, pool: EnvPool, seed: int, task: str
) -> Path:
    """Run one episode in a pool's first environment and write its clip, at the robot's speed."""
    counts: list[int] = []

    def frames() -> Iterator[Frame]:
        for replan in drive(runner, pool, seed, task, watch=True):
            counts.append(replan.chunk.forwards)
            for i, views in enumerate(replan.views, start=1):
                last = replan.finished and i == len(replan.views)
                frame = compose_frame(
                    list(views.values()),
                    sides=getattr(pool.config, "sides", ("", "")),
                    instruction=replan.instruction,
                    decoder=row.name,
                    forwards=counts[-1],
                    mean_forwards=sum(counts) / len(counts),
                    unit="token" if row.decoding.method == "ar" else "block",
                    step=replan.step + i,
                    status=("solved" if replan.success else "not solved") if last else "",
                )
                yield from [frame] * (END_FRAMES if last else 1)

    return write_clip(path, frames(), pool.config.fps)
