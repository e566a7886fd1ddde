"""Every operation that has implementations to choose from."""

from glmjax.kernels import attention
from glmjax.kernels import geglu
from glmjax.kernels import layer_norm
from glmjax.kernels import quantized
from glmjax.kernels import rows

ALL = (attention.ATTENTION, attention.DECODE, layer_norm.BACKWARD, geglu.BACKWARD, quantized.PRODUCT, rows.PRODUCT)
