"""Batch and mesh settings of the published backbones for GPUs: one of 80 or 141 GB, or eight each.

`--config=configs/sd35_stage2.py:1x80` applies one; launch/gpus.sh and launch/slurm.sh choose it by
the GPUs that they find. The batch stays the published one. Micro-batches and images decoded at once
are as large as memory allows, since small ones cost kernel launches on a GPU, and over several
devices a gathering of the weights each; docs/hardware.md has the peaks.
"""

from typing import NamedTuple

from ml_collections import config_dict

from rtdmd_jax.errors import UserError


class Preset(NamedTuple):
  """Settings for one set-up of GPUs.

  Attributes:
    micro_batches: of a step.
    decode_chunk: images that a device decodes at once; stage 2 alone.
    split: whether parameters are split over the eight GPUs of a host (mesh.fsdp) or each has all.
  """

  micro_batches: int
  decode_chunk: int | None = None
  split: bool = False


SETUPS = ("1x80", "1x141", "8x80")
# By family and stage, in the order of `SETUPS`; None where bfloat16 weights do not fit.
PRESETS: dict[tuple[str, str], tuple[Preset | None, ...]] = {
  ("sd3", "stage1"): (Preset(3), Preset(2), Preset(1)),
  ("sd3", "stage2"): (Preset(32, 1), Preset(16, 2), Preset(4, 1)),
  ("sd35", "stage1"): (Preset(1), Preset(1), Preset(1)),
  ("sd35", "stage2"): (Preset(24, 4), Preset(16, 8), Preset(3, 4)),
  ("flux1", "stage1"): (Preset(6), Preset(3), Preset(1)),
  ("flux1", "stage2"): (Preset(384, 4), Preset(96, 8), Preset(12, 4, split=True)),
  ("flux2", "stage1"): (Preset(3), Preset(2), Preset(1)),
  ("flux2", "stage2"): (Preset(192, 4), Preset(48, 8), Preset(12, 4)),
  ("flux2_9b", "stage1"): (Preset(18), Preset(3), Preset(1, split=True)),
  ("flux2_9b", "stage2"): (None, Preset(96, 4), Preset(12, 4, split=True)),
}


def apply(c: config_dict.ConfigDict, family: str, setup: str) -> None:
  """Changes a configuration of `family` for a set-up of `SETUPS`.

  Raises:
    UserError: weights of the family do not fit there.
  """
  preset = PRESETS[family, c.stage][SETUPS.index(setup)]
  if preset is None:
    raise UserError(
      f"configs/{family}_{c.stage}.py does not fit {setup} GB: its weights alone leave no room for"
      f" a step. Use {' or '.join(_fitting(family, c.stage))}, or model.base_storage='int8'."
    )
  c.batch.micro_batches = preset.micro_batches
  if preset.decode_chunk is not None:
    c.batch.decode_chunk = preset.decode_chunk
  # The rest of the devices, those of further hosts as well, have a part of the batch each.
  c.mesh.data, c.mesh.fsdp = -1, 8 if preset.split else 1


def _fitting(family: str, stage: str) -> list[str]:
  presets = zip(SETUPS, PRESETS[family, stage], strict=True)
  return [setup for setup, preset in presets if preset is not None]
