"""Products with quantized and half-precision weights on CPUs, by a small library of C++ called through jax.ffi."""
