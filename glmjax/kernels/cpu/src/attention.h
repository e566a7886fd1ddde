// What one step of attention over a cache is: one query for each row and head, over the slots before the row's end.
//
//   out[b, h, :] = sum over slots m < end[b] of softmax_m(q[b, h, :] . key[b, h, m, :] / sqrt(width)) value[b, h, m, :]
//
// Sums are float32's, in an order that depends on a row's end alone: what a row reads does not depend on the others. A
// row whose end is 0 reads zeros.

#pragma once

#include <cstdint>

namespace glmjax::cpu {

// What keys and values are kept as. Bytes have a float32 scale for each slot and head.
enum SlotKind : int { kSlotFloats, kSlotBfloats, kSlotBytes };

struct Attention {
  int64_t rows, heads, slots, width;
  const void* q;  // [rows, heads, width], float32 or bfloat16
  bool q_is_bfloat16;
  const void* key;  // [rows, heads, slots, width]
  const void* value;
  const float* key_scale;  // [rows, heads, slots], of bytes
  const float* value_scale;
  SlotKind kind;
  const int32_t* end;  // [rows]
  void* out;           // [rows, heads, width], as q
};

// Computes one head of one row; `scores` has room for all slots and 16 more, `floats` for two widths and 32 more.
using AttendHead = void (*)(const Attention&, int64_t row, int64_t head, float* scores, float* floats);

void attend_generic(const Attention&, int64_t row, int64_t head, float* scores, float* floats);
void attend_avx2(const Attention&, int64_t row, int64_t head, float* scores, float* floats);
void attend_avx512(const Attention&, int64_t row, int64_t head, float* scores, float* floats);

// Returns the function of the named instruction set, or of this machine's best for an empty name.
AttendHead choose_attention(const char* isa);

}  // namespace glmjax::cpu
