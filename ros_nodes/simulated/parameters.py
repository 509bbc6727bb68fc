"""Parameters of the simulated robot."""

from ceed_vla.ros_nodes.robot.parameters import LIVE, START, NodeParameter
from ceed_vla.sim.tabletop.scene import MAX_IMAGE_SIZE
from ceed_vla.sim.tabletop.tasks import SPLITS, TASKS

SIM_PARAMETERS = (
    NodeParameter(
        "task", "mixed", "Task family of the next episode.", LIVE, choices=("mixed", *TASKS)
    ),
    NodeParameter(
        "seed",
        0,
        "Seed of the next episode; it determines the whole episode.",
        LIVE,
        (0, 2**31 - 1),
    ),
    NodeParameter("advance_seed", False, "Add 1 to the seed before every reset.", LIVE),
    NodeParameter(
        "split",
        "train",
        "Set of colour and phrasing combinations of the episodes.",
        START,
        choices=SPLITS,
    ),
    NodeParameter("camera_rate", 30.0, "Image rate of every camera [Hz].", LIVE, (1, 60)),
    NodeParameter(
        "image_size", 96, "Height and width of the images [px].", START, (16, MAX_IMAGE_SIZE)
    ),
    NodeParameter(
        "command_timeout",
        0.05,
        "Time for which a position command or a twist applies before the arm stops [s].",
        START,
        (0.02, 1),
    ),
    NodeParameter(
        "publish_instruction", True, "Publish the episode's instruction for the policy node.", LIVE
    ),
    NodeParameter(
        "publish_expert",
        False,
        "Publish what a scripted expert would do now on ~/expert (sensor_msgs/Joy, 50 Hz): six "
        "axes of an action, and the buttons 0 to open and 1 to close.",
        START,
    ),
    NodeParameter(
        "publish_clock",
        False,
        "Publish /clock and stamp messages with it; other nodes need use_sim_time.",
        START,
    ),
    NodeParameter(
        "real_time_factor",
        1.0,
        "Simulated seconds per real second; values other than 1 need publish_clock.",
        START,
        (0.1, 20),
    ),
)
