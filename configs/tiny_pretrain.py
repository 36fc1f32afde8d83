"""Trains every network of the shipped tiny pipeline from scratch, on drawn shapes."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  c = config_dict.ConfigDict()
  c.stage = "pretrain"
  c.seed = 0
  # Phases run in this order; one whose output exists in the workdir is not run again.
  c.phases = ("vae", "clip", "teacher")
  c.images = 60_000
  c.max_length = 16

  c.vae = config_dict.ConfigDict()
  c.vae.steps = 1200
  c.vae.batch_size = 16
  c.vae.learning_rate = 2e-3
  c.vae.kl_weight = 1e-4
  c.vae.model = dict(
    _class_name="AutoencoderKL",
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(8, 16, 32, 64),
    layers_per_block=1,
    latent_channels=8,
    norm_num_groups=8,
    use_quant_conv=False,
    use_post_quant_conv=False,
    mid_block_add_attention=True,
  )
  return c
