"""Training on a reward that a service computes, with faults on the way."""

import re

import pytest

from rtdmd_jax import cli, main
from rtdmd_jax.rewards.host.geneval import GenEval
from rtdmd_jax.rewards.host.shapes_detector import detect_shapes
from tests.support.paths import CONFIGS
from tests.support.reward_faults import Proxy, running, serving

CONFIG = """
import sys
sys.path.insert(0, {configs!r})
import tiny_stage2

def get_config():
  c = tiny_stage2.get_config()
  c.batch.prompts = c.batch.images_per_prompt = 2
  c.batch.micro_batches = 1
  c.eval.final_prompts = c.eval.prompts = c.eval.chunk = 4
  c.eval.preview = c.eval.teacher_steps = c.train.steps = 2
  c.eval.every = 100
  c.train.save_every = 1
  if {options!r}:
    del c.rewards.geneval
    c.rewards.geneval = dict(weight=1.0, chunk=1, backoff=0.01, **{options!r})
  return c
"""


def run(folder, options, name):
  """Exit code of a short run whose GenEval has these options, and its exported generator."""
  config = folder / f"{name}.py"
  config.write_text(CONFIG.format(configs=str(CONFIGS), options=options))
  argv = ["main", f"--config={config}", f"--workdir={folder / name}"]
  code = cli.run(main.main, argv, define_flags=main.define_flags, requires=("config", "workdir"))
  export = folder / name / "export/generator/adapter_model.safetensors"
  return code, export.read_bytes() if export.exists() else None


@pytest.mark.slow
def test_faults_of_the_service_do_not_change_a_run_and_its_death_stops_it_cleanly(tmp_path, capsys):
  code, expected = run(tmp_path, {}, "local")
  assert code == 0
  faults = {4: "drop", 3: "html", 2: "cut"}
  with serving({"geneval": GenEval(detect_shapes)}) as server:
    # Three requests of five go wrong.
    with running(Proxy(server.server_port, lambda n: faults.get(n % 5))) as proxy:
      options = {"url": proxy.url, "attempts": 20}
      assert run(tmp_path, options, "faults") == (0, expected)
      assert sum(map(bool, proxy.faults)) > 20

    # The first evaluation and the first step take 8 requests; then the service is dead.
    dead = [True]
    with running(
      Proxy(server.server_port, lambda n: "500" if dead[0] and n >= 8 else None)
    ) as proxy:
      options = {"url": proxy.url, "attempts": 2}
      capsys.readouterr()
      code, exported = run(tmp_path, options, "death")
      assert code == 2 and exported not in (None, expected)  # that of the first checkpoint
      error = capsys.readouterr().err
      assert re.search(r"error: reward 'geneval' failed on 4 of 4 samples", error), error
      dead[0] = False
      assert run(tmp_path, options, "death") == (0, expected)
