// Half precision to float32, by integers alone, so that flushing of denormals does not touch it.

#pragma once

#include <cstdint>
#include <cstring>

namespace glmjax::cpu {

static inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float bfloat16_to_float(uint16_t half) { return from_bits(static_cast<uint32_t>(half) << 16); }

// Returns the nearest bfloat16, the even one of two; a NaN stays one.
static inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Returns the value of a float16, subnormal ones, infinities and NaNs too.
static inline float float16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  uint32_t exponent = (half >> 10) & 31, fraction = half & 1023;
  if (exponent == 31) return from_bits(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) {
    if (fraction == 0) return from_bits(sign);
    exponent = 113;
    while (!(fraction & 1024)) fraction <<= 1, --exponent;
    return from_bits(sign | exponent << 23 | (fraction & 1023) << 13);
  }
  return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

}  // namespace glmjax::cpu
