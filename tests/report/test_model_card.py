import json
from types import SimpleNamespace

import pytest

from rtdmd_jax.adapters.peft import PEFT_NAME
from rtdmd_jax.models import flux1, flux2
from rtdmd_jax.models.transformer import OtherNames
from rtdmd_jax.report.model_card import Run, find_run, write_card
from rtdmd_jax.runtime.files import save_tensors

CONFIG = {
  "stage": "stage2",
  "model": {"image_size": 512},
  "dmd": {"timesteps": [1000, 750, 500, 250], "eta": 0.9},
  "lora": {"rank": 32, "alpha": 64.0},
  "batch": {"prompts": 48, "images_per_prompt": 24},
  "train": {"steps": 1000},
  "rewards": {"hpsv2": {"weight": 1.0}, "geneval": {"weight": 0.5}},
}
SCORES = {
  "systems": [
    {
      "name": "teacher",
      "steps": 50,
      "guidance": 4.5,
      "scores": {"hpsv2": {"mean": 0.3, "ci95": 0.01, "n": 900}, "geneval": {"mean": None, "n": 0}},
    },
    {
      "name": "result, few steps",
      "steps": 4,
      "guidance": 1.0,
      "scores": {
        "hpsv2": {"mean": 0.3333, "ci95": None, "n": 1},
        "geneval": {"mean": 0.9, "ci95": 0.02, "n": 1000},
      },
    },
  ]
}
NAMES = {
  "SD3Config": OtherNames("StableDiffusion3Pipeline", "SD3Transformer2DModel", ()),
  "Flux1Config": flux1.NAMES,
  "Flux2Config": flux2.NAMES,
}


def network(name):
  return SimpleNamespace(names=NAMES[name])


def card(directory, kind="peft", name="SD3Config", run=None):
  write_card(directory, kind, network(name), "somewhere/private/stable-diffusion-3.5-medium", run)
  return (directory / "README.md").read_text()


def test_a_run_with_scores(tmp_path):
  text = card(tmp_path, run=Run(CONFIG, SCORES))
  assert text.startswith("---\nlibrary_name: diffusers\n")
  assert "# LoRA for stable-diffusion-3.5-medium" in text and "private" not in text
  assert "| rewards x weights | hpsv2 x 1, geneval x 0.5 |" in text
  assert "| images a step | 1,152 |" in text
  assert "| system | steps | guidance | hpsv2 | geneval |" in text
  assert "| teacher | 50 | 4.5 | 0.3000 ± 0.0100 | failed |" in text
  assert "| result, few steps | 4 | 1 | 0.3333 | 0.9000 ± 0.0200 |" in text
  assert "Means over 0 to 1,000 prompts, with 95 % intervals.\n" in text
  assert "trained on" not in text  # nobody has compared


def test_only_what_was_checked_is_said(tmp_path):
  overlap = {"data.held_out": [0, 1632], "rewards.hpsv2.held_out": [2, 400]}
  checked = SCORES | {"run": {"step": 400, "settings": "x", "overlap": overlap}}
  text = card(tmp_path, run=Run(CONFIG, checked, 400, "moving average"))
  assert "| training steps | 400 of 1,000 |" in text and "| weights | moving average |" in text
  assert "None of the 1,632 prompts of data.held_out is trained on in this stage." in text
  assert "2 of the 400 prompts of rewards.hpsv2.held_out are trained on" in text


def test_without_rewards_there_are_no_scores(tmp_path):
  systems = [system | {"scores": {}} for system in SCORES["systems"]]
  text = card(tmp_path, run=Run(CONFIG | {"rewards": {}}, SCORES | {"systems": systems}))
  assert "## Training" in text and "## Held-out scores" not in text


def test_a_run_without_rewards_has_no_scores_to_tell(tmp_path):
  systems = [{**system, "scores": {}} for system in SCORES["systems"]]
  text = card(tmp_path, run=Run(CONFIG | {"rewards": {}}, {"systems": systems}))
  assert "## Training" in text and "## Held-out scores" not in text


def test_an_adapter_of_unknown_origin(tmp_path):
  text = card(tmp_path)
  assert "## Training" not in text and "## Held-out scores" not in text
  assert "## Held-out scores" not in card(tmp_path, run=Run(CONFIG, None))


@pytest.mark.parametrize(
  "kind, name, words",
  [
    ("peft", "Flux1Config", ("FluxPipeline", "load_lora_weights", "--format=comfyui")),
    ("comfyui", "Flux2Config", ("models/loras", "cfg 1")),
    ("merged", "Flux2Config", ("Flux2KleinPipeline", "Flux2Transformer2DModel.from_pretrained")),
  ],
)
def test_how_to_load(tmp_path, kind, name, words):
  text = card(tmp_path, kind, name)
  for word in words:
    assert word in text
  assert ("- lora" in text) == (kind != "merged")


def test_the_run_of_an_adapter_is_found_beside_it(tmp_path):
  adapter = tmp_path / "export/generator"
  adapter.mkdir(parents=True)
  assert find_run(adapter) is None
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  assert find_run(adapter) == Run(CONFIG, None)
  (tmp_path / "evaluation.json").write_text(json.dumps(SCORES))
  assert find_run(adapter) == Run(CONFIG, SCORES)
  assert find_run(tmp_path / "export") is None


def test_scores_of_another_step_are_not_told(tmp_path):
  adapter = tmp_path / "export/generator"
  save_tensors(adapter / PEFT_NAME, {}, {"step": "8", "weights": "moving average"})
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  for step, told in ((8, True), (4, False)):
    scores = SCORES | {"run": {"step": step}}
    (tmp_path / "evaluation.json").write_text(json.dumps(scores))
    assert find_run(adapter) == Run(CONFIG, scores if told else None, 8, "moving average")
  (tmp_path / "evaluation.json").write_text('{"systems": [')
  assert find_run(adapter) == Run(CONFIG, None, 8, "moving average")
