"""Trains every network of the shipped tiny pipeline from scratch, on drawn shapes."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  c = config_dict.ConfigDict()
  c.stage = "pretrain"
  c.seed = 0
  # Phases run in this order; one whose output exists in the workdir is not run again.
  c.phases = ("vae", "text", "scorer", "teacher")
  c.start = ""  # a pipeline to go on from; what no phase trains is copied
  c.images = 60_000
  c.washed_out = 0.0  # share of images with little contrast
  c.max_length = 12

  c.vae = config_dict.ConfigDict()
  c.vae.steps = 1500
  c.vae.batch_size = 16
  c.vae.learning_rate = 2e-3
  c.vae.kl_weight = 3e-4
  c.vae.model = dict(
    _class_name="AutoencoderKL",
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(8, 16, 32, 64),
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=8,
    use_quant_conv=False,
    use_post_quant_conv=False,
    mid_block_add_attention=True,
  )

  c.text = config_dict.ConfigDict()
  c.text.steps = 1000
  c.text.batch_size = 128
  c.text.learning_rate = 1e-3
  c.text.projection_dim = 64
  tower = dict(
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
  )
  c.text.text = dict(tower)
  c.text.text_2 = tower | dict(hidden_act="gelu")
  c.text.vision = tower | dict(
    hidden_size=96,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=64,
    patch_size=16,
  )

  c.scorer = config_dict.ConfigDict()
  c.scorer.steps = 1200
  c.scorer.batch_size = 128
  c.scorer.learning_rate = 1.5e-3
  c.scorer.projection_dim = 64
  wide = tower | dict(hidden_size=96, intermediate_size=384)
  c.scorer.text = dict(wide)
  c.scorer.vision = wide | dict(num_hidden_layers=4, image_size=64, patch_size=8)

  c.teacher = config_dict.ConfigDict()
  c.teacher.steps = 1500
  c.teacher.batch_size = 128
  c.teacher.learning_rate = 1.5e-2
  c.teacher.caption_dropout = 0.1
  c.teacher.shift = 2.0
  c.teacher.model = dict(
    _class_name="SD3Transformer2DModel",
    sample_size=8,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=6,
    attention_head_dim=32,
    num_attention_heads=4,
    caption_projection_dim=128,
    joint_attention_dim=128,
    pooled_projection_dim=128,
    pos_embed_max_size=4,
    qk_norm="rms_norm",
    dual_attention_layers=(),
  )
  c.teacher.t5 = dict(
    d_model=128,
    d_kv=32,
    d_ff=256,
    num_layers=2,
    num_heads=4,
    feed_forward_proj="gated-gelu",
    relative_attention_num_buckets=16,
    relative_attention_max_distance=32,
  )
  return c
