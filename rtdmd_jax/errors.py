"""The one exception that stands for a user's mistake."""


class UserError(Exception):
  """Bad input: one sentence naming the file, key, line or value and the fix.

  Command-line tools print the sentence without a traceback and exit with code 2.
  """
