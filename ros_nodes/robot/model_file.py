"""Reads an MJCF or URDF file and reduces it to its kinematics, within limits, for MuJoCo.

MuJoCo multiplies elements (`replicate`, `composite`, `attach`), allocates what a file declares
(textures, `memory`), and loads the files that it names. Kinematics needs none of that, so only the
elements in `_ELEMENTS` and the attributes in `_ATTRIBUTES` are passed on.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

from ceed_vla.errors import ConfigError
from ceed_vla.files import regular
from ceed_vla.texts import short

MOST_BYTES = 5_000_000  # of a model and all files that it includes
MOST_FILES = 50
MOST_PARTS = 1_000  # number of `_PARTS`: MuJoCo's time grows with its square
_DEEPEST = 200  # largest depth of nested elements
_PARTS = frozenset(("body", "compiler", "default", "frame", "freejoint", "joint", "link", "site"))
_IN_BODY = frozenset(("body", "frame", "freejoint", "joint", "site"))
_ELEMENTS: dict[str, frozenset[str]] = {  # parent -> children that are passed on
    "mujoco": frozenset(("compiler", "default", "worldbody")),
    "default": frozenset(("default", "joint", "site")),
    "worldbody": _IN_BODY,
    "body": _IN_BODY,
    "frame": _IN_BODY,
    "robot": frozenset(("joint", "link")),
    "joint": frozenset(("axis", "child", "limit", "origin", "parent")),  # of a URDF
}
_ATTRIBUTES = frozenset(
    (
        *("name", "class", "childclass", "link"),
        *("pos", "quat", "axisangle", "xyaxes", "zaxis", "euler", "xyz", "rpy"),
        *("type", "fromto", "size"),
        *("axis", "range", "limited", "ref", "lower", "upper", "effort", "velocity"),
        *("angle", "eulerseq", "autolimits"),
    )
)


def read_model(path: Path) -> ElementTree.Element:
    """Return the kinematics of an MJCF or URDF file, with its includes in place.

    `ConfigError`: The file cannot be read, is not XML, or exceeds a limit.
    """
    reader = _Reader(path)
    try:
        reader.read(path)
        return reader.builder.close()
    except ConfigError:
        raise
    except (OSError, ValueError, AssertionError, expat.ExpatError) as error:
        reason = short(getattr(error, "strerror", None) or error)
        what = f"The robot model {path} cannot be read ({reason})"
        raise ConfigError(f"{what}; give an MJCF or URDF file.") from error


def urdf_velocities(model: ElementTree.Element) -> dict[str, float]:
    """Map joints of a URDF to velocity limits [rad/s]; an MJCF has none, and 0 means unknown."""
    found = {}
    for joint in model.findall("joint"):
        limit = joint.find("limit")
        try:
            velocity = float("nan" if limit is None else limit.get("velocity", "nan"))
        except ValueError:
            continue
        if 0.0 < velocity < float("inf"):
            found[joint.get("name", "")] = velocity
    return found


class _Reader:
    """Copies the elements of a file and of its includes that are passed on to `builder`."""

    def __init__(self, path: Path) -> None:
        self.builder = ElementTree.TreeBuilder()
        self._path = path
        self._open: list[str] = []  # names of the open elements
        self._bytes = 0
        self._files = 0
        self._parts = 0

    def read(self, file: Path) -> None:
        """Copy one file, without the root element if it is an include."""
        self._files += 1
        if self._files > MOST_FILES:
            raise self._too_much(f"includes more than {MOST_FILES - 1} files")
        with regular(file, ConfigError).open("rb") as content:
            text = content.read(MOST_BYTES + 1)
        self._bytes += len(text)
        if self._bytes > MOST_BYTES:
            raise self._too_much(f"has more than {MOST_BYTES / 1e6:g} MB")
        _FileParser(self, is_include=self._files > 1).parse(_without_comments(text))

    def passes(self, tag: str) -> bool:
        """Whether an element is passed on at the present place."""
        if not self._open:
            return True
        return tag in _ELEMENTS.get(self._open[-1], ())

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self._parts += tag in _PARTS
        if self._parts > MOST_PARTS:
            what = f"more than {MOST_PARTS} bodies, links, joints, frames and sites"
            raise self._too_much(f"has {what}")
        self._open.append(tag)
        known = {name: value for name, value in attributes.items() if name in _ATTRIBUTES}
        self.builder.start(tag, known)

    def end(self, tag: str) -> None:
        self._open.pop()
        self.builder.end(tag)

    def include(self, attributes: dict[str, str]) -> None:
        named = attributes.get("file", "")
        if not named:
            raise ConfigError(f"The robot model {self._path} has an include without a file.")
        self.read(self._path.parent / named)

    def refuse_types(self, *_: object) -> None:
        raise ConfigError(
            f"The robot model {self._path} has a document type, whose entities may expand without "
            "end; remove the DOCTYPE."
        )

    def too_deep(self) -> ConfigError:
        return self._too_much(f"nests more than {_DEEPEST} elements")

    def _too_much(self, what: str) -> ConfigError:
        remedy = "give a file that contains only the arm"
        return ConfigError(f"The robot model {self._path} {what}; {remedy}.")


class _FileParser:
    """Parses one file for a `_Reader`. Prefixes stay in names: vendors leave them undeclared."""

    def __init__(self, reader: _Reader, is_include: bool) -> None:
        self._reader, self._is_include = reader, is_include
        self._depth = 0
        self._dropped = 0  # depth of the element whose content is skipped; 0 outside of one
        self._parser = expat.ParserCreate()
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.StartDoctypeDeclHandler = reader.refuse_types

    def parse(self, text: bytes) -> None:
        self._parser.Parse(text, True)

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._reader.too_deep()
        if self._dropped or (self._is_include and self._depth == 1):
            return
        if tag == "include":
            self._dropped = self._depth
            self._reader.include(attributes)
        elif self._reader.passes(tag):
            self._reader.start(tag, attributes)
        else:
            self._dropped = self._depth

    def _end(self, tag: str) -> None:
        if self._dropped == self._depth:
            self._dropped = 0
        elif not self._dropped and not (self._is_include and self._depth == 1):
            self._reader.end(tag)
        self._depth -= 1


def _without_comments(text: bytes) -> bytes:
    """Return `text` without comments: XML forbids "--" there, MuJoCo and many vendors allow it."""
    parts = []
    at = 0
    while (begin := text.find(b"<!--", at)) >= 0:
        end = text.find(b"-->", begin + 4)
        if end < 0:
            break
        parts += [text[at:begin], b"\n" * text.count(b"\n", begin, end)]
        at = end + 3
    return b"".join([*parts, text[at:]])


def text_of(model: ElementTree.Element) -> str:
    """Return the model as text for MuJoCo."""
    return ElementTree.tostring(model, encoding="unicode")
