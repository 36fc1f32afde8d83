"""JSON of unknown origin."""

import json
from typing import Any

from rtdmd_jax.errors import UserError


def parse_json(text: str | bytes, place: str) -> Any:
  """The value of `text`.

  Args:
    text: JSON, as text or in UTF-8.
    place: the file, and line if there is one, for the message.

  Raises:
    UserError: not UTF-8, not JSON, or JSON with numbers or nesting beyond Python's limits.
  """
  try:
    # Named, because json would take other encodings for what they look like.
    return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
  except UnicodeDecodeError as error:
    raise UserError(f"{place}: is not UTF-8 ({error.reason} at byte {error.start})") from error
  except json.JSONDecodeError as error:
    where = f"line {error.lineno}, column {error.colno}"
    raise UserError(f"{place}: is not JSON ({error.msg} at {where})") from error
  except (ValueError, RecursionError) as error:
    reason = "nested too deep" if isinstance(error, RecursionError) else "a number too long"
    raise UserError(f"{place}: is not JSON that can be read ({reason})") from error
