"""The table of commands: the purpose of each, and the flags that its help explains."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Command:
    """One row of the command table."""

    summary: str  # one line for `ceed-vla --help`
    # module (imported when the command runs), its dataclass of flags, and its function
    where: str
    extras: str = ""  # extras whose packages it imports
    must: str = ""  # flags that `--help` lists first, besides those without a default
    # flags that `--help` explains next; it only names the others. Without must and may: explain all
    may: str = ""
    # printed after an interrupt: what is on disk; formatted with the configuration's fields
    kept: str = "nothing was written"
    # the flag that a word without ``--`` sets; if it is a list, all words before the first flag
    positional: str = ""
    # "field=flag ..." for flags with another name than their field, see `ceed_vla.cli.names`
    renamed: str = ""
    # Module and class that add a simulator's flags to the configuration; `arguments` of that class
    # returns further arguments of the function. For commands that may not import the simulator.
    simulator: str = ""
    axis: str = ""  # its folder in `ceed_vla.axes`; without that folder there is no command


_RESUMABLE = "continue with the same command and --resume=true"
COMMANDS = {
    "record": Command(
        "record demonstrations of the scripted experts as a LeRobot dataset",
        "ceed_vla.sim.record RecordConfig record",
        extras="policy sim train",
        must="root",
        may="mode env.type env.task episodes seed policy.path resume",
        kept=f"complete attempts are in {{root}}; {_RESUMABLE}",
    ),
    "inspect": Command(
        "inspect a dataset: its content, its faults, and the settings training derives from it",
        "ceed_vla.training.inspection InspectConfig inspect",
        extras="train",
        must="roots",
        may="minutes output policy.chunk_size policy.action_tokens.type",
        positional="roots",
        renamed="root=roots",
    ),
    "train": Command(
        "train the autoregressive teacher on recorded data",
        "ceed_vla.training.teacher TrainConfig train",
        extras="train",
        must="roots output_dir",
        may=(
            "grounding_roots steps max_minutes batch_size rounds env.type validate_episodes "
            "policy.path policy.chunk_size policy.backbone.type policy.device resume"
        ),
        kept=f"the last saved state is in {{output_dir}}; {_RESUMABLE}",
        simulator="ceed_vla.sim.hooks TeacherSimulation",
    ),
    "fit-tokens": Command(
        "fit FAST action tokens (DCT and BPE) on recorded data",
        "ceed_vla.training.fit_tokens FitTokensConfig fit_tokens",
        extras="train",
        must="roots output",
        may="chunk_size most_ids gripper_dims",
    ),
    "collect": Command(
        "write the teacher's Jacobi trajectories over a dataset",
        "ceed_vla.training.trajectories CollectConfig collect",
        extras="train",
        must="policy.path roots output_dir",
        may="device batch_size max_frames shard_index num_shards threads resume",
        kept=f"complete shards are in {{output_dir}}; {_RESUMABLE}",
    ),
    "distill": Command(
        "distill the teacher into a student that decodes in few forwards",
        "ceed_vla.training.distill DistillConfig distill",
        extras="train",
        must="teacher.path trajectories.path roots output_dir",
        may=(
            "student.path trajectories.online steps max_minutes batch_size lr loss states "
            "max_iterations confidence env.type lora.rank device seed threads resume"
        ),
        kept=f"the last saved state is in {{output_dir}}; {_RESUMABLE}",
        simulator="ceed_vla.sim.hooks StudentSimulation",
    ),
    "exits": Command(
        "train exits of a frozen policy: forwards that end after a few layers",
        "ceed_vla.training.axes.depth ExitsConfig exits",
        extras="train",
        axis="depth",
        must="policy.path roots output_dir layers",
        may="trajectories.path kind steps batch_size lr device seed threads resume",
        kept=f"the last saved state is in {{output_dir}}; {_RESUMABLE}",
    ),
    "reinforce": Command(
        "learn when to exit from the outcomes of episodes",
        "ceed_vla.training.axes.learned ReinforceConfig reinforce",
        extras="policy sim",
        axis="learned",
        must="policy.path output_dir",
        may="env.type env.task cap decay rounds groups scouts groups_from seed workers",
        kept=(
            "groups so far, if any, are in {output_dir}; learn from them with "
            "--groups_from={output_dir}"
        ),
        simulator="ceed_vla.sim.axes.learned ReinforceSimulation",
    ),
    "improve": Command(
        "train a policy's weights on the outcomes of its episodes",
        "ceed_vla.training.improve.run ImproveConfig improve",
        extras="train sim vlm",
        must="policy.path output_dir",
        may=(
            "env.type env.task decoding cap decay starts iterations groups rank lr seed workers "
            "resume"
        ),
        kept=f"the last complete iteration is in {{output_dir}}; {_RESUMABLE}",
        simulator="ceed_vla.sim.improve ImproveSimulation",
    ),
    "context": Command(
        "train a scorer that chooses the prefix tokens that a frozen policy keeps",
        "ceed_vla.training.axes.context ContextConfig context",
        extras="train",
        axis="context",
        must="policy.path roots output_dir",
        may="trajectories.path dropped steps batch_size lr seed threads resume",
        kept=f"the last saved state is in {{output_dir}}; {_RESUMABLE}",
    ),
    "route": Command(
        "learn which layers of a frozen policy each chunk needs",
        "ceed_vla.training.axes.programs RouteConfig route",
        extras="train",
        axis="programs",
        must="policy.path roots output_dir",
        may="trajectories.path programs harm steps batch_size lr seed threads resume",
        kept=f"the last saved state is in {{output_dir}}; {_RESUMABLE}",
    ),
    "open-loop": Command(
        "compare decoders on held-out data, without a simulator: error, forwards, latency",
        "ceed_vla.training.open_loop OpenLoopConfig open_loop",
        extras="train",
        must="policy.path roots output_dir",
        may="held_out gate decoders chunks executed_steps device threads",
    ),
    "eval": Command(
        "compare decoders in closed loop: success, forwards, latency, clips",
        "ceed_vla.sim.evaluate EvalConfig evaluate",
        extras="policy sim",
        must="policy.path",
        may=(
            "teacher.path decoders episodes seed delay_ms workers env.type env.task env.split "
            "output_dir device threads resume"
        ),
        kept=f"finished episodes are in {{output_dir}}; {_RESUMABLE}",
    ),
    "merge": Command(
        "join the shards of an evaluation that several machines shared",
        "ceed_vla.sim.merge MergeConfig merge",
        extras="policy sim",
        must="folders",
        may="output_dir",
        positional="folders",
    ),
    "report": Command(
        "write one page that shows runs and compares them: verdict, tables, plots, clips",
        "ceed_vla.report.command ReportConfig report",
        extras="sim",
        must="runs",
        may="output",
        positional="runs",
    ),
    "bench": Command(
        "measure latency and success of a policy, its rivals and the floor, in one run",
        "ceed_vla.sim.bench BenchConfig bench",
        extras="policy sim",
        must="policy.path",
        may="teacher.path decoders episodes seed engine env.type output_dir threads resume",
        kept=f"finished episodes are in {{output_dir}}; {_RESUMABLE}",
    ),
    "calibrate": Command(
        "choose exit thresholds that bound a risk, and write them into the checkpoint",
        "ceed_vla.sim.calibrate CalibrateConfig calibrate",
        extras="policy sim",
        must="policy.path output_dir",
        may="epsilons alpha signals decoders episodes seed env.type executed_steps threads resume",
        kept=f"measured decoders are in {{output_dir}}; {_RESUMABLE}",
    ),
    "tune": Command(
        "search the decoding with the most success within a budget of milliseconds",
        "ceed_vla.sim.tune TuneConfig tune",
        extras="policy sim",
        must="policy.path output_dir",
        may="budgets_ms save population generations episodes chunks seed engine env.type threads "
        "resume",
        kept=f"measured plans are in {{output_dir}}; {_RESUMABLE}",
    ),
    "show": Command(
        "plot how the tokens of one observation converge over the iterations",
        "ceed_vla.sim.show ShowConfig show",
        extras="policy sim",
        must="policy.path",
        may="teacher.path output seed chunk env.type env.task device",
    ),
    "grounding": Command(
        "measure how well a policy locates object and goal, by distance",
        "ceed_vla.sim.grounding GroundingConfig grounding",
        extras="policy sim",
        must="policy.path",
        may="scenes edges env.type env.task output device",
    ),
    "demo": Command(
        "run the shipped policies: table, plots and clips in a few minutes",
        "ceed_vla.sim.evaluate DemoConfig evaluate",
        extras="policy sim",
        may="episodes seed output_dir resume",
        kept=f"finished episodes are in {{output_dir}}; {_RESUMABLE}",
    ),
    "ros-demo": Command(
        "drive the simulated robot through ROS 2: success, command rate, a bag",
        "ceed_vla.ros_nodes.demo.ros_demo RosDemoConfig ros_demo",
        extras="sim ros2",
        may=(
            "episodes checkpoint task action_interface decoding engine simulated_time rivals "
            "latencies_ms reaction output_dir"
        ),
        kept="the bag and the nodes' output so far, if any, are in {output_dir}",
    ),
    "run": Command(
        "give a running policy node a task with a time limit, and wait for its result",
        "ceed_vla.ros_nodes.robot.run_task RunTaskConfig run_task",
        extras="ros2",
        must="instruction",
        may="time_limit node wait",
        kept="the task was cancelled",
        positional="instruction",
    ),
    "robot-check": Command(
        "check offline whether a robot file and a checkpoint match",
        "ceed_vla.ros_nodes.robot.check RobotCheckConfig robot_check",
        extras="ros2",
        may="file checkpoint",
        positional="file",
    ),
    "bag-to-dataset": Command(
        "make a LeRobot dataset from a bag of a robot's topics",
        "ceed_vla.ros_nodes.record.bag_to_dataset BagConfig bag_to_dataset",
        extras="bags train",
        must="bag root",
        may="robot instruction format resume",
        kept="complete episodes are in {root}; convert again into another root",
        positional="bag",
    ),
    "convert": Command(
        "make a checkpoint from a published model (OpenVLA, pi0-FAST)",
        "ceed_vla.convert ConvertConfig convert",
        extras="policy",
        must="path output_dir",
        may=(
            "from unnorm_key chunk_size n_action_steps camera camera_size fast_tokenizer "
            "text_tokenizer device"
        ),
        positional="path",
    ),
    "export": Command(
        "write a checkpoint as graphs that run without torch, for CPUs",
        "ceed_vla.export.export ExportConfig export",
        extras="export",
        must="policy.path output_dir",
        may="weights",
    ),
    "serve": Command(
        "serve a policy to clients over a network (protocols of openpi and vla-eval)",
        "ceed_vla.serving.serve ServeConfig serve",
        must="policy.path",
        may="host port map decoding engine api_key_file certificate private_key",
    ),
    "seal": Command(
        "write a checkpoint's manifest: a lost, exchanged or damaged file is an error from then on",
        "ceed_vla.checkpoints.sealing SealConfig seal_folder",
        extras="policy",
        must="folder",
        positional="folder",
    ),
    "verify": Command(
        "check a published model against its reference outputs",
        "ceed_vla.verify VerifyConfig verify",
        extras="policy",
        must="folder",
        may="policy.path device",
        positional="folder",
    ),
    "doctor": Command(
        "check this installation: versions, GL, ROS, devices, disk; with a remedy for each problem",
        "ceed_vla.doctor DoctorConfig doctor",
    ),
}


_AXES = Path(__file__).parents[1] / "axes"
COMMANDS = {
    name: command
    for name, command in COMMANDS.items()
    if not command.axis or (_AXES / command.axis).is_dir()
}


def config_of(command: Command) -> type[Any]:
    """A command's configuration dataclass, with the simulator's flags if it has some."""
    place, name, _ = command.where.split()
    config_class = getattr(importlib.import_module(place), name)
    if not command.simulator:
        return config_class
    module, name = command.simulator.split()
    simulator = getattr(importlib.import_module(module), name)
    space = {"__doc__": config_class.__doc__, "__module__": config_class.__module__}
    return dataclass(type(config_class.__name__, (simulator, config_class), space))
