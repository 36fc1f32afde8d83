"""What the commands say at their start of prompts that are longer than a text encoder reads."""

from types import SimpleNamespace

from rtdmd_jax.datasets.prompts import Prompt
from rtdmd_jax.pipeline.describe import text_limits
from rtdmd_jax.rewards.held_out_sets import HeldOut
from rtdmd_jax.training.overview import print_cut_prompts
from tests.support.paths import TINY


def test_training_names_its_own_and_the_held_out_prompts(capsys):
  long = [Prompt("a photo of a red circle left of a blue square and a green cross", {})]
  pipeline = SimpleNamespace(text=SimpleNamespace(limits=text_limits(TINY)))
  sets = [HeldOut("signs", long, ())]
  print_cut_prompts(SimpleNamespace(pipeline=pipeline, prompts=long * 3, held_out_sets=sets))
  lines = capsys.readouterr().out.splitlines()
  assert [line.partition(" tokens")[0] for line in lines] == [
    "3 of 3 training prompts are longer than CLIP's 12",
    "3 of 3 training prompts are longer than T5's 12",
    "1 of 1 held-out prompts of signs is longer than CLIP's 12",
    "1 of 1 held-out prompts of signs is longer than T5's 12",
  ]
