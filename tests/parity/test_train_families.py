"""Both stages of each FLUX family run to their end on small random diffusers directories."""

import json
from pathlib import Path

import pytest
from parity.test_flux_pipelines import flux1, flux2

import rtdmd_jax
from rtdmd_jax import cli, main

pytest.importorskip("torch")
pytestmark = [pytest.mark.parity, pytest.mark.slow]

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = Path(rtdmd_jax.__file__).parent / "assets/tiny"
COMMON = [
  "--config.model.image_size=64",
  "--config.model.dtype=float32",
  "--config.lora.rank=2",
  "--config.lora.alpha=4.0",
  f"--config.data.prompts={TINY / 'prompts'}",
  f"--config.data.held_out={TINY / 'prompts'}",
  "--config.batch.prompts=2",
  "--config.train.steps=2",
  "--config.train.log_every=1",
  "--config.train.fake_update_ratio=2",
  "--config.ema.every=1",
  "--config.eval.prompts=2",
  "--config.eval.final_prompts=2",
  "--config.eval.chunk=2",
  "--config.eval.preview=2",
  "--config.eval.teacher_steps=2",
]


@pytest.fixture(scope="module", params=["flux1", "flux2"])
def family(request, tmp_path_factory):
  """A family's name, a pipeline directory and a folder for configs."""
  root = tmp_path_factory.mktemp(request.param)
  made = flux1(root / "tokens", guidance_embeds=True) if request.param == "flux1" else flux2()
  made.save_pretrained(root / "pipeline")
  for stage in ("stage1", "stage2"):
    # The family's own config, with rewards that need no download.
    (root / f"{stage}.py").write_text(
      "import sys\n"
      f"sys.path.insert(0, {str(CONFIGS)!r})\n"
      "import families\n"
      "def get_config():\n"
      f"  c = families.{stage}({request.param!r})\n"
      "  for section in (c.rewards, c.eval.rewards):\n"
      "    for name in list(section):\n"
      "      del section[name]\n"
      f"  c.rewards.clipscore = dict(weight=1.0, directory={str(TINY / 'clip')!r},"
      " backpropagate=True)\n"
      "  c.rewards.geneval = dict(weight=1.0, detector='shapes')\n"
      "  return c\n"
    )
  return request.param, root


def _run(root, stage, *overrides):
  pretrained = root / "pipeline"
  argv = ["main", f"--config={root / stage}.py", f"--workdir={root / 'runs' / stage}"]
  argv += [f"--config.model.pretrained={pretrained}", "--config.model.generator_init=", *COMMON]
  return cli.run(
    main.main, [*argv, *overrides], define_flags=main.define_flags, requires=("config", "workdir")
  )


def test_both_stages_run_to_their_end(family):
  name, root = family
  assert _run(root, "stage1", "--config.batch.micro_batches=1") == 0
  export = root / "runs/stage1/export"
  more = [f"--config.load.{role}={export / role}" for role in ("generator", "fake_score")]
  more += ["--config.batch.repeats=2", "--config.batch.micro_batches=2"]
  assert _run(root, "stage2", *more) == 0
  for stage in ("stage1", "stage2"):
    work = root / "runs" / stage
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    seen = {key: value for line in lines for key, value in line["scalars"].items()}
    assert seen["generator/skipped"] == seen["fake_score/skipped"] == 0
    assert seen["generator/grad_norm"] > 0 and seen["fake_score/grad_norm"] > 0
    assert (work / "export/generator/adapter_model.safetensors").exists(), name
    systems = json.loads((work / "evaluation.json").read_text())["systems"]
    assert [system["steps"] for system in systems] == [2, 4, 4]
