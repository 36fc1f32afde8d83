"""Scaled dot-product attention, in one place: XLA's, or a kernel that never holds all scores."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import PartitionSpec

from rtdmd_jax.runtime import sharding
from rtdmd_jax.runtime.sharding import constrain

# "auto" takes the kernel of the platform that the program is compiled for.
KERNELS = ("auto", "xla", "splash", "cudnn")
# Below this length "auto" takes XLA's, whose scores are small.
MIN_LENGTH = 512

_kernel: ContextVar[str] = ContextVar("attention_kernel", default="xla")


@contextlib.contextmanager
def attention_kernel(name: str) -> Iterator[None]:
  """Sets the kernel, one of `KERNELS`, of `attention` traced inside; outside it is XLA's.

  Raises:
    ValueError: another name.
  """
  if name not in KERNELS:
    raise ValueError(f"attention kernel {name!r}; known are {', '.join(KERNELS)}")
  token = _kernel.set(name)
  try:
    yield
  finally:
    _kernel.reset(token)


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array | None = None,
  *,
  bias: jax.Array | None = None,
  scale: float | None = None,
) -> jax.Array:
  """softmax(scale q k^T + bias) v for every head, float32 inside whatever the inputs are.

  With a mask or a bias this is always XLA's; see `attention_kernel` for the others.

  Args:
    q: [B, Lq, H, D].
    k, v: [B, Lk, H, D].
    mask: bool, broadcastable to [B, H, Lq, Lk] with four axes; False hides a key.
    bias: broadcastable likewise.
    scale: None takes 1 / sqrt(D).

  Returns:
    [B, Lq, H, D] in the type of `v`.
  """
  q, k, v = (constrain(x, None, "tensor") for x in (q, k, v))
  kernel = "xla"
  if mask is None and bias is None and q.shape == k.shape:
    kernel = _chosen(q)
  if kernel == "xla":
    out = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=scale)
  else:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    run = {"splash": _splash, "cudnn": _cudnn}[kernel]
    out = _per_device(lambda q, k, v: run(q, k, v, scale), q, k, v)
  return constrain(out, None, "tensor")


def _chosen(q: jax.Array) -> str:
  """The kernel for self-attention of q [B, L, H, D]."""
  kernel = _kernel.get()
  if kernel != "auto":
    return kernel
  platform, length, width = sharding.platform(), q.shape[1], q.shape[3]
  if length < MIN_LENGTH:
    return "xla"
  if platform == "tpu":
    return "splash"
  half = q.dtype in (jnp.bfloat16, jnp.float16)
  return "cudnn" if platform in ("gpu", "cuda") and half and width in (64, 128) else "xla"


def _per_device(run: Callable[..., jax.Array], *qkv: jax.Array) -> jax.Array:
  """Runs a kernel on every device's own samples and heads; XLA cannot split a kernel itself."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return run(*qkv)
  spec = sharding.activation_spec(qkv[0].shape, mesh, None, "tensor")
  spec = PartitionSpec(*spec, *[None] * (4 - len(spec)))
  return jax.shard_map(run, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(*qkv)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
  return even_attention(q, k, v, scale, "cudnn")


def even_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, scale: float, implementation: str
) -> jax.Array:
  """Self-attention [B, L, H, D] of an even number of tokens, of which the last may be a hidden one.

  jax refuses the gradient of cuDNN's kernel for an odd number (SD3's 77 + 128 + 1024 tokens are
  one), though the kernel itself takes it.

  Args:
    q, k, v: [B, L, H, D].
    scale: of the products.
    implementation: a name that `jax.nn.dot_product_attention` takes.
  """
  batch, length = q.shape[:2]
  lengths = None
  if length % 2:
    q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    lengths = jnp.full((batch,), length, jnp.int32)
  out = jax.nn.dot_product_attention(
    q, k, v, scale=scale, implementation=implementation, key_value_seq_lengths=lengths
  )
  return out[:, :length]


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
  """The Pallas kernel of TPUs, [B, L, H, D] each; interpreted, and slow, on other platforms.

  Tokens are padded to whole tiles, and a segment of their own hides the padding.
  """
  length, heads = q.shape[1:3]
  padded, block = tiles(length)
  q = (q.astype(jnp.float32) * scale).astype(q.dtype)
  pad = ((0, 0), (0, 0), (0, padded - length), (0, 0))
  q, k, v = (jnp.pad(jnp.swapaxes(x, 1, 2), pad) for x in (q, k, v))
  kernel = splash.make_splash_mha_single_device(
    splash_mask.MultiHeadMask([splash_mask.FullMask((padded, padded))] * heads),
    block_sizes=splash.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
    interpret=sharding.platform() != "tpu",
  )
  segments = None
  if padded > length:
    ids = (jnp.arange(padded) >= length).astype(jnp.int32)
    segments = splash.SegmentIds(ids, ids)
  out = jax.vmap(lambda q, k, v: kernel(q, k, v, segments))(q, k, v)
  return jnp.swapaxes(out, 1, 2)[:, :length]


def tiles(length: int) -> tuple[int, int]:
  """(padded length, tile) of the TPU kernel: the largest tile that adds at most 15 %."""
  for block in (512, 256, 128):
    padded = -(-length // block) * block
    if padded <= 1.15 * length:
      break
  return padded, block
