"""The record node's parameters."""

import shutil

from ceed_vla.ros_nodes.record.plan import FORMATS
from ceed_vla.ros_nodes.robot.common_parameters import (
    AUTOSTART,
    DISCOVER_PACKAGES,
    ROBOT_CONFIG,
    TOPICS,
)
from ceed_vla.ros_nodes.robot.parameters import LIVE, NodeParameter
from ceed_vla.texts import LONGEST_INSTRUCTION, instruction_problem, shown

RECORD_PARAMETERS = (
    DISCOVER_PACKAGES,
    NodeParameter("root", "", "Folder of the data set."),
    NodeParameter(
        "resume", False, "Continue the recording in root; false: root must be new or empty."
    ),
    ROBOT_CONFIG,
    TOPICS,
    NodeParameter(
        "checkpoint",
        "",
        "Checkpoint whose features, image sizes and names of actions are stored; empty: all "
        "features of the robot's file, and images as the cameras send them.",
    ),
    NodeParameter(
        "instruction",
        "",
        f"Task of the next episode, at most {LONGEST_INSTRUCTION} characters; the topic "
        "~/instruction sets it too, and the latest value is used.",
        LIVE,
        check=instruction_problem,
    ),
    NodeParameter(
        "format",
        "h264",
        "Codec of the videos (h264 is the faster one), or png for images without loss.",
        choices=FORMATS,
    ),
    NodeParameter(
        "longest_gap",
        0.5,
        "Time without a message of an input after which the episode ends by itself [s].",
        within=(0.05, 60),
    ),
    NodeParameter(
        "patience",
        0.2,
        "Time for which a frame waits for messages that are on their way [s].",
        within=(0.0, 5),
    ),
    NodeParameter(
        "memory_mb",
        500,
        "Images that may wait to be stored, before the episode ends by itself [MB].",
        within=(10, 100000),
    ),
    AUTOSTART,
    NodeParameter(
        "python",
        "",
        "Python interpreter of the process that stores; it must have ceed_vla and lerobot. Empty: "
        "the node's own.",
        check=lambda path: (
            f"{shown(path)} is not an executable program"
            if path and shutil.which(path) is None
            else None
        ),
    ),
)
