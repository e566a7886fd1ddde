// Kernels for aarch64 with NEON and its dot products of bytes (Cortex-A76, Neoverse N1, Apple M1 and later).

#if defined(__aarch64__)

#include <arm_neon.h>

#include "numbers.h"
#include "product.h"
#include "target.h"

TARGET_BEGIN("arch=armv8.2-a+dotprod")
#include "tile.h"

namespace {

struct FloatRows {
  using Vector = float32x4_t;
  using Accumulator = float32x4_t;
  using Element = float;
  using Sum = float;
  static constexpr int kWeightBytes = 16, kOffset = 0, kRows = 4;
  static Accumulator zero() { return vdupq_n_f32(0); }
  static Accumulator add(Accumulator a, Vector weight, Vector x) { return vfmaq_f32(a, weight, x); }
  static void sum(const Accumulator a[4], Sum sums[4]) {
    vst1q_f32(sums, vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3])));
  }
};

struct Int4Floats : FloatRows {
  static constexpr int kInputs = 32, kVectors = 8;
  static void load(const uint8_t* bytes, Vector w[kVectors]) {
    const int32x4_t codes = vreinterpretq_s32_u8(vld1q_u8(bytes));
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      const int32x4_t left = vshlq_s32(codes, vdupq_n_s32(28 - 4 * k));
      w[k] = vcvtq_f32_s32(vshrq_n_s32(left, 28));
    }
  }
  static void arrange(const float* natural, float* packed) { arrange_nibbles<8, kInputs>(natural, packed); }
};

struct Int8Floats : FloatRows {
  static constexpr int kInputs = 16, kVectors = 4;
  static void load(const uint8_t* bytes, Vector w[kVectors]) {
    const int8x16_t codes = vreinterpretq_s8_u8(vld1q_u8(bytes));
    const int16x8_t low = vmovl_s8(vget_low_s8(codes)), high = vmovl_s8(vget_high_s8(codes));
    w[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
    w[1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(low)));
    w[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
    w[3] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)));
  }
  static void arrange(const float* natural, float* packed) { arrange_naturally<kInputs>(natural, packed); }
};

struct Bfloat16Floats : FloatRows {
  static constexpr int kInputs = 8, kVectors = 2;
  static void load(const uint8_t* bytes, Vector w[kVectors]) {
    const uint16x8_t halves = vreinterpretq_u16_u8(vld1q_u8(bytes));
    w[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(halves), 16));
    w[1] = vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(halves), 16));
  }
  static void arrange(const float* natural, float* packed) { arrange_naturally<kInputs>(natural, packed); }
};

struct Float32Floats : FloatRows {
  static constexpr int kInputs = 4, kVectors = 1;
  static void load(const uint8_t* bytes, Vector w[kVectors]) { w[0] = vreinterpretq_f32_u8(vld1q_u8(bytes)); }
  static void arrange(const float* natural, float* packed) { arrange_naturally<kInputs>(natural, packed); }
};

struct ByteRows {
  using Vector = int8x16_t;
  using Accumulator = int32x4_t;
  using Element = int8_t;
  using Sum = int32_t;
  static constexpr int kWeightBytes = 16, kOffset = 0, kRows = 4;
  static Accumulator zero() { return vdupq_n_s32(0); }
  static Accumulator add(Accumulator a, Vector weight, Vector x) { return vdotq_s32(a, weight, x); }
  static void sum(const Accumulator a[4], Sum sums[4]) {
    vst1q_s32(sums, vpaddq_s32(vpaddq_s32(a[0], a[1]), vpaddq_s32(a[2], a[3])));
  }
};

struct Int4Bytes : ByteRows {
  static constexpr int kInputs = 32, kVectors = 2;
  static void load(const uint8_t* bytes, Vector w[kVectors]) {
    const int8x16_t codes = vreinterpretq_s8_u8(vld1q_u8(bytes));
    w[0] = vshrq_n_s8(vshlq_n_s8(codes, 4), 4);
    w[1] = vshrq_n_s8(codes, 4);
  }
  static void arrange(const int8_t* natural, int8_t* packed) { arrange_nibbles<2, kInputs>(natural, packed); }
};

struct Int8Bytes : ByteRows {
  static constexpr int kInputs = 16, kVectors = 1;
  static void load(const uint8_t* bytes, Vector w[kVectors]) { w[0] = vreinterpretq_s8_u8(vld1q_u8(bytes)); }
  static void arrange(const int8_t* natural, int8_t* packed) { arrange_naturally<kInputs>(natural, packed); }
};

}  // namespace
TARGET_END

namespace {

const Kernel int4_bytes = kernel_of<Int4Bytes>(), int8_bytes = kernel_of<Int8Bytes>();
const Kernel int4_floats = kernel_of<Int4Floats>(), int8_floats = kernel_of<Int8Floats>();
const Kernel bfloat16_floats = kernel_of<Bfloat16Floats>(), float32_floats = kernel_of<Float32Floats>();

}  // namespace

namespace glmjax::cpu {

const Table kNeon = {
    {&int4_bytes, &int8_bytes, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr},
    {&int4_floats, &int8_floats, &bfloat16_floats, &float32_floats},
};

}  // namespace glmjax::cpu

#endif
