"""`python -m glmjax` is the glmjax command."""

import sys

from glmjax import cli

sys.exit(cli.main())
