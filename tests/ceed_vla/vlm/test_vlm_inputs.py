"""The step that makes a model's inputs: layouts, state, and refused observations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lerobot.processor import PolicyProcessorPipeline
from tiny_vlms import FAMILIES
from tokenizers.processors import TemplateProcessing

from ceed_vla.backbones.vlm.inputs import VLMInputsStep, keyed
from ceed_vla.backbones.vlm.model import FLAT_KEY, IDS_KEY, MASK_KEY, ROW_KEY
from ceed_vla.backbones.vlm.processor import load_processor
from ceed_vla.errors import CheckpointError, ObservationError

FRONT, WRIST = "observation.images.front", "observation.images.wrist"


def raw(rows: int = 2, **changes: Any) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    cameras = {name: torch.rand(rows, 3, 64, 96, generator=random) for name in (FRONT, WRIST)}
    return {
        **cameras,
        "observation.state": torch.zeros(rows, 5),
        "task": ["push it", "press"][:rows],
        **changes,
    }


@pytest.fixture(scope="module")
def steps(base: Any) -> Any:
    """Inputs step of a family with other settings, inside a pipeline."""

    def make(family: str = "smolvlm", **settings: Any) -> Any:
        sizes = {FRONT: [64, 96], WRIST: [64, 96]}
        step = VLMInputsStep(sizes=sizes, prompt="do {instruction}", **settings)
        return PolicyProcessorPipeline([step.set_processor(load_processor(base(family)))])

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_has_the_rows_first(family: str, steps: Any) -> None:
    batch = steps(family)(raw())
    made = {key: value for key, value in batch.items() if key.startswith((ROW_KEY, FLAT_KEY))}
    assert {IDS_KEY, MASK_KEY} < made.keys()
    assert all(len(value) == 2 for value in made.values())
    assert batch[MASK_KEY][:, -1].all()
    assert torch.equal(batch[FRONT], raw()[FRONT])  # the cameras do not change


def test_one_instruction_serves_all_rows(steps: Any) -> None:
    pipeline = steps()
    assert torch.equal(
        pipeline(raw(task="press"))[IDS_KEY], pipeline(raw(task=["press"] * 2))[IDS_KEY]
    )


def test_floats_and_bytes_are_the_same_image(steps: Any) -> None:
    pipeline, pixels = steps(), f"{ROW_KEY}pixel_values"
    image = (raw()[FRONT] * 255).round().to(torch.uint8)
    assert torch.equal(
        pipeline(raw(**{FRONT: image}))[pixels], pipeline(raw(**{FRONT: image / 255}))[pixels]
    )


def test_stacked_cameras_are_one_image(steps: Any, base: Any) -> None:
    separate, stacked = steps("llava")(raw()), steps("llava", layout="stacked")(raw())
    image = load_processor(base("llava")).tokenizer.convert_tokens_to_ids("<image>")
    tokens = [(batch[IDS_KEY][0] == image).sum().item() for batch in (separate, stacked)]
    assert tokens[0] == 2 * tokens[1] > 0
    swapped = steps("llava", layout="stacked")(raw(**{FRONT: raw()[WRIST], WRIST: raw()[FRONT]}))
    pixels = f"{ROW_KEY}pixel_values"
    assert not torch.equal(stacked[pixels], swapped[pixels])


def test_places_for_the_state_are_the_last_tokens(steps: Any) -> None:
    for family in ("qwen2_5_vl", "paligemma"):
        plain, placed = steps(family)(raw()), steps(family, state_places=5)(raw())
        assert torch.equal(placed[IDS_KEY][:, :-5], plain[IDS_KEY])
        assert placed[MASK_KEY][:, -5:].all()
        lengths = {
            v.shape[1]
            for k, v in placed.items()
            if k.endswith(("input_ids", "attention_mask", "token_type_ids"))
        }
        assert lengths == {plain[IDS_KEY].shape[1] + 5}


def test_a_saved_step_needs_no_folder(steps: Any, tmp_path: Any) -> None:
    for family in FAMILIES:
        pipeline = steps(family)
        pipeline.save_pretrained(tmp_path / family, config_filename="pre.json")
        again = PolicyProcessorPipeline.from_pretrained(
            tmp_path / family, config_filename="pre.json"
        )
        one, two = pipeline(raw()), again(raw())
        assert one.keys() == two.keys()
        assert all(
            torch.equal(one[key], two[key]) for key in one if key.startswith((ROW_KEY, FLAT_KEY))
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({FRONT: torch.rand(2, 3, 48, 96)}, r"\(B, 3, 64, 96\)"),
        ({WRIST: torch.rand(3, 3, 64, 96)}, "must be equal"),
        ({"task": ["push"] * 3}, "for 2 rows"),
        ({"task": ["push", " "]}, "non-empty"),
    ],
)
def test_observations_that_are_refused(changes: dict[str, Any], message: str, steps: Any) -> None:
    with pytest.raises(ObservationError, match=message):
        steps()(raw(**changes))


def test_a_missing_camera_is_named(steps: Any) -> None:
    observation = raw()
    del observation[WRIST]
    with pytest.raises(
        ObservationError, match=r"lacks 'observation.images.wrist'; it has observation.images.front"
    ):
        steps()(observation)


def test_rows_with_different_numbers_of_images() -> None:
    with pytest.raises(ObservationError, match="3 pixel_values from 2 rows"):
        keyed({"pixel_values": torch.zeros(3, 3, 8, 8)}, 2)


def test_a_step_without_its_files() -> None:
    with pytest.raises(CheckpointError, match="without its files"):
        PolicyProcessorPipeline([VLMInputsStep(sizes={FRONT: [64, 96]})])(raw())


def test_a_template_that_writes_the_first_token_does_so_alone(steps: Any) -> None:
    pipeline = steps("llava")
    processor = pipeline.steps[0]._processor
    begins, first = processor.tokenizer.bos_token, processor.tokenizer.bos_token_id
    adds = TemplateProcessing(single=f"{begins} $A", special_tokens=[(begins, first)])
    processor.tokenizer.backend_tokenizer.post_processor = adds
    part = "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}"
    row = "{% for p in messages[0]['content'] %}" + part + "{% endfor %}"
    for template in (row, begins + row):
        pipeline.steps[0]._rendered.clear()
        processor.chat_template = template
        ids = pipeline(raw(task="press"))[IDS_KEY]
        assert ((ids == first).sum(1) == 1).all()
