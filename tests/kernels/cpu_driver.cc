// Runs the library's products and attention without XLA, on a pool of its own, for sanitizers and other machines'
// emulators: every instruction set that the machine has, against sums in double; rows alone and together; calls at
// once.
// Prints the sets, and ends with 0 where all agree.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "attention.h"
#include "driver.h"
#include "numbers.h"
#include "product.h"

namespace {

using namespace glmjax::cpu;

class Pool {
 public:
  explicit Pool(int count) {
    for (int i = 0; i < count; ++i) threads_.emplace_back([this] { work(); });
  }
  ~Pool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ended_ = true;
    }
    ready_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  int64_t num_threads() const { return static_cast<int64_t>(threads_.size()); }
  void Schedule(std::function<void()> task) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    ready_.notify_one();
  }

 private:
  void work() {
    for (;;) {
      std::function<void()> task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        ready_.wait(lock, [this] { return ended_ || !tasks_.empty(); });
        if (tasks_.empty()) return;
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<std::function<void()>> tasks_;
  bool ended_ = false;
  std::vector<std::thread> threads_;
};

struct Case {
  WeightKind kind;
  bool bfloats, fast;
  int64_t rows, inputs, outputs, groups;
};

constexpr int64_t kBits[] = {4, 8, 16, 32};

uint16_t half_of(float value) { return static_cast<uint16_t>(to_bits(value) >> 16); }

// The arrays of a product, each of exactly its size, so that a read behind an end is seen.
struct Arrays {
  std::vector<float> x;
  std::vector<uint16_t> halves;
  std::vector<uint8_t> weights;
  std::vector<float> scale;

  Arrays(const Case& c, std::mt19937& random)
      : x(c.rows * c.inputs), weights(c.outputs * c.inputs * kBits[c.kind] / 8) {
    std::normal_distribution<float> normal;
    for (float& value : x) value = from_bits(to_bits(normal(random)) & 0xffff0000);
    for (const float value : x) halves.push_back(half_of(value));
    for (uint8_t& byte : weights) byte = static_cast<uint8_t>(random());
    if (c.kind == kFloat32) {
      for (int64_t i = 0; i < c.outputs * c.inputs; ++i) {
        const float value = normal(random);
        std::memcpy(weights.data() + 4 * i, &value, 4);
      }
    } else if (c.kind == kBfloat16) {
      for (int64_t i = 0; i < c.outputs * c.inputs; ++i) {
        const uint16_t value = half_of(normal(random));
        std::memcpy(weights.data() + 2 * i, &value, 2);
      }
    }
    for (int64_t i = 0; i < c.groups * c.outputs; ++i) scale.push_back(0.5f + static_cast<float>(random() % 997) / 997);
  }

  double weight(const Case& c, int64_t output, int64_t input) const {
    const int64_t at = output * c.inputs + input;
    if (c.kind == kInt8) return static_cast<int8_t>(weights[at]);
    if (c.kind == kInt4) {
      const int byte = weights[at / 2], code = input % 2 ? byte & 15 : byte >> 4;
      return code < 8 ? code : code - 16;
    }
    if (c.kind == kBfloat16) {
      uint16_t value;
      std::memcpy(&value, weights.data() + 2 * at, 2);
      return bfloat16_to_float(value);
    }
    float value;
    std::memcpy(&value, weights.data() + 4 * at, 4);
    return value;
  }
};

// Multiplies rows [first, first + rows) by the named set; empty where the set has no such kernel.
std::vector<float> multiply(const char* isa, const Case& c, const Arrays& arrays, int64_t first, int64_t rows,
                            Pool& pool) {
  Product p{};
  p.rows = rows, p.inputs = c.inputs, p.outputs = c.outputs, p.groups = c.groups;
  p.x_is_bfloat16 = c.bfloats;
  p.x = c.bfloats ? static_cast<const void*>(arrays.halves.data() + first * c.inputs)
                  : static_cast<const void*>(arrays.x.data() + first * c.inputs);
  p.weights = arrays.weights.data();
  p.row_bytes = c.inputs * kBits[c.kind] / 8;
  p.scale = arrays.scale.data();
  std::vector<float> out(rows * c.outputs, NAN);
  p.out = out.data();
  p.kernel = choose(isa, c.kind, c.bfloats, c.fast);
  std::vector<uint8_t> scratch(scratch_bytes(rows, c.inputs, c.groups, c.fast));
  place_scratch(p, scratch.data());
  run(p, pool);
  return out;
}

bool agrees(const char* isa, const Case& c, const Arrays& arrays, const std::vector<float>& out) {
  for (int64_t r = 0; r < c.rows; ++r) {
    float largest = 0;
    for (int64_t i = 0; i < c.inputs; ++i) largest = std::fmax(largest, std::fabs(arrays.x[r * c.inputs + i]));
    for (int64_t o = 0; o < c.outputs; ++o) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < c.inputs; ++i) {
        float x = arrays.x[r * c.inputs + i];
        if (c.fast) x = std::nearbyint(x * (127 / largest)) * (largest / 127);
        const double scale = arrays.scale[i / (c.inputs / c.groups) * c.outputs + o];
        const double product = x * arrays.weight(c, o, i) * scale;
        sum += product, size += std::fabs(product);
      }
      if (!(std::fabs(sum - out[r * c.outputs + o]) <= 1e-6 * size)) {
        std::printf("%s kind %d bfloats %d fast %d: %ld x %ld x %ld in %ld: out[%ld, %ld] is %g, not %g\n", isa, c.kind,
                    c.bfloats, c.fast, static_cast<long>(c.rows), static_cast<long>(c.inputs),
                    static_cast<long>(c.outputs), static_cast<long>(c.groups), static_cast<long>(r),
                    static_cast<long>(o), out[r * c.outputs + o], sum);
        return false;
      }
    }
  }
  return true;
}

bool check(const char* isa, const Case& c, std::mt19937& random, Pool& pool) {
  const Arrays arrays(c, random);
  const std::vector<float> together = multiply(isa, c, arrays, 0, c.rows, pool);
  if (!agrees(isa, c, arrays, together)) return false;
  for (int64_t r = 0; r < c.rows; r += 3) {
    const std::vector<float> alone = multiply(isa, c, arrays, r, 1, pool);
    if (std::memcmp(alone.data(), together.data() + r * c.outputs, alone.size() * sizeof(float))) {
      std::printf("%s kind %d fast %d: row %ld alone is another\n", isa, c.kind, c.fast, static_cast<long>(r));
      return false;
    }
  }
  return true;
}

// Two threads compute the same again and again.
template <typename Compute>
bool is_same_at_once(const char* isa, const char* what, const Compute& compute) {
  const std::vector<float> once = compute();
  std::atomic<int> wrong{0};
  const auto repeat = [&] {
    for (int i = 0; i < 50; ++i) wrong += compute() != once;
  };
  std::thread other(repeat);
  repeat();
  other.join();
  if (wrong) std::printf("%s: %d %s at once are wrong\n", isa, wrong.load(), what);
  return !wrong;
}

bool check_at_once(const char* isa, std::mt19937& random, Pool& pool) {
  const Case c{kInt4, false, true, 2, 1024, 515, 1};
  const Arrays arrays(c, random);
  return is_same_at_once(isa, "products", [&] { return multiply(isa, c, arrays, 0, c.rows, pool); });
}

struct AttentionCase {
  SlotKind kind;
  bool bfloats;  // of queries and what is read
  int64_t rows, heads, slots, width;
};

// The arrays of a step of attention, each of exactly its size.
struct Cache {
  std::vector<float> q, key, value, key_scale, value_scale;  // what keys and values stand for, without scales
  std::vector<uint16_t> q_halves, key_halves, value_halves;
  std::vector<int8_t> key_bytes, value_bytes;
  std::vector<int32_t> end;

  Cache(const AttentionCase& c, std::mt19937& random) {
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& to, std::vector<uint16_t>& halves, std::vector<int8_t>* bytes,
                          int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        const int8_t byte = static_cast<int8_t>(random());
        if (bytes) bytes->push_back(byte);
        to.push_back(bytes && c.kind == kSlotBytes ? byte : from_bits(to_bits(normal(random)) & 0xffff0000));
        halves.push_back(half_of(to.back()));
      }
    };
    const int64_t kept = c.rows * c.heads * c.slots;
    fill(q, q_halves, nullptr, c.rows * c.heads * c.width);
    fill(key, key_halves, &key_bytes, kept * c.width);
    fill(value, value_halves, &value_bytes, kept * c.width);
    const bool scaled = c.kind == kSlotBytes;
    for (int64_t i = 0; i < kept; ++i) {
      key_scale.push_back(scaled ? 0.01f + static_cast<float>(random() % 97) / 9700 : 1);
      value_scale.push_back(scaled ? 0.01f + static_cast<float>(random() % 97) / 9700 : 1);
    }
    for (int64_t row = 0; row < c.rows; ++row) end.push_back(row % 3 == 1 ? 0 : 1 + random() % c.slots);
    end.back() = c.slots;
  }
};

// Returns what rows [first, first + rows) read, as floats.
std::vector<float> attend(const char* isa, const AttentionCase& c, const Cache& cache, int64_t first, int64_t rows,
                          Pool& pool) {
  const auto from = [&](const auto& array, int64_t each) { return array.data() + first * c.heads * each; };
  const int64_t slots = c.slots * c.width;
  Attention a{};
  a.rows = rows, a.heads = c.heads, a.slots = c.slots, a.width = c.width, a.kind = c.kind;
  a.q_is_bfloat16 = c.bfloats;
  a.q = c.bfloats ? static_cast<const void*>(from(cache.q_halves, c.width)) : from(cache.q, c.width);
  switch (c.kind) {
    case kSlotFloats: a.key = from(cache.key, slots), a.value = from(cache.value, slots); break;
    case kSlotBfloats: a.key = from(cache.key_halves, slots), a.value = from(cache.value_halves, slots); break;
    case kSlotBytes:
      a.key = from(cache.key_bytes, slots), a.value = from(cache.value_bytes, slots);
      a.key_scale = from(cache.key_scale, c.slots), a.value_scale = from(cache.value_scale, c.slots);
      break;
  }
  a.end = cache.end.data() + first;
  std::vector<float> out(rows * c.heads * c.width, NAN);
  std::vector<uint16_t> halves(out.size());
  a.out = c.bfloats ? static_cast<void*>(halves.data()) : out.data();
  run(a, choose_attention(isa), pool);
  if (c.bfloats) std::transform(halves.begin(), halves.end(), out.begin(), bfloat16_to_float);
  return out;
}

bool agrees(const char* isa, const AttentionCase& c, const Cache& cache, const std::vector<float>& out) {
  for (int64_t i = 0; i < c.rows * c.heads; ++i) {
    const int64_t end = cache.end[i / c.heads];
    std::vector<double> weights;
    double largest = -INFINITY, total = 0;
    for (int64_t m = 0; m < end; ++m) {
      double score = 0;
      for (int64_t k = 0; k < c.width; ++k) {
        score += static_cast<double>(cache.q[i * c.width + k]) * cache.key[(i * c.slots + m) * c.width + k];
      }
      weights.push_back(score * cache.key_scale[i * c.slots + m] / std::sqrt(static_cast<double>(c.width)));
      largest = std::fmax(largest, weights.back());
    }
    for (double& weight : weights) total += weight = std::exp(weight - largest);
    for (int64_t k = 0; k < c.width; ++k) {
      double sum = 0, size = 1e-30;
      for (int64_t m = 0; m < end; ++m) {
        const double part = weights[m] / total * cache.value[(i * c.slots + m) * c.width + k] *
                            cache.value_scale[i * c.slots + m];
        sum += part, size += std::fabs(part);
      }
      if (!(std::fabs(sum - out[i * c.width + k]) <= (c.bfloats ? 5e-3 : 2e-5) * size)) {
        std::printf("%s attention kind %d bfloats %d: %ld x %ld x %ld x %ld: out[%ld, %ld] is %g, not %g\n", isa,
                    c.kind, c.bfloats, static_cast<long>(c.rows), static_cast<long>(c.heads),
                    static_cast<long>(c.slots), static_cast<long>(c.width), static_cast<long>(i), static_cast<long>(k),
                    out[i * c.width + k], sum);
        return false;
      }
    }
  }
  return true;
}

bool check(const char* isa, const AttentionCase& c, std::mt19937& random, Pool& pool) {
  const Cache cache(c, random);
  const std::vector<float> together = attend(isa, c, cache, 0, c.rows, pool);
  if (!agrees(isa, c, cache, together)) return false;
  const int64_t each = c.heads * c.width;
  for (int64_t row = 0; row < c.rows; ++row) {
    const std::vector<float> alone = attend(isa, c, cache, row, 1, pool);
    if (std::memcmp(alone.data(), together.data() + row * each, each * sizeof(float))) {
      std::printf("%s attention kind %d: row %ld alone reads something else\n", isa, c.kind, static_cast<long>(row));
      return false;
    }
  }
  return true;
}

bool check_attention_at_once(const char* isa, std::mt19937& random, Pool& pool) {
  const AttentionCase c{kSlotBfloats, true, 3, 4, 300, 64};
  const Cache cache(c, random);
  return is_same_at_once(isa, "steps of attention", [&] { return attend(isa, c, cache, 0, c.rows, pool); });
}

}  // namespace

int main() {
  std::mt19937 random(7);
  Pool pool(2);
  bool right = true;
  for (const char* const* isa = sets(); *isa; ++isa) {
    for (const int64_t rows : {1, 2, 3, 4, 7, 8, 9, 14}) {
      for (const auto& [inputs, outputs, groups] : {std::tuple<int64_t, int64_t, int64_t>{128, 4, 1}, {62, 9, 1},
                                                    {1036, 67, 2}, {6, 1, 3}, {516, 262, 1}, {9002, 3, 1}}) {
        for (const bool bfloats : {false, true}) {
          for (int kind = 0; kind < kWeightKinds; ++kind) {
            const WeightKind weights = static_cast<WeightKind>(kind);
            right &= check(*isa, {weights, bfloats, false, rows, inputs, outputs, groups}, random, pool);
            if (kind > kInt8) continue;
            right &= check(*isa, {weights, bfloats, true, rows, inputs, outputs, groups}, random, pool);
          }
          right &= check(*isa, {kInt8, bfloats, true, rows, inputs + groups, outputs, groups}, random, pool);
        }
      }
    }
    right &= check(*isa, {kInt8, true, false, 515, 33, 5, 1}, random, pool);  // more than a panel
    right &= check_at_once(*isa, random, pool);
    for (const SlotKind kind : {kSlotFloats, kSlotBfloats, kSlotBytes}) {
      for (const bool bfloats : {false, true}) {
        for (const auto& [rows, heads, slots, width] :
             {std::tuple<int64_t, int64_t, int64_t, int64_t>{1, 1, 1, 1}, {2, 3, 7, 20}, {5, 2, 33, 128},
              {3, 4, 300, 64}, {4, 1, 65, 145}}) {
          right &= check(*isa, AttentionCase{kind, bfloats, rows, heads, slots, width}, random, pool);
        }
      }
    }
    right &= check_attention_at_once(*isa, random, pool);
    std::printf("%s %s\n", *isa, right ? "agrees" : "DIFFERS");
  }
  return right ? 0 : 1;
}
