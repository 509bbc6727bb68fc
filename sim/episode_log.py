"""The episode file: finished episodes of an evaluation, one line each, from which it is resumed.

The first line identifies the evaluation: episodes are reused only if everything that affects them
is equal. Every line ends with a checksum of itself and of the lines before it, which detects edits;
it is not a signature.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from ceed_vla.errors import CeedVLAError, ConfigError
from ceed_vla.files import parse_json, read_json, write_text
from ceed_vla.outputs import MADE_BY
from ceed_vla.sim.rollout import EpisodeResult

logger = logging.getLogger(__name__)

EPISODES = "episodes.jsonl"
CHAINED = "chained"  # key in the first line: whether the other lines have checksums
Results = dict[str, list[EpisodeResult]]  # by decoder name

_KINDS = {
    "decoder": str,
    "seed": int,
    "task": str,
    "instruction": str,
    "success": bool,
    "steps": int,
    "tokens": str,
}
_KINDS |= {
    "forwards": list,
    "exit_reasons": list,
    "block_layers": list,
    "prefix_layers": list,
    "motion": dict,
}
# defaults for older files, which lack these
_LATER: dict[str, Any] = {
    "block_layers": [],
    "prefix_layers": [],
    "motion": {},
    "tokens": "",
}
_ANEW = "start a new evaluation in another --output_dir."
DIGEST = 12  # characters of an episode's `tokens`
_LONGEST = 2**28  # largest episode file [bytes]
_CHECK = ', "check": "'  # before the checksum at the end of a line


class EpisodeLog:
    """Appends finished episodes to a file; each is on disk before the next one is counted.

    Args:
        folder: Output folder of the evaluation.
        identity: Everything that affects an episode, as JSON values: checkpoints, decoders, seeds
            and so on.
        plan: Task of every seed; "mixed" for any.
        longest: Step limit of an episode.
        versions: Those of the software that runs the episodes; None: not compared.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        plan: dict[int, str],
        longest: int,
        versions: dict[str, str] | None,
    ) -> None:
        self.file = folder / EPISODES
        self.identity = json.loads(json.dumps(identity))
        self.plan, self.longest = plan, longest
        self.versions = versions
        self._last = ""  # checksum of the last line that was written

    def read(self) -> Results:
        """Read the finished episodes of this evaluation; none if there is no file.

        Raises:
            ConfigError: The file belongs to another evaluation, or to other versions of the
                software, was edited, or is damaged in a line before the last.
        """
        results: Results = {name: [] for name in self.identity["decoders"]}
        lines = _lines(self.file)
        if not lines:
            return results
        header = _values(lines[0])
        self._check_identity(header)
        self._check_versions(header.get("versions", self.versions))  # unknown in older files
        chained = header.get(CHAINED) is True
        if not chained:
            logger.warning(
                "%s was written by an earlier version: its lines have no checksums.", self.file
            )
        last = _checksum("", lines[0])
        seen: set[tuple[str, int]] = set()
        for number, line in enumerate(lines[1:], start=2):
            if _values(line) is None and number == len(lines):
                break  # a process died while it wrote this line
            text, check = _parted(line) if chained else (line, "")
            values = _values(text)
            episode = self._episode(values)
            if episode is None or (values["decoder"], episode.seed) in seen:
                what = f"line {number} is not an episode of this evaluation, or is a duplicate"
                raise ConfigError(f"{self.file}: {what}; restore the file, or {_ANEW}")
            last = _checksum(last, text)
            if chained and check != last:
                what = f"line {number}, or a line before it, was changed"
                raise ConfigError(f"{self.file}: {what}; restore the file, or {_ANEW}")
            seen.add((values["decoder"], episode.seed))
            results[values["decoder"]].append(episode)
        return results

    def shared(self, folder: Path) -> Results:
        """Read the episodes of another evaluation in `folder` whose decoders are equal to ours.

        Decoders are equal if their model, settings and seeds are.

        Raises:
            ConfigError: `folder` has no evaluation, a damaged one, or one with other episodes.
        """
        try:
            theirs = read_identity(folder)
        except ConfigError as error:
            raise ConfigError(f"--reuse: {error}") from error
        names = {*self.identity, "engine"}  # an engine is named only if it is an export
        alike = {name for name in names if theirs.get(name) == self.identity.get(name)}
        models = {"policy", "teacher"} & alike
        if other := sorted(names - alike - {"policy", "teacher", "decoders"}):
            raise ConfigError(
                f"--reuse is {folder}, an evaluation with other {', '.join(other)}: its episodes "
                "cannot be reused."
            )
        found = EpisodeLog(folder, theirs, self.plan, self.longest, self.versions).read()
        same = {
            n: row
            for n, row in self.identity["decoders"].items()
            if theirs["decoders"].get(n) == row
        }
        return {name: found[name] for name, row in same.items() if row["model"] in models}

    def start(self, results: Results) -> None:
        """Write a new file that contains `results`."""
        facts = {"versions": self.versions, "identity": self.identity}
        header = json.dumps({"program": MADE_BY, CHAINED: True, **facts})
        self._last = _checksum("", header)
        found = [(name, episode) for name, episodes in results.items() for episode in episodes]
        lines = [self._line(name, episode) for name, episode in found]
        write_text(self.file, "\n".join([header, *lines, ""]))

    def append(self, name: str, episode: EpisodeResult) -> None:
        try:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(self._line(name, episode) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            error.filename = str(self.file)
            raise

    def _line(self, name: str, episode: EpisodeResult) -> str:
        """Format an episode as the next line of the file, with its checksum."""
        text = line_of(name, episode)
        self._last = _checksum(self._last, text)
        return f'{text[:-1]}{_CHECK}{self._last}"}}'

    def _check_identity(self, header: Any) -> None:
        theirs = header.get("identity") if isinstance(header, dict) else None
        if not isinstance(theirs, dict):
            raise ConfigError(f"{self.file} does not identify its evaluation; {_ANEW}")
        for name in {**self.identity, **theirs}:
            ours = self.identity.get(name)
            other = theirs.get(name)
            if ours != other:
                what = _difference(name, other, ours)
                raise ConfigError(
                    f"{self.file} is of another evaluation: {what}; set the same options, or "
                    f"{_ANEW}"
                )

    def _check_versions(self, theirs: Any) -> None:
        if self.versions is None or theirs == self.versions:
            return
        names = [*self.versions, *theirs] if isinstance(theirs, dict) else []
        other = [
            f"{name} {theirs.get(name)} instead of {self.versions.get(name)}"
            for name in dict.fromkeys(names)
            if theirs.get(name) != self.versions.get(name)
        ]
        what = f"with {', '.join(other)}" if other else "by unknown software"
        raise ConfigError(
            f"{self.file} was written {what}, which may change episodes; go on with the same "
            f"versions, or {_ANEW}"
        )

    def _episode(self, values: Any) -> EpisodeResult | None:
        """Parse a line's `values`; None if they are not an episode of this evaluation."""
        values = {**_LATER, **values} if isinstance(values, dict) else {}
        if {name: type(value) for name, value in values.items()} != _KINDS:
            return None
        episode = EpisodeResult(
            **{name: value for name, value in values.items() if name != "decoder"}
        )
        counts = episode.forwards
        reasons = episode.exit_reasons
        layers = (episode.block_layers, episode.prefix_layers)
        fits = (
            values["decoder"] in self.identity["decoders"]
            and self.plan.get(episode.seed) in ("mixed", episode.task)
            and 0 < episode.steps <= self.longest
            and 0 < len(counts) == len(reasons) <= episode.steps
            and {len(found) for found in layers} <= {0, len(counts)}
            and all(
                type(count) is int and 0 <= count < 10**6
                for found in (counts, *layers)
                for count in found
            )
            and all(type(reason) is str and len(reason) < 100 for reason in reasons)
            and len(episode.tokens) in (0, DIGEST)
            and all(type(value) is float and 0 <= value < 1e12 for value in episode.motion.values())
        )
        return episode if fits else None


def _difference(name: str, theirs: Any, ours: Any) -> str:
    """What differs in a value of two identities; of objects, the first entry that does."""
    while isinstance(theirs, dict) and isinstance(ours, dict):
        every = {**theirs, **ours}  # an older version may lack a key
        here, there = ({key: one.get(key, "missing") for key in every} for one in (ours, theirs))
        key = next(key for key in every if there[key] != here[key])
        name, theirs, ours = f"{name}.{key}", there[key], here[key]
    return f"its {name} is {str(theirs)[:200]}, here it is {str(ours)[:200]}"


def read_identity(folder: Path) -> dict[str, Any]:
    """The identity of the evaluation in a folder.

    Raises:
        ConfigError: It has no episode file, or one that does not identify its evaluation.
    """
    header = _values((_lines(folder / EPISODES) or [""])[0])
    identity = header.get("identity") if isinstance(header, dict) else None
    if not isinstance(identity, dict) or not isinstance(identity.get("decoders"), dict):
        raise ConfigError(f"{folder} has no {EPISODES}; set the folder of an evaluation.")
    return identity


def refuse_unfinished(folder: Path, report: str) -> None:
    """Refuse to overwrite the episodes of an interrupted evaluation.

    Raises:
        ConfigError: `folder` has episodes, and its `report` is missing or not complete.
    """
    episodes = len(_lines(folder / EPISODES)) - 1
    try:
        done = read_json(folder / report).get("complete") is True
    except CeedVLAError:
        done = False
    if episodes > 0 and not done:
        what = f"an interrupted evaluation ({episodes} finished episodes)"
        raise ConfigError(
            f"{folder} holds {what}; continue it with --resume=true, or set another --output_dir."
        )


def _lines(file: Path) -> list[str]:
    """Lines of an episode file; empty if there is no file."""
    if not file.is_file():
        return []
    try:
        if file.stat().st_size > _LONGEST:
            raise ConfigError(
                f"{file} has {file.stat().st_size / 1e6:.0f} MB; an episode file has at most "
                f"{_LONGEST / 1e6:.0f} MB. Restore the file, or {_ANEW}"
            )
        return file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is damaged; {_ANEW}") from error


def _values(line: str) -> Any:
    """Parse a line as JSON; None if it is invalid."""
    try:
        return parse_json(line)
    except ValueError:
        return None


def _checksum(before: str, text: str) -> str:
    """Checksum of a line's `text`, chained to that of the previous line, `before`."""
    return hashlib.sha256(f"{before}{text}".encode()).hexdigest()[:12]


def _parted(line: str) -> tuple[str, str]:
    """Split a line into its text and its checksum, which is empty if missing."""
    text, found, rest = line.rpartition(_CHECK)
    return (text + "}", rest.removesuffix('"}')) if found else (line, "")


def line_of(name: str, episode: EpisodeResult) -> str:
    """Format an episode of a decoder as JSON."""
    values = {field: getattr(episode, field) for field in _KINDS if field != "decoder"}
    return json.dumps({"decoder": name, **values})
