"""Host memory of the encodings of prompts: python -m benchmarks.prompt_memory sd35 --steps=1000

Makes the batches of each family's published stage 2, in their order, through the training's own
`make_batch` and `PromptCache`. The encodings have the published types and sizes, and a simulated
encoder writes them anew each time; nothing else of a run is there. Prints resident memory in GB
before the first batch, at its highest and after the last one. As in a run the last batch lives
until the next one is made, and where the device is the host its arrays count, too. The exit code is
1 where the highest is 4 GB or more above the start.
"""

import argparse
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import psutil

from benchmarks import record, tables
from rtdmd_jax.aot.abstract import abstract_batch, abstract_setup
from rtdmd_jax.config import load_config
from rtdmd_jax.datasets.prompts import Prompt
from rtdmd_jax.pipeline.prompt_cache import PromptCache, encoding_chunk
from rtdmd_jax.training.batch import encoding_bytes, make_batch

CONFIGS = Path(__file__).parents[1] / "configs"
FAMILIES = ("sd3", "sd35", "flux1", "flux2", "flux2_9b")
LIMIT = 4.0
# Records that `python -m rtdmd_jax.datasets.geneval` writes to train on.
PROMPTS = 50_000


class Resident:
  """Resident memory of this process in bytes: at the start, highest and at the end of a block."""

  def __enter__(self):
    self._process, self._done = psutil.Process(), threading.Event()
    self.start = self.highest = self._process.memory_info().rss
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()
    return self

  def _watch(self):
    while not self._done.wait(0.005):
      self.highest = max(self.highest, self._process.memory_info().rss)

  def __exit__(self, *exception):
    self._done.set()
    self._thread.join()
    self.end = self._process.memory_info().rss


def simulated(batch, chunk):
  """An encoder of `chunk` prompts whose encodings have the shapes and types of `batch`'s."""
  like = {"conditioning": batch.conditioning, "reward_text": batch.reward_text}

  @jax.jit
  def fill(number):
    return jax.tree.map(lambda a: jnp.full((chunk, *a.shape[1:]), number, a.dtype), like)

  return lambda prompts: fill(float(len(prompts[0])))


def measure(family: str, steps: int):
  """Resident memory of `steps` batches, bytes of one prompt's encoding, and prompts a batch."""
  config = load_config(str(CONFIGS / f"{family}_stage2.py"), [])
  setup = abstract_setup(config)
  shapes, count = abstract_batch(config, setup), config.batch.prompts
  chunk = encoding_chunk(count)
  encode = simulated(shapes, chunk)
  cache = PromptCache(encode, chunk=chunk, max_bytes=config.data.cache_gb * 1e9)
  unconditional = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), setup.unconditional)
  prompts = [Prompt(f"prompt {i}", {}) for i in range(PROMPTS)]
  with Resident() as resident:
    for step in range(steps):
      batch, _ = make_batch(
        prompts,
        cache,
        unconditional,
        seed=config.seed,
        step=step,
        prompts_per_batch=count,
        images_per_prompt=config.batch.images_per_prompt,
      )
      jax.block_until_ready(batch)
  return resident, encoding_bytes(shapes), count


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("family", choices=FAMILIES)
  parser.add_argument("--steps", type=int, default=1000)
  record.add_flag(parser)
  args = parser.parse_args()
  resident, size, count = measure(args.family, args.steps)
  start, highest, end = (n / 1e9 for n in (resident.start, resident.highest, resident.end))
  row = {
    "family": args.family, "mb_per_prompt": size / 1e6, "prompts": count, "steps": args.steps,
    "start_gb": start, "highest_gb": highest, "end_gb": end, "growth_gb": highest - start,
  }  # fmt: skip
  tables.report("prompt_memory", [row], args.save, ("family",))
  return int(highest - start >= LIMIT)


if __name__ == "__main__":
  sys.exit(main())
