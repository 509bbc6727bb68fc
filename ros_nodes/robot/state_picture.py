"""Writes the picture and the tables of the controller's states from `controller_states`.

``python -m ceed_vla.ros_nodes.robot.state_picture`` rewrites docs/images/controller_states.svg and
the section "The states of the controller" of docs/explanation/safety.md, in a clone of the
repository.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ceed_vla.ros_nodes.robot.controller_states import (
    COMMANDING,
    TRANSITIONS,
    ControllerState,
    Event,
    Transition,
)

COMMAND = "python -m ceed_vla.ros_nodes.robot.state_picture"
ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "images" / "controller_states.svg"
PAGE = ROOT / "docs" / "explanation" / "safety.md"
HEADING = "## The states of the controller\n"
NEXT_HEADING = "\n## "  # ends the section

INTRODUCTION = """\
This section is for readers of `ros_nodes/robot/controller.py`. The controller is a state machine
that runs once per tick. The second table is `TRANSITIONS` in
`ros_nodes/robot/controller_states.py`; any other transition raises an error. The state changes at
ticks, and immediately when `~/enable` or `~/go_home` is accepted while commands are sent.

`policy/state` publishes the same states for operators, with three differences: `moving` includes
`homing`; `silent` is published as `disabled`, or as `holding` if motion is allowed; and a call that
forbids motion shows before the tick that acts on it."""

type Point = tuple[float, float]  # x to the right and y down [px]

WIDTH = 940.0
HEIGHT = 690.0
NODE: Point = (120.0, 56.0)  # width and height of a state
CENTERS: dict[ControllerState, Point] = {
    ControllerState.SILENT: (90.0, 120.0),
    ControllerState.STOPPED: (90.0, 395.0),
    ControllerState.WAITING: (430.0, 120.0),
    ControllerState.MOVING: (830.0, 120.0),
    ControllerState.HOMING: (430.0, 395.0),
    ControllerState.HOLDING: (830.0, 395.0),
    ControllerState.GUIDED: (640.0, 560.0),
}
GROUP = (330.0, 20.0, 930.0, 670.0)  # left, top, right and bottom of the frame around `COMMANDING`
GAP = 9.0  # between an arrow and the line between two centers: there may be one each way
LINE = 17.0  # height of a line of text
FILL = {ControllerState.SILENT: "#eeeeee", ControllerState.STOPPED: "#f9d6d5"}
FILL_COMMANDING = "#dcebfa"


@dataclass(frozen=True)
class Arrow:
    """An arrow of the picture and the lines of its label."""

    start: Point
    end: Point
    label: tuple[str, ...]


def picture() -> str:
    """The machine as an SVG text."""
    left, top, right, bottom = GROUP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" '
        f'width="{WIDTH:.0f}" height="{HEIGHT:.0f}" font-family="sans-serif" font-size="14">',
        f"<!-- Written by {COMMAND} -->",
        '<defs><marker id="head" viewBox="0 0 10 10" refX="10" refY="5" markerWidth="8" '
        'markerHeight="8" orient="auto"><path d="M 0 0 L 10 5 L 0 10 z" fill="#333333"/></marker>'
        "</defs>",
        f'<rect width="{WIDTH:.0f}" height="{HEIGHT:.0f}" fill="#ffffff"/>',
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{right - left:.0f}" '
        f'height="{bottom - top:.0f}" rx="14" fill="none" stroke="#888888" '
        'stroke-dasharray="6 4"/>',
        _text((right - 14.0, top + 22.0), "a command every tick", "end", "#666666"),
    ]
    arrows = [*_leaving_group(), *_from_all(), *_between_states()]
    parts += [_line(arrow) for arrow in arrows]
    parts += [_node(state) for state in ControllerState]
    parts += [_label(arrow) for arrow in arrows]
    return "\n".join([*parts, "</svg>", ""])


def section() -> str:
    """The section of docs/explanation/safety.md, from its heading to the empty line before the next
    heading. Its layout is the one that the formatter of the docs writes.
    """
    name = PICTURE.relative_to(PAGE.parent, walk_up=True)
    lines = [
        HEADING,
        INTRODUCTION,
        "",
        f"![The states of the controller and the events between them]({name.as_posix()})",
        "",
        "| state | meaning |",
        "| -- | -- |",
        *(f"| {state} | {state.meaning} |" for state in ControllerState),
        "",
        "| event | when | from | to | what the controller does |",
        "| -- | -- | -- | -- | -- |",
        *_table_rows(),
        "",
        f"`{COMMAND}` generates the picture and the tables.",
        "",
    ]
    return "\n".join(lines)


def with_section(page: str) -> str:
    """The text of a page with its section replaced.

    Raises:
        ValueError: The page does not have the section once, with another one behind it.
    """
    before, heading, rest = page.partition(HEADING)
    _, next_heading, after = rest.partition(NEXT_HEADING)
    if not heading or not next_heading or HEADING in after:
        raise ValueError(f"The page needs the heading {HEADING!r} once, before another section.")
    return before + section() + next_heading + after


def main() -> int:
    """Rewrite picture and section; returns the exit status."""
    if not PAGE.is_file():
        print(f"There is no {PAGE}; run {COMMAND} in a clone.", file=sys.stderr)
        return 1
    PICTURE.write_text(picture(), encoding="utf-8")
    PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"Written: {PICTURE}, {PAGE}")
    return 0


def _table_rows() -> list[str]:
    """One line for the transitions that differ in nothing but the state before."""
    states: dict[tuple[Event, ControllerState, str], list[ControllerState]] = {}
    for row in TRANSITIONS:
        states.setdefault((row.event, row.next, row.action), []).append(row.state)
    return [
        f"| {event} | {event.meaning} | {', '.join(before)} | {after} | {action} |"
        for (event, after, action), before in states.items()
    ]


def _leaves_group(row: Transition) -> bool:
    return row.state in COMMANDING and row.next not in COMMANDING


def _from_all_others(row: Transition) -> bool:
    """Whether every other state inside leads to this one by the same event."""
    before = {other.state for other in TRANSITIONS if other.event is row.event}
    return before == {state for state in COMMANDING if state is not row.next}


def _from_all() -> list[Arrow]:
    """An arrow from the frame to each state inside, for the events that all others have."""
    events = {row.event: row.next for row in TRANSITIONS if _from_all_others(row)}
    arrows = []
    for event, state in events.items():
        if state not in COMMANDING:
            continue
        x, y = CENTERS[state]
        upper = y < HEIGHT / 2
        edge = GROUP[1] if upper else GROUP[3]
        border = y - NODE[1] / 2 if upper else y + NODE[1] / 2
        arrows.append(Arrow((x, edge), (x, border), (event, "(all others)")))
    return arrows


def _leaving_group() -> list[Arrow]:
    """An arrow from the frame to each state outside, for the events of the states inside."""
    events: dict[ControllerState, dict[Event, list[ControllerState]]] = {}
    for row in filter(_leaves_group, TRANSITIONS):
        events.setdefault(row.next, {}).setdefault(row.event, []).append(row.state)
    arrows = []
    for outside, by_event in events.items():
        label = tuple(
            event if len(before) == len(COMMANDING) else f"{event} ({', '.join(before)})"
            for event, before in by_event.items()
        )
        x, y = CENTERS[outside]
        enters = any(row.state is outside and row.next in COMMANDING for row in TRANSITIONS)
        y += GAP if enters else 0.0
        arrows.append(Arrow((GROUP[0], y), (x + NODE[0] / 2, y), label))
    return arrows


def _between_states() -> list[Arrow]:
    """The arrows from state to state."""
    events: dict[tuple[ControllerState, ControllerState], list[str]] = {}
    for row in TRANSITIONS:
        if not _leaves_group(row) and not _from_all_others(row):
            events.setdefault((row.state, row.next), []).append(row.event)
    both_ways = {pair for pair in events if pair[::-1] in events or pair[0] not in COMMANDING}
    return [
        _arrow(CENTERS[start], CENTERS[end], GAP * ((start, end) in both_ways), tuple(label))
        for (start, end), label in events.items()
    ]


def _arrow(start: Point, end: Point, aside: float, label: tuple[str, ...]) -> Arrow:
    """An arrow between the borders of two states, moved by `aside` to the left of its way [px]."""
    way_x = end[0] - start[0]
    way_y = end[1] - start[1]
    length = (way_x**2 + way_y**2) ** 0.5
    unit = (way_x / length, way_y / length)
    shift = (aside * unit[1], -aside * unit[0])
    leave = _border(unit, shift)
    arrive = _border((-unit[0], -unit[1]), shift)
    first = (start[0] + shift[0] + leave * unit[0], start[1] + shift[1] + leave * unit[1])
    last = (end[0] + shift[0] - arrive * unit[0], end[1] + shift[1] - arrive * unit[1])
    return Arrow(first, last, label)


def _border(unit: Point, shift: Point) -> float:
    """How far it is from beside a state's center to its border, along a `unit` vector [px]."""
    ways = []
    for axis in (0, 1):
        if abs(unit[axis]) > 1e-9:
            toward_border = 1.0 if unit[axis] > 0.0 else -1.0
            ways.append((NODE[axis] / 2 - toward_border * shift[axis]) / abs(unit[axis]))
    return min(ways)


def _line(arrow: Arrow) -> str:
    (x1, y1), (x2, y2) = arrow.start, arrow.end
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#333333" '
        'stroke-width="1.4" marker-end="url(#head)"/>'
    )


def _label(arrow: Arrow) -> str:
    """The text of an arrow, at the left of its way."""
    way_x = arrow.end[0] - arrow.start[0]
    way_y = arrow.end[1] - arrow.start[1]
    length = (way_x**2 + way_y**2) ** 0.5
    left = (way_y / length, -way_x / length)
    x = (arrow.start[0] + arrow.end[0]) / 2 + 8.0 * left[0]
    y = (arrow.start[1] + arrow.end[1]) / 2 + 8.0 * left[1]
    anchor = "middle" if abs(left[0]) < 0.3 else "start" if left[0] > 0.0 else "end"
    height = LINE * (len(arrow.label) - 1)
    if left[1] < -0.3:  # above the arrow
        first = y - height
    elif left[1] > 0.3:  # below
        first = y + 10.0
    else:
        first = y + 5.0 - height / 2
    return "\n".join(
        _text((x, first + LINE * index), line, anchor) for index, line in enumerate(arrow.label)
    )


def _node(state: ControllerState) -> str:
    x, y = CENTERS[state]
    fill = FILL.get(state, FILL_COMMANDING)
    return (
        f'<rect x="{x - NODE[0] / 2:.1f}" y="{y - NODE[1] / 2:.1f}" width="{NODE[0]:.0f}" '
        f'height="{NODE[1]:.0f}" rx="10" fill="{fill}" stroke="#333333"/>\n'
        + _text((x, y + 5.0), state.upper(), "middle", "#000000")
    )


def _text(at: Point, text: str, anchor: str, fill: str = "#000000") -> str:
    return (
        f'<text x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="{anchor}" fill="{fill}" '
        f'stroke="#ffffff" stroke-width="3" paint-order="stroke">{escape(text)}</text>'
    )


if __name__ == "__main__":
    sys.exit(main())
