"""Rewards that are computed on the device, by name; all of them can be back-propagated."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.device.description import Loadable, RewardDescription
from rtdmd_jax.weights.reward_files import local_options
from rtdmd_jax.weights.source import MACHINE, Source, read_file

# Module and class. The options of a reward are the arguments of its class's `describe`.
_CLASSES = {
  "clipscore": ("rtdmd_jax.rewards.device.clipscore", "ClipScore"),
  "pickscore": ("rtdmd_jax.rewards.device.pickscore", "PickScore"),
  "hpsv2": ("rtdmd_jax.rewards.device.hpsv2", "HPSv2"),
  "aesthetic": ("rtdmd_jax.rewards.device.aesthetic", "Aesthetic"),
  "imagereward": ("rtdmd_jax.rewards.device.imagereward", "ImageReward"),
}
NAMES = tuple(_CLASSES)
# Images scored at once on the way from the host: bounds the memory, compiles one program.
_CHUNK = 64


class OptionError(UserError):
  """Options that the reward does not take, or lacks."""


class DeviceReward(Protocol):
  """The interface of a reward on the device; all but `tokenize` are pure in their array arguments.

  `params` is its tree of parameters. `tokenize` maps P prompts to ids [P, text_length],
  `text_features`
  (params, ids) to what is known of the prompts without images, [P, ...]. `score` maps (params,
  images [B, H, W, 3] in [0, 1], text features [B, ...]) to scores [B] through `transform`, and
  `gradient_score` is the same through `gradient_transform`, meant for back-propagation.
  """

  params: Any
  transform: Callable[[jax.Array], jax.Array]
  gradient_transform: Callable[[jax.Array], jax.Array]
  text_length: int

  def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
    """See the class."""

  def text_features(self, params: Any, ids: jax.Array) -> jax.Array:
    """See the class."""

  def score(self, params: Any, images: jax.Array, text_features: jax.Array) -> jax.Array:
    """See the class."""

  def gradient_score(self, params: Any, images: jax.Array, text_features: jax.Array) -> jax.Array:
    """See the class."""


def gradients(models: Mapping[str, DeviceReward]) -> dict[str, Callable[..., jax.Array]]:
  """`gradient_score` of the rewards whose preprocessing for back-propagation is another one."""
  return {
    name: model.gradient_score
    for name, model in models.items()
    if model.gradient_transform != model.transform
  }


def describe(
  name: str, options: Mapping[str, Any], *, source: Source = MACHINE
) -> RewardDescription:
  """Describes the reward `name` of `NAMES` by its config files.

  Args:
    name: the reward.
    options: arguments of its class's `describe`, such as `directory` or `weights`, where
      repositories of the hub will do as well (see `hub`); `dtype` by name.
    source: finds them and reads their config files.

  Raises:
    OptionError: an unknown or a missing option.
    UserError: missing or broken files.
  """
  checked_options(name, options)  # a wrong option is said before anything is downloaded
  own = checked_options(name, local_options(name, options, source.locate))
  return _class(name).describe(source.read, **own)


def load(name: str, options: Mapping[str, Any]) -> DeviceReward:
  """Loads the reward `name` of `NAMES`; see `describe`."""
  return describe(name, options).load()


def checked_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
  """A reward's options with `dtype` as a type; opens no file.

  Raises:
    OptionError: an unknown or a missing option.
  """
  try:
    inspect.signature(_class(name).describe).bind(read_file, **options)
  except TypeError as error:
    raise OptionError(f"reward {name!r}: {error} in its options {dict(options)!r}") from error
  try:
    return {k: jnp.dtype(v) if k == "dtype" else v for k, v in options.items()}
  except TypeError as error:
    raise OptionError(f"reward {name!r}: {options['dtype']!r} is no dtype ({error})") from error


def published_options(name: str) -> Mapping[str, str]:
  """The options of a reward that name config files, as they are published."""
  return _class(name).PUBLISHED


def _class(name: str) -> type[Loadable]:
  module, attribute = _CLASSES[name]
  return getattr(importlib.import_module(module), attribute)


def host_reward(model: DeviceReward) -> Callable[..., np.ndarray]:
  """The reward as `(uint8 images [B, H, W, 3], prompts, metadata) -> [B]`, for `MultiReward`.

  Every distinct prompt is encoded once.
  """
  encode = jax.jit(model.text_features)
  score = jax.jit(lambda params, *inputs: _score_bytes(model, params, *inputs))

  def reward(images: np.ndarray, prompts: Sequence[str], metadata: Any) -> np.ndarray:
    del metadata
    row = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    features = _in_chunks(encode, model.params, model.tokenize(list(row)))
    own = features[np.array([row[prompt] for prompt in prompts])]
    return _in_chunks(score, model.params, images, own)

  return reward


def _score_bytes(model: DeviceReward, params: Any, images: jax.Array, text: jax.Array) -> jax.Array:
  return model.score(params, images.astype(jnp.float32) / 255, text)


def _in_chunks(function: Callable, params: Any, *arrays: np.ndarray) -> np.ndarray:
  """`function` of all rows, in chunks of one size; the device works ahead of the transfers."""
  count = len(arrays[0])
  size = min(_CHUNK, count)
  parts = []
  for start in range(0, count, size):
    index = np.minimum(np.arange(start, start + size), count - 1)
    parts.append(function(params, *(jax.device_put(a[index]) for a in arrays)))
  return np.concatenate(jax.device_get(parts))[:count]
