// Which instruction sets this machine has, and which of them computes a product.

#include <cstring>

#include "attention.h"
#include "product.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif
#endif

namespace glmjax::cpu {
namespace {

struct Set {
  const char* name;
  const Table* table;
};

#if defined(__x86_64__)
constexpr int kKnown = 5;
const Set kSets[kKnown] = {{"avx512_bf16", &kAvx512Bf16},
                           {"avx512_vnni", &kAvx512Vnni},
                           {"avx512", &kAvx512},
                           {"avx2", &kAvx2},
                           {"generic", &kGeneric}};
#elif defined(__aarch64__)
constexpr int kKnown = 2;
const Set kSets[kKnown] = {{"neon", &kNeon}, {"generic", &kGeneric}};
#else
constexpr int kKnown = 1;
const Set kSets[kKnown] = {{"generic", &kGeneric}};
#endif

// Returns the place in kSets of the best set that this machine has; it has all that follow.
int best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 4;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) {
    return 3;
  }
  if (!__builtin_cpu_supports("avx512vnni")) return 2;
  return __builtin_cpu_supports("avx512bf16") ? 0 : 1;
#elif defined(__aarch64__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? 0 : 1;
#else
  return 0;
#endif
}

}  // namespace

const char* const* sets() {
  static const char* names[kKnown + 1] = {};
  static const bool filled = [] {
    for (int i = best(), to = 0; i < kKnown; ++i, ++to) names[to] = kSets[i].name;
    return true;
  }();
  (void)filled;
  return names;
}

const Kernel* choose(const char* isa, WeightKind weights, bool x_is_bfloat16, bool fast) {
  static const int first = best();
  int at = first;
  if (*isa) {
    while (at < kKnown && std::strcmp(kSets[at].name, isa)) ++at;
  }
  for (; at < kKnown; ++at) {
    const Table& table = *kSets[at].table;
    if (fast) {
      if (table[kBytes][weights]) return table[kBytes][weights];
      continue;
    }
    if (x_is_bfloat16 && table[kBfloats][weights]) return table[kBfloats][weights];
    if (table[kFloats][weights]) return table[kFloats][weights];
  }
  return nullptr;
}

AttendHead choose_attention(const char* isa) {
  const char* name = *isa ? isa : sets()[0];
#if defined(__x86_64__)
  if (!std::strncmp(name, "avx512", 6)) return attend_avx512;
  if (!std::strcmp(name, "avx2")) return attend_avx2;
#else
  (void)name;
#endif
  return attend_generic;
}

}  // namespace glmjax::cpu
