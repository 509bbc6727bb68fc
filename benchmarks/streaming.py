"""Data larger than memory: what a streamed data set costs beside one that is decoded into files.

    python benchmarks/streaming.py                    # 100,000 frames of two cameras as videos; about ten minutes
    python benchmarks/streaming.py --frames 5000

The data set is synthetic, its videos in LeRobot's default codec. Every row is a process of its own: a tiny teacher
trains some steps, then an epoch's batches are drawn without training. "few frames" is the same work on 320 frames, so
what its process takes is the model's; memory is the peak of the resident set, that of maps their pages in memory too.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CAMERAS = ("observation.images.front", "observation.images.wrist")
FPS, EPISODE, PER_FILE = 10, 200, 10_000  # [Hz], frames, frames


def write_video(file: Path, frames: int, size: int) -> None:
    """A video of a texture that moves, every second frame a key frame as LeRobot writes it."""
    import av

    texture = np.random.default_rng(0).integers(0, 255, (size // 8 + 1, size // 8 + 1, 3)).astype(np.uint8)
    texture = texture.repeat(8, 0).repeat(8, 1)[:size, :size]
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        options = {"g": "2", "crf": "30", "preset": "12"}
        stream = container.add_stream("libsvtav1", FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        for step in range(frames):
            image = np.roll(texture, (step % size, step // 7 % size), (0, 1))
            image[:8, :8] = step % 256
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())


def write_dataset(root: Path, frames: int, size: int) -> Path:
    """A LeRobotDataset v3 of so many frames; all its video files are copies of one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = {"dtype": "video", "shape": [size, size, 3], "names": ["height", "width", "channels"]}
    features = dict.fromkeys(CAMERAS, image)
    for name, length in (("observation.state", 14), ("action", 7)):
        features[name] = {"dtype": "float32", "shape": [length], "names": None}  # type: ignore[dict-item]
    length, random = min(EPISODE, frames), np.random.default_rng(0)
    index = np.arange(frames)
    columns = {
        "observation.state": random.normal(size=(frames, 14)).astype(np.float32),
        "action": random.uniform(-0.2, 0.2, (frames, 7)).astype(np.float32),
    }
    table = {
        name: pa.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1]) for name, values in columns.items()
    }
    table |= {"index": index, "episode_index": index // length, "frame_index": index % length}
    table |= {"task_index": 0 * index, "timestamp": (index % length / FPS).astype(np.float32)}
    first = np.arange(0, frames, length)
    episodes = {"episode_index": first // length, "length": np.minimum(length, frames - first)}
    for camera in CAMERAS:
        places = {"chunk_index": 0 * first, "file_index": first // PER_FILE, "from_timestamp": first % PER_FILE / FPS}
        episodes |= {f"videos/{camera}/{name}": values for name, values in places.items()}
        for file in range(-(-frames // PER_FILE)):
            video = root / "videos" / camera / "chunk-000" / f"file-{file:03d}.mp4"
            if camera == CAMERAS[0] and not file:
                write_video(video, min(frames, PER_FILE), size)
                original = video
                continue
            video.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(original, video)
    for file, rows in (
        ("data/chunk-000/file-000", table),
        ("meta/episodes/chunk-000/file-000", episodes),
        ("meta/tasks", {"task": ["move"], "task_index": [0]}),
    ):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(rows), root / f"{file}.parquet")
    info = {"codebase_version": "v3.0", "fps": FPS, "features": features, "total_frames": frames,
            "total_episodes": len(first)}  # fmt: skip
    (root / "meta" / "info.json").write_text(json.dumps(info))
    return root


def measure(root: Path, output: Path, *, streamed: bool, steps: int, frames: int, batch: int, memory: float) -> None:
    """Train and draw; print a line of JSON."""
    from ceed_vla.data.frame_stream import StreamingConfig
    from sim.tabletop.policy import tabletop_config
    from training.teacher import TeacherRun, TrainConfig

    sizes = {"width": 32, "layers": 1, "heads": 2, "mlp_width": 32, "stem_channels": [8] * 4, "auxiliary_scale": []}
    config = TrainConfig(
        policy=tabletop_config(**sizes), roots=str(root), output_dir=str(output), steps=steps, batch_size=batch,
        grounding_steps=0, grounding_batch=0, rounds=0, mixed_precision="no", threads=1,
        streaming=StreamingConfig(above_gb=0 if streamed else 1e6, memory_gb=memory),
    )  # fmt: skip
    started = time.perf_counter()
    run = TeacherRun(config)
    found = {"open_s": time.perf_counter() - started}
    run.run()
    drawn, started = 0, time.perf_counter()
    for step in range(steps, steps + -(-frames // batch)):
        drawn += len(run.mixture.draw(batch, step)["task"])
    found["frames_s"] = drawn / (time.perf_counter() - started)
    found["gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=96, help="[px]")
    parser.add_argument("--steps", type=int, default=50, help="optimiser steps")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--memory", type=float, default=0.5, help="streaming.memory_gb")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "ROOT"), help=argparse.SUPPRESS)  # a row's own process
    arguments = parser.parse_args()
    work = {"steps": arguments.steps, "frames": arguments.frames, "batch": arguments.batch, "memory": arguments.memory}
    if arguments.one:
        with tempfile.TemporaryDirectory() as output:
            measure(Path(arguments.one[1]), Path(output) / "run", streamed=arguments.one[0] == "stream", **work)
        return
    with tempfile.TemporaryDirectory() as folder:
        roots = {}
        for name, frames in (("few frames", 320), ("data", arguments.frames)):
            started = time.perf_counter()
            roots[name] = write_dataset(Path(folder) / name.replace(" ", "_"), frames, arguments.size)
        size = arguments.frames * len(CAMERAS) * 3 * arguments.size**2 / 1e9
        taken = time.perf_counter() - started
        print(f"{arguments.frames} frames of {len(CAMERAS)} cameras, {size:.2f} GB decoded; written in {taken:.0f} s")
        base = 0.0
        for name, kind, root in (
            ("few frames", "map", "few frames"),
            ("stream", "stream", "data"),
            ("map", "map", "data"),
        ):
            flags = [f"--{flag}={value}" for flag, value in work.items()]
            command = [sys.executable, __file__, *flags, "--one", kind, str(roots[root])]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            base = base or found["gb"]
            print(
                f"  {name:<12} opened in {found['open_s']:7.1f} s  {found['frames_s']:8.0f} frames/s  peak "
                f"{found['gb']:.2f} GB, {found['gb'] - base:+.2f} GB over the model's",
                flush=True,
            )


if __name__ == "__main__":
    main()
