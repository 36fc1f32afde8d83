"""Text encoders of the pipelines: prompts in, the transformer's conditioning out."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.errors import UserError
from rtdmd_jax.models.clip import CLIPText
from rtdmd_jax.models.encoders import clip_text_network, qwen3_network, t5_network
from rtdmd_jax.models.network import Network
from rtdmd_jax.models.sd3 import SD3Config
from rtdmd_jax.models.tokenizer import (
  Limit,
  checked_ids,
  load_tokenizer,
  longer,
  no_tokenizer,
  tokenize,
)
from rtdmd_jax.pipeline.conditioning import Conditioning
from rtdmd_jax.weights.safetensors import read_config
from rtdmd_jax.weights.source import Read

Tokenize = Callable[[Sequence[str]], dict[str, np.ndarray]]
Encode = Callable[[Any, dict[str, jax.Array]], Conditioning]

# RTDMD's length of T5's sequence for SD3; a tokenizer that says less is taken at its word.
SD3_T5_LENGTH = 128
FLUX1_T5_LENGTH = 512
FLUX2_LENGTH = 512
_INDEX = "model_index.json"
_T5 = "text_encoder_3"
# The hidden states of Qwen3 that FLUX.2-klein was trained on.
FLUX2_LAYERS = (9, 18, 27)
# Of a prompt set, those that `cut_prompts` looks at.
_MOST_LOOKED_AT = 50_000
_SHOWN = 80  # letters of a prompt


class TextEncoder(NamedTuple):
  """A family's text encoders.

  `tokenize` maps prompts to a tree of ids [B, L] on the host; `encode` maps (params, ids) to the
  conditioning and may be jitted. `limits` are what each encoder reads of a prompt.
  """

  params: Any
  tokenize: Tokenize
  encode: Encode
  limits: tuple[Limit, ...] = ()


class TextDescription(NamedTuple):
  """A family's text encoders as config files describe them; no weights have been opened.

  Attributes:
    networks: by their folder. The parameters of a single one are not put into a dictionary.
    encode: of `TextEncoder`.
    ids: gives the shapes of what `encode` reads of one prompt, by tokenizers' config files.
    words: maps the pipeline's directory to `tokenize` and `limits` of `TextEncoder`.
  """

  networks: Mapping[str, Network]
  encode: Encode
  ids: Callable[[], dict[str, jax.ShapeDtypeStruct]]
  words: Callable[[Path], tuple[Tokenize, tuple[Limit, ...]]]

  def abstract(self) -> TextEncoder:
    """The encoders with shapes for parameters; they encode shapes, and tokenize nothing."""
    shapes = {name: network.shapes for name, network in self.networks.items()}
    return TextEncoder(_tree(shapes), no_tokenizer, self.encode)

  def load(self, directory: Path) -> TextEncoder:
    """Reads tokenizers and weights below a pipeline's directory.

    Raises:
      UserError: missing or broken files.
    """
    tokenize, limits = self.words(directory)  # first, as it takes no time
    params = {name: network.load(directory / name) for name, network in self.networks.items()}
    return TextEncoder(_tree(params), tokenize, self.encode, limits)

  def conditioning(self) -> Conditioning:
    """Shapes of the encoding of one prompt."""
    return jax.eval_shape(self.encode, self.abstract().params, self.ids())


def _tree(by_folder: Mapping[str, Any]) -> Any:
  only = tuple(by_folder.values())
  return only[0] if len(only) == 1 else dict(by_folder)


def cut_prompts(
  limits: Sequence[Limit], prompts: Sequence[str], what: str = "prompts"
) -> list[str]:
  """A sentence for each text encoder that reads some of the prompts in part only.

  Encoders of one kind with the same vocabulary count as one. Of more than 50,000 prompts as many
  are looked at, evenly spread, and the sentence says so.

  Args:
    limits: of a family's text encoders.
    prompts: that a run uses.
    what: they are called.
  """
  count = min(len(prompts), _MOST_LOOKED_AT)
  looked_at = [prompts[i * len(prompts) // count] for i in range(count)]
  among = f"{len(prompts):,} {what}"
  if count < len(prompts):
    among = f"{count:,} looked at of {among}"
  sentences, done = [], []
  for limit in limits:
    # Both CLIP towers of Stable Diffusion 3 have the same words.
    key = (limit.encoder, limit.length, limit.tokenizer.get_vocab())
    if key in done:
      continue
    done.append(key)
    if cut := longer(limit, looked_at):
      first = looked_at[cut[0]]
      shown = first if len(first) <= _SHOWN else first[: _SHOWN - 1] + "…"
      verb = "is" if len(cut) == 1 else "are"
      sentences.append(
        f"{len(cut):,} of {among} {verb} longer than {limit.encoder}'s {limit.length} tokens and"
        f" {verb} cut there; the first: {shown!r}"
      )
  return sentences


def sd3_conditioning(clip: jax.Array, pooled: jax.Array, t5_states: jax.Array) -> Conditioning:
  """SD3's conditioning: CLIP tokens, zero-padded to T5's width, then T5's tokens.

  Args:
    clip: [B, L1, D1 + D2], penultimate states of both CLIP towers side by side.
    pooled: [B, P], their pooled projections side by side.
    t5_states: [B, L2, D], D at least D1 + D2.
  """
  padded = jnp.pad(clip, ((0, 0), (0, 0), (0, t5_states.shape[-1] - clip.shape[-1])))
  return Conditioning(jnp.concatenate([padded, t5_states.astype(padded.dtype)], axis=1), pooled)


def has_t5(index: Mapping[str, Any]) -> bool:
  """Whether a Stable Diffusion 3 pipeline has its T5, by the contents of its model_index.json."""
  return index.get(_T5, "") not in (None, [None, None])


def sd3_limits(directory: Path) -> tuple[Limit, ...]:
  """The limits of the encoders of a Stable Diffusion 3 directory: CLIP's two and T5."""
  clip = tuple(_limit("CLIP", directory / name) for name in ("tokenizer", "tokenizer_2"))
  if not has_t5(read_config(directory, _INDEX)):
    return clip
  return (*clip, _limit("T5", directory / "tokenizer_3", SD3_T5_LENGTH))


def flux1_limits(directory: Path) -> tuple[Limit, ...]:
  """The limits of CLIP and T5 of a FLUX.1 directory."""
  t5 = _limit("T5", directory / "tokenizer_2", FLUX1_T5_LENGTH)
  return _limit("CLIP", directory / "tokenizer"), t5


def flux2_limits(directory: Path) -> tuple[Limit, ...]:
  """The limit of Qwen3 of a FLUX.2-klein directory, which reads a user's turn.

  Raises:
    UserError: a tokenizer without a chat template or that pads in front.
  """
  limit = _limit("Qwen3", directory / "tokenizer", FLUX2_LENGTH)
  tokenizer = limit.tokenizer
  if tokenizer.chat_template is None or tokenizer.padding_side != "right":
    raise UserError(
      f"{directory / 'tokenizer'} must have a chat template and padding_side 'right'; its"
      f" padding_side is {tokenizer.padding_side!r}."
    )

  def turn(prompt: str) -> str:
    return tokenizer.apply_chat_template(
      [{"role": "user", "content": prompt}],
      tokenize=False,
      add_generation_prompt=True,
      enable_thinking=False,
    )

  return (limit._replace(text=turn),)


def _limit(encoder: str, directory: Path, most: float = math.inf) -> Limit:
  tokenizer = load_tokenizer(directory)
  return Limit(encoder, tokenizer, min(most, tokenizer.model_max_length))


def describe_sd3_text(directory: str | os.PathLike, read: Read, dtype: Any) -> TextDescription:
  """The two CLIP towers and T5 of a Stable Diffusion 3 directory.

  Where model_index.json says `"text_encoder_3": [null, null]` zeros stand for T5's states, as in
  diffusers.

  Args:
    directory: of the pipeline, for error messages.
    read: reads its config files.
    dtype: type of the computation and of the parameters.

  Raises:
    UserError: missing or broken files.
  """
  networks = {
    part: clip_text_network(read(f"{part}/config.json"), source=f"{directory}/{part}", dtype=dtype)
    for part in ("text_encoder", "text_encoder_2")
  }
  towers = {name: network.module for name, network in networks.items()}
  with_t5 = has_t5(read(_INDEX))
  if with_t5:
    networks[_T5] = t5_network(read(f"{_T5}/config.json"), dtype=dtype)
  else:
    width = SD3Config.from_dict(read("transformer/config.json")).joint_attention_dim

  def words(directory: Path) -> tuple[Tokenize, tuple[Limit, ...]]:
    limits = sd3_limits(directory)
    return _tokenize_each(dict(zip(networks, limits, strict=True)), networks), limits

  def encode(params: Any, ids: dict[str, jax.Array]) -> Conditioning:
    out = [
      tower.apply({"params": params[name]}, ids[name], hidden=True)
      for name, tower in towers.items()
    ]
    states = jnp.concatenate([o.hidden[-2] for o in out], axis=-1)
    pooled = jnp.concatenate([o.projected for o in out], axis=-1)
    if with_t5:
      t5_states = networks[_T5].module.apply({"params": params[_T5]}, ids[_T5])
    else:
      t5_states = jnp.zeros((len(states), SD3_T5_LENGTH, width), states.dtype)
    return sd3_conditioning(states, pooled, t5_states)

  def ids() -> dict[str, jax.ShapeDtypeStruct]:
    found = {"text_encoder": _ids(read, "tokenizer"), "text_encoder_2": _ids(read, "tokenizer_2")}
    return found | ({_T5: _ids(read, "tokenizer_3", SD3_T5_LENGTH)} if with_t5 else {})

  return TextDescription(networks, encode, ids, words)


def describe_flux1_text(directory: str | os.PathLike, read: Read, dtype: Any) -> TextDescription:
  """The CLIP tower (pooled) and T5 (tokens) of a FLUX.1 directory; see `describe_sd3_text`."""
  source, config = f"{directory}/text_encoder", read("text_encoder/config.json")
  networks = {
    "text_encoder": clip_text_network(config, source=source, dtype=dtype),
    "text_encoder_2": t5_network(read("text_encoder_2/config.json"), dtype=dtype),
  }
  clip, t5 = (network.module for network in networks.values())

  def words(directory: Path) -> tuple[Tokenize, tuple[Limit, ...]]:
    limits = flux1_limits(directory)
    return _tokenize_each(dict(zip(networks, limits, strict=True)), networks), limits

  def encode(params: Any, ids: dict[str, jax.Array]) -> Conditioning:
    pooled = clip.apply({"params": params["text_encoder"]}, ids["text_encoder"]).pooled
    tokens = t5.apply({"params": params["text_encoder_2"]}, ids["text_encoder_2"])
    return Conditioning(tokens, pooled)

  def ids() -> dict[str, jax.ShapeDtypeStruct]:
    return {
      "text_encoder": _ids(read, "tokenizer"),
      "text_encoder_2": _ids(read, "tokenizer_2", FLUX1_T5_LENGTH),
    }

  return TextDescription(networks, encode, ids, words)


def describe_flux2_text(directory: str | os.PathLike, read: Read, dtype: Any) -> TextDescription:
  """Qwen3 of a FLUX.2-klein directory; prompts become a user's turn, answered without thinking.

  See `describe_sd3_text`. `words` refuses a tokenizer without a chat template or that pads in
  front.
  """
  del directory
  network = qwen3_network(read("text_encoder/config.json"), layers=FLUX2_LAYERS, dtype=dtype)
  encoder = network.module

  def words(directory: Path) -> tuple[Tokenize, tuple[Limit, ...]]:
    limits = flux2_limits(directory)
    ((_, tokenizer, length, turn),) = limits

    def tokenize_chat(prompts: Sequence[str]) -> dict[str, np.ndarray]:
      turns = [turn(prompt) for prompt in prompts]
      rows = tokenizer(turns, padding="max_length", max_length=length, truncation=True)
      ids = checked_ids(tokenizer, rows.input_ids, encoder.config.vocab_size)
      return {"ids": ids, "mask": np.array(rows.attention_mask, bool)}

    return tokenize_chat, limits

  def encode(params: Any, inputs: dict[str, jax.Array]) -> Conditioning:
    return Conditioning(encoder.apply({"params": params}, inputs["ids"], inputs["mask"]), None)

  def ids() -> dict[str, jax.ShapeDtypeStruct]:
    own = _ids(read, "tokenizer", FLUX2_LENGTH)
    return {"ids": own, "mask": jax.ShapeDtypeStruct(own.shape, jnp.bool_)}

  return TextDescription({"text_encoder": network}, encode, ids, words)


def encoder_network(
  kind: Any, config: Mapping[str, Any], *, source: str | os.PathLike, dtype: Any
) -> Network:
  """A text encoder by itself, by its class in model_index.json; see `describe_sd3_text`."""
  if kind in ("CLIPTextModel", "CLIPTextModelWithProjection"):
    return clip_text_network(config, source=source, dtype=dtype)
  if kind == "T5EncoderModel":
    return t5_network(config, dtype=dtype)
  return qwen3_network(config, layers=FLUX2_LAYERS, dtype=dtype)


def _ids(read: Read, folder: str, most: float = math.inf) -> jax.ShapeDtypeStruct:
  """The shape [1, L] of one prompt's ids, by the config file of a tokenizer."""
  length = min(most, read(f"{folder}/tokenizer_config.json").get("model_max_length", math.inf))
  if not math.isfinite(length):
    raise UserError(f"{folder}/tokenizer_config.json names no model_max_length.")
  return jax.ShapeDtypeStruct((1, int(length)), jnp.int32)


def _tokenize_each(limits: Mapping[str, Limit], networks: Mapping[str, Network]) -> Tokenize:
  """Tokenizes for every encoder, by its folder; refuses more tokens than CLIP has positions."""
  for name, limit in limits.items():
    if isinstance(networks[name].module, CLIPText):
      _check_length(limit.tokenizer, networks[name].module)
  vocabulary = {name: network.module.config.vocab_size for name, network in networks.items()}

  def tokenize_each(prompts: Sequence[str]) -> dict[str, np.ndarray]:
    return {
      name: tokenize(limit.tokenizer, prompts, length=limit.length, vocabulary=vocabulary[name])
      for name, limit in limits.items()
    }

  return tokenize_each


def _check_length(tokenizer: Any, tower: CLIPText) -> None:
  length, positions = tokenizer.model_max_length, tower.config.max_position_embeddings
  if length > positions:
    raise UserError(
      f"{tokenizer.name_or_path}/tokenizer_config.json: model_max_length is {length:g}, but the"
      f" text encoder has {positions} positions (max_position_embeddings); use at most that."
    )
