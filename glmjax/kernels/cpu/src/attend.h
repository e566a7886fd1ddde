// One head of one row (attention.h), in vectors of sixteen floats that the compiler splits where registers are smaller:
// to be included in the region that is compiled for an instruction set. Everything is local to the including file.

namespace {

using glmjax::cpu::Attention;

using Floats = float __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Integers = int32_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(32)));
using Bytes = int8_t __attribute__((vector_size(16)));

constexpr int64_t kLanes = 16;
constexpr int kBlock = 8;  // vectors of a value that are summed side by side, in registers

inline Floats load(const float* x) {
  Floats found;
  __builtin_memcpy(&found, x, sizeof found);
  return found;
}
inline Floats load(const uint16_t* x) {
  Halves halves;
  __builtin_memcpy(&halves, x, sizeof halves);
  const Words words = __builtin_convertvector(halves, Words) << 16;
  return (Floats)words;
}
inline Floats load(const int8_t* x) {
  Bytes bytes;
  __builtin_memcpy(&bytes, x, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, Integers), Floats);
}
template <typename T>
inline Floats load_part(const T* x, int64_t count) {
  T part[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = x[i];
  return load(part);
}

inline float sum(const Floats& x) {
  float lanes[kLanes];
  __builtin_memcpy(lanes, &x, sizeof lanes);
  for (int64_t half = kLanes / 2; half; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// e^x for x up to 0, to about two units in the last place; below -87 it is 0. Cephes' way: 2^n and a polynomial.
inline Floats exponential(const Floats& x) {
  const Integers small = x < -87.0f;  // NaN is not, and stays NaN
  const Floats shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Words power = ((Words)shifted + 127) << 23;  // the low bits of `shifted` are n
  const Floats found = p * (Floats)power;
  return (Floats)((Words)found & ~(Words)small);
}

// Writes the scores of a query for the slots before `end`.
template <typename T>
inline void score(const float* q, const T* key, const float* scale, int64_t end, int64_t width, float* scores) {
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t m = 0; m < end; ++m, key += width) {
    __builtin_prefetch(key + 8 * width);
    Floats a = {}, b = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= whole; i += 2 * kLanes) {
      a += load(q + i) * load(key + i);
      b += load(q + i + kLanes) * load(key + i + kLanes);
    }
    if (i < whole) a += load(q + i) * load(key + i);
    if (whole < width) b += load(q + whole) * load_part(key + whole, width - whole);
    scores[m] = scale ? sum(a + b) * scale[m] : sum(a + b);
  }
}

// Turns scores into the softmax's numerators and returns their sum; those past `end`, up to whole vectors, become 0.
inline float numerators(float* scores, int64_t end) {
  float largest = scores[0];
  for (int64_t m = 1; m < end; ++m) largest = scores[m] > largest || scores[m] != scores[m] ? scores[m] : largest;
  for (int64_t m = end; m < (end + kLanes - 1) / kLanes * kLanes; ++m) scores[m] = -__builtin_inff();
  Floats total = {};
  for (int64_t m = 0; m < end; m += kLanes) {
    const Floats weights = exponential(load(scores + m) - largest);
    __builtin_memcpy(scores + m, &weights, sizeof weights);
    total += weights;
  }
  return sum(total);
}

// Adds up values times weights, `count` vectors of them from the first on.
template <int count, typename T>
inline void mix_block(const float* weights, const T* value, int64_t end, int64_t width, float* out) {
  Floats sums[count] = {};
  for (int64_t m = 0; m < end; ++m, value += width) {
    __builtin_prefetch(value + 8 * width);
#pragma GCC unroll 8
    for (int k = 0; k < count; ++k) sums[k] += load(value + k * kLanes) * weights[m];
  }
  __builtin_memcpy(out, sums, sizeof sums);
}

template <typename T>
inline void mix(const float* weights, const T* value, int64_t end, int64_t width, float* out) {
  int64_t i = 0;
  for (; i + kBlock * kLanes <= width; i += kBlock * kLanes) mix_block<kBlock>(weights, value + i, end, width, out + i);
  for (; i + kLanes <= width; i += kLanes) mix_block<1>(weights, value + i, end, width, out + i);
  if (i == width) return;
  Floats sums = {};
  for (int64_t m = 0; m < end; ++m) sums += load_part(value + m * width + i, width - i) * weights[m];
  __builtin_memcpy(out + i, &sums, sizeof sums);
}

template <typename T>
inline void attend_slots(const Attention& a, int64_t row, int64_t head, const float* q, float* scores, float* out) {
  const int64_t at = row * a.heads + head, end = a.end[row] < a.slots ? a.end[row] : a.slots;
  const T* key = static_cast<const T*>(a.key) + at * a.slots * a.width;
  const T* value = static_cast<const T*>(a.value) + at * a.slots * a.width;
  const float* key_scale = a.key_scale ? a.key_scale + at * a.slots : nullptr;
  score(q, key, key_scale, end, a.width, scores);
  const float total = numerators(scores, end);
  if (a.value_scale) {
    for (int64_t m = 0; m < end; ++m) scores[m] *= a.value_scale[at * a.slots + m];
  }
  mix(scores, value, end, a.width, out);
  for (int64_t i = 0; i < a.width; ++i) out[i] /= total;
}

inline void attend(const Attention& a, int64_t row, int64_t head, float* scores, float* floats) {
  const int64_t first = (row * a.heads + head) * a.width;
  const int64_t padded = (a.width + kLanes - 1) / kLanes * kLanes;
  float* q = floats;
  float* out = floats + padded;
  const float scale = 1 / __builtin_sqrtf(static_cast<float>(a.width));
  for (int64_t i = 0; i < padded; ++i) {
    float x = 0;
    if (i < a.width) {
      x = a.q_is_bfloat16 ? glmjax::cpu::bfloat16_to_float(static_cast<const uint16_t*>(a.q)[first + i])
                          : static_cast<const float*>(a.q)[first + i];
    }
    q[i] = x * scale;
    out[i] = 0;
  }
  if (a.end[row] > 0) {
    switch (a.kind) {
      case glmjax::cpu::kSlotFloats: attend_slots<float>(a, row, head, q, scores, out); break;
      case glmjax::cpu::kSlotBfloats: attend_slots<uint16_t>(a, row, head, q, scores, out); break;
      case glmjax::cpu::kSlotBytes: attend_slots<int8_t>(a, row, head, q, scores, out); break;
    }
  }
  for (int64_t i = 0; i < a.width; ++i) {
    if (a.q_is_bfloat16) {
      static_cast<uint16_t*>(a.out)[first + i] = glmjax::cpu::float_to_bfloat16(out[i]);
    } else {
      static_cast<float*>(a.out)[first + i] = out[i];
    }
  }
}

}  // namespace
