"""The adapters of a checkpoint, on a network of a few layers."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file

from rtdmd_jax.adapters.lora import build_adapters
from rtdmd_jax.adapters.peft import PEFT_NAME, adapter_layers, save_peft
from rtdmd_jax.errors import UserError
from rtdmd_jax.models import build_transformer
from rtdmd_jax.runtime.checkpoint import Checkpoints
from rtdmd_jax.training.stored_run import StoredRun, generator_weights
from rtdmd_jax.weights.safetensors import save_model
from tests.support.exported import CONFIG, drawn, run

TARGETS = ["attn.to_q", "proj_out"]
SETTINGS = {
  "stage": "stage1",
  "model": {"image_size": 64, "fake_score_init": ""},
  "dmd": {"timesteps": [1000, 750, 500, 250], "eta": 0.9},
  "lora": {"rank": 2, "alpha": 4.0},
  "ema": {"decay": 0.9, "every": 2},
  "batch": {"prompts": 4, "images_per_prompt": 1},
  "train": {"steps": 3},
  "rewards": {},
}
EVERY = {"decay": 0.9, "every": 2}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  """A workdir with the checkpoints 1 to 3 of a run, and what the first two held."""
  root = tmp_path_factory.mktemp("stored")
  transformer = build_transformer(CONFIG)
  for name in ("pipeline", "own"):
    file = root / name / "transformer/diffusion_pytorch_model.safetensors"
    save_model(file, CONFIG, transformer.init(jax.random.key(0)), transformer.table)
  earlier = drawn(transformer, ["attn.to_q"], seed=9)
  save_peft(root / "one", earlier, transformer.table, rank=2, alpha=2.0, targets=["attn.to_q"])
  model = {"pretrained": str(root / "pipeline"), "generator_init": str(root / "own")}
  load = {"generator": str(root / "one"), "fake_score": ""}
  config = SETTINGS | {"model": SETTINGS["model"] | model, "load": load}
  states = {}
  start = build_adapters(
    transformer.init_abstract(), transformer.table, TARGETS, rank=2, key=jax.random.key(0)
  )
  with Checkpoints(root / "run/checkpoints") as saved:
    for step in (1, 2, 3):
      trained, fake = (drawn(transformer, TARGETS, seed=step + n) for n in (0, 20))
      ema = start if step == 1 else drawn(transformer, TARGETS, seed=step + 10)
      states[step] = SimpleNamespace(ema=ema, trained=trained, fake_score=fake)
      state = {"ema": ema, "generator": trained, "fake_score": fake, "step": jnp.int32(step)}
      saved.save(step, state, {"config": config})
  return SimpleNamespace(
    root=root, work=root / "run", transformer=transformer, states=states, earlier=earlier
  )


def change(tree, transformer, alpha):
  """What adapters of rank 2 add to each module, [out, in]."""
  layers = adapter_layers(tree, transformer.table)
  return {name: (alpha / 2) * (a @ b).T for name, (a, b) in layers.items()}


def exported(directory):
  """What the adapters of a PEFT directory of scale 1 add to each module, [out, in]."""
  tensors = load_file(directory / PEFT_NAME)
  return {
    key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
      tensors[key.replace("lora_A", "lora_B")] @ a
    )
    for key, a in tensors.items()
    if "lora_A" in key
  }


@pytest.mark.parametrize("step", [None, 2, 1])
def test_a_checkpoint_is_exported_with_the_earlier_stage(stored, tmp_path, capsys, step):
  name = str(stored.work) if step is None else f"{stored.work}:{step}"
  flags = ["--pipeline=", f"--checkpoint={name}", "--format=peft", f"--out={tmp_path / 'out'}"]
  assert run(stored.root, *flags) == 0
  step = step or 3
  # At the first step the average was still at its start, which changes nothing.
  own = stored.states[step].trained if step == 1 else stored.states[step].ema
  want = change(own, stored.transformer, 4.0)
  for module, delta in change(stored.earlier, stored.transformer, 2.0).items():
    want[module] = want.get(module, 0.0) + delta
  got = exported(tmp_path / "out")
  assert got.keys() == want.keys()
  for module, delta in want.items():
    np.testing.assert_allclose(got[module], delta, atol=1e-5, err_msg=module)
  card = (tmp_path / "out/README.md").read_text()
  assert "# LoRA for own" in card
  words = "adapters in training, as the moving average has not moved yet"
  assert f"| weights | {words if step == 1 else 'moving average'} |" in card
  assert f"| training steps | {'3' if step == 3 else f'{step} of 3'} |" in card
  with safe_open(tmp_path / "out" / PEFT_NAME, framework="numpy") as file:
    assert file.metadata()["step"] == str(step)


def test_the_fake_score_of_a_checkpoint(stored, tmp_path):
  flags = [f"--checkpoint={stored.work}:2", "--role=fake_score", "--format=peft"]
  assert run(stored.root, "--pipeline=", *flags, f"--out={tmp_path / 'out'}") == 0
  got = exported(tmp_path / "out")
  for module, delta in change(stored.states[2].fake_score, stored.transformer, 4.0).items():
    np.testing.assert_allclose(got[module], delta, atol=1e-5, err_msg=module)


def test_what_is_not_there_is_named(stored, tmp_path):
  (tmp_path / "empty").mkdir()
  (tmp_path / "begun/checkpoints").mkdir(parents=True)
  for text, message in (
    (f"{stored.work}:7", "has no checkpoint 7; it has 1, 2, 3"),
    (tmp_path / "nowhere", "nowhere is not a folder; give WORKDIR:STEP"),
    (f"{stored.work}:last", "is not a folder"),
    (tmp_path / "empty", "empty holds no checkpoints/; give the --workdir of a training run"),
    (tmp_path / "begun", "begun/checkpoints holds no checkpoint"),
  ):
    with pytest.raises(UserError, match=message):
      StoredRun.parse(str(text))
  found = StoredRun.parse(f"{stored.work}:1")
  gone = found._replace(config=found.config | {"load": {"generator": "gone", "fake_score": ""}})
  with pytest.raises(UserError, match="adds to the earlier stage's adapters in gone, which"):
    gone.adapters(stored.transformer)


def test_the_configuration_may_lie_beside_the_checkpoint(tmp_path):
  with Checkpoints(tmp_path / "checkpoints") as saved:
    saved.save(4, {"x": jnp.ones(1)}, None)
  (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
  assert StoredRun.parse(str(tmp_path)) == StoredRun(tmp_path, 4, SETTINGS)


def test_which_weights_are_worth_exporting(stored):
  first, second = stored.states[1], stored.states[2]
  assert generator_weights(second.ema, second.trained, EVERY) == (second.ema, "moving average")
  tree, words = generator_weights(second.ema, second.trained, {"decay": 0.0, "every": 1})
  assert tree is second.ema and words == "adapters in training"
  tree, words = generator_weights(first.ema, first.trained, EVERY)
  assert tree is first.trained and "has not moved yet" in words
  tree, words = generator_weights(first.ema, first.ema, EVERY)
  assert tree is first.ema and words.startswith("the start")
  assert not any(x.any() for path, x in flatten_dict(tree).items() if path[-1] == "b")
