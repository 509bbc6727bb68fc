"""`ceed-vla <command> [--flag value ...]`: one entry for the whole pipeline.

A command's module, and with it torch or MuJoCo, is imported when that command runs.
Exit codes: 0 done, 1 an error that the message explains, 2 wrong usage, 130 interrupted. Every error is one line.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

from ceed_vla import __version__
from ceed_vla.cli_flags import parse_flags, take_packages
from ceed_vla.cli_help import Page, format_help, installed_environments
from ceed_vla.cli_values import UsageError
from ceed_vla.discovery import discover
from ceed_vla.errors import CeedVLAError, is_failure
from ceed_vla.workers import prepare

PROGRAM = "ceed-vla"
TRACEBACK = "CEED_VLA_TRACEBACK"
_ON, _OFF = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")
LONGEST_MESSAGE = 1500


@dataclass(frozen=True)
class Command:
    """One row of the command table."""

    summary: str  # one line for `ceed-vla --help`
    where: str  # module, imported when it runs; a dataclass there, its flags; and a function of that
    must: str = ""  # flags that `--help` lists first, besides those without a default
    may: str = ""  # flags that it explains after these; the others it only names. With neither, it explains all
    kept: str = "nothing was written"  # by an interrupt; formatted with the configuration's fields
    positional: str = ""  # the flag that a word without ``--`` stands for
    renamed: str = ""  # "field=flag ..." where a flag is not called like its field, see `ceed_vla.cli_names`
    # Module and class that add a simulator's flags to the configuration; `arguments` of that class gives the
    # function's further arguments. For commands that may not import the simulator.
    simulator: str = ""


_RESUMABLE = "go on with the same command and --resume=true"
COMMANDS = {
    "record": Command(
        "record demonstrations of the scripted experts as a LeRobot data set",
        "sim.record RecordConfig record",
        must="root",
        may="mode env.type env.task episodes seed policy.path resume",
        kept=f"complete attempts are in {{root}}; {_RESUMABLE}",
    ),
    "inspect": Command(
        "say what a data set holds, and what training would choose from it",
        "training.inspection InspectConfig inspect",
        must="roots",
        may="minutes output policy.chunk_size policy.action_tokens.type",
        positional="roots",
        renamed="root=roots",
    ),
    "train": Command(
        "train the autoregressive teacher on recorded data",
        "training.teacher TrainConfig train",
        must="roots output_dir",
        may="grounding_roots steps max_minutes batch_size rounds env.type validate_episodes policy.path "
        "policy.chunk_size policy.backbone.type policy.device resume",
        kept=f"the last saved state is in {{output_dir}}; {_RESUMABLE}",
        simulator="sim.hooks TeacherSimulation",
    ),
    "fit-tokens": Command(
        "fit FAST action tokens (DCT and BPE) on recorded data",
        "training.fit_tokens FitTokensConfig fit_tokens",
        must="roots output",
        may="chunk_size most_ids gripper_dims",
    ),
    "collect": Command(
        "write the teacher's Jacobi trajectories over a data set",
        "training.trajectories CollectConfig collect",
        must="policy.path roots output_dir",
        may="device batch_size max_frames shard_index num_shards threads resume",
        kept=f"complete shards are in {{output_dir}}; {_RESUMABLE}",
    ),
    "distill": Command(
        "distill the teacher into a student that decodes in few forwards",
        "training.distill DistillConfig distill",
        must="teacher.path trajectories.path roots output_dir",
        may="trajectories.online steps max_minutes batch_size lr loss states max_iterations confidence env.type "
        "lora.rank device seed threads resume",
        kept=f"the last saved state is in {{output_dir}}; {_RESUMABLE}",
        simulator="sim.hooks StudentSimulation",
    ),
    "exits": Command(
        "train exits of a frozen policy: forwards that end after a few layers",
        "training.exits ExitsConfig exits",
        must="policy.path roots output_dir layers",
        may="kind steps batch_size lr device seed threads",
    ),
    "reinforce": Command(
        "learn when to exit from what becomes of episodes",
        "training.reinforce ReinforceConfig reinforce",
        must="policy.path output_dir",
        may="env.type env.task cap decay rounds groups scouts groups_from seed workers",
        kept="groups so far, if any, are in {output_dir}; teach with them: --groups_from={output_dir}",
        simulator="sim.hooks ReinforceSimulation",
    ),
    "context": Command(
        "train which prefix tokens of a frozen policy are run: the others cost nothing",
        "training.context ContextConfig context",
        must="policy.path roots output_dir",
        may="dropped steps batch_size lr seed",
    ),
    "open-loop": Command(
        "compare decoders on held-out data, without a simulator: error, forwards, latency",
        "training.open_loop OpenLoopConfig open_loop",
        must="policy.path roots output_dir",
        may="held_out gate decoders chunks executed_steps device threads",
    ),
    "eval": Command(
        "compare decoders in closed loop: success, forwards, latency, clips",
        "sim.evaluate EvalConfig evaluate",
        must="policy.path",
        may="teacher.path decoders episodes seed delay_ms workers env.type env.task env.split output_dir device "
        "threads resume",
        kept=f"finished episodes are in {{output_dir}}; {_RESUMABLE}",
    ),
    "bench": Command(
        "time a policy and its rivals over the floor, with their success, in one run",
        "sim.bench BenchConfig bench",
        must="policy.path",
        may="teacher.path decoders episodes seed engine env.type output_dir threads resume",
        kept=f"finished episodes are in {{output_dir}}; {_RESUMABLE}",
    ),
    "calibrate": Command(
        "choose exit thresholds that keep a promised risk, and write them into the checkpoint",
        "sim.calibrate CalibrateConfig calibrate",
        must="policy.path output_dir",
        may="epsilons alpha signals decoders episodes seed env.type executed_steps threads",
    ),
    "tune": Command(
        "search the decoding with the most success within a budget of milliseconds",
        "sim.tune TuneConfig tune",
        must="policy.path output_dir",
        may="budgets_ms save population generations episodes chunks seed engine env.type threads",
    ),
    "show": Command(
        "draw how one observation's tokens settle over the iterations",
        "sim.show ShowConfig show",
        must="policy.path",
        may="teacher.path output seed chunk env.type env.task device",
    ),
    "grounding": Command(
        "how well a policy sees where object and goal are, by distance",
        "sim.grounding GroundingConfig grounding",
        must="policy.path",
        may="scenes edges env.type env.task output device",
    ),
    "demo": Command(
        "run the shipped policies: table, plots and clips in a few minutes",
        "sim.evaluate DemoConfig evaluate",
        may="episodes seed output_dir resume",
        kept=f"finished episodes are in {{output_dir}}; {_RESUMABLE}",
    ),
    "ros-demo": Command(
        "drive the simulated robot through ROS 2: success, command rate, a bag",
        "ros_nodes.demo.ros_demo RosDemoConfig ros_demo",
        may="episodes checkpoint task action_interface decoding simulated_time rivals latencies_ms reaction output_dir",
        kept="the bag and the nodes' output, as far as they came, are in {output_dir}",
    ),
    "robot-check": Command(
        "say offline whether a robot's file and a checkpoint fit",
        "ros_nodes.robot.check RobotCheckConfig robot_check",
        may="file checkpoint",
        positional="file",
    ),
    "convert": Command(
        "make a checkpoint from a published model (OpenVLA, pi0-FAST)",
        "ceed_vla.convert ConvertConfig convert",
        must="path output_dir",
        may="from unnorm_key chunk_size n_action_steps camera camera_size fast_tokenizer text_tokenizer device",
        positional="path",
    ),
    "seal": Command(
        "write a checkpoint's manifest: a lost, exchanged or damaged file is an error from then on",
        "ceed_vla.checkpoints.sealing SealConfig seal_folder",
        must="folder",
        positional="folder",
    ),
    "verify": Command(
        "check a published model against its reference outputs",
        "ceed_vla.verify VerifyConfig verify",
        must="folder",
        may="policy.path device",
        positional="folder",
    ),
    "doctor": Command(
        "look at this installation: versions, GL, ROS, devices, disk; what to do where something is missing",
        "ceed_vla.doctor DoctorConfig doctor",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, of `sys.argv` if `arguments` is None, and return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"{PROGRAM} {__version__}")
        return 0
    if len(words) > 1 and f"{words[0]}-{words[1]}" in COMMANDS:
        words[:2] = [f"{words[0]}-{words[1]}"]
    name, flags = words[0], words[1:]
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, n=1)
        guess = f" (did you mean {close[0]}?)" if close else ""
        return _complain(PROGRAM, f"unknown command {name!r}{guess}; choose one of {', '.join(COMMANDS)}", 2)
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything of the hub is imported: no command asks it
    _configure_logging()
    if os.environ.get(TRACEBACK, "").lower() not in (*_ON, *_OFF):
        print(
            f"{PROGRAM}: {TRACEBACK} is {os.environ[TRACEBACK][:20]!r}; 1 shows tracebacks, 0 does not", file=sys.stderr
        )
    if arguments is None and not tracebacks():
        sys.unraisablehook = lambda _: None  # what fails while objects are thrown away changes nothing
    if re.search(r"--workers[= ](?!1( |$))", " ".join(flags)) and not _help(
        flags
    ):  # they import what this process is about to
        prepare(COMMANDS[name].where.split()[0])
    return run(name, COMMANDS[name], flags)


def tracebacks() -> bool:
    """Whether the user asks where errors come from."""
    return os.environ.get(TRACEBACK, "").lower() in _ON


def _configure_logging() -> None:
    """Our own progress, others' warnings, one line each; LeRobot's remarks on missing accelerators are left out."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    for name in ("ceed_vla", "training", "sim", "ros_nodes"):
        logging.getLogger(name).setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_for_the_user)


def _is_for_the_user(record: logging.LogRecord) -> bool:
    if not tracebacks():
        record.exc_info = record.exc_text = record.stack_info = None
    return record.levelno >= logging.ERROR or "lerobot" not in Path(record.pathname).parts


def overview() -> str:
    rows = "\n".join(f"  {name:<13}{command.summary}" for name, command in COMMANDS.items())
    return (
        f"usage: {PROGRAM} <command> [--flag value ...]\n\n"
        f"Vision-language-action policies that decode their action tokens in parallel.\n\n"
        f"commands:\n{rows}\n\n"
        f"{PROGRAM} <command> --help explains the flags that matter, --help=all every flag; {PROGRAM} --version names "
        f"the version.\n"
        f"{TRACEBACK}=1 in the environment shows where an error comes from."
    )


def config_of(command: Command) -> type[Any]:
    """A command's configuration dataclass; with the simulator's flags where it has some."""
    place, name, _ = command.where.split()
    config_class = getattr(importlib.import_module(place), name)
    if not command.simulator:
        return config_class
    module, name = command.simulator.split()
    simulator = getattr(importlib.import_module(module), name)
    space = {"__doc__": config_class.__doc__, "__module__": config_class.__module__}
    return dataclass(type(config_class.__name__, (simulator, config_class), space))


def run(name: str, command: Command, flags: Sequence[str]) -> int:
    program, config = f"{PROGRAM} {name}", None
    try:
        packages, flags = take_packages(flags)
        discover(packages)
        wanted = _help(flags)
        if wanted:
            # Packages may add to what flags can be; the stored page has what this package alone offers.
            stored = None if packages else Page.stored(name)
            page = stored or Page.of(config_of(command), command.renamed)
            groups = (command.positional, command.must.split(), command.may.split())
            print(format_help(program, page, *groups, everything=wanted == "all"))
            installed = ", ".join(installed_environments())
            if installed and any(flag[0] == "env.type" for flag in page.flags):
                print(f"\nInstalled here, with environments that --env.type takes, too: {installed}")
            return 0
        config = parse_flags(config_of(command), flags, command.positional, command.renamed)
        module, _, function = command.where.split()
        more = config.arguments() if command.simulator else {}
        result = getattr(importlib.import_module(module), function)(config, **more)
        if not isinstance(result, dict | None):  # a dict is a report that the command has printed
            print(result)
    except UsageError as error:
        return _complain(program, f"{error} ({program} --help lists the flags)", 2)
    except KeyboardInterrupt:
        kept = command.kept.format_map(vars(config)) if config is not None else "nothing was started"
        print(f"\n{program}: interrupted; {kept}", file=sys.stderr)
        return 130
    except BaseException as error:
        if tracebacks() or not is_failure(error):
            raise
        return _complain(program, explain(error), 1)
    return 0


def _help(flags: Sequence[str]) -> str:
    """Which help is asked for: "some" or "all"; empty for none."""
    for word, following in pairwise([*flags, ""]):
        if word in ("-h", "--help", "--help=all"):
            return "all" if "all" in (following, word.partition("=")[2]) else "some"
    return ""


def explain(error: BaseException) -> str:
    """What a user can do about an exception, whatever raised it."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return f"{where}{error.strerror}{'; make room there, what is complete is kept' if full else ''}"
    if isinstance(error, CeedVLAError | OSError):
        return text
    if type(error).__name__ == "SafetensorError":
        return f"weights cannot be read or written ({text}); is the file complete, and is there room on the disk?"
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return f"not enough memory ({text or 'MemoryError'}); a smaller batch, model or image needs less"
    if isinstance(error, RecursionError):
        return "an input is nested too deep"
    if isinstance(error, ImportError):
        return f"{text}; `{PROGRAM} doctor` tells what this installation lacks"
    return f"unexpected {type(error).__name__}: {text} (this is a defect or damaged input; {TRACEBACK}=1 shows where)"


def _complain(program: str, message: str, code: int) -> int:
    """One line on stderr, without what would steer a terminal."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    line = line if len(line) <= LONGEST_MESSAGE else f"{line[:LONGEST_MESSAGE]} ..."
    print(f"{program}: error: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
