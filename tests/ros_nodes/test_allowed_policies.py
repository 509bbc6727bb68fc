"""LeRobot's policies on a robot: only listed types with listed settings load, and no code of a
checkpoint's folder runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import draccus
import pytest
from lerobot.configs import PreTrainedConfig

from ceed_vla.checkpoints.allowed import POLICIES, read_allowed
from ceed_vla.cli.entry import main
from ceed_vla.errors import CheckpointError
from ceed_vla.serving.predictor import Predictor, PredictorSettings

EVIL = """
from pathlib import Path
Path({mark!r}).write_text("ran")
class Evil:
    @classmethod
    def register_for_auto_class(cls, *arguments):
        Path({mark!r}).write_text("ran")
    @classmethod
    def from_pretrained(cls, *arguments, **options):
        Path({mark!r}).write_text("ran")
        return cls()
"""
AUTO = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer")
ROUTES = dict.fromkeys(AUTO, "evil.Evil")
ENCODER_FILES = ("config.json", "processor_config.json", "preprocessor_config.json")
STATE = {"type": "STATE", "shape": [6]}
FEATURES = {
    "input_features": {
        "observation.images.top": {"type": "VISUAL", "shape": [3, 64, 64]},
        "observation.state": STATE,
    },
    "output_features": {"action": {"type": "ACTION", "shape": [6]}},
}
ATTACKS = {
    "pi0_fast": {"action_tokenizer_name": "lk/enc"},
    "gaussian_actor": {"vision_encoder_name": "lk/enc"},
    "smolvla": {"vlm_model_name": "lk/enc", "load_vlm_weights": True},
    "evo1": {"vlm_model_name": "lk/enc"},
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a folder `lk/enc` whose code writes `ran` if it is executed."""
    monkeypatch.chdir(tmp_path)
    encoder = tmp_path / "lk" / "enc"
    encoder.mkdir(parents=True)
    (encoder / "evil.py").write_text(EVIL.format(mark=str(tmp_path / "ran")))
    for name in (*ENCODER_FILES, "tokenizer_config.json"):
        (encoder / name).write_text(json.dumps({"model_type": "evil", "auto_map": ROUTES}))
    return tmp_path


def foreign(place: Path, kind: str, **changes: Any) -> Path:
    """Write a checkpoint of another type, with settings written by LeRobot's own class."""
    import lerobot.policies  # noqa: F401  (registers them)

    folder = place / "lk"
    config = draccus.encode(PreTrainedConfig.get_choice_class(kind)(device="cpu"), PreTrainedConfig)
    (folder / "config.json").write_text(json.dumps({**config, **FEATURES, **changes}))
    for name in ("model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json"):
        (folder / name).write_text('{"steps": []}')
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        Predictor(PredictorSettings(str(folder)))
    return str(error.value)


# ---- types --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ATTACKS)
def test_a_type_that_runs_what_its_texts_name_is_refused(place: Path, kind: str) -> None:
    folder = foreign(place, kind, **ATTACKS[kind])
    told = refused(folder)
    field = next(iter(ATTACKS[kind]))
    assert f"a policy of type '{kind}' with " in told
    assert f"{field}: 'lk/enc'" in told
    assert "Loaded are ceed_vla, act, diffusion, tdmpc, vqbet" in told
    assert not (place / "ran").exists()


LOADING = """
import json, os, shutil
import lerobot.policies
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class

found = {}
for kind in KINDS:
    shutil.copy(f"{kind}.json", "lk/config.json")
    try:
        config = PreTrainedConfig.from_pretrained("lk")
        get_policy_class(kind).from_pretrained("lk", config=config)
        said = ""
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    found[kind] = ("ran " if os.path.exists("ran") else "") + said
    if os.path.exists("ran"):
        os.remove("ran")
print("\\n" + json.dumps(found))
"""


@pytest.mark.external  # tests only LeRobot: that the attacks refused above work there
def test_the_attacks_are_real(place: Path) -> None:
    """LeRobot itself runs code of the same folders, or reads from stdin."""
    for kind, texts in ATTACKS.items():
        folder = foreign(place, kind, **texts)
        (folder / "config.json").rename(place / f"{kind}.json")
    code = f"KINDS = {list(ATTACKS)}\n{LOADING}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input="n\n" * 9, capture_output=True, text=True, check=True)
    print(done.stdout)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["pi0_fast"].startswith("ran ")
    assert found["gaussian_actor"].startswith("ran ")
    for kind in ("smolvla", "evo1"):
        assert "lk/enc" in found[kind]


def test_neither_do_other_commands_load_them(
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(foreign(place, "pi0_fast", **ATTACKS["pi0_fast"]))
    commands = [
        ["eval", f"--policy.path={folder}"],
        ["bench", f"--policy.path={folder}"],
        ["record", "--root=demos", "--mode=takeover", f"--policy_path={folder}"],
        ["open-loop", f"--policy_path={folder}", "--roots=demos", "--output_dir=out"],
        ["seal", folder],
        ["robot-check", f"--checkpoint={folder}"],
    ]
    for words in commands:
        assert main(words) == 1, words
        assert "Traceback" not in capsys.readouterr().err
    assert not (place / "ran").exists()


def test_a_type_of_a_package_that_the_user_named_is_loaded(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclass
    class TheirConfig(PreTrainedConfig):  # type: ignore[misc]
        model_name: str = "anything"

    TheirConfig.__module__ = "their_package.configuration_their"
    PreTrainedConfig.register_subclass("theirs")(TheirConfig)
    try:
        folder = place / "lk"
        values = {"type": "theirs", "model_name": "whatever", **FEATURES}
        (folder / "config.json").write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match="--discover_packages_path") as error:
            read_allowed(folder, "cpu")
        assert "type 'theirs' with model_name: 'whatever'" in str(error.value)
        monkeypatch.setitem(sys.modules, "their_package", types.ModuleType("their_package"))
        monkeypatch.setattr("ceed_vla.discovery._discovered", {"their_package", "lerobot"})
        assert read_allowed(folder, "cpu") == {**values, "device": "cpu"}
        # LeRobot's own policies do not, even in a folder whose code names LeRobot.
        foreign(place, "pi0_fast", **ATTACKS["pi0_fast"])
        with pytest.raises(CheckpointError, match="action_tokenizer_name"):
            read_allowed(folder, "cpu")
    finally:
        del PreTrainedConfig._choice_registry["theirs"]


# ---- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", POLICIES)
def test_what_lerobot_writes_of_a_listed_type_is_read(place: Path, kind: str) -> None:
    """Also with all settings that training leaves there, which are dropped."""
    left = {"repo_id": "me/policy", "tags": ["a"], "license": "mit", "pretrained_path": "lk/enc"}
    values = read_allowed(foreign(place, kind, **left), "cpu")
    assert not left.keys() & values.keys()
    assert values.get("pretrained_backbone_weights") is None
    values.pop("type")
    config = draccus.decode(PreTrainedConfig.get_choice_class(kind), values)
    assert config.device == "cpu"
    assert config.repo_id is None


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("act", {"vision_backbone": "resnet18.evil"}, "it must be one of resnet18, resnet34"),
        ("act", {"vision_backbone": None}, "vision_backbone is None"),
        ("act", {"feedforward_activation": "tanh"}, "feedforward_activation is 'tanh'"),
        ("act", {"dim_model": "512"}, "dim_model is '512'"),
        ("act", {"text_encoder_name": "lk/enc"}, "text_encoder_name is 'lk/enc'"),
        ("act", {"dim_model": {"path": "lk/enc"}}, "dim_model is {'path': 'lk/enc'}"),
        ("act", {"dim_model": [["lk/enc"]]}, "dim_model is"),
        ("act", {"device": "lk/enc"}, "device is 'lk/enc'"),
        ("act", {"normalization_mapping": {"VISUAL": "lk/enc"}}, "normalization_mapping is"),
        ("act", {"input_features": {"a": {**STATE, "path": "lk/enc"}}}, "input_features is"),
        ("act", {"input_features": {"a": {"type": "lk/enc", "shape": [3]}}}, "input_features is"),
        ("act", {"input_features": {"../a": {"type": "STATE", "shape": [3]}}}, "plain name"),
        ("act", {"use_peft": True}, "has adapters"),
        ("diffusion", {"noise_scheduler_type": "Evil"}, "noise_scheduler_type is 'Evil'"),
        ("diffusion", {"compile_mode": "evil"}, "compile_mode is 'evil'"),
        ("diffusion", {"scheduler_name": "evil"}, "scheduler_name is 'evil'"),
        ("vqbet", {"vision_backbone": "lk/enc"}, "vision_backbone is 'lk/enc'"),
        ("tdmpc", {"q_ensemble_size": "5"}, "q_ensemble_size is '5'"),
    ],
)
def test_a_text_where_none_may_be_is_refused(
    place: Path,
    kind: str,
    change: dict[str, Any],
    message: str,
) -> None:
    assert message in refused(foreign(place, kind, **change))
    assert not (place / "ran").exists()


def test_adapters_are_not_left_out_without_a_word(place: Path) -> None:
    folder = foreign(place, "act")
    (folder / "adapter_config.json").write_text("{}")
    assert "has adapters" in refused(folder)


# ---- standard input -----------------------------------------------------------------------------


@pytest.fixture
def full_input() -> Iterator[None]:
    """Standard input that never ends."""
    reading, writing = os.pipe()
    kept = os.dup(0)
    os.dup2(reading, 0)
    os.write(writing, b"yes\n" * 100)
    yield
    os.dup2(kept, 0)
    for number in (reading, writing, kept):
        os.close(number)


ASKING = """
from dataclasses import dataclass
import os, sys
from lerobot.configs import PreTrainedConfig

@PreTrainedConfig.register_subclass("asking")
@dataclass
class AskingConfig(PreTrainedConfig):
    def __post_init__(self):
        raise ValueError(f"read {os.read(0, 3)} and {sys.stdin.read(3)!r}")
    observation_delta_indices = action_delta_indices = reward_delta_indices = None
    def get_optimizer_preset(self): ...
    def get_scheduler_preset(self): ...
    def validate_features(self): ...

class AskingPolicy: ...
"""


@pytest.mark.slow
def test_the_process_of_a_policy_reads_no_input(
    place: Path,
    full_input: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ceed_vla.ros_nodes.robot.inference import InferenceWorker
    from ceed_vla.ros_nodes.robot.local_policy import local_policy

    (place / "asking.py").write_text(ASKING)
    (place / "lk" / "config.json").write_text(json.dumps({"type": "asking", **FEATURES}))
    for name in ("model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json"):
        (place / "lk" / name).write_text("{}")
    monkeypatch.syspath_prepend(place)
    worker = InferenceWorker(local_policy(place / "lk", mode="process", discover_packages="asking"))
    try:
        worker.begin()
        end = time.monotonic() + 60
        while worker.failed is None and time.monotonic() < end:
            time.sleep(0.05)
        assert "read b'' and ''" in str(worker.failed)
    finally:
        worker.close()
