"""Seeded damage to files.

It is independent of formats: values of JSON and YAML are replaced, removed, moved and enlarged;
bytes are flipped and cut.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2.5, 1e30, float("nan"), float("inf"), -(10**20), 10**12),
    *(
        "",
        "x",
        "nan",
        "../../victim",
        "/tmp/victim",
        "a" * 2000,
        "\x1b[2J",
        "{x.__class__}",
        "cuda",
    ),
    *([], {}, [1, 2], {"a": 1}, [[[]]]),
    *(
        {"class": "os.system", "config": {"command": "touch ran"}},
        "__import__('os').system('touch ran')",
    ),
    *(
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        {"auto_map": {"AutoTokenizer": "ran.Ran"}},
    ),
)
# Values that need excessive time or memory, each created when it is drawn.
LARGE: tuple[Callable[[], Any], ...] = (
    lambda: "1" * 60_000,
    lambda: "risk" + "1" * 60_000,
    lambda: {"risk" + "1" * 60_000: "ar"},
    lambda: {f"risk{number}": "ar" for number in range(100_000)},
    lambda: [[] for _ in range(500_000)],
    lambda: [0.5] * 300_000,
    lambda: ["a" * 1000] * 10_000,
    lambda: json.loads("[" * 150 + "]" * 150),
    lambda: 10**4000,
    lambda: "a" * 3_000_000,
    lambda: "_".join(["conf0.1"] * 10_000),
    lambda: "(a+)+$",
)


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """All places in nested mappings and lists; the first three of long lists."""
    yield place
    entries = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:3])
        if isinstance(value, list)
        else ()
    )
    for key, inner in entries:
        yield from places(inner, (*place, key))


def mutated(value: Any, source: random.Random) -> Any:
    """`value` with one or two places replaced, removed or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(source.choice((1, 1, 2))):
        place = source.choice(list(places(value)))
        if not place:
            return copy.deepcopy(source.choice(STRANGE))
        holder = value
        for key in place[:-1]:
            holder = holder[key]
        kind = source.random()
        if kind < 0.15:
            del holder[place[-1]]
        elif kind < 0.25:
            holder[place[-1]] = [holder[place[-1]]]
        elif kind < 0.32:
            holder[place[-1]] = source.choice(LARGE)()
        else:
            holder[place[-1]] = copy.deepcopy(source.choice(STRANGE))
    return value


def dump_yaml(values: Any) -> str:
    """Format as YAML; long values as JSON, which is also YAML and fast to write."""
    text = json.dumps(values, default=str)
    return text if len(text) > 20_000 else yaml.safe_dump(values)


def damage_text(file: Path, source: random.Random) -> None:
    """Change the values of a file of JSON, YAML or lines of JSON."""
    read: Callable[[str], Any] = yaml.safe_load if file.suffix == ".yaml" else json.loads
    write: Callable[[Any], str] = dump_yaml if file.suffix == ".yaml" else json.dumps
    if file.suffix == ".jsonl":
        lines = file.read_text().splitlines()
        at = source.randrange(len(lines))
        lines[at] = json.dumps(mutated(json.loads(lines[at]), source))
        file.write_text("\n".join(lines) + "\n")
        return
    file.write_text(write(mutated(read(file.read_text()), source)))


def damage_bytes(file: Path, source: random.Random) -> None:
    """Cut a file, append to it, or replace some of its bytes."""
    data = bytearray(file.read_bytes())
    kind = source.random()
    if kind < 0.3:
        data = data[: source.randrange(len(data))]
    elif kind < 0.4:
        data = data + bytes(source.randrange(256) for _ in range(16))
    else:
        for _ in range(source.choice((1, 4, 64))):
            # Headers and footers describe the contents of a file.
            edge = source.choice((min(len(data), 600), len(data)))
            at = source.randrange(edge)
            data[at if source.random() < 0.5 else -1 - at] = source.randrange(256)
    file.write_bytes(bytes(data))


def damage(file: Path, source: random.Random) -> None:
    """Damage a file in place: mostly its values if it is text, otherwise its bytes."""
    text = file.suffix in (".json", ".jsonl", ".yaml")
    (damage_text if text and source.random() < 0.9 else damage_bytes)(file, source)
