"""The policy node's parameters."""

import shutil

from ceed_vla.ros_nodes.robot.interfaces.base import INTERFACES
from ceed_vla.ros_nodes.robot.outage import RESUME_WITHIN
from ceed_vla.ros_nodes.robot.parameters import LIVE, START, NodeParameter
from ceed_vla.ros_nodes.robot.predictor import ENGINES
from ceed_vla.ros_nodes.robot.texts import LONGEST_INSTRUCTION, instruction_problem, shown

POLICY_PARAMETERS = (
    # The first one: what these packages register is a choice of others.
    NodeParameter(
        "discover_packages",
        "",
        "Python packages, comma-separated, that register an interface, backbone, decoder, ... of "
        "your own.",
        START,
    ),
    NodeParameter(
        "checkpoint",
        "student",
        "LeRobot checkpoint folder, or teacher or student for the shipped ones.",
    ),
    NodeParameter(
        "robot_config",
        "",
        "Robot's YAML file (topics, joints, limits); empty: the simulated arm's.",
    ),
    NodeParameter(
        "topics",
        "",
        "Topics instead of those of the robot's file: front=/camera/image_raw, "
        "joint_states=/left/joint_states.",
    ),
    NodeParameter(
        "action_interface", "forward_position", "How commands reach the arm.", choices=INTERFACES
    ),
    NodeParameter(
        "instruction",
        "",
        f"What to do, in at most {LONGEST_INSTRUCTION} characters; ~/instruction sets it too, the "
        "last one counts.",
        LIVE,
        check=instruction_problem,
    ),
    NodeParameter(
        "autostart",
        False,
        "Configure and activate at the start, without a lifecycle manager.",
        START,
    ),
    NodeParameter("start_enabled", True, "Enable motion when activated; false: wait for ~/enable."),
    NodeParameter(
        "dry_run",
        False,
        "Command nothing: ~/preview_command has what the arm and ~/planned what arm and gripper "
        "would be sent.",
    ),
    NodeParameter(
        "blend_in",
        0.0,
        "Motion grows from none to all that the policy wants for so long [s].",
        within=(0, 10),
    ),
    NodeParameter(
        "resume_within",
        RESUME_WITHIN,
        "Longest outage of an input or of the policy after which motion resumes by itself [s]; "
        "after a longer one, a restart of the robot or a conflict it waits for ~/enable.",
        within=(0, 3600),
    ),
    NodeParameter(
        "command_rate",
        100.0,
        "Commands per second [Hz]; at least the robot's steps per second.",
        within=(5, 500),
    ),
    NodeParameter(
        "replan_steps",
        0,
        "Steps after which the next chunk is due; 0: the checkpoint's n_action_steps, one less if "
        "an answer takes 1.5 steps at most.",
        within=(0, 64),
    ),
    NodeParameter(
        "decoding", "ceed", "How CEED-VLA checkpoints decode: ceed, jacobi, ar, cap2, plan, ..."
    ),
    NodeParameter(
        "chunk_deadline",
        0.0,
        "With decoding plan: the plans of the checkpoint are timed here, on a blank image, and the "
        "best that takes no longer decodes; 0: one step of the robot [s].",
        within=(0, 10),
    ),
    NodeParameter("device", "cpu", "Where the policy runs: cpu, cuda, cuda:1, mps."),
    NodeParameter(
        "engine",
        "eager",
        "How CEED-VLA checkpoints run; compiled needs minutes to load, a C++ compiler, and "
        "inference_mode process.",
        choices=ENGINES,
    ),
    NodeParameter(
        "inference_mode", "process", "Where inference runs.", choices=("process", "thread")
    ),
    NodeParameter(
        "inference_python",
        "",
        "Python of the inference process, where ceed_vla, torch and lerobot are, if this one has "
        "none of them.",
        check=lambda path: (
            f"{shown(path)} is no program" if path and shutil.which(path) is None else None
        ),
    ),
    NodeParameter("inference_threads", 1, "Threads of inference on the CPU.", within=(1, 64)),
    NodeParameter(
        "inference_delay", 0.0, "Slows every chunk, to test slow inference [s].", within=(0, 5)
    ),
    NodeParameter(
        "realtime_priority",
        50,
        "SCHED_FIFO priority of the command stream where the system allows it; 0: none.",
        START,
        (0, 90),
    ),
    NodeParameter(
        "image_timeout", 0.5, "Age of an image at which the arm holds [s].", START, (0.02, 5)
    ),
    NodeParameter(
        "frozen_image_timeout",
        0.5,
        "Hold if a camera repeats one image for longer while the arm moves [s]; 0: a camera may.",
        START,
        (0, 60),
    ),
    NodeParameter(
        "joint_state_timeout",
        0.2,
        "Age of the joint states at which the arm holds [s].",
        START,
        (0.02, 2),
    ),
    NodeParameter(
        "max_joint_velocity",
        10.0,
        "Velocity limit of every joint; the robot's own if lower [rad/s].",
        START,
        (0.01, 10),
    ),
    NodeParameter(
        "max_joint_step",
        1.0,
        "Largest distance of a command from the measured position; the robot's own if lower [rad].",
        START,
        (0.001, 1),
    ),
)
