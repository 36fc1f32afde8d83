"""Which prompts a reward cannot score: those without the record or the words that it needs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rtdmd_jax.errors import UserError
from rtdmd_jax.prompts import Prompt, load_prompts
from rtdmd_jax.rewards.geneval import check_record
from rtdmd_jax.rewards.ocr import target_text


class Lack(NamedTuple):
  """A prompt's number in its set, from 0, and what it lacks."""

  index: int
  reason: str


def unscorable(name: str, options: Mapping[str, Any], prompts: Sequence[Prompt]) -> list[Lack]:
  """The prompts that the reward `name` cannot score whatever the image; empty for most rewards.

  Args:
    name: of the reward.
    options: its options, of which geneval2's `questions` matters.
    prompts: of a set.

  Raises:
    UserError: the file of `questions` is missing or broken.
  """
  if name == "geneval2":
    file = options.get("questions")
    known = {p.text for p in load_prompts(file, split="test")} if file else set()
    reasons = (_without_questions(p, known) for p in prompts)
  elif name in ("geneval", "ocr"):
    find = _without_record if name == "geneval" else _without_quotes
    reasons = (find(p) for p in prompts)
  else:
    return []
  return [Lack(i, reason) for i, reason in enumerate(reasons) if reason]


def _without_record(prompt: Prompt) -> str:
  try:
    check_record(prompt.record, "its record")
  except UserError as error:
    missing = [key for key in ("tag", "include") if key not in prompt.record]
    return f"no {' and no '.join(missing)} in its record" if missing else str(error)
  except (AttributeError, IndexError, KeyError, TypeError):
    return f"include is {prompt.record['include']!r}, which is not a list of objects"
  return ""


def _without_questions(prompt: Prompt, known: set[str]) -> str:
  return "" if "vqa_list" in prompt.record or prompt.text in known else "no vqa_list in its record"


def _without_quotes(prompt: Prompt) -> str:
  return "" if target_text(prompt.text) else "it quotes nothing"
