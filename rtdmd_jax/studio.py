"""A web page on this machine that draws a prompt with several systems, side by side.

python -m rtdmd_jax.studio --config=configs/tiny_eval.py --lora=result=runs/tiny/export/generator

Reads the pipelines, systems and adapters of an evaluation's configuration; writes nothing. An image
is the one that rtdmd_jax.sample draws of the same prompt, seed and settings. The page is at
http://127.0.0.1:7860 and for this machine alone; from another one, forward the port with ssh.
Needs gradio: pip install -e ".[studio]" in the clone.
"""

import importlib
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from rtdmd_jax import cli, sample
from rtdmd_jax.adapters.load import Lora, load_adapters
from rtdmd_jax.errors import UserError
from rtdmd_jax.evaluate import suite
from rtdmd_jax.pipeline import Pipeline
from rtdmd_jax.runtime import sharding
from rtdmd_jax.runtime.extras import missing


class Studio:
  """Systems that draw the same prompt and seed."""

  def __init__(self, settings: dict[str, sample.Settings]):
    """Loads every pipeline of `settings` (by name of a system, of the same dtype) once."""
    self.settings = {name: replace(how, batch=1) for name, how in settings.items()}
    self._mesh = sharding.make_mesh()
    self._turn = threading.Lock()
    pipelines, self._samplers = {}, {}
    with jax.set_mesh(self._mesh):
      for name, how in self.settings.items():
        if how.pipeline not in pipelines:
          dtype = jnp.dtype(how.dtype)
          pipelines[how.pipeline] = Pipeline.from_pretrained(how.pipeline, dtype=dtype)
        pipeline = pipelines[how.pipeline]
        adapters = load_adapters(how.loras, pipeline.transformer)
        self._samplers[name] = sample.sampler(pipeline, how, adapters)

  def draw(self, prompt: str, seed: int) -> dict[str, np.ndarray]:
    """An image [H, W, 3] uint8 by every system, in the order of `settings`.

    Raises:
      UserError: an empty prompt, or a seed that is none.
    """
    if not prompt.strip():
      raise UserError("the prompt is empty; give it some text.")
    if seed != int(seed) or not 0 <= seed < 2**32:
      raise UserError(f"the seed is {seed}; give a whole number from 0 to 2**32 - 1.")
    shot = sample.Shot(0, prompt.strip(), int(seed))
    # A mesh is set for one thread, and the page's requests come on others.
    with self._turn, jax.set_mesh(self._mesh):
      return {name: images([shot])[0] for name, images in self._samplers.items()}

  def label(self, name: str) -> str:
    """The caption above an image."""
    how = self.settings[name]
    guidance = f", guidance {how.guidance:g}" if how.guidance > 1 else ""
    return f"{name.replace('_', ' ')}: {how.steps} steps{guidance}"


def systems(config: Any, loras: Sequence[str]) -> dict[str, sample.Settings]:
  """The config's systems, and one for each NAME=PATH, sampled as its last few-step one.

  Raises:
    UserError: a bad config, a malformed or unknown adapter, or no few-step system to follow.
  """
  suite.check_config(config)
  by_name = {name: suite.settings(config, name) for name in config.systems}
  for text in loras:
    name, _, path = text.partition("=")
    if not name or not path:
      raise UserError(f"--lora={text} must be NAME=PATH or NAME=PATH:SCALE.")
    few = [how for how in by_name.values() if how.few_step]
    if not few:
      raise UserError(f"--lora={text} needs a few-step system in the config to be sampled as.")
    by_name[name] = replace(few[-1], loras=(Lora.parse(path),))
  return by_name


def import_gradio() -> Any:
  """The module gradio.

  Raises:
    UserError: it is not installed.
  """
  try:
    return importlib.import_module("gradio")
  except ImportError as error:
    raise missing("rtdmd_jax.studio", error, "studio") from error


def page(studio: Studio) -> Any:
  """The page as a gradio `Blocks`.

  Raises:
    UserError: gradio is not installed.
  """
  gr = import_gradio()

  def draw(prompt: str, seed: float) -> list[np.ndarray]:
    try:
      return list(studio.draw(prompt, seed).values())
    except UserError as error:
      raise gr.Error(str(error)) from error

  with gr.Blocks(title="rtdmd_jax studio", analytics_enabled=False) as blocks:
    gr.Markdown("# One prompt, one seed, several systems")
    with gr.Row():
      prompt = gr.Textbox(label="Prompt", scale=5, elem_id="prompt")
      seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, elem_id="seed")
      button = gr.Button("Draw", variant="primary", elem_id="draw")
    with gr.Row():
      images = [gr.Image(label=studio.label(name), format="png") for name in studio.settings]
    for event in (button.click, prompt.submit):
      event(draw, [prompt, seed], images, concurrency_limit=1)
  return blocks


def define_flags(values: flags.FlagValues) -> None:
  """Adds this tool's flags."""
  flags.DEFINE_multi_string(
    "lora", [], "NAME=PATH[:SCALE]: a further few-step system; may be repeated.", flag_values=values
  )
  flags.DEFINE_integer("port", 7860, "Of the page.", 1, 65535, flag_values=values)


def main(call: cli.Invocation) -> None:
  """Serves the page until Ctrl-C."""
  call.expect("evaluation")
  import_gradio()  # before what takes long
  blocks = page(Studio(systems(call.config, call.flags.lora)))
  try:
    blocks.launch(server_name="127.0.0.1", server_port=call.flags.port, share=False)
  except OSError as error:
    raise UserError(
      f"port {call.flags.port} cannot be listened on; give another --port."
    ) from error


if __name__ == "__main__":
  sys.exit(cli.run(main, define_flags=define_flags, requires=("config",), shared=("config",)))
