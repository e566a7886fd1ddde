"""What went wrong with a request to a bucket, in words of ours: none of obstore's, which hold addresses."""

import errno
import importlib
import re

from glmjax import errors


class NoAnswer(OSError):
  """The network or the service did not answer, or not now."""


def base() -> type[Exception]:
  """Returns what all of obstore's errors are."""
  return importlib.import_module("obstore.exceptions").BaseError


def status(error: BaseException) -> int:
  """Returns the status that the service has answered with; 0: none."""
  match = re.search(r"status(?: code)?: (\d{3})", str(error))
  return int(match[1]) if match else 0


def explained(error: BaseException, address: str, key: str, seconds: float, answered: bool = False) -> Exception:
  """Returns what obstore's error means here: of its text, which holds addresses and answers, nothing is kept.

  `seconds` are those for which it was tried; `answered`: the bucket has answered this process before.
  """
  kinds = importlib.import_module("obstore.exceptions")
  text = re.sub(r"https?://\S+", "", str(error)).replace(key or address, "")  # keys may be of tokens and tokenizers
  where, code = f"{address}/{key}", status(error)
  if "NoSuchBucket" in text:
    return _no_bucket(address)
  if "NoSuchUpload" in text:  # its end was asked for twice, as the first answer was lost
    return NoAnswer(errno.EREMOTEIO, "the answer to the end of an upload was lost", where)
  if isinstance(error, FileNotFoundError):
    return FileNotFoundError(errno.ENOENT, "no such object", where)
  if isinstance(error, kinds.AlreadyExistsError | kinds.PreconditionError):
    return FileExistsError(errno.EEXIST, "it is there already", where)
  if code == 429 or "SlowDown" in text:
    return NoAnswer(errno.EREMOTEIO, f"too many requests, or the quota is used up, for {seconds:g} s", where)
  if code >= 500 or code == 408:  # of what gives log-ins, too
    return NoAnswer(errno.EREMOTEIO, f"the service reports an error, again and again for {seconds:g} s", where)
  asked = "oken" in text or "redential" in text or "//169.254." in str(error)  # the machine, who is logged in
  if isinstance(error, kinds.UnauthenticatedError) or code == 401 or asked:
    if not code and answered:
      return NoAnswer(errno.EREMOTEIO, f"what gives the log-in does not answer for {seconds:g} s", where)
    login = "gcloud auth application-default login" if address.startswith("gs") else "aws configure, or aws sso login"
    return errors.InputError(f"{address}: nobody is logged in, or the log-in has run out: {login}")
  if isinstance(error, kinds.PermissionDeniedError) or code == 403 or "AccessDenied" in text:
    return PermissionError(errno.EACCES, "permission denied", where)
  if code >= 300:
    name = f", {match[1]}" if (match := re.search(r"<Code>(\w{1,60})</Code>", text)) else ""
    said = f"the service refuses it (status {code}{name}): check the bucket's region (AWS_REGION) and its address"
    return OSError(errno.ENOTSUP, said, where)  # which no other try changes
  return NoAnswer(errno.EREMOTEIO, f"no answer for {seconds:g} s: check the network, the bucket's region", where)


def _no_bucket(address: str) -> errors.InputError:
  return errors.InputError(f"there is no bucket {address}: check its name, and whose project it is")
