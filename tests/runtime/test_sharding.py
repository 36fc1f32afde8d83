"""The mesh and the table; both stages on several devices equal one device."""

import os
import subprocess
import sys
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from rtdmd_jax.errors import UserError
from rtdmd_jax.models import build_transformer
from rtdmd_jax.runtime import sharding
from tests.support.paths import ROOT

MESH = AbstractMesh((1, 8, 2), sharding.AXES)
FULL_SIZE = {
  "SD3Transformer2DModel": {"num_layers": 24, "num_attention_heads": 24,
                            "caption_projection_dim": 1536},
  "FluxTransformer2DModel": {"guidance_embeds": True},
  "Flux2Transformer2DModel": {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24,
                              "joint_attention_dim": 7680, "guidance_embeds": False},
}  # fmt: skip


@pytest.mark.parametrize(
  "name, shape, wanted",
  [
    ("blocks_0/attn/to_q/kernel", (23, 1536, 1536), (None, "fsdp", "tensor")),
    ("blocks_0/attn/to_out_0/kernel", (23, 1536, 1536), (None, "tensor", "fsdp")),
    ("single_transformer_blocks/attn/to_qkv_mlp_proj/kernel", (20, 64, 96), (None, "fsdp", None)),
    ("0/nu/blocks_0/attn/to_q/a", (23, 1536, 4), (None, "fsdp", None)),
    ("ema/last_block/attn/to_q/b", (4, 1536), (None, "fsdp")),
    ("time_text_embed/text_embedder/linear_1/kernel", (12, 64), (None, None)),
    ("decoder/conv_in/kernel", (3, 3, 16, 512), (None, None, None, None)),
    ("blocks_0/attn/to_q/bias", (23, 1536), (None, None)),
    ("blocks_0/attn/to_q/kernel_scale", (23, 1536), (None, "tensor")),
    ("ff/net_2/kernel_scale", (1536,), ("fsdp",)),
    ("x_embedder/kernel_scale", (1536,), (None,)),
    ("step", (), ()),
  ],
)
def test_axes_by_name(name, shape, wanted):
  assert sharding.spec(name, shape, MESH) == PartitionSpec(*wanted)


def test_a_large_leaf_without_a_rule_is_an_error():
  with pytest.raises(ValueError, match="mystery"):
    sharding.spec("blocks_0/mystery", (512, 512), MESH)
  assert sharding.spec("blocks_0/mystery", (8, 8), MESH) == PartitionSpec()


@pytest.mark.parametrize("family", FULL_SIZE)
def test_every_large_weight_of_a_full_size_transformer_is_split(family):
  params = build_transformer({"_class_name": family} | FULL_SIZE[family]).init_abstract()
  (row,) = sharding.table({"base": params}, MESH)
  _, count, total, local = row
  assert total == 4 * count
  assert total / 16 <= local < 0.13 * total  # 16 devices; fused projections are split 8 times


@pytest.mark.parametrize(
  "sizes, words",
  [((3, -1, 1), "1 devices"), ((-1, -1, 1), "at most one"), ((1, 0, 1), "positive")],
)
def test_a_mesh_that_does_not_fit(sizes, words):
  with pytest.raises(UserError, match=words):
    sharding.make_mesh(*sizes, devices=jax.devices()[:1])


@dataclass(frozen=True)
class _Device:
  id: int
  platform: str
  slice_index: int
  device_kind: str = "any"
  process_index: int = 0


def test_hosts_of_gpus_may_be_split_along_any_axis_and_slices_of_tpus_along_data():
  def devices(platform):
    return [_Device(i, platform, slice_index=i // 4) for i in range(8)]

  mesh = sharding.make_mesh(devices=devices("gpu"))  # as two nodes of Slurm with a published config
  assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 1}
  assert [device.id for device in mesh.devices.flat] == list(range(8))
  with pytest.raises(UserError, match="mesh.data is 1; use a multiple of the 2 slices"):
    sharding.make_mesh(devices=devices("tpu"))


def test_without_a_mesh_nothing_is_constrained():
  x = np.ones((3, 2))
  assert (
    sharding.constrain(x) is x
    and sharding.constrain_by_rules(x) is x
    and sharding.current() is None
  )


def run_script(name, *arguments):
  """A script of this folder in a process of its own, whose programs are compiled quickly."""
  environment = {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  command = [sys.executable, ROOT / "tests/support" / name, *arguments]
  subprocess.run(command, check=True, cwd=ROOT, env=os.environ | environment)


MESHES = ("1,8,1", "2,4,1", "8,1,1", "2,2,2")


@pytest.mark.slow
def test_every_mesh_equals_one_device(tmp_path):
  run_script("sharded_run.py", "8", "20", tmp_path, "1,1,1", *MESHES)
  one = np.load(tmp_path / "1,1,1.npz")
  assert {"stage1/loss/generator", "stage2/loss/policy", "stage2/params/generator"} <= set(one)
  for mesh in MESHES:
    many = np.load(tmp_path / f"{mesh}.npz")
    # The adapters really are split wherever the mesh splits parameters.
    assert many["stage1/split"][0] == (mesh != "8,1,1")
    for name in one:
      if "params" in name:
        np.testing.assert_allclose(many[name], one[name], atol=1e-4, err_msg=f"{mesh} {name}")
      elif "split" not in name:
        # The first losses see the same parameters; later ones also their 20 steps of rounding.
        np.testing.assert_allclose(many[name][0], one[name][0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(many[name], one[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_devices_of_a_mesh_share_the_encoding_of_prompts(tmp_path):
  meshes = ("2,4,1", "8,1,1", "2,2,2")
  run_script("encoded_run.py", "8", tmp_path, "1,1,1", *meshes)
  one = np.load(tmp_path / "1,1,1.npz")
  for mesh in meshes:
    many = np.load(tmp_path / f"{mesh}.npz")
    assert many["split"] == (mesh != "8,1,1")  # the parameters are
    assert many["flops"] < 1.1 / 8 * one["flops"], mesh
    for name in ("tokens", "pooled", "reward"):
      np.testing.assert_allclose(many[name], one[name], atol=1e-5, err_msg=f"{mesh} {name}")


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_devices(tmp_path):
  meshes = ("2,4,1", "1,4,1", "1,1,1", "2,4,1")
  run_script("resharded_run.py", "8", "2", tmp_path, *meshes)
  ends = np.load(tmp_path / "ends.npz")
  for stage in ("stage1", "stage2"):
    for role in ("generator", "fake_score"):
      whole, parts = (ends[f"{way}/{stage}/{role}"] for way in ("whole", "parts"))
      np.testing.assert_allclose(parts, whole, atol=1e-5, err_msg=f"{stage} {role}")
