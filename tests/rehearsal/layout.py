"""Lays out `checkpoints/` and `prompts/` by the names in `configs/`, with small random weights.

Everything is written by diffusers, transformers and torch as the published repositories have it:
sharded weights, fp16 variants beside them, CLIP tokenizers of vocab.json and merges.txt alone, an
open_clip `.pt`, an aesthetic `.pth`, `ImageReward.pt`. Only the sizes differ.
"""

import importlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import diffusers
import torch
import transformers

from rtdmd_jax.models.blip import BlipVisionConfig
from rtdmd_jax.pretrain.tokenizers import train_clip_tokenizer, train_t5_tokenizer
from tests.parity import flux_reference
from tests.parity.flux_pipelines import qwen_tokenizer
from tests.support import blip_files, clip_files, judge_files, open_clip_files
from tests.support.paths import CONFIGS

COLOURS = ("red", "blue", "green", "white")
OBJECTS = ("apple", "clock", "vase", "kite", "cup")
_CLIP_LENGTH, _T5_LENGTH, _QWEN_LENGTH = 77, 512, 512
_SHARD = "40KB"
_VAE = dict(
  block_out_channels=(4, 8, 8, 8),
  down_block_types=("DownEncoderBlock2D",) * 4,
  up_block_types=("UpDecoderBlock2D",) * 4,
  layers_per_block=1,
  norm_num_groups=4,
  scaling_factor=0.4,
  shift_factor=0.1,
)
_FLUX = dict(num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2)
# Widths of the two CLIP towers, of T5 and of Qwen3; SD3 pads the towers, side by side, to T5's.
_TOWERS, _T5_WIDTH, _QWEN_WIDTH = (16, 24), 48, 8


def families():
  """The module `configs/families.py`."""
  sys.path.insert(0, str(CONFIGS))
  try:
    return importlib.import_module("families")
  finally:
    sys.path.remove(str(CONFIGS))


def lay_out(root, family):
  """Writes below `root` whatever the configs of `family` read, but reward services."""
  checkpoints = root / "checkpoints"
  settings = families().FAMILIES[family]
  for seed, name in enumerate(filter(None, (settings.pretrained, settings.generator_init))):
    write_backbone(checkpoints / Path(name).name, family, seed)
  write_rewards(checkpoints)
  write_prompts(root / "prompts")


def write_backbone(directory, family, seed=0):
  """A repository in diffusers' layout; `seed` chooses the transformer's weights."""
  make = {"sd3": _sd3, "sd35": _sd35, "flux1": _flux1}.get(family, _flux2)
  with tempfile.TemporaryDirectory() as tokenizers:
    pipeline = make(Path(tokenizers))
  if seed:
    with torch.no_grad():
      generator = torch.Generator().manual_seed(seed)
      for parameter in pipeline.transformer.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
  pipeline.to(torch.bfloat16)
  pipeline.save_pretrained(directory, max_shard_size=_SHARD)
  if family == "sd3":  # fp16 variants lie beside the others
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
      encoder = getattr(pipeline, name).to(torch.float16)
      encoder.save_pretrained(directory / name, variant="fp16", max_shard_size=_SHARD)
  for folder in directory.glob("tokenizer*"):
    _clip_files_alone(folder)
  (directory / "README.md").write_text("---\nlicense: other\n---\n")
  # What repositories have beside diffusers' layout.
  (directory / f"{directory.name}.safetensors").write_bytes(b"\0" * 16)
  return pipeline


def _clip_files_alone(directory):
  """Replaces a CLIP tokenizer's tokenizer.json by vocab.json and merges.txt, as published."""
  fast = directory / "tokenizer.json"
  settings = json.loads((directory / "tokenizer_config.json").read_text())
  if not str(settings.get("tokenizer_class")).startswith("CLIPTokenizer"):
    return
  model = json.loads(fast.read_text())["model"]
  (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
  lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
  (directory / "merges.txt").write_text("\n".join(lines) + "\n")
  fast.unlink()


def _words():
  return [prompt["prompt"] for prompt in geneval_records()]


def _clip_text(directory, width, cls="CLIPTextModelWithProjection"):
  count = train_clip_tokenizer(_words(), directory, max_length=_CLIP_LENGTH)
  config = transformers.CLIPTextConfig(
    vocab_size=count,
    hidden_size=width,
    intermediate_size=2 * width,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=_CLIP_LENGTH,
    projection_dim=width,
    bos_token_id=count - 2,
    eos_token_id=count - 1,
  )
  return _small(getattr(transformers, cls), config), transformers.CLIPTokenizer.from_pretrained(
    directory
  )


def _t5(directory):
  count = train_t5_tokenizer(_words(), directory, max_length=_T5_LENGTH)
  config = transformers.T5Config(
    vocab_size=count, d_model=_T5_WIDTH, d_kv=8, d_ff=32, num_heads=2, num_layers=2,
    feed_forward_proj="gated-gelu",
  )  # fmt: skip
  encoder = _small(transformers.T5EncoderModel, config)
  return encoder, transformers.T5Tokenizer.from_pretrained(directory)


def _small(cls, config):
  torch.manual_seed(0)
  return cls(config).eval()


def _vae(channels):
  config = _VAE | dict(latent_channels=channels)
  return flux_reference.randomised(diffusers.AutoencoderKL, config)


def _sd35(directory):
  return _sd3(directory, num_layers=3, dual_attention_layers=(0, 1), qk_norm="rms_norm")


def _sd3(directory, **changes):
  config = dict(
    sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=3,
    attention_head_dim=8, num_attention_heads=3, caption_projection_dim=24,
    joint_attention_dim=_T5_WIDTH, pooled_projection_dim=sum(_TOWERS), pos_embed_max_size=16,
  )  # fmt: skip
  clips = [_clip_text(directory / str(i), width) for i, width in enumerate(_TOWERS)]
  t5, t5_tokenizer = _t5(directory / "t5")
  return diffusers.StableDiffusion3Pipeline(
    scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    vae=_vae(16),
    text_encoder=clips[0][0],
    tokenizer=clips[0][1],
    text_encoder_2=clips[1][0],
    tokenizer_2=clips[1][1],
    text_encoder_3=t5,
    tokenizer_3=t5_tokenizer,
    transformer=flux_reference.randomised(diffusers.SD3Transformer2DModel, config | changes),
  )


def _flux1(directory):
  clip, clip_tokenizer = _clip_text(directory / "clip", _TOWERS[0], "CLIPTextModel")
  t5, t5_tokenizer = _t5(directory / "t5")
  config = _FLUX | dict(
    in_channels=64, joint_attention_dim=_T5_WIDTH, pooled_projection_dim=_TOWERS[0],
    axes_dims_rope=(4, 6, 6), guidance_embeds=True,
  )  # fmt: skip
  return diffusers.FluxPipeline(
    scheduler=_dynamic_scheduler(),
    vae=_vae(16),
    text_encoder=clip,
    tokenizer=clip_tokenizer,
    text_encoder_2=t5,
    tokenizer_2=t5_tokenizer,
    transformer=flux_reference.randomised(diffusers.FluxTransformer2DModel, config),
  )


def _flux2(directory):
  del directory
  tokenizer = qwen_tokenizer()
  tokenizer.model_max_length = _QWEN_LENGTH
  qwen = transformers.Qwen3Config(
    vocab_size=len(tokenizer), hidden_size=_QWEN_WIDTH, intermediate_size=12, num_hidden_layers=29,
    num_attention_heads=4, num_key_value_heads=2, head_dim=4,
    rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
  )  # fmt: skip
  settings = {key: value for key, value in _VAE.items() if not key.endswith("_factor")}
  vae = flux_reference.randomised(diffusers.AutoencoderKLFlux2, settings | dict(latent_channels=32))
  vae.bn.running_var.copy_(0.2 + torch.rand(128, generator=torch.Generator().manual_seed(0)))
  config = _FLUX | dict(
    in_channels=128, joint_attention_dim=3 * _QWEN_WIDTH, axes_dims_rope=(4, 4, 4, 4),
    guidance_embeds=False,
  )  # fmt: skip
  return diffusers.Flux2KleinPipeline(
    scheduler=_dynamic_scheduler(),
    vae=vae,
    text_encoder=_small(transformers.Qwen3ForCausalLM, qwen),
    tokenizer=tokenizer,
    transformer=flux_reference.randomised(diffusers.Flux2Transformer2DModel, config),
  )


def _dynamic_scheduler():
  return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def write_rewards(checkpoints):
  """The five rewards on the device, each in its published files."""
  openai = checkpoints / "clip-vit-large-patch14"
  clip_files.write_clip(openai, act="quick_gelu")
  shared = clip_files.TINY.projection
  torch.save(
    clip_files.AestheticHead(shared).state_dict(),
    checkpoints / "sac+logos+ava1-l14-linearMSE.pth",
  )
  pickscore = checkpoints / "PickScore_v1"
  clip_files.write_clip(pickscore)
  laion = checkpoints / "CLIP-ViT-H-14-laion2B-s32B-b79K"
  laion.mkdir()
  for file in pickscore.iterdir():
    if file.suffix == ".safetensors":
      continue  # the laion repository's own weights are not read
    shutil.copyfile(file, laion / file.name)
    if file.name != "config.json":  # PickScore_v1's processor is that of the laion repository
      file.unlink()
  with tempfile.TemporaryDirectory() as folder:
    open_clip_files.write_open_clip(Path(folder))
    shutil.move(Path(folder) / "hps.pt", checkpoints / "HPS_v2.1_compressed.pt")
  image_reward = checkpoints / "ImageReward"
  image_reward.mkdir()
  vision = BlipVisionConfig(64, 2, 1, 32, 8)
  blip_files.write_imagereward(image_reward, vision)
  bert = checkpoints / "bert-base-uncased"
  bert.mkdir()
  shutil.move(image_reward / "vocab.txt", bert / "vocab.txt")
  settings = {"do_lower_case": True, "model_max_length": 512, "tokenizer_class": "BertTokenizer"}
  (bert / "tokenizer_config.json").write_text(json.dumps(settings))


def geneval_records():
  """Records of GenEval's six tags over everyday objects."""
  records = []
  for i, name in enumerate(OBJECTS):
    other, colour = OBJECTS[(i + 1) % len(OBJECTS)], COLOURS[i % len(COLOURS)]
    tint = COLOURS[(i + 1) % len(COLOURS)]
    one, two = {"class": name, "count": 1}, {"class": other, "count": 1}
    many = {"include": [{"class": name, "count": 2}], "exclude": [{"class": name, "count": 3}]}
    placed = two | {"position": ["left of", 0]}
    records += [
      {"tag": "single_object", "include": [one], "prompt": f"a photo of a {name}"},
      {"tag": "two_object", "include": [one, two], "prompt": f"a photo of a {name} and a {other}"},
      {"tag": "counting", **many, "prompt": f"a photo of two {name}s"},
      {"tag": "colors", "include": [one | {"color": colour}],
       "prompt": f"a photo of a {colour} {name}"},
      {"tag": "position", "include": [one, placed],
       "prompt": f"a photo of a {other} left of a {name}"},
      {"tag": "color_attr", "include": [one | {"color": colour}, two | {"color": tint}],
       "prompt": f"a photo of a {colour} {name} and a {tint} {other}"},
    ]  # fmt: skip
  return records


def write_prompts(root):
  """The prompt sets under their published file names; every prompt is made up here."""
  records = geneval_records()
  plain = [record["prompt"].replace("a photo of", "an oil painting of") for record in records]
  quoted = [f'a sign that says "{colour} {name}"' for colour in COLOURS for name in OBJECTS]
  questions = [
    {"prompt": f"two {name}s", "atom_count": 3, "skills": ["count"],
     "vqa_list": [[f"How many {name}s are in the image?", "two"]]}
    for name in OBJECTS
  ]  # fmt: skip
  files = {
    "pickscore/train.txt": plain,
    "pickscore/test.txt": plain[:4],
    "drawbench/test.txt": [text.replace("painting", "sketch") for text in plain],
    "hpsv3/test.txt": [text.replace("painting", "portrait") for text in plain],
    "ocr/test.txt": quoted,
    "geneval/train_metadata.jsonl": [json.dumps(record) for record in records],
    "geneval/test_metadata.jsonl": [json.dumps(record) for record in records[::-1]],
    "geneval2/test.jsonl": [json.dumps(question) for question in questions],
  }
  for name, lines in files.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("\n".join(lines) + "\n")


def write_judges(directory):
  """The models behind the reward services; options of `rewards.serve` by the reward's name."""
  for name, write in (
    ("mask2former", judge_files.write_mask2former),
    ("clip", judge_files.write_clip),
    ("qwen3_vl", judge_files.write_qwen3_vl),
  ):
    (directory / name).mkdir(parents=True)
    write(directory / name)
  (directory / "hpsv3").mkdir()
  (directory / "hpsv3/HPSv3.safetensors").write_bytes(b"\0" * 16)
  return {
    "geneval": dict(
      detector="mask2former", directory=str(directory / "mask2former"), clip=str(directory / "clip")
    ),
    "geneval2": dict(directory=str(directory / "qwen3_vl"), device="cpu", dtype="float32"),
    "hpsv3": dict(directory=str(directory / "hpsv3"), device="cpu"),
  }
