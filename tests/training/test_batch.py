import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.datasets.prompts import Prompt
from rtdmd_jax.pipeline.conditioning import Conditioning
from rtdmd_jax.pipeline.prompt_cache import PromptCache, encoding_chunk
from rtdmd_jax.training.batch import encoding_bytes, make_batch
from rtdmd_jax.training.state import Batch


def _encode(calls):
  def encode(prompts):
    calls.append(list(prompts))
    lengths = jnp.array([[[float(len(p))]] for p in prompts])
    return {"conditioning": Conditioning(lengths, None), "reward_text": {"r": lengths[:, 0]}}

  return encode


def test_every_prompt_is_encoded_once_in_chunks_of_one_size():
  calls = []
  cache = PromptCache(_encode(calls), chunk=2)
  first = cache(["a", "bb", "ccc", "a"])
  np.testing.assert_array_equal(first["conditioning"].tokens[:, 0, 0], [1, 2, 3, 1])
  cache(["ccc", "bb"])
  assert calls == [["a", "bb"], ["ccc", "ccc"]]


def test_what_is_kept_is_bounded_and_the_last_used():
  calls = []
  size = sum(np.asarray(a).nbytes for a in jax.tree.leaves(_encode([])(["a"])))
  cache = PromptCache(_encode(calls), chunk=1, max_bytes=2 * size)
  calls.clear()
  for prompt in ("a", "b", "a", "c", "a", "b"):
    np.testing.assert_array_equal(cache([prompt])["reward_text"]["r"], [[len(prompt)]])
  assert [call[0] for call in calls] == ["a", "b", "c", "b"]  # "c" took the place of "b"
  nothing = PromptCache(_encode(calls), chunk=1, max_bytes=0)
  calls.clear()
  for _ in range(2):
    nothing(["a"])
  assert len(calls) == 2


def test_encodings_keep_their_types_and_hold_no_more_than_themselves():
  encode = lambda prompts: {"x": jnp.ones((len(prompts), 3), jnp.bfloat16)}  # noqa: E731
  cache = PromptCache(encode, chunk=4)
  assert cache(["a", "b"])["x"].dtype == jnp.bfloat16
  assert all(row["x"].base is None for row in cache._rows.values())


def test_chunks_fit_the_batch_and_the_devices():
  sizes = (2, 32, 48, 64, 72)
  assert [encoding_chunk(n) for n in sizes] == [2, 32, 24, 32, 24]
  assert [encoding_chunk(n, 8) for n in sizes] == [8, 32, 24, 32, 24]
  assert [encoding_chunk(n, 12) for n in sizes] == [12, 24, 24, 24, 24]
  assert [encoding_chunk(n, 64) for n in sizes] == [64] * 5


def test_the_bytes_of_an_encoding_are_those_that_are_kept():
  tokens = jax.ShapeDtypeStruct((3, 5, 4), jnp.bfloat16)
  text = {"r": jax.ShapeDtypeStruct((3, 2), jnp.float32)}
  batch = Batch(Conditioning(tokens, None), None, None, None, text)
  assert encoding_bytes(batch) == 5 * 4 * 2 + 2 * 4


def test_a_batch_is_a_function_of_seed_and_step():
  prompts = [Prompt("x" * n, None) for n in range(1, 8)]
  cache = PromptCache(_encode([]), chunk=4)
  empty = Conditioning(jnp.zeros((1, 1, 1)), None)
  settings = dict(seed=3, prompts_per_batch=3, images_per_prompt=2)
  one, chosen = make_batch(prompts, cache, empty, step=4, **settings)
  two, _ = make_batch(prompts, PromptCache(_encode([])), empty, step=4, **settings)
  np.testing.assert_array_equal(one.conditioning.tokens, two.conditioning.tokens)
  np.testing.assert_array_equal(one.prompt_index, [0, 0, 1, 1, 2, 2])
  np.testing.assert_array_equal(one.sample_index, np.arange(24, 30))
  lengths = one.conditioning.take(one.prompt_index).tokens[:, 0, 0]
  np.testing.assert_array_equal(lengths, [len(p.text) for p in chosen])
