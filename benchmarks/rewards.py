"""Images scored a second: rewards on the device, beside their torch references in the same run.

  python -m benchmarks.rewards --size=small --images=64

Both sides take 8-bit images and prompts and give scores. The references do what RTDMD's released
code does, in float32: Pillow's preprocessing on the host for PickScore, aesthetic and ImageReward,
torch's resize for CLIPScore and HPSv2. Weights are random, so the last column, the largest
difference of scores over their root mean square, checks the two sides and no published model. Needs
torch.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from PIL import Image

from benchmarks import record, tables
from rtdmd_jax.models.blip import BlipVisionConfig
from rtdmd_jax.rewards import device_rewards
from tests.support import clip_files as files
from tests.support.blip_files import write_imagereward
from tests.support.open_clip_files import write_open_clip

# "full" is the published one.
CLIP_L = {
  "tiny": files.TINY,
  "small": files.Sizes((192, 3, 4), (256, 4, 6), 14, 112, 77, 192),
  "full": files.Sizes((768, 12, 12), (1024, 16, 24), 14, 224, 77, 768),
}
CLIP_H = {
  "tiny": files.TINY,
  "small": files.Sizes((256, 4, 6), (320, 4, 8), 14, 112, 77, 256),
  "full": files.Sizes((1024, 16, 24), (1280, 16, 32), 14, 224, 77, 1024),
}
BLIP = {  # image encoder, and the text encoder as (width, heads, layers)
  "tiny": (BlipVisionConfig(64, 2, 1, files.SIDE, 8), (64, 4, 2)),
  "small": (BlipVisionConfig(256, 6, 4, 112, 16), (192, 3, 3)),
  "full": (BlipVisionConfig(), (768, 12, 12)),
}


def pillow(images, side):
  """Resize of square images on the host, to normalised torch pixels."""
  small = [Image.fromarray(i).resize((side, side), Image.Resampling.BICUBIC) for i in images]
  pixels = np.stack([np.asarray(i) for i in small]).transpose(0, 3, 1, 2)
  return files.normalise(torch.tensor(pixels / np.float32(255)))


def resized(images, side, mode):
  """torch's antialiased resize of square images, to normalised pixels."""
  x = torch.tensor(images.transpose(0, 3, 1, 2)) / 255
  return files.normalise(torch.nn.functional.interpolate(x, side, mode=mode, antialias=True))


def clip_cosine(model, pixels, ids):
  """Cosines of transformers' CLIP."""
  out = model(input_ids=torch.tensor(ids).long(), pixel_values=pixels)
  return (files.unit(out.image_embeds) * files.unit(out.text_embeds)).sum(-1)


def clipscore(size, directory):
  """Options of the reward and its reference (images, ids) -> scores; so are the next four."""
  model, _ = files.write_clip(directory, "quick_gelu", CLIP_L[size])
  side = CLIP_L[size].side
  reference = lambda images, ids: clip_cosine(model, resized(images, side, "bilinear"), ids)  # noqa: E731
  return {"directory": directory}, reference


def pickscore(size, directory):
  model, _ = files.write_clip(directory, "gelu", CLIP_H[size])
  side, scale = CLIP_H[size].side, model.logit_scale.exp() / 26
  reference = lambda images, ids: scale * clip_cosine(model, pillow(images, side), ids)  # noqa: E731
  return {"directory": directory}, reference


def hpsv2(size, directory):
  model, _ = write_open_clip(directory, CLIP_H[size])

  def reference(images, ids):
    image = files.unit(model.visual(resized(images, CLIP_H[size].side, "bicubic")))
    return (image * files.unit(model.encode_text(torch.tensor(ids).long()))).sum(-1)

  return {"directory": directory, "weights": directory / "hps.pt"}, reference


def aesthetic(size, directory):
  model, _ = files.write_clip(directory, "quick_gelu", CLIP_L[size])
  head = files.AestheticHead(CLIP_L[size].projection).eval()
  torch.save(head.state_dict(), directory / "head.pth")

  def reference(images, ids):
    pooled = model.vision_model(pixel_values=pillow(images, CLIP_L[size].side)).pooler_output
    return head.layers(files.unit(model.visual_projection(pooled)))[:, 0]

  return {"directory": directory, "weights": directory / "head.pth"}, reference


def imagereward(size, directory):
  vision, text = BLIP[size]
  model = write_imagereward(directory, vision, text)

  def reference(images, ids):
    ids = torch.tensor(ids).long()
    return model(ids, (ids != 0).long(), pillow(images, vision.image_size))

  options = {"weights": directory / "ImageReward.pt", "tokenizer": directory}
  return options, reference


BUILDERS = dict(
  clipscore=clipscore,
  pickscore=pickscore,
  hpsv2=hpsv2,
  aesthetic=aesthetic,
  imagereward=imagereward,
)


def seconds(function):
  """(time of the second call, its result): the first one compiles."""
  function()
  start = time.perf_counter()
  result = function()
  return time.perf_counter() - start, result


def measure(name, size, images, prompts, batch):
  """One row of the table."""
  with tempfile.TemporaryDirectory() as folder:
    options, reference = BUILDERS[name](size, Path(folder))
    model = device_rewards.load(name, options | {"compat": True})
    score = device_rewards.host_reward(model)

    def torch_scores():
      parts = []
      with torch.inference_mode():
        for start in range(0, len(images), batch):
          rows = slice(start, start + batch)
          parts.append(reference(images[rows], model.tokenize(prompts[rows])).numpy())
      return np.concatenate(parts)

    ours, got = seconds(lambda: score(images, prompts, None))
    theirs, want = seconds(torch_scores)
  difference = float(np.abs(got - want).max() / np.sqrt(np.mean(want**2)))
  rates = dict(device=len(images) / ours, torch=len(images) / theirs)
  return dict(reward=name, **rates, speedup=theirs / ours, largest_difference=difference)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--size", choices=tuple(CLIP_L), default="small")
  parser.add_argument("--images", type=int, default=64)
  parser.add_argument("--pixels", type=int, default=512, help="side of the images")
  parser.add_argument("--batch", type=int, default=64, help="images a torch call")
  parser.add_argument("--images_per_prompt", type=int, default=8, help="images a prompt")
  parser.add_argument(
    "--rewards", nargs="*", choices=device_rewards.NAMES, default=device_rewards.NAMES
  )
  record.add_flag(parser)
  args = parser.parse_args()
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  # In parts: they are drawn in float64.
  parts = [
    files.photos(min(32, args.images - start), args.pixels, args.pixels, seed=start)
    for start in range(0, args.images, 32)
  ]
  images = np.concatenate(parts)
  prompts = [f"a {'red ' * (i // args.images_per_prompt % 7)}cube" for i in range(args.images)]
  print(f"{args.images} images of {args.pixels} px, {args.size} models; jax on {jax.devices()[0]}")
  rows = [measure(name, args.size, images, prompts, args.batch) for name in args.rewards]
  tables.report("rewards", rows, args.save, ("reward",))


if __name__ == "__main__":
  main()
