"""glmjax: train, quantize and serve GLM-130B-style bilingual language models in JAX."""

__version__ = "0.1.0"
