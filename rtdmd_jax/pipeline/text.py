"""Text encoders of the pipelines: prompts in, the transformer's conditioning out."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.errors import UserError
from rtdmd_jax.models.clip import CLIPText
from rtdmd_jax.models.encoders import load_clip_text, load_qwen3, load_t5
from rtdmd_jax.models.sd3 import SD3Config
from rtdmd_jax.models.t5 import T5Encoder
from rtdmd_jax.models.tokenizer import Limit, checked_ids, load_tokenizer, longer, tokenize
from rtdmd_jax.pipeline.conditioning import Conditioning
from rtdmd_jax.weights.safetensors import read_config

# RTDMD's length of T5's sequence for SD3; a tokenizer that says less is taken at its word.
SD3_T5_LENGTH = 128
FLUX1_T5_LENGTH = 512
FLUX2_LENGTH = 512
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
  tokenize: Callable[[Sequence[str]], dict[str, np.ndarray]]
  encode: Callable[[Any, dict[str, jax.Array]], Conditioning]
  limits: tuple[Limit, ...] = ()


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
  """What the encoders of a Stable Diffusion 3 directory read of a prompt: CLIP's two and T5."""
  clip = tuple(_limit("CLIP", directory / name) for name in ("tokenizer", "tokenizer_2"))
  if not has_t5(read_config(directory, "model_index.json")):
    return clip
  return (*clip, _limit("T5", directory / "tokenizer_3", SD3_T5_LENGTH))


def flux1_limits(directory: Path) -> tuple[Limit, ...]:
  """What CLIP and T5 of a FLUX.1 directory read of a prompt."""
  t5 = _limit("T5", directory / "tokenizer_2", FLUX1_T5_LENGTH)
  return _limit("CLIP", directory / "tokenizer"), t5


def flux2_limits(directory: Path) -> tuple[Limit, ...]:
  """What Qwen3 of a FLUX.2-klein directory reads of a prompt: a user's turn.

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


def load_sd3_text(directory: Path, *, dtype: Any) -> TextEncoder:
  """The two CLIP towers and T5 of a Stable Diffusion 3 directory.

  Where model_index.json says `"text_encoder_3": [null, null]` zeros stand for T5's states, as in
  diffusers.

  Raises:
    UserError: missing or broken files.
  """
  with_t5 = has_t5(read_config(directory, "model_index.json"))
  limits = sd3_limits(directory)
  towers, tokenizers, params = {}, {}, {}
  for suffix, limit in zip(("", "_2"), limits, strict=False):
    name = f"text_encoder{suffix}"
    towers[name], params[name] = load_clip_text(directory / name, dtype=dtype)
    tokenizers[name] = limit.tokenizer
    _check_length(tokenizers[name], towers[name])
  t5 = None
  if with_t5:
    t5, params[_T5] = load_t5(directory / _T5, dtype=dtype)
  else:
    width = SD3Config.from_dict(read_config(directory / "transformer")).joint_attention_dim

  def tokenize_all(prompts: Sequence[str]) -> dict[str, np.ndarray]:
    ids = {name: _clip_ids(tok, prompts, towers[name]) for name, tok in tokenizers.items()}
    if t5 is not None:
      ids[_T5] = _t5_ids(limits[-1], prompts, t5)
    return ids

  def encode(params: Any, ids: dict[str, jax.Array]) -> Conditioning:
    out = [
      tower.apply({"params": params[name]}, ids[name], hidden=True)
      for name, tower in towers.items()
    ]
    states = jnp.concatenate([o.hidden[-2] for o in out], axis=-1)
    pooled = jnp.concatenate([o.projected for o in out], axis=-1)
    if t5 is None:
      t5_states = jnp.zeros((len(states), SD3_T5_LENGTH, width), states.dtype)
    else:
      t5_states = t5.apply({"params": params[_T5]}, ids[_T5])
    return sd3_conditioning(states, pooled, t5_states)

  return TextEncoder(params, tokenize_all, encode, limits)


def _check_length(tokenizer: Any, tower: CLIPText) -> None:
  length, positions = tokenizer.model_max_length, tower.config.max_position_embeddings
  if length > positions:
    raise UserError(
      f"{tokenizer.name_or_path}/tokenizer_config.json: model_max_length is {length:g}, but the"
      f" text encoder has {positions} positions (max_position_embeddings); use at most that."
    )


def _clip_ids(tokenizer: Any, prompts: Sequence[str], tower: CLIPText) -> np.ndarray:
  length = tokenizer.model_max_length
  return tokenize(tokenizer, prompts, length=length, vocabulary=tower.config.vocab_size)


def _t5_ids(limit: Limit, prompts: Sequence[str], t5: T5Encoder) -> np.ndarray:
  vocabulary = t5.config.vocab_size
  return tokenize(limit.tokenizer, prompts, length=limit.length, vocabulary=vocabulary)


def load_flux1_text(directory: Path, *, dtype: Any) -> TextEncoder:
  """The CLIP tower (pooled) and T5 (tokens) of a FLUX.1 directory.

  Raises:
    UserError: missing or broken files.
  """
  limits = flux1_limits(directory)
  clip_tokenizer = limits[0].tokenizer
  clip, clip_params = load_clip_text(directory / "text_encoder", dtype=dtype)
  _check_length(clip_tokenizer, clip)
  t5, t5_params = load_t5(directory / "text_encoder_2", dtype=dtype)

  def tokenize_all(prompts: Sequence[str]) -> dict[str, np.ndarray]:
    return {
      "text_encoder": _clip_ids(clip_tokenizer, prompts, clip),
      "text_encoder_2": _t5_ids(limits[1], prompts, t5),
    }

  def encode(params: Any, ids: dict[str, jax.Array]) -> Conditioning:
    pooled = clip.apply({"params": params["text_encoder"]}, ids["text_encoder"]).pooled
    tokens = t5.apply({"params": params["text_encoder_2"]}, ids["text_encoder_2"])
    return Conditioning(tokens, pooled)

  params = {"text_encoder": clip_params, "text_encoder_2": t5_params}
  return TextEncoder(params, tokenize_all, encode, limits)


def load_flux2_text(directory: Path, *, dtype: Any) -> TextEncoder:
  """Qwen3 of a FLUX.2-klein directory; prompts become a user's turn, answered without thinking.

  Raises:
    UserError: missing or broken files, or a tokenizer without a chat template or that pads in
      front.
  """
  limits = flux2_limits(directory)
  ((_, tokenizer, length, turn),) = limits
  encoder, params = load_qwen3(directory / "text_encoder", layers=FLUX2_LAYERS, dtype=dtype)

  def tokenize_chat(prompts: Sequence[str]) -> dict[str, np.ndarray]:
    turns = [turn(prompt) for prompt in prompts]
    rows = tokenizer(turns, padding="max_length", max_length=length, truncation=True)
    ids = checked_ids(tokenizer, rows.input_ids, encoder.config.vocab_size)
    return {"ids": ids, "mask": np.array(rows.attention_mask, bool)}

  def encode(params: Any, inputs: dict[str, jax.Array]) -> Conditioning:
    return Conditioning(encoder.apply({"params": params}, inputs["ids"], inputs["mask"]), None)

  return TextEncoder(params, tokenize_chat, encode, limits)
