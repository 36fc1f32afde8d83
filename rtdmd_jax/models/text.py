"""Text encoders of the pipelines: prompts in, the transformer's conditioning out."""

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
from rtdmd_jax.models.tokenizer import checked_ids, load_tokenizer, tokenize
from rtdmd_jax.state import Conditioning
from rtdmd_jax.weights.safetensors import read_config

# RTDMD's length of T5's sequence for SD3; a tokenizer that says less is taken at its word.
SD3_T5_LENGTH = 128
FLUX1_T5_LENGTH = 512
FLUX2_LENGTH = 512
_T5 = "text_encoder_3"
# The hidden states of Qwen3 that FLUX.2-klein was trained on.
FLUX2_LAYERS = (9, 18, 27)


class TextEncoder(NamedTuple):
  """A family's text encoders.

  `tokenize` maps prompts to a tree of ids [B, L] on the host; `encode` maps (params, ids) to the
  conditioning and may be jitted.
  """

  params: Any
  tokenize: Callable[[Sequence[str]], dict[str, np.ndarray]]
  encode: Callable[[Any, dict[str, jax.Array]], Conditioning]


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


def load_sd3_text(directory: Path, *, dtype: Any) -> TextEncoder:
  """The two CLIP towers and T5 of a Stable Diffusion 3 directory.

  Where model_index.json says `"text_encoder_3": [null, null]` zeros stand for T5's states, as in
  diffusers.

  Raises:
    UserError: missing or broken files.
  """
  towers, tokenizers, params = {}, {}, {}
  for suffix in ("", "_2"):
    name = f"text_encoder{suffix}"
    towers[name], params[name] = load_clip_text(directory / name, dtype=dtype)
    tokenizers[name] = load_tokenizer(directory / f"tokenizer{suffix}")
    _check_length(tokenizers[name], towers[name])
  t5 = None
  if has_t5(read_config(directory, "model_index.json")):
    t5_tokenizer = load_tokenizer(directory / "tokenizer_3")
    t5, params[_T5] = load_t5(directory / _T5, dtype=dtype)
    t5_length = min(SD3_T5_LENGTH, t5_tokenizer.model_max_length)
  else:
    width = SD3Config.from_dict(read_config(directory / "transformer")).joint_attention_dim

  def tokenize_all(prompts: Sequence[str]) -> dict[str, np.ndarray]:
    ids = {name: _clip_ids(tok, prompts, towers[name]) for name, tok in tokenizers.items()}
    if t5 is not None:
      ids[_T5] = _t5_ids(t5_tokenizer, prompts, t5, t5_length)
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

  return TextEncoder(params, tokenize_all, encode)


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


def _t5_ids(tokenizer: Any, prompts: Sequence[str], t5: T5Encoder, length: int) -> np.ndarray:
  return tokenize(tokenizer, prompts, length=length, vocabulary=t5.config.vocab_size)


def load_flux1_text(directory: Path, *, dtype: Any) -> TextEncoder:
  """The CLIP tower (pooled) and T5 (tokens) of a FLUX.1 directory.

  Raises:
    UserError: missing or broken files.
  """
  clip_tokenizer = load_tokenizer(directory / "tokenizer")
  t5_tokenizer = load_tokenizer(directory / "tokenizer_2")
  clip, clip_params = load_clip_text(directory / "text_encoder", dtype=dtype)
  _check_length(clip_tokenizer, clip)
  t5, t5_params = load_t5(directory / "text_encoder_2", dtype=dtype)
  t5_length = min(FLUX1_T5_LENGTH, t5_tokenizer.model_max_length)

  def tokenize_all(prompts: Sequence[str]) -> dict[str, np.ndarray]:
    return {
      "text_encoder": _clip_ids(clip_tokenizer, prompts, clip),
      "text_encoder_2": _t5_ids(t5_tokenizer, prompts, t5, t5_length),
    }

  def encode(params: Any, ids: dict[str, jax.Array]) -> Conditioning:
    pooled = clip.apply({"params": params["text_encoder"]}, ids["text_encoder"]).pooled
    tokens = t5.apply({"params": params["text_encoder_2"]}, ids["text_encoder_2"])
    return Conditioning(tokens, pooled)

  params = {"text_encoder": clip_params, "text_encoder_2": t5_params}
  return TextEncoder(params, tokenize_all, encode)


def load_flux2_text(directory: Path, *, dtype: Any) -> TextEncoder:
  """Qwen3 of a FLUX.2-klein directory; prompts become a user's turn, answered without thinking.

  Raises:
    UserError: missing or broken files, or a tokenizer without a chat template or that pads in
      front.
  """
  tokenizer = load_tokenizer(directory / "tokenizer")
  if tokenizer.chat_template is None or tokenizer.padding_side != "right":
    raise UserError(
      f"{directory / 'tokenizer'} must have a chat template and padding_side 'right'; its"
      f" padding_side is {tokenizer.padding_side!r}."
    )
  encoder, params = load_qwen3(directory / "text_encoder", layers=FLUX2_LAYERS, dtype=dtype)
  length = min(FLUX2_LENGTH, tokenizer.model_max_length)

  def tokenize_chat(prompts: Sequence[str]) -> dict[str, np.ndarray]:
    turns = [
      tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
      )
      for prompt in prompts
    ]
    rows = tokenizer(turns, padding="max_length", max_length=length, truncation=True)
    ids = checked_ids(tokenizer, rows.input_ids, encoder.config.vocab_size)
    return {"ids": ids, "mask": np.array(rows.attention_mask, bool)}

  def encode(params: Any, inputs: dict[str, jax.Array]) -> Conditioning:
    return Conditioning(encoder.apply({"params": params}, inputs["ids"], inputs["mask"]), None)

  return TextEncoder(params, tokenize_chat, encode)
