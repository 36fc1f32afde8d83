"""Draws images: one for each prompt and seed, as numbered PNG files.

python -m rtdmd_jax.sample --config=configs/tiny_infer.py --prompt "a photo of a red circle"

Reads the pipeline and the LoRAs of the configuration, or of a training run's --checkpoint, and
prompts of --prompt or a file. Writes into --workdir, or else config.out.

An image is a function of the settings, its seed and the number of its prompt: neither the other
prompts nor the batch size nor the number of devices change it. Its file is
<prompt number>_<seed>.png and holds the settings as JSON in the text field "rtdmd_jax". A file that
is there already with the same settings is kept, so that an interrupted run goes on; with other
settings it is an error unless --overwrite is given.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image, PngImagePlugin

from rtdmd_jax import __version__, cli
from rtdmd_jax.adapters.load import Lora, load_adapters
from rtdmd_jax.datasets.prompts import load_prompts
from rtdmd_jax.errors import UserError
from rtdmd_jax.models.vae import decode_images
from rtdmd_jax.pipeline import Pipeline, sampling
from rtdmd_jax.pipeline.prompt_cache import PromptCache
from rtdmd_jax.pipeline.text import cut_prompts
from rtdmd_jax.pipeline.velocity import role_variables, role_velocity
from rtdmd_jax.report.captions import labels, write_names
from rtdmd_jax.report.grids import grid, save_png
from rtdmd_jax.runtime import sharding
from rtdmd_jax.runtime.compilation import jit
from rtdmd_jax.runtime.files import replace_file
from rtdmd_jax.training.stored_run import FLAG_HELP, StoredRun

METADATA_KEY = "rtdmd_jax"
GRID_NAME = "grid.png"
_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Settings:
  """The typed form of an inference config.

  Attributes:
    pipeline: a diffusers directory.
    dtype: of parameters and computation.
    height: of the images in pixels.
    width: of the images in pixels.
    steps: how many.
    guidance: classifier-free guidance scale, off at 1; an input of networks that embed it.
    seed: of the noise, where the command line gives none.
    loras: adapters, each PATH, PATH:SCALE or a path and a scale, added up in order.
    few_step: the distilled generator's stochastic sampler; False takes Euler steps.
    out: directory of the images.
    eta: stochasticity of the few steps.
    batch: images at once, on all devices together.
  """

  pipeline: str
  dtype: str
  height: int
  width: int
  steps: int
  guidance: float
  seed: int
  loras: tuple[Lora, ...]
  few_step: bool
  out: str
  eta: float = 0.9
  batch: int = 8

  @classmethod
  def from_config(cls, config: Any) -> "Settings":
    """Reads a config.

    Raises:
      UserError: a missing or unknown key, or a value that cannot be meant.
    """
    # Configs of every kind say what they are for; the rest are this class's own.
    values = {key: value for key, value in config.items() if key != "stage"}
    for key in values.keys() - {f.name for f in fields(cls)}:
      raise UserError(f"the config has a key {key!r}, which is unknown to rtdmd_jax.sample.")
    for field in fields(cls):
      if field.name not in values and field.name not in ("eta", "batch"):
        raise UserError(f"the config lacks the key {field.name!r}, which rtdmd_jax.sample reads.")
    values["loras"] = tuple(Lora.parse(lora) for lora in values["loras"])
    built = cls(**values)
    built._check()
    return built

  def _check(self) -> None:
    for name in ("height", "width", "steps", "batch"):
      if getattr(self, name) < 1:
        raise UserError(f"{name} is {getattr(self, name)}; give at least 1.")
    if self.dtype not in _DTYPES:
      raise UserError(f"dtype is {self.dtype!r}; choose one of {', '.join(_DTYPES)}.")
    if self.guidance < 1:
      raise UserError(f"guidance is {self.guidance}; 1 is without, larger is stronger.")
    if not 0 <= self.eta <= 1:
      raise UserError(f"eta is {self.eta}; give a number from 0 to 1.")


@dataclass(frozen=True)
class Shot:
  """One image to draw: the number and text of its prompt, and its seed."""

  index: int
  prompt: str
  seed: int

  def path(self, directory: Path) -> Path:
    """The file that the image is written to."""
    return directory / f"{self.index:05d}_{self.seed}.png"

  def notes(self, settings: Settings) -> dict[str, Any]:
    """The notes in the image's file: everything that the image is a function of."""
    shared = asdict(settings)
    for key in ("seed", "out", "batch"):
      del shared[key]
    shared["loras"] = [{"path": str(lora.path), "scale": lora.scale} for lora in settings.loras]
    own = {"prompt": self.prompt, "prompt_index": self.index, "seed": self.seed}
    return own | shared | {"version": __version__}


Sampler = Callable[[Sequence[Shot]], np.ndarray]


def sampler(pipeline: Pipeline, settings: Settings, adapters: Any) -> Sampler:
  """A function that draws up to `settings.batch` images at once with a single program.

  Args:
    pipeline: its parameters lie on the current mesh, over which images are spread.
    settings: size, steps, guidance.
    adapters: adapter tree with its scale folded in; may be empty.

  Returns:
    A function of shots, as many as the batch or fewer, to images [N, H, W, 3] uint8. It raises
    UserError for an image with values that are not finite.
  """
  size = (settings.height, settings.width)
  steps, shape = settings.steps, pipeline.latent_shape(size)
  if settings.few_step:
    sigmas = pipeline.few_step_sigmas(1000.0 * (1.0 - np.arange(steps) / steps), size)
  else:
    sigmas = pipeline.euler_sigmas(steps, size)
  embedded = pipeline.transformer.embedded_guidance
  guided = settings.guidance > 1 and not embedded
  batch = batch_size(settings)
  cache = PromptCache(pipeline.encode, chunk=batch)
  unconditional = sharding.replicate(cache([""])) if guided else None
  variables = role_variables(pipeline.params, adapters=sharding.shard(adapters))

  @jit
  def run(variables, vae_params, conditioning, unconditional, seeds, index):
    velocity = role_velocity(
      pipeline.transformer.apply,
      variables,
      conditioning,
      unconditional=unconditional,
      guidance=settings.guidance,
      embedded_guidance=embedded,
    )
    keys = jax.vmap(jax.random.key)(seeds)
    eta = settings.eta if settings.few_step else 0.0
    latents = sampling.sample(velocity, keys, index, shape, sigmas, eta=eta)
    decode = partial(decode_images, pipeline.vae, vae_params)
    drawn, finite = sampling.checked_images(decode, latents)
    return jnp.round(255.0 * drawn).astype(jnp.uint8), finite

  def images(shots: Sequence[Shot]) -> np.ndarray:
    # A constant size compiles once; the images beyond the last are thrown away.
    padded = [*shots, *[shots[-1]] * (batch - len(shots))]
    seeds, index = (np.array([getattr(s, n) for s in padded], np.uint32) for n in ("seed", "index"))
    inputs = sharding.split_batch((cache([s.prompt for s in padded]), seeds, index))
    outputs = run(variables, pipeline.vae_params, inputs[0], unconditional, *inputs[1:])
    drawn, finite = jax.device_get(outputs)
    named = [f"{s.index} ({s.prompt!r}) with seed {s.seed}" for s in shots]
    sampling.refuse_nonfinite(finite, named)
    return drawn[: len(shots)]

  return images


def batch_size(settings: Settings) -> int:
  """Images at once: `settings.batch`, rounded up to what the current mesh can split."""
  return -(-settings.batch // sharding.batch_parts()) * sharding.batch_parts()


def draw(
  pipeline: Pipeline, settings: Settings, adapters: Any, shots: Sequence[Shot]
) -> Iterator[tuple[Shot, np.ndarray]]:
  """Draws images in batches of one size, spread over the current mesh.

  Args:
    pipeline: its parameters lie on the current mesh.
    settings: size, steps, guidance.
    adapters: adapter tree with its scale folded in; may be empty.
    shots: what to draw.

  Yields:
    (shot, image [H, W, 3] uint8) in the order of `shots`.
  """
  images, batch = sampler(pipeline, settings, adapters), batch_size(settings)
  for start in range(0, len(shots), batch):
    part = shots[start : start + batch]
    yield from zip(part, images(part), strict=True)


def pending(
  shots: Sequence[Shot], settings: Settings, directory: Path, *, overwrite: bool
) -> list[Shot]:
  """The shots without a file of the same settings.

  Raises:
    UserError: a file of other settings, and `overwrite` is not set.
  """
  missing = []
  for shot in shots:
    path = shot.path(directory)
    same = path.exists() and read_notes(path) == shot.notes(settings)
    if path.exists() and not same and not overwrite:
      raise UserError(f"{path} has other settings; give another --workdir, or --overwrite.")
    if not same:
      missing.append(shot)
  return missing


def read_notes(path: Path) -> dict[str, Any] | None:
  """The settings in a file, None if it is not one of ours."""
  try:
    with Image.open(path) as image:
      return json.loads(image.text[METADATA_KEY])
  except (OSError, AttributeError, KeyError, ValueError):
    return None


def write(image: np.ndarray, path: Path, notes: dict[str, Any]) -> None:
  """Writes a PNG with its settings; it appears whole or not."""
  info = PngImagePlugin.PngInfo()
  info.add_text(METADATA_KEY, json.dumps(notes))  # plain ASCII, so that it is a tEXt chunk
  picture = Image.fromarray(image)
  replace_file(path, lambda partial: picture.save(partial, format="PNG", pnginfo=info))


def main(call: cli.Invocation) -> None:
  """Draws what the command line asks for."""
  call.expect("images")
  values = call.flags
  settings = Settings.from_config(call.config)
  run = StoredRun.parse(values.checkpoint) if values.checkpoint else None
  if run is not None:
    if values.lora is not None:
      raise UserError("--checkpoint stands in place of --lora; give one of them.")
    settings = of_run(settings, run)
  if values.lora is not None:
    chosen = tuple(Lora.parse(value) for value in values.lora if value)
    settings = replace(settings, loras=chosen)
  shots = _shots(values, settings)
  directory = call.workdir or Path(settings.out)
  todo = pending(shots, settings, directory, overwrite=values.overwrite)
  cli.make_folder(directory, "--workdir" if call.workdir else "out")
  if todo:
    with jax.set_mesh(sharding.make_mesh()):
      dtype = jnp.dtype(settings.dtype)
      if run is not None:
        pipeline = run.pipeline(dtype)
        adapters, words = run.adapters(pipeline.transformer)
        print(f"{run.directory}: {words}")
      else:
        pipeline = Pipeline.from_pretrained(settings.pipeline, dtype=dtype)
        adapters = load_adapters(settings.loras, pipeline.transformer)
      texts = list(dict.fromkeys(shot.prompt for shot in todo))
      for line in cut_prompts(pipeline.text.limits, texts):
        print(line)
      for shot, image in draw(pipeline, settings, adapters, todo):
        write(image, shot.path(directory), shot.notes(settings))
  if values.grid:
    images = np.stack([np.asarray(Image.open(shot.path(directory))) for shot in shots])
    captions, names = labels([s.prompt for s in shots], [s.index for s in shots])
    columns = len({shot.seed for shot in shots})
    columns = columns if columns > 1 else None
    save_png(directory / GRID_NAME, grid(images, captions, columns=columns))
    write_names((directory / GRID_NAME).with_suffix(".txt"), names)
  print(f"{directory}: {len(todo)} images drawn, {len(shots) - len(todo)} were there")


def of_run(settings: Settings, run: StoredRun) -> Settings:
  """The settings with the pipeline and the adapters of a run's checkpoint, as images note them."""
  return replace(settings, pipeline=run.base(), loras=(Lora(run.directory),))


def _shots(values: flags.FlagValues, settings: Settings) -> list[Shot]:
  prompts = list(values.prompt)
  if values.prompts:
    prompts += [p.text for p in load_prompts(values.prompts, split="test")]
  if not prompts:
    raise UserError("no prompts: give --prompt TEXT (may be repeated) or --prompts FILE.")
  if any(not prompt.strip() for prompt in prompts):
    raise UserError("a --prompt is empty; give it some text.")
  try:
    seeds = [int(seed) for seed in values.seeds] or [settings.seed]
  except ValueError:
    raise UserError(f"--seeds={','.join(values.seeds)} must be whole numbers.") from None
  if len(set(seeds)) != len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
    raise UserError(f"seeds are {seeds}; give different numbers from 0 to 2**32 - 1.")
  return [Shot(i, prompt, seed) for i, prompt in enumerate(prompts) for seed in seeds]


def define_flags(values: flags.FlagValues) -> None:
  """The tool's own flags."""
  several, flag = flags.DEFINE_multi_string, flags.DEFINE_bool
  several("prompt", [], "A prompt; may be repeated.", flag_values=values)
  flags.DEFINE_string("prompts", None, "A prompt file, after --prompt.", flag_values=values)
  several(
    "lora", None, "PATH or PATH:SCALE instead of config.loras; empty for none.", flag_values=values
  )
  about = f"{FLAG_HELP} Its pipeline and adapters are drawn with instead of the config's."
  flags.DEFINE_string("checkpoint", None, about, flag_values=values)
  flags.DEFINE_list("seeds", [], "Seeds, a,b,c; config.seed by default.", flag_values=values)
  flag("grid", False, f"Also write {GRID_NAME} of all images, captioned.", flag_values=values)
  flag("overwrite", False, "Replace files of other settings.", flag_values=values)


if __name__ == "__main__":
  sys.exit(cli.run(main, define_flags=define_flags, requires=("config",)))
