"""Origins of published models and prompt sets: size, licence and gate.

Sizes are approximate, of the files that this package reads, as the repositories' pages list them or
as their numbers of parameters imply. docs/backbones.md and docs/data.md print these tables.
"""

from collections.abc import Mapping
from pathlib import PurePath
from typing import NamedTuple
from urllib.parse import quote

_STABILITY = "Stability AI Community License"
_FLUX = "FLUX Non-Commercial License"


class Source(NamedTuple):
  """A repository of models.

  Attributes:
    what: whose files they are, for a table.
    licence: its name.
    sizes: number of files and gigabytes by what is taken: a name in `hub_files.KINDS`, or a file.
    gated: whether its terms must be accepted before it can be downloaded.
    url: where its files lie if not on Hugging Face's hub, to be followed by a file's name.
  """

  what: str
  licence: str
  sizes: Mapping[str, tuple[int, float]]
  gated: bool = False
  url: str = ""


def _pipeline(
  what: str, licence: str, files: int, size: float, own: tuple[int, float], gated: bool
):
  return Source(what, licence, {"pipeline": (files, size), "transformer": own}, gated)


SOURCES: dict[str, Source] = {
  "stabilityai/stable-diffusion-3-medium-diffusers": _pipeline(
    "SD3-M", _STABILITY, 26, 15.5, (2, 4.2), gated=True
  ),
  "stabilityai/stable-diffusion-3.5-medium": _pipeline(
    "SD3.5-M", _STABILITY, 29, 16.3, (2, 4.9), gated=True
  ),
  "black-forest-labs/FLUX.1-dev": _pipeline(
    "FLUX.1-dev", "FLUX.1 [dev] Non-Commercial License", 23, 33.7, (5, 23.8), gated=True
  ),
  "black-forest-labs/FLUX.2-klein-base-4B": _pipeline(
    "FLUX.2-klein 4B, base", "Apache-2.0", 18, 16.0, (2, 7.8), gated=False
  ),
  "black-forest-labs/FLUX.2-klein-4B": _pipeline(
    "FLUX.2-klein 4B, distilled", "Apache-2.0", 18, 16.0, (2, 7.8), gated=False
  ),
  "black-forest-labs/FLUX.2-klein-base-9B": _pipeline(
    "FLUX.2-klein 9B, base", _FLUX, 22, 34.7, (4, 18.2), gated=True
  ),
  "black-forest-labs/FLUX.2-klein-9B": _pipeline(
    "FLUX.2-klein 9B, distilled", _FLUX, 22, 34.7, (4, 18.2), gated=True
  ),
  "openai/clip-vit-large-patch14": Source(
    "CLIPScore, aesthetic, GenEval's colours", "not stated (its code: MIT)", {"model": (8, 1.7)}
  ),
  "yuvalkirstain/PickScore_v1": Source("PickScore", "not stated (its code: MIT)", {
    "encoder": (8, 3.9), "model": (8, 3.9),
  }),
  "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": Source("PickScore's and HPSv2's processor", "MIT", {
    "processor": (8, 0.005), "config": (8, 0.005),
  }),
  "xswu/HPSv2": Source("HPSv2", "Apache-2.0", {"HPS_v2.1_compressed.pt": (1, 2.0)}),
  "christophschuhmann/improved-aesthetic-predictor": Source(
    "aesthetic", "Apache-2.0", {"sac+logos+ava1-l14-linearMSE.pth": (1, 0.004)},
    url="https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/",
  ),
  "zai-org/ImageReward": Source("ImageReward", "Apache-2.0", {"ImageReward.pt": (2, 1.8)}),
  "google-bert/bert-base-uncased": Source(
    "ImageReward's tokenizer", "Apache-2.0", {"tokenizer": (4, 0.001)}
  ),
  "facebook/mask2former-swin-small-coco-instance": Source(
    "GenEval's detector", "other (its code: MIT)", {"encoder": (3, 0.3)}
  ),
  "Qwen/Qwen3-VL-8B-Instruct": Source("GenEval2's judge", "Apache-2.0", {"model": (15, 17.5)}),
  "MizzenAI/HPSv3": Source("HPSv3", "not known", {"hpsv3": (1, 17.0)}),
}  # fmt: skip


class PromptSet(NamedTuple):
  """A public set of prompts: what it holds, how it is fetched, and its licence."""

  files: str
  fetch: str
  licence: str


def _rtdmd(name: str) -> str:
  clone = "git clone --depth=1 https://github.com/Harahan/RTDMD"
  return f"{clone} && mkdir -p prompts && cp -r RTDMD/dataset/{name} prompts/"


PROMPT_SETS: dict[str, PromptSet] = {
  "pickscore": PromptSet(
    "train.txt (25,432 prompts), test.txt (2,048)", _rtdmd("pickscore"),
    "of Pick-a-Pic, by way of Flow-GRPO (MIT)",
  ),
  "drawbench": PromptSet(
    "test.txt (200 prompts, 5 times each)", _rtdmd("drawbench"),
    "of DrawBench, by way of RTDMD (Apache-2.0)",
  ),
  "hpsv3": PromptSet(
    "test.txt (1,024 prompts)", _rtdmd("hpsv3"), "of HPDv3 (MIT), by way of RTDMD (Apache-2.0)"
  ),
  "ocr": PromptSet("test.txt (1,018 prompts)", _rtdmd("ocr"), "of Flow-GRPO (MIT)"),
  "geneval": PromptSet(
    "test_metadata.jsonl (553 records), train_metadata.jsonl (50,000)",
    "python -m rtdmd_jax.datasets.geneval --out=prompts/geneval",
    "made here, as GenEval's (MIT) are",
  ),
  "geneval2": PromptSet(
    "test.jsonl (800 records)",
    "curl -fL --create-dirs -o prompts/geneval2/test.jsonl"
    " https://raw.githubusercontent.com/facebookresearch/GenEval2/main/geneval2_data.jsonl",
    "CC BY-NC 4.0, not for commercial use",
  ),
}  # fmt: skip


def known_id(path: str | PurePath) -> str | None:
  """The repository, or the file of one, that is called like the last part of a path."""
  name = PurePath(path).name
  for repository, source in SOURCES.items():
    if repository.endswith(f"/{name}"):
      return repository
    if name in source.sizes and "." in name:
      return f"{repository}/{name}"
  return None


def size_text(files: int, gigabytes: float) -> str:
  """`26 files, about 16.3 GB`, in megabytes below a tenth of one."""
  count = "1 file" if files == 1 else f"{files} files"
  return (
    f"{count}, about {gigabytes:g} GB"
    if gigabytes >= 0.1
    else (f"{count}, about {1000 * gigabytes:g} MB")
  )


def file_url(source: Source, file: str) -> str:
  """The address of a file of a repository outside of the hub."""
  return source.url + quote(file)


def where_prompts(path: str) -> str:
  """How to get the prompts of a missing file or folder, as the end of a sentence; may be empty."""
  for part in PurePath(path).parts[:-3:-1]:
    if part in PROMPT_SETS:
      source = PROMPT_SETS[part]
      return f"; {source.files}: get it with `{source.fetch}` (licence: {source.licence})"
  return ""
