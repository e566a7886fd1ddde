"""Opens obstore's stores, with the credentials and the addresses that the clouds' own tools use."""

import datetime
import importlib
import os
from typing import Any

from glmjax import errors
from glmjax.io import bucket_errors

_EXTRAS = {"gs": "gcs", "s3": "s3"}


def obstore() -> Any:
  """Returns the library, which is imported where a bucket is used."""
  return importlib.import_module("obstore")


def opened(scheme: str, name: str, repeated: float, unanswered: float) -> Any:
  """Opens a store that itself repeats requests for so many seconds, 0: never, and gives each up after so many."""
  try:
    store = importlib.import_module("obstore.store")
  except ImportError:
    raise errors.InputError(
      f"{scheme}://{name} is in a bucket, which takes a package more: pip install 'glmjax[{_EXTRAS[scheme]}]'"
    ) from None
  options: dict[str, Any] = {
    "retry_config": {
      "max_retries": 1000 if repeated else 0,  # until the time is up
      "retry_timeout": datetime.timedelta(seconds=repeated),
      "backoff": {"init_backoff": datetime.timedelta(seconds=0.1), "max_backoff": datetime.timedelta(seconds=8)},
    },
    "client_options": {"timeout": datetime.timedelta(seconds=unanswered)},
  }
  try:
    return _google(store, name, options) if scheme == "gs" else _amazon(store, name, options)
  except bucket_errors.base() as error:
    raise bucket_errors.explained(error, f"{scheme}://{name}", "", repeated) from None


def _google(store: Any, name: str, options: dict[str, Any]) -> Any:
  """Opens a bucket with the credentials that gcloud, GOOGLE_APPLICATION_CREDENTIALS or the machine itself have."""
  if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):  # what Google's own clients look for
    address = emulator if "//" in emulator else f"http://{emulator}"
    options["client_options"]["allow_http"] = True
    return store.GCSStore(name, base_url=address.rstrip("/"), bearer_token="none", **options)
  return store.GCSStore(name, **options)


def _amazon(store: Any, name: str, options: dict[str, Any]) -> Any:
  """Opens a bucket with the credentials that boto3 finds where it is installed: profiles, single sign-on, roles."""
  endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
  if endpoint:
    options["endpoint"] = endpoint.rstrip("/")
    options["client_options"]["allow_http"] = endpoint.startswith("http://")
  if "AWS_ACCESS_KEY_ID" not in os.environ and "AWS_SKIP_SIGNATURE" not in os.environ:
    try:
      options["credential_provider"] = importlib.import_module("obstore.auth.boto3").Boto3CredentialProvider()
    except (ImportError, ValueError):  # without boto3, or where it finds none: obstore asks the machine itself
      pass
    except Exception as error:
      if not type(error).__module__.startswith("botocore"):
        raise
      raise errors.InputError(f"s3://{name}: {errors.one_line(error)}") from error  # a profile that is not there, say
  return store.S3Store(name, **options)
