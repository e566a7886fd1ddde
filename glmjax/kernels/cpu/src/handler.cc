// What the library exports: XLA's handler of a product, and what Python asks about this machine (library.py).

#include <cstdint>
#include <string>
#include <string_view>

#include "attention.h"
#include "driver.h"
#include "product.h"
#include "xla/ffi/api/c_api.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace glmjax::cpu {
namespace {

// Computes out = (x * weights) * scale, all of one product's shapes having been checked by product.py. `scratch` is a
// result only so that XLA finds room for it.
ffi::Error multiply(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weights, ffi::AnyBuffer scale,
                    ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::U8> scratch, int64_t kind, bool fast,
                    std::string_view isa) {
  Product product{};
  product.rows = x.dimensions()[0];
  product.inputs = x.dimensions()[1];
  product.outputs = weights.dimensions()[0];
  product.x = x.untyped_data();
  product.x_is_bfloat16 = x.element_type() == ffi::BF16;
  product.weights = static_cast<const uint8_t*>(weights.untyped_data());
  const WeightKind weight_kind = static_cast<WeightKind>(kind);
  constexpr int64_t kBits[kWeightKinds] = {4, 8, 16, 32};
  product.row_bytes = product.inputs * kBits[weight_kind] / 8;
  product.groups = scale.dimensions()[0];
  if (product.groups) product.scale = scale.untyped_data();
  product.groups = product.groups ? product.groups : 1;
  product.scale_is_half = scale.element_type() == ffi::F16;
  product.out = out->typed_data();
  product.kernel = choose(std::string(isa).c_str(), weight_kind, product.x_is_bfloat16, fast);
  if (!product.kernel) {
    const std::string words = "this machine does not have GLMJAX_CPU_ISA=" + std::string(isa);
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, words);
  }
  if (static_cast<int64_t>(scratch->size_bytes()) <
      scratch_bytes(product.rows, product.inputs, product.groups, fast)) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "the scratch is too small");
  }
  place_scratch(product, scratch->typed_data());
  run(product, pool);
  return ffi::Error::Success();
}

// Computes a step of attention over a cache, its shapes having been checked by attention.py. Scales are empty where the
// slots are floats.
ffi::Error attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer key, ffi::AnyBuffer value,
                  ffi::Buffer<ffi::F32> key_scale, ffi::Buffer<ffi::F32> value_scale, ffi::Buffer<ffi::S32> end,
                  ffi::Result<ffi::AnyBuffer> out, std::string_view isa) {
  Attention attention{};
  attention.rows = q.dimensions()[0];
  attention.heads = q.dimensions()[1];
  attention.width = q.dimensions()[2];
  attention.slots = key.dimensions()[key.dimensions().size() - 2];  // one row's cache may be without the axis of rows
  attention.q = q.untyped_data();
  attention.q_is_bfloat16 = q.element_type() == ffi::BF16;
  attention.key = key.untyped_data();
  attention.value = value.untyped_data();
  const bool bytes = key.element_type() == ffi::S8;
  attention.key_scale = bytes ? key_scale.typed_data() : nullptr;
  attention.value_scale = bytes ? value_scale.typed_data() : nullptr;
  attention.kind = bytes ? kSlotBytes : key.element_type() == ffi::F32 ? kSlotFloats : kSlotBfloats;
  attention.end = end.typed_data();
  attention.out = out->untyped_data();
  run(attention, choose_attention(std::string(isa).c_str()), pool);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace glmjax::cpu

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT XLA_FFI_Error* glmjax_cpu_product(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(glmjax_cpu_product, glmjax::cpu::multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Attr<int64_t>("kind")
                                  .Attr<bool>("fast")
                                  .Attr<std::string_view>("isa"));

EXPORT XLA_FFI_Error* glmjax_cpu_attention(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(glmjax_cpu_attention, glmjax::cpu::attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<std::string_view>("isa"));

// The number of what the handler takes; library.py has the same. Another one with every change of arguments.
EXPORT int glmjax_cpu_interface() { return 3; }

// The version of XLA's interface that the library was built for.
EXPORT int glmjax_cpu_ffi_major() { return XLA_FFI_API_MAJOR; }
EXPORT int glmjax_cpu_ffi_minor() { return XLA_FFI_API_MINOR; }

// The instruction sets of this machine, the best first; null at the end.
EXPORT const char* const* glmjax_cpu_sets() { return glmjax::cpu::sets(); }

// The sum of so many words: what reading memory takes.
EXPORT uint64_t glmjax_cpu_sum_words(const uint64_t* words, int64_t count) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += words[i];
  return sum;
}
