"""A run's `Setup` made of shapes alone: nothing is loaded, nothing is allocated."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.adapters.load import Lora, load_adapters
from rtdmd_jax.aot.published import read
from rtdmd_jax.errors import UserError
from rtdmd_jax.models import build_transformer, clip, qwen3, t5
from rtdmd_jax.models.blip import BlipVisionConfig, ImageRewardNet
from rtdmd_jax.models.clip_config import CLIPConfig, TextConfig
from rtdmd_jax.models.encoders import abstract_vae
from rtdmd_jax.models.med import MedConfig
from rtdmd_jax.models.score_head import ScoreHead
from rtdmd_jax.models.transformer import Transformer
from rtdmd_jax.models.vae import decode_images
from rtdmd_jax.pipeline import Pipeline
from rtdmd_jax.pipeline.conditioning import Conditioning
from rtdmd_jax.pipeline.prompt_cache import PromptCache
from rtdmd_jax.pipeline.sampling import Schedule
from rtdmd_jax.pipeline.text import (
  FLUX1_T5_LENGTH,
  FLUX2_LAYERS,
  FLUX2_LENGTH,
  SD3_T5_LENGTH,
  TextEncoder,
  has_t5,
)
from rtdmd_jax.rewards import device_rewards
from rtdmd_jax.rewards.device.aesthetic import Aesthetic
from rtdmd_jax.rewards.device.clipscore import ClipScore
from rtdmd_jax.rewards.device.hpsv2 import HPSv2
from rtdmd_jax.rewards.device.imagereward import ImageReward
from rtdmd_jax.rewards.device.pickscore import PickScore
from rtdmd_jax.rewards.device.preprocess import (
  CLIP_MEAN,
  CLIP_STD,
  ClipTransform,
  PadTransform,
)
from rtdmd_jax.training.latent_rewards import LatentRewards
from rtdmd_jax.training.setup import Setup, new_adapters
from rtdmd_jax.training.state import Batch, Frozen, Roles
from rtdmd_jax.weights import hub

Tree = Any

_IMAGEREWARD_LENGTH = 35
_SCHEDULES = {
  "StableDiffusion3Pipeline": "sd3",
  "FluxPipeline": "flux1",
  "Flux2KleinPipeline": "flux2",
}


def abstract_setup(config: Any) -> Setup:
  """What `build.build` makes of `config`, with `jax.ShapeDtypeStruct`s for parameters.

  Checkpoints may be missing as long as they are published ones; adapters of an earlier stage that
  do not exist yet are taken to have this run's rank and targets. Rewards on the host are left out.

  Raises:
    UserError: neither a checkpoint nor a published one, or an unsupported config.
  """
  dtype = jnp.dtype(config.model.dtype)
  pipeline = abstract_pipeline(
    config.model.pretrained,
    dtype,
    remat=config.model.remat,
    attention=config.model.attention,
    base_storage=config.model.base_storage,
  )
  keys = {
    role: config.model[f"{role}_init"] or config.model.pretrained
    for role in ("generator", "fake_score", "teacher")
  }
  sigmas = pipeline.few_step_sigmas(config.dmd.timesteps, config.model.image_size)
  roles = Roles(
    apply=pipeline.transformer.apply,
    **keys,
    adapter_scale=config.lora.alpha / config.lora.rank,
    sigmas=jnp.asarray(sigmas),
    latent_shape=pipeline.latent_shape(config.model.image_size),
    embedded_guidance=pipeline.transformer.embedded_guidance,
  )
  models = {
    n: abstract_reward(n, config.rewards[n]) for n in config.rewards if n in device_rewards.NAMES
  }
  backpropagated = tuple(n for n in models if config.rewards[n].get("backpropagate", False))
  scoring = LatentRewards(
    decode=partial(decode_images, pipeline.vae.clone(remat=config.model.remat)),
    device={name: model.score for name, model in models.items()},
    weights={name: float(reward.weight) for name, reward in config.rewards.items()},
    differentiable=backpropagated,
    gradient=device_rewards.gradients({name: models[name] for name in backpropagated}),
  )
  frozen = Frozen(
    bases={path: pipeline.params for path in {config.model.pretrained, *keys.values()}},
    generator=_earlier(config, config.load.generator, pipeline),
    fake_score=_earlier(config, config.load.fake_score, pipeline),
    vae=pipeline.vae_params,
    rewards={name: model.params for name, model in models.items()},
  )
  conditioning = _conditioning(config.model.pretrained, pipeline.transformer, 1, dtype)
  cache = PromptCache(_nothing)
  return Setup(pipeline, roles, frozen, scoring, None, cache, conditioning, [], [])


def abstract_batch(config: Any, setup: Setup) -> Batch:
  """The shapes of a training batch."""
  prompts, count = config.batch.prompts, config.batch.prompts * config.batch.images_per_prompt
  index = jax.ShapeDtypeStruct((count,), jnp.int32)
  samples = jax.ShapeDtypeStruct((count,), jnp.uint32)
  encoded = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct((prompts, *s.shape[1:]), s.dtype), setup.unconditional
  )
  text = {
    name: jax.eval_shape(
      score.__self__.text_features,
      setup.frozen.rewards[name],
      jax.ShapeDtypeStruct((prompts, _ids_length(score.__self__)), jnp.int32),
    )
    for name, score in setup.scoring.device.items()
  }
  return Batch(encoded, index, samples, setup.unconditional, text)


def abstract_pipeline(
  directory: str,
  dtype: Any,
  *,
  remat: str = "none",
  attention: str = "auto",
  base_storage: str = "native",
) -> Pipeline:
  """`Pipeline.from_pretrained` without parameters, and without tokenizers."""
  kind = _kind(directory)
  schedule = Schedule.from_config(
    _SCHEDULES[kind], read(directory, "scheduler", "scheduler_config.json")
  )
  transformer = build_transformer(
    read(directory, "transformer"), dtype=dtype, remat=remat, attention=attention
  )
  decoder, decoder_params = abstract_vae(read(directory, "vae"), source=directory, dtype=dtype)
  text = TextEncoder(_text_params(directory, kind, dtype), _nothing, _nothing)
  params = transformer.stored(_cast(transformer.init_abstract(), dtype), base_storage)
  return Pipeline(transformer, params, decoder, _cast(decoder_params, dtype), text, schedule)


def _kind(directory: str) -> str:
  kind = read(directory, file="model_index.json").get("_class_name")
  if not isinstance(kind, str) or kind not in _SCHEDULES:
    raise UserError(
      f"_class_name in {directory}/model_index.json is {kind!r}; supported are"
      f" {', '.join(_SCHEDULES)}."
    )
  return kind


def _text_params(directory: str, kind: str, dtype: Any) -> Tree:
  """Parameters of the text encoders, which stay on the devices beside the programs."""
  ids = jnp.zeros((1, 1), jnp.int32)

  def clip_text(part: str) -> Tree:
    config = read(directory, part)
    projection = "CLIPTextModelWithProjection" in config["architectures"]
    return _shapes(clip.CLIPText(TextConfig.from_dict(config), projection, dtype), dtype, ids)

  def t5_encoder(part: str) -> Tree:
    config = t5.T5Config.from_dict(read(directory, part))
    return _shapes(t5.T5Encoder(config, dtype), dtype, ids)

  if kind == "Flux2KleinPipeline":
    config = qwen3.Qwen3Config.from_dict(read(directory, "text_encoder"))
    return _shapes(qwen3.Qwen3(config, FLUX2_LAYERS, dtype), dtype, ids)
  towers = {"text_encoder": clip_text("text_encoder")}
  if kind == "FluxPipeline":
    return towers | {"text_encoder_2": t5_encoder("text_encoder_2")}
  towers["text_encoder_2"] = clip_text("text_encoder_2")
  if not has_t5(read(directory, file="model_index.json")):
    return towers
  return towers | {"text_encoder_3": t5_encoder("text_encoder_3")}


def _conditioning(directory: str, net: Transformer, count: int, dtype: Any) -> Conditioning:
  """Shapes of the encodings of `count` prompts."""

  def longest(part: str) -> int:
    return read(directory, part, "tokenizer_config.json")["model_max_length"]

  def t5_length() -> int:
    with_t5 = has_t5(read(directory, file="model_index.json"))
    return min(SD3_T5_LENGTH, longest("tokenizer_3")) if with_t5 else SD3_T5_LENGTH

  length = {
    "StableDiffusion3Pipeline": lambda: longest("tokenizer") + t5_length(),
    "FluxPipeline": lambda: min(FLUX1_T5_LENGTH, longest("tokenizer_2")),
    "Flux2KleinPipeline": lambda: min(FLUX2_LENGTH, longest("tokenizer")),
  }[_kind(directory)]()
  tokens, pooled = net.example[2], net.example[3]
  return Conditioning(
    jax.ShapeDtypeStruct((count, length, tokens.shape[-1]), dtype),
    None if pooled is None else jax.ShapeDtypeStruct((count, pooled.shape[-1]), dtype),
  )


def _earlier(config: Any, path: str, pipeline: Pipeline) -> Tree:
  """Shapes of an earlier stage's adapters; empty without a path."""
  if not path:
    return {}
  lora = Lora.parse(path)
  if hub.find(lora.path, "adapter") is not None:
    load = load_adapters([lora], pipeline.transformer)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), load)
  return jax.eval_shape(lambda: new_adapters(config, pipeline, jax.random.key(0)))


def abstract_reward(name: str, options: Any) -> device_rewards.DeviceReward:
  """A reward of `device.NAMES` whose `params` are shapes and whose tokenizer is missing.

  Of the options `dtype`, `directory` and `method` matter here.
  """
  dtype = jnp.dtype(options.get("dtype", "float32"))
  if name == "imagereward":
    vision, text = BlipVisionConfig(), MedConfig()
    net = ImageRewardNet(vision, text, dtype)
    ids, pixels = jnp.zeros((1, _IMAGEREWARD_LENGTH), jnp.int32), _pixels(vision)
    own = _transform(vision, "bicubic")
    return ImageReward(net, own, own, None, _shapes(net, dtype, ids, ids > 0, pixels))
  both = CLIPConfig.from_dict(read(options["directory"]))
  net = clip.CLIP(both, dtype)
  params = _shapes(net, dtype, jnp.zeros((1, 1), jnp.int32), _pixels(both.vision))
  if name == "aesthetic":
    tower = clip.CLIPVision(both.vision, dtype)
    features = jnp.zeros((1, both.projection_dim))
    own = _transform(both.vision, "bicubic")
    parts = {
      "clip": _shapes(tower, dtype, _pixels(both.vision)),
      "head": _shapes(ScoreHead(), jnp.float32, features),
    }
    return Aesthetic(tower, own, own, parts)
  if name == "hpsv2":
    own = PadTransform(both.vision.image_size, CLIP_MEAN, CLIP_STD)
    return HPSv2(net, own, own, _nothing, params)
  method = options.get("method", "bilinear") if name == "clipscore" else "bicubic"
  own = _transform(both.vision, method)
  return {"clipscore": ClipScore, "pickscore": PickScore}[name](net, own, own, _nothing, params)


def _ids_length(model: device_rewards.DeviceReward) -> int:
  if isinstance(model, ImageReward):
    return _IMAGEREWARD_LENGTH
  return 0 if isinstance(model, Aesthetic) else model.module.config.text.max_position_embeddings


def _transform(vision: Any, method: str) -> ClipTransform:
  return ClipTransform(vision.image_size, vision.image_size, CLIP_MEAN, CLIP_STD, method)


def _pixels(vision: Any) -> jax.Array:
  return jnp.zeros((1, vision.image_size, vision.image_size, 3))


def _shapes(module: nn.Module, dtype: Any, *inputs: jax.Array) -> Tree:
  return _cast(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"], dtype)


def _cast(tree: Tree, dtype: Any) -> Tree:
  """Floating-point leaves in `dtype`, as loading casts them."""
  return jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(
      s.shape, dtype if jnp.issubdtype(s.dtype, jnp.floating) else s.dtype
    ),
    tree,
  )


def _nothing(*args: Sequence[str]) -> np.ndarray:
  raise ValueError("an abstract setup has no tokenizers and encodes nothing")
