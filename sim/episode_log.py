"""Finished episodes of an evaluation on disk, one line each, so that an interrupted one goes on
where it was.

The first line says of what evaluation they are: an episode counts only where all that decides it is
the same. Every line ends with a checksum of itself and of the lines before it, so that an edit is
noticed; it is no signature.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from ceed_vla.checkpoint_files import weights_hash
from ceed_vla.checkpoints.manifest import unsealed_bytes
from ceed_vla.errors import CeedVLAError, ConfigError
from ceed_vla.files import parse_json, read_json, write_text
from ceed_vla.folders import MANIFEST, WEIGHTS, resolve_checkpoint
from ceed_vla.outputs import MADE_BY
from ceed_vla.sim.rollout import EpisodeResult

logger = logging.getLogger(__name__)

EPISODES = "episodes.jsonl"
CHAINED = "chained"  # in the first line: whether the others have checksums
Results = dict[str, list[EpisodeResult]]  # by the decoder's name

_KINDS = {
    "decoder": str,
    "seed": int,
    "task": str,
    "instruction": str,
    "success": bool,
    "steps": int,
}
_KINDS |= {
    "forwards": list,
    "exit_reasons": list,
    "block_layers": list,
    "prefix_layers": list,
    "motion": dict,
}
# older files lack these
_LATER: dict[str, Any] = {
    "block_layers": [],
    "prefix_layers": [],
    "motion": {},
}
_ANEW = "start anew in another --output_dir."
_LONGEST = 2**28  # [bytes]
_CHECK = ', "check": "'  # before the checksum at the end of a line


class EpisodeLog:
    """Appends finished episodes to a file; each is on disk before the next one counts.

    `identity` is what decides an episode: checkpoints, decoders, seeds and so on, as JSON can hold
    them; `plan` the task of every seed, "mixed" for any; `longest` the most steps of an episode.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], plan: dict[int, str], longest: int
    ) -> None:
        self.file = folder / EPISODES
        self.identity = json.loads(json.dumps(identity))
        self.plan, self.longest = plan, longest
        self._last = ""  # checksum of the last line that was written

    def read(self) -> Results:
        """Episodes of this evaluation that finished; none without a file.

        `ConfigError`: A file of another evaluation, an edited one, or damage elsewhere than in the
        last line.
        """
        results: Results = {name: [] for name in self.identity["decoders"]}
        lines = _lines(self.file)
        if not lines:
            return results
        header = _values(lines[0])
        self._check_identity(header)
        chained = header.get(CHAINED) is True
        if not chained:
            logger.warning("%s is of an earlier version: its lines have no checksums.", self.file)
        last = _checksum("", lines[0])
        seen: set[tuple[str, int]] = set()
        for number, line in enumerate(lines[1:], start=2):
            if _values(line) is None and number == len(lines):
                break  # a process died while it wrote
            text, check = _parted(line) if chained else (line, "")
            values = _values(text)
            episode = self._episode(values)
            if episode is None or (values["decoder"], episode.seed) in seen:
                what = f"line {number} is no episode of this evaluation, or a second one"
                raise ConfigError(f"{self.file}: {what}; restore the file, or {_ANEW}")
            last = _checksum(last, text)
            if chained and check != last:
                what = f"line {number}, or one before it, is not as it was written"
                raise ConfigError(f"{self.file}: {what}; restore the file, or {_ANEW}")
            seen.add((values["decoder"], episode.seed))
            results[values["decoder"]].append(episode)
        return results

    def shared(self, folder: Path) -> Results:
        """Episodes of another evaluation in `folder` by decoders that are the same there: equal
        model, settings, seeds.

        `ConfigError`: No evaluation there, a damaged one, or one of other episodes.
        """
        header = _values((_lines(folder / EPISODES) or [""])[0])
        theirs = header.get("identity") if isinstance(header, dict) else None
        if not isinstance(theirs, dict) or not isinstance(theirs.get("decoders"), dict):
            raise ConfigError(f"--reuse is {folder}, which has no {EPISODES} of an evaluation.")
        alike = {name for name, value in self.identity.items() if theirs.get(name) == value}
        models = {"policy", "teacher"} & alike
        if other := sorted(self.identity.keys() - alike - {"policy", "teacher", "decoders"}):
            raise ConfigError(
                f"--reuse is {folder}, an evaluation with other {', '.join(other)}; nothing fits."
            )
        found = EpisodeLog(folder, theirs, self.plan, self.longest).read()
        same = {
            n: row
            for n, row in self.identity["decoders"].items()
            if theirs["decoders"].get(n) == row
        }
        return {name: found[name] for name, row in same.items() if row["model"] in models}

    def start(self, results: Results) -> None:
        """Write a file of `results`."""
        header = json.dumps({"program": MADE_BY, CHAINED: True, "identity": self.identity})
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
        """The line that follows the last one."""
        text = line_of(name, episode)
        self._last = _checksum(self._last, text)
        return f'{text[:-1]}{_CHECK}{self._last}"}}'

    def _check_identity(self, header: Any) -> None:
        theirs = header.get("identity") if isinstance(header, dict) else None
        if not isinstance(theirs, dict):
            raise ConfigError(f"{self.file} does not say what it is of; {_ANEW}")
        for name in {**self.identity, **theirs}:
            ours = self.identity.get(name)
            other = theirs.get(name)
            if ours != other:
                what = f"its {name} is {str(other)[:200]}, here it is {str(ours)[:200]}"
                raise ConfigError(
                    f"{self.file} is of another evaluation: {what}; give the same options, or "
                    f"{_ANEW}"
                )

    def _episode(self, values: Any) -> EpisodeResult | None:
        """The episode of a line's `values`; None if it cannot be one of this evaluation."""
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
            and all(type(value) is float and 0 <= value < 1e12 for value in episode.motion.values())
        )
        return episode if fits else None


def refuse_unfinished(folder: Path, report: str) -> None:
    """Keep the episodes of an interrupted evaluation in `folder`, which its `report` does not call
    complete.

    `ConfigError`: There are such episodes.
    """
    episodes = len(_lines(folder / EPISODES)) - 1
    try:
        done = read_json(folder / report).get("complete") is True
    except CeedVLAError:
        done = False
    if episodes > 0 and not done:
        what = f"an interrupted evaluation ({episodes} finished episodes)"
        raise ConfigError(
            f"{folder} holds {what}; go on with --resume=true, or name another --output_dir."
        )


def fingerprint(path: str) -> str:
    """Names a checkpoint: its weights, and the settings beside them."""
    digest = hashlib.sha256(weights_hash(path).encode())
    for file in sorted(resolve_checkpoint(path).glob("*")):
        if file.suffix in (".json", ".safetensors") and file.name not in (WEIGHTS, MANIFEST):
            digest.update(file.name.encode() + unsealed_bytes(file))
    return digest.hexdigest()[:12]


def _lines(file: Path) -> list[str]:
    """Lines of an episode file; none without one."""
    if not file.is_file():
        return []
    try:
        if file.stat().st_size > _LONGEST:
            raise ConfigError(
                f"{file} has {file.stat().st_size / 1e6:.0f} MB; it is no file of ours."
            )
        return file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is damaged; {_ANEW}") from error


def _values(line: str) -> Any:
    """What JSON says; None if it is none."""
    try:
        return parse_json(line)
    except ValueError:
        return None


def _checksum(before: str, text: str) -> str:
    """Of a line's `text`, behind a line whose checksum is `before`."""
    return hashlib.sha256(f"{before}{text}".encode()).hexdigest()[:12]


def _parted(line: str) -> tuple[str, str]:
    """A line without its checksum, and the checksum; empty where there is none."""
    text, found, rest = line.rpartition(_CHECK)
    return (text + "}", rest.removesuffix('"}')) if found else (line, "")


def line_of(name: str, episode: EpisodeResult) -> str:
    """An episode of a decoder as JSON."""
    values = {field: getattr(episode, field) for field in _KINDS if field != "decoder"}
    return json.dumps({"decoder": name, **values})
