"""The policy node's parameters."""

import shutil

from ceed_vla.ros_nodes.robot.common_parameters import (
    AUTOSTART,
    DISCOVER_PACKAGES,
    ROBOT_CONFIG,
    TOPICS,
)
from ceed_vla.ros_nodes.robot.interfaces.base import INTERFACES
from ceed_vla.ros_nodes.robot.outage import RESUME_WITHIN
from ceed_vla.ros_nodes.robot.parameters import LIVE, START, NodeParameter
from ceed_vla.ros_nodes.robot.safety import MAX_DT
from ceed_vla.ros_nodes.robot.tasks.runner import MOST_QUEUED
from ceed_vla.scheduling import PIN_HELP, pin_problem
from ceed_vla.serving.predictor import ENGINES
from ceed_vla.texts import LONGEST_INSTRUCTION, instruction_problem, shown

POLICY_PARAMETERS = (
    DISCOVER_PACKAGES,
    NodeParameter(
        "checkpoint",
        "student",
        "LeRobot checkpoint folder, an export, or teacher or student for a shipped checkpoint.",
    ),
    ROBOT_CONFIG,
    TOPICS,
    NodeParameter(
        "action_interface",
        "forward_position",
        "Interface through which the arm receives commands.",
        choices=INTERFACES,
    ),
    NodeParameter(
        "instruction",
        "",
        f"Task for the policy, at most {LONGEST_INSTRUCTION} characters; the topic ~/instruction "
        "sets it too, and the latest value is used.",
        LIVE,
        check=instruction_problem,
    ),
    AUTOSTART,
    NodeParameter(
        "start_enabled",
        True,
        "Enable motion on activation, unless an operator forbade it before; false: motion starts "
        "only after a call of ~/enable.",
    ),
    NodeParameter(
        "task_queue",
        0,
        "Tasks that may wait while another runs; with 0, a second task is refused.",
        START,
        (0, MOST_QUEUED),
    ),
    NodeParameter(
        "success_topic",
        "",
        "Topic of std_msgs/Bool that is true when the task is solved, such as sim/success; empty: "
        "tasks end by time limit or cancellation.",
        START,
    ),
    NodeParameter(
        "dry_run",
        False,
        "Send no commands; publish the arm's commands on ~/preview_command and the chunks for arm "
        "and gripper on ~/planned instead.",
    ),
    NodeParameter(
        "blend_in",
        0.0,
        "Time over which motion grows from zero to the policy's full motion [s].",
        within=(0, 10),
    ),
    NodeParameter(
        "resume_within",
        RESUME_WITHIN,
        "Longest outage of an input or of the policy after which motion resumes automatically [s]; "
        "after a longer outage, a restart of the robot or a conflict, motion needs ~/enable. A "
        "chunk may take as long, and at least 1 s.",
        within=(0, 3600),
    ),
    NodeParameter(
        "command_rate",
        100.0,
        "Rate of commands [Hz]; at least the robot's steps per second.",
        within=(1 / MAX_DT, 500),
    ),
    NodeParameter(
        "replan_steps",
        0,
        "Steps after which the next chunk is due; 0: the checkpoint's n_action_steps, minus one if "
        "an answer takes at most 1.5 steps.",
        within=(0, 64),
    ),
    NodeParameter(
        "decoding",
        "ceed",
        "Decoder name for CEED-VLA checkpoints: ceed, jacobi, ar, cap2, plan, ...",
    ),
    NodeParameter(
        "chunk_deadline",
        0.0,
        "Time limit of a chunk with decoding plan [s]: the node times the checkpoint's plans on "
        "this machine, on a blank image, and selects the best plan within the limit; 0: one step "
        "of the robot.",
        within=(0, 10),
    ),
    NodeParameter("device", "cpu", "Device on which the policy runs: cpu, cuda, cuda:1, mps."),
    NodeParameter(
        "engine",
        "auto",
        "Engine that runs CEED-VLA checkpoints. edge: an export, without torch; a checkpoint is "
        "exported once, which takes half a minute or more. eager: torch. compiled: takes minutes "
        "to load, and requires a C++ compiler and inference_mode process. auto: edge if the device "
        "is cpu and the checkpoint has an export, or can get one, that runs the decoding and "
        "passes its own checks; eager otherwise.",
        choices=ENGINES,
    ),
    NodeParameter(
        "inference_mode",
        "process",
        "Run inference in a separate process or in a thread of the node.",
        choices=("process", "thread"),
    ),
    NodeParameter(
        "inference_python",
        "",
        "Python interpreter of the inference process; it must have ceed_vla, and torch and lerobot "
        "or, for an export, onnxruntime. Empty: the node's own.",
        check=lambda path: (
            f"{shown(path)} is not an executable program"
            if path and shutil.which(path) is None
            else None
        ),
    ),
    NodeParameter("inference_threads", 1, "CPU threads of inference.", within=(1, 64)),
    NodeParameter(
        "inference_pin",
        "auto",
        f"Cores of these threads: {PIN_HELP}; auto pins two or more threads if no other process "
        "decodes on their cores.",
        check=pin_problem,
    ),
    NodeParameter(
        "inference_url",
        "",
        "Server (ceed-vla serve) that runs the policy, ws://HOST:PORT or wss://HOST:PORT; its "
        "checkpoint, engine, device and threads then replace this node's. Empty: this computer.",
    ),
    NodeParameter("inference_key_file", "", "File with the API key of the server; empty: none."),
    NodeParameter(
        "inference_ca_file",
        "",
        "Certificates to trust (PEM) for wss; empty: those of the system.",
    ),
    NodeParameter(
        "inference_timeout",
        0.0,
        "Time after which an answer of the server counts as lost [s]; 0: four times the usual "
        "time, at least 2 s.",
        within=(0, 600),
    ),
    NodeParameter(
        "inference_jpeg_quality",
        0,
        "Quality of the images sent to the server as JPEG, for slow networks; 0: pixels, without "
        "loss.",
        within=(0, 100),
    ),
    NodeParameter(
        "inference_delay",
        0.0,
        "Time added to every chunk, to test slow inference [s].",
        within=(0, 5),
    ),
    NodeParameter(
        "realtime_priority",
        50,
        "SCHED_FIFO priority of the command stream if the system allows it; inference in a process "
        "of its own runs two levels lower if it leaves a core to others. 0: none.",
        START,
        (0, 90),
    ),
    NodeParameter(
        "image_timeout", 0.5, "Age of an image at which the arm holds [s].", START, (0.02, 5)
    ),
    NodeParameter(
        "frozen_image_timeout",
        0.5,
        "Hold if a camera repeats one image for longer than this while the arm moves [s]; 0: no "
        "check.",
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
        "Velocity limit of every joint [rad/s]; a lower limit in the robot's file applies instead.",
        START,
        (0.01, 10),
    ),
    NodeParameter(
        "max_joint_step",
        1.0,
        "Largest distance of a command from the measured position [rad]; a lower limit in the "
        "robot's file applies instead.",
        START,
        (0.001, 1),
    ),
)
