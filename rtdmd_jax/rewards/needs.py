"""The needs of rewards: what a prompt must bring, checked before anything is loaded."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rtdmd_jax.datasets.prompts import Prompt
from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.host.geneval import check_record
from rtdmd_jax.rewards.host.geneval2 import check_questions, read_questions
from rtdmd_jax.rewards.host.ocr import target_text
from rtdmd_jax.rewards.multi import MAX_FAILED

_WHY = {
  "geneval": "it needs a GenEval record of each prompt ('tag' and 'include'), as a"
  " *_metadata.jsonl file has them",
  "geneval2": "it needs the questions of each prompt ('vqa_list'), or a file of them in its option"
  " questions",
  "ocr": "it needs a text in double quotes in each prompt",
}
# What a record of another form can make of reading it.
_MALFORMED = (UserError, TypeError, KeyError, IndexError, ValueError, AttributeError)


def unscorable(
  name: str, prompts: Sequence[Prompt], options: Mapping[str, Any] | None = None
) -> list[int]:
  """Numbers of the prompts that the reward `name` cannot score, because they lack what it needs.

  Args:
    name: the reward; of one that is not built in nothing is known, and the list is empty.
    prompts: with their records.
    options: of the reward, as a configuration has them.

  Raises:
    UserError: geneval2's option `questions` names a missing or broken file.
  """
  scorable = _test(name, options or {})
  return [] if scorable is None else [i for i, p in enumerate(prompts) if not scorable(p)]


def shortage(
  key: str, name: str, prompts: Sequence[Prompt], path: str, options: Mapping[str, Any]
) -> str | None:
  """A sentence on the prompts of `path` that `unscorable` finds; None without any.

  Args:
    key: section of the configuration, `rewards` or `eval.rewards`.
    name: the reward.
    prompts: all prompts of `path`.
    path: where they are from.
    options: of the reward.

  Raises:
    UserError: as `unscorable`.
  """
  lacking = unscorable(name, prompts, options)
  if not lacking:
    return None
  text = prompts[lacking[0]].text
  return (
    f"{key}.{name} cannot score {len(lacking):,} of the {len(prompts):,} prompts of {path}, the"
    f" first of them {text[:80]!r}: {_WHY[name]}."
  )


def check_training_prompts(rewards: Mapping[str, Any], prompts: Sequence[Prompt], path: str) -> str:
  """Whether the prompts to train on have what the trained rewards need.

  Args:
    rewards: section `rewards` of the configuration.
    prompts: all prompts of `path`.
    path: `data.prompts`.

  Returns:
    Sentences on rewards that lack some of it, but no more than their `max_failed` allows.

  Raises:
    UserError: a run would end at a batch of such prompts.
  """
  said = []
  for name, options in rewards.items():
    sentence = shortage("rewards", name, prompts, path, options)
    if sentence is None:
      continue
    share = len(unscorable(name, prompts, options)) / len(prompts)
    refuses = name != "ocr" and "url" not in options
    if refuses or (options.get("weight", 1.0) and share > options.get("max_failed", MAX_FAILED)):
      raise UserError(sentence)
    said.append(sentence)
  return " ".join(said)


def _test(name: str, options: Mapping[str, Any]) -> Callable[[Prompt], bool] | None:
  """Whether a prompt can be scored; None where nothing is known."""
  remote = "url" in options
  if remote and options.get("reward", name) != name:
    return None
  if name == "geneval":
    return lambda prompt: _accepts(lambda: check_record(prompt.record, "record"))
  if name == "ocr":
    return lambda prompt: target_text(prompt.text) is not None
  if name == "geneval2" and not remote:  # a service may have the questions
    path = options.get("questions")
    known = {} if path is None else read_questions(path)
    return lambda prompt: _accepts(lambda: check_questions(prompt.text, prompt.record, known))
  return None


def _accepts(check: Callable[[], object]) -> bool:
  try:
    check()
  except _MALFORMED:
    return False
  return True
