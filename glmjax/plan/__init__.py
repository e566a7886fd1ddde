"""What a model takes on hardware that is elsewhere. Called, as glmjax.plan(...), it is `glmjax.api.plan`."""

import sys

import glmjax

sys.modules[__name__].__class__ = glmjax.CallablePackage
