"""The one exception for mistakes a user can mend."""


class InputError(ValueError):
  """Bad input: one line that says what is wrong, where, and what to do about it.

  The command line prints the message alone and exits with status 2; a library caller
  meets an ordinary ValueError.
  """
