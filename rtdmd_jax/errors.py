"""Exceptions that end a program early, and the exit codes (docs/robustness.md)."""

EXIT_USER_ERROR = 2
EXIT_NUMBERS = 3  # training met numbers that are not finite
EXIT_PREEMPTED = 75  # SIGTERM; what was to be saved is saved
EXIT_UNSAVED = 76  # SIGTERM or Ctrl-C; the time ran out before the checkpoint was complete
EXIT_INTERRUPTED = 130  # Ctrl-C
EXIT_PIPE = 141  # nobody reads the output any more, as other programs end by SIGPIPE


class UserError(Exception):
  """Bad input: one sentence naming the file, key, line or value and the fix.

  Command-line tools print the sentence without a traceback and exit with code 2.
  """


class Stopped(BaseException):
  """A run that ends before its last step on purpose.

  Command-line tools print the sentence and exit with `code`. Like `KeyboardInterrupt` it may be
  raised by a signal anywhere, so `except Exception` does not catch it.
  """

  def __init__(self, message: str, code: int):
    super().__init__(message)
    self.code = code
