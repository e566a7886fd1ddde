"""Training: losses, gradients, optimizers, the loop. Called, as glmjax.train(...), it is `glmjax.api.train`."""

import sys

import glmjax

sys.modules[__name__].__class__ = glmjax.CallablePackage
