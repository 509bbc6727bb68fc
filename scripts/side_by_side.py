"""Makes docs/images/demo.gif: two clips of ``ceed-vla demo`` side by side, with their milliseconds.

python scripts/side_by_side.py outputs/demo docs/images/demo.gif

The times are the median of the same run, so run the demo on a machine that does nothing else.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import imageio.v3 as iio
from PIL import Image, ImageDraw, ImageFont

from ceed_vla.sim.clips import HEADER, VIEW

ROWS = {"teacher_ar": "teacher, token by token", "ceed": "student, early exit"}
SIDE = 288  # of a view [px]
CAPTION = 56
COLORS = 64
FRAME_MS = 100  # the clips have 10 steps per second


def captions(report: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Two lines for every row of a report: what it is, and what a chunk costs."""
    found = {}
    for name, title in ROWS.items():
        row = report["decoders"][name]
        ms = row["total_ms"]["p50"]
        found[name] = (title, f"{row['forwards_mean']:.1f} forwards, {ms:.0f} ms per chunk")
    return found


def main(demo: Path, output: Path) -> None:
    """Write the picture."""
    texts = captions(json.loads((demo / "report.json").read_text(encoding="utf-8")))
    clips = {name: iio.imread(demo / f"clip_{name}.mp4") for name in ROWS}
    length = max(map(len, clips.values()))
    pictures = []
    for number in range(length):
        picture = Image.new("RGB", (len(ROWS) * SIDE, SIDE + CAPTION), (24, 27, 33))
        draw = ImageDraw.Draw(picture)
        for column, (name, clip) in enumerate(clips.items()):
            frame = clip[min(number, len(clip) - 1)][HEADER:, :VIEW]
            view = Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BOX)
            picture.paste(view, (column * SIDE, CAPTION))
            for line, text in enumerate(texts[name]):
                size, ink = ((16, (236, 239, 244)), (14, (86, 180, 233)))[line]
                place = (column * SIDE + 10, 8 + 24 * line)
                draw.text(place, text, ink, font=ImageFont.load_default(size))
        pictures.append(picture.quantize(COLORS, dither=Image.Dither.NONE))
    first, *others = pictures
    first.save(
        output, save_all=True, append_images=others, duration=FRAME_MS, loop=0, optimize=True
    )
    print(f"Written: {output}, {output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
