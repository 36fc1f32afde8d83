"""A small SD3 with adapters, and the export tool on a pipeline's directory."""

import jax

from rtdmd_jax import cli, export
from rtdmd_jax.adapters.lora import build_adapters

# Several heads, a dual-attention block, and a last block without text output.
CONFIG = dict(
  _class_name="SD3Transformer2DModel",
  sample_size=8,
  in_channels=4,
  out_channels=4,
  num_layers=3,
  attention_head_dim=4,
  num_attention_heads=2,
  joint_attention_dim=12,
  caption_projection_dim=8,
  pooled_projection_dim=6,
  pos_embed_max_size=8,
  dual_attention_layers=[0],
  qk_norm="rms_norm",
)
RANK, ALPHA = 2, 4.0


def drawn(transformer, targets, seed=0, rank=RANK):
  abstract, key = transformer.init_abstract(), jax.random.key(seed)
  tree = build_adapters(abstract, transformer.table, targets, rank=rank, key=key)
  return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(key, x.shape), tree)


def run(root, *flags):
  argv = ["export", f"--pipeline={root / 'pipeline'}", *flags]
  required = ("format", "out")
  return cli.run(export.main, argv, define_flags=export.define_flags, requires=required)
