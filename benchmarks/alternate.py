"""Compare the speed of this code with another version: two checkouts decode in turns.

    python -m benchmarks.alternate OTHER_CHECKOUT --decoders ar,jacobi,ceed --chunks 300

Each checkout runs in a process of its own; chunk by chunk both decode the same observation,
in alternating order, so that slow phases of the machine hit both. For every decoder it prints the
ratio of the medians (this over the other), with a 95 % interval by resampling pairs of chunks. The
order in which the processes start changes the ratio by some percent too, which this interval lacks:
two pairs start in opposite orders, and each pair's ratio is printed.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RECORDED = ROOT / "tests" / "fixtures" / "decoded_9257658.zip"
DECODERS = "ar,ar_h,jacobi,jacobi_h,cap1,cap2,ceed,ceed_fresh,conf0.2_cap2_fresh"
WARM_UP = 5
RESAMPLES = 2000

# The program of each process; it imports only public names, which both versions have.
WORKER = """
import io, json, sys, time, zipfile
import numpy as np, torch
from pathlib import Path
from PIL import Image
import ceed_vla
from ceed_vla import load
torch.set_num_threads(1)
archive = zipfile.ZipFile(sys.argv[1])
values = np.load(io.BytesIO(archive.read("decoded.npz")))
count = len(values["state"])
shipped = Path(ceed_vla.__file__).parent / "pretrained" / "student_all_tokens"
policy = load(shipped.name if shipped.is_dir() else "student")[0]  # its name before 2026-11-29
images = {
    camera: np.asarray(Image.open(io.BytesIO(archive.read(camera + ".png")))).reshape(
        count, 96, 96, 3
    )
    for camera in policy.config.cameras
}
print(Path(ceed_vla.__file__).resolve(), flush=True)
for line in sys.stdin:
    index, decoder = json.loads(line)
    batch = {
        camera: torch.from_numpy(found[index].copy()).permute(2, 0, 1)[None].float() / 255
        for camera, found in images.items()
    }
    batch["observation.state"] = torch.from_numpy(values["state"][index : index + 1])
    words = values["words"][index : index + 1].astype(np.int64)
    batch["observation.language.tokens"] = torch.from_numpy(words)
    tokens = torch.from_numpy(values["previous"][index : index + 1].astype(np.int64))
    started = time.perf_counter()
    result = policy.decode(batch, decoder, previous=tokens)
    seconds = time.perf_counter() - started
    print(json.dumps([seconds, result.tokens[0].tolist()]), flush=True)
"""


class Checkout:
    """A process that decodes with the code of a checkout."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(RECORDED)],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        package = self.process.stdout.readline().strip()
        if not package:
            raise SystemExit(f"{folder} does not load its student; see the message above.")
        if not Path(package).is_relative_to(folder.resolve()):
            raise SystemExit(f"{folder} has no ceed_vla; Python found {package}.")

    def decode(self, index: int, decoder: str) -> tuple[float, list[int]]:
        """Seconds and tokens of one chunk."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([index, decoder]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"A checkout cannot decode with {decoder}; see the message above.")
        seconds, tokens = json.loads(answer)
        return seconds, tokens


def ratio(mine: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """The ratio of the medians of two series (N,), and its 95 % interval by resampling pairs."""
    random = np.random.default_rng(0)
    drawn = random.integers(0, len(mine), (RESAMPLES, len(mine)))
    resampled = np.median(mine[drawn], axis=1) / np.median(other[drawn], axis=1)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return float(np.median(mine) / np.median(other)), float(low), float(high)


def in_turns(
    pair: dict[int, Checkout], decoder: str, chunks: int, count: int
) -> list[tuple[float, float]]:
    """Seconds of this and of the other checkout, for each of `chunks` chunks."""
    seconds = []
    for chunk in range(-WARM_UP, chunks):
        order = (0, 1) if chunk % 2 else (1, 0)
        found = {which: pair[which].decode(chunk % count, decoder) for which in order}
        if found[0][1] != found[1][1]:
            raise SystemExit(f"{decoder}: other tokens for observation {chunk % count}.")
        if chunk >= 0:
            seconds.append((found[0][0], found[1][0]))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--decoders", default=DECODERS)
    parser.add_argument("--chunks", type=int, default=300)
    options = parser.parse_args()
    with zipfile.ZipFile(RECORDED) as archive:
        count = len(np.load(io.BytesIO(archive.read("decoded.npz")))["state"])
    folders = [ROOT, options.other]
    starts = [{which: Checkout(folders[which]) for which in order} for order in ((0, 1), (1, 0))]
    print("| decoder | this p50 [ms] | other p50 [ms] | ratio [95 %] | of each pair |")
    print("|---|---|---|---|---|")
    for decoder in options.decoders.split(","):
        chunks = -(-options.chunks // 2)
        halves = [np.array(in_turns(pair, decoder, chunks, count)).T for pair in starts]
        times = np.concatenate(halves, axis=1)  # (2, N)
        each = ", ".join(f"{ratio(*half)[0]:.3f}" for half in halves)
        middle, low, high = ratio(times[0], times[1])
        mine, other = 1000 * np.median(times, axis=1)
        print(
            f"| {decoder} | {mine:.2f} | {other:.2f} | {middle:.3f} [{low:.3f}, {high:.3f}] "
            f"| {each} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
