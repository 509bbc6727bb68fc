"""``ceed-vla show``: how the tokens of one chunk settle, one by one and in parallel."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from ceed_vla.decoding import DecodingConfig
from ceed_vla.fields import SEEDS, ranged
from ceed_vla.outputs import claim_file
from ceed_vla.sim.env_tasks import task_of
from ceed_vla.sim.environment import EVALUATION_SEEDS, Bundle, EnvPool, images_of, observation_batch
from ceed_vla.sim.evaluation import load_bundles
from ceed_vla.sim.evaluation_config import MOVED
from ceed_vla.sim.plots import BLUE, FAINT, GREY, INK, SKY, STYLE, VERMILLION, save_figure
from ceed_vla.sim.rerun_episodes import log_episode
from ceed_vla.sim.rollout import PolicyRunner, Replan, drive, stack_previous
from ceed_vla.sim.settings import CheckpointPath, DrivenConfig
from ceed_vla.viz import RerunLog, check_rerun

UNKNOWN, WRONG, AHEAD, SETTLED = range(4)
_COLORS = (FAINT, "#F0A46A", SKY, BLUE)
_LABELS = {
    SETTLED: "final, as is everything before it",
    AHEAD: "final before an earlier token is",
    WRONG: "will still change",
    UNKNOWN: "not decoded yet",
}
_EXIT_NOTES = {"max_iterations": "cap reached", "stable": "executed steps\nare final"}


@dataclass
class ShowConfig(DrivenConfig):
    """Options of ``ceed-vla show``.

    Attributes:
        teacher: The policy's autoregressive teacher; without one, the policy's own autoregressive
            decoding is shown.
        output: PNG file to write; an earlier picture of this command is replaced.
        seed: Seed of the episode.
        chunk: Index of the chunk to show; the policy drives the episode up to it. Chunk 0 has no
            warm start.
        executed_steps: Steps executed of each chunk.
        device: Overrides the checkpoints' device.
        rerun: File to write for Rerun's viewer, PATH.rrd: the episode up to this chunk. Needs the
            extra `viz`.
    """

    moved: ClassVar[dict[str, str]] = MOVED

    teacher: CheckpointPath = field(default_factory=CheckpointPath)
    output: str = "show.png"
    seed: int = ranged(EVALUATION_SEEDS, SEEDS)
    chunk: int = ranged(3, "[0, 10000]")
    executed_steps: int = ranged(4, "[1, 4096]")
    device: str | None = None
    rerun: str = ""


@dataclass
class Panel:
    """One decoding of the block, as drawn."""

    title: str
    status: NDArray[np.int_]  # (rows, n) codes; row 0 is the state before the first forward
    exit_row: int  # forwards after which the decoder stopped
    exit_note: str = ""  # why it stopped there; empty for no mark
    start: str = ""  # label of row 0


def show(config: ShowConfig) -> Path:
    """Draw the tokens of one chunk over its forwards; return the PNG file."""
    path = claim_file("output", config.output, ".png")
    if config.rerun:
        check_rerun("rerun", config.rerun)
    config.place_threads()
    bundles = load_bundles(config)
    policy = bundles["policy"][0].config
    with EnvPool(1, config.env, config.instruction) as pool:
        runner = PolicyRunner(
            bundles["policy"], policy.decoding, executed_steps=config.executed_steps
        )
        moments = drive(runner, pool, config.seed, task_of(config.env, config.seed))
        replans = list(islice(moments, config.chunk + 1))
        replan = replans[-1]  # the last one of a shorter episode
    if config.rerun:
        with RerunLog(Path(config.rerun)) as log:
            log_episode(log, "policy", runner, replans, config.env.fps)
    panels = build_panels(bundles, replan, policy.decoding, config.executed_steps)
    with mpl.rc_context(STYLE):
        figure = draw(
            panels, replan, max(policy.block_length // policy.chunk_size, 1), config.executed_steps
        )
        save_figure(figure, path, dpi=170)
    return path


def build_panels(
    bundles: dict[str, Bundle], replan: Replan, early_exit: DecodingConfig, executed_steps: int
) -> list[Panel]:
    """Decode the observation of `replan` in three ways and determine when every token settled.

    The ways are token by token, the teacher's Jacobi (if there is a teacher), and the policy's
    Jacobi with its exit.
    """
    taught = "teacher" in bundles
    strict = DecodingConfig(guess=early_exit.guess)
    block = int(bundles["teacher" if taught else "policy"][0].config.block_length)
    title = f"{'Teacher' if taught else 'Policy'}, token by token: {block - 1} forwards"
    panels = [Panel(title, autoregressive_status(block), block - 1)]
    if taught:
        title = "Teacher, Jacobi to convergence"
        panels.append(_jacobi_panel(title, bundles["teacher"], replan, strict, executed_steps))
    early_exit = early_exit if early_exit.method == "jacobi" else strict
    title = f"{'Student' if taught else 'Policy'}, Jacobi with early exit"
    return [*panels, _jacobi_panel(title, bundles["policy"], replan, early_exit, executed_steps)]


def _jacobi_panel(
    title: str, bundle: Bundle, replan: Replan, decoding: DecodingConfig, executed_steps: int
) -> Panel:
    """Panel with all states up to the fixed point, and with the exit of `decoding`."""
    policy, preprocessor, _ = bundle
    batch = preprocessor(observation_batch([replan.observation], [replan.instruction]))
    previous = stack_previous([replan.previous])
    request: dict[str, Any] = {
        "previous": previous,
        "shift_steps": executed_steps,
        "executed_steps": executed_steps,
    }
    strict = DecodingConfig(method="jacobi", guess=decoding.guess, seed=decoding.seed)
    result = policy.decode(batch, strict, record_states=True, **request)
    early = policy.decode(batch, decoding, **request)
    count = int(early.iterations[0])
    all_forwards = int(result.iterations[0])
    title += f": {count} block forward{'s' if count != 1 else ''}"
    if all_forwards > count:
        title += f" (to convergence: {all_forwards})"
    note = _EXIT_NOTES.get(early.exit_reason[0], early.exit_reason[0])
    start = "previous chunk" if decoding.guess == "previous" and previous is not None else "guess"
    return Panel(title, jacobi_status(torch.cat(result.states).cpu().numpy()), count, note, start)


def jacobi_status(states: NDArray[np.integer]) -> NDArray[np.int_]:
    """Determine whether each token of each state is final.

    Args:
        states: States (iterations + 1, n); the last row is the fixed point.

    Returns:
        Codes of the same shape: `SETTLED` if the token and all before it are final, `AHEAD` if it
        is final but an earlier one is not, `WRONG` otherwise.
    """
    equal = states == states[-1]  # (k + 1, n)
    final = np.logical_and.accumulate(equal[::-1], axis=0)[::-1]  # equal from here on
    prefix = np.logical_and.accumulate(final, axis=1)
    return np.where(prefix, SETTLED, np.where(final, AHEAD, WRONG))


def autoregressive_status(block: int) -> NDArray[np.int_]:
    """Codes (n, n): after j forwards the first j + 1 tokens are final (one from the prefill)."""
    return np.where(np.tri(block, dtype=bool), SETTLED, UNKNOWN)


def draw(panels: list[Panel], replan: Replan, width: int, executed_steps: int) -> Figure:
    """Draw the camera images, and per panel a map of tokens over forwards.

    `width` is the number of tokens per step.
    """
    row_inches, gap = 0.135, 0.95
    heights = [row_inches * max(len(panel.status), 3) for panel in panels]
    height = sum(heights) + gap * len(panels) + 1.2
    figure = Figure(figsize=(13.0, height))
    left = 0.285
    right = 0.94
    top = height - 1.0
    for panel, inches in zip(panels, heights, strict=True):
        axes = figure.add_axes((left, (top - inches) / height, right - left, inches / height))
        _draw_panel(axes, panel, width, executed_steps, last=panel is panels[-1])
        top -= inches + gap
    figure.text(
        0.025,
        1 - 0.38 / height,
        f"“{replan.instruction}”",
        fontsize=16,
        fontweight="bold",
        va="center",
    )
    _draw_cameras(figure, replan, height)
    return figure


def _draw_panel(axes: Axes, panel: Panel, width: int, executed_steps: int, *, last: bool) -> None:
    rows, block = panel.status.shape
    axes.pcolormesh(
        np.arange(block + 1),
        np.arange(rows + 1) - 0.5,
        panel.status,
        cmap=ListedColormap(list(_COLORS)),
        vmin=-0.5,
        vmax=3.5,
        edgecolors="white",
        linewidth=0.5,
    )
    for boundary in range(width, block, width):
        axes.axvline(boundary, color="white", lw=2.2)
    axes.axvline(executed_steps * width, color=INK, lw=1.4, ls=(0, (4, 2)))
    if panel.exit_row < rows - 1:  # what would follow without the exit
        axes.axhspan(panel.exit_row + 0.5, rows - 0.5, color="white", alpha=0.62, lw=0, zorder=3)
    if panel.exit_note:
        axes.plot(
            [0, block],
            [panel.exit_row + 0.5] * 2,
            color=VERMILLION,
            lw=2.2,
            clip_on=False,
            zorder=4,
        )
        axes.text(
            block + 0.4,
            panel.exit_row + 0.5,
            f"exit\n{panel.exit_note}",
            color=VERMILLION,
            fontsize=9,
            va="center",
            fontweight="bold",
        )
        axes.text(block + 0.4, 0, panel.start, color=GREY, fontsize=9, va="center")
    axes.set(xlim=(0, block), ylim=(rows - 0.5, -0.5), title=panel.title, ylabel="forwards")
    axes.set_yticks(range(rows) if rows <= 16 else [*range(0, rows - 2, 10), rows - 1])
    labels = [f"step {i + 1}" if last or rows > 16 else "" for i in range(block // width)]
    axes.set_xticks([width * (i + 0.5) for i in range(len(labels))], labels)
    axes.tick_params(length=0, labelsize=8.5)
    axes.spines[:].set_visible(False)
    if last:
        axes.annotate(
            "left of the dashed line: executed before the next chunk",
            (executed_steps * width, 0),
            (-6, -24),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right",
            va="top",
            style="italic",
        )


def _draw_cameras(figure: Figure, replan: Replan, height: float) -> None:
    # [inch]
    side = 2.55
    width = figure.get_figwidth()
    top = height - 1.0
    for name, pixels in images_of(replan.observation).items():
        axes = figure.add_axes((0.025, (top - side) / height, side / width, side / height))
        axes.imshow(pixels, interpolation="nearest")
        axes.set_axis_off()
        camera = f"{name.rpartition('.')[2]} camera"
        figure.text(
            0.025, (top - side - 0.16) / height, camera, fontsize=9, color=GREY, va="center"
        )
        top -= side + 0.42
    handles = [Patch(facecolor=_COLORS[code], label=label) for code, label in _LABELS.items()]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.018, (top + 0.1) / height),
        frameon=False,
        fontsize=9,
        labelspacing=0.9,
        handlelength=1.2,
        handleheight=1.1,
    )
