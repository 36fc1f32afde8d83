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
from rtdmd_jax.models.tokenizer import Limit, checked_ids, load_tokenizer, longer, tokenize
from rtdmd_jax.state import Conditioning
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
  conditioning and may be jitted. `limits` are the tokens that each encoder reads of a text, and
  `text` is what of a prompt it reads, such as a turn of a conversation.
  """

  params: Any
  tokenize: Callable[[Sequence[str]], dict[str, np.ndarray]]
  encode: Callable[[Any, dict[str, jax.Array]], Conditioning]
  limits: tuple[Limit, ...] = ()
  text: Callable[[str], str] = str


def cut_prompts(text: TextEncoder, prompts: Sequence[str], what: str = "prompts") -> list[str]:
  """A sentence for each text encoder that reads some of the prompts in part only.

  Encoders with the same name and the same prompts share one. Of more than 50,000 prompts as many
  are looked at, evenly spread, and the sentence says so.

  Args:
    text: the encoders.
    prompts: that a run uses.
    what: they are called.
  """
  count = min(len(prompts), _MOST_LOOKED_AT)
  looked_at = [prompts[i * len(prompts) // count] for i in range(count)]
  texts = [text.text(prompt) for prompt in looked_at]
  among = f"{len(prompts):,} {what}"
  if count < len(prompts):
    among = f"{count:,} looked at of {among}"
  sentences = []
  for limit in text.limits:
    if cut := longer(limit, texts):
      first = looked_at[cut[0]]
      shown = first if len(first) <= _SHOWN else first[: _SHOWN - 1] + "…"
      verb = "is" if len(cut) == 1 else "are"
      sentences.append(
        f"{len(cut):,} of {among} {verb} longer than {limit.encoder}'s {limit.length} tokens and"
        f" {verb} cut there; the first: {shown!r}"
      )
  return list(dict.fromkeys(sentences))


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
  towers, tokenizers, params, limits = {}, {}, {}, []
  for suffix in ("", "_2"):
    name = f"text_encoder{suffix}"
    towers[name], params[name] = load_clip_text(directory / name, dtype=dtype)
    tokenizers[name] = load_tokenizer(directory / f"tokenizer{suffix}")
    _check_length(tokenizers[name], towers[name])
    limits.append(_clip_limit(tokenizers[name]))
  t5 = None
  if has_t5(read_config(directory, "model_index.json")):
    t5_tokenizer = load_tokenizer(directory / "tokenizer_3")
    t5, params[_T5] = load_t5(directory / _T5, dtype=dtype)
    t5_length = min(SD3_T5_LENGTH, t5_tokenizer.model_max_length)
    limits.append(Limit("T5", t5_tokenizer, t5_length))
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

  return TextEncoder(params, tokenize_all, encode, tuple(limits))


def _clip_limit(tokenizer: Any) -> Limit:
  return Limit("CLIP", tokenizer, tokenizer.model_max_length)


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
  limits = (_clip_limit(clip_tokenizer), Limit("T5", t5_tokenizer, t5_length))
  return TextEncoder(params, tokenize_all, encode, limits)


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

  def turn(prompt: str) -> str:
    return tokenizer.apply_chat_template(
      [{"role": "user", "content": prompt}],
      tokenize=False,
      add_generation_prompt=True,
      enable_thinking=False,
    )

  def tokenize_chat(prompts: Sequence[str]) -> dict[str, np.ndarray]:
    turns = [turn(prompt) for prompt in prompts]
    rows = tokenizer(turns, padding="max_length", max_length=length, truncation=True)
    ids = checked_ids(tokenizer, rows.input_ids, encoder.config.vocab_size)
    return {"ids": ids, "mask": np.array(rows.attention_mask, bool)}

  def encode(params: Any, inputs: dict[str, jax.Array]) -> Conditioning:
    return Conditioning(encoder.apply({"params": params}, inputs["ids"], inputs["mask"]), None)

  limits = (Limit("Qwen3", tokenizer, length),)
  return TextEncoder(params, tokenize_chat, encode, limits, turn)
