// Compiled once per instruction set, with -DMOA_ISA=<name> and that set's flags. Everything included here lives in
// moa::<name>, so that no two copies of a function share a symbol; the standard library's templates stay out.
#define MOA_STRING_(x) #x
#define MOA_STRING(x) MOA_STRING_(x)
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define MOA_HAS_AVX2
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define MOA_HAS_AVX512
#endif
#if defined(__AVX512BF16__)
#define MOA_HAS_AVX512_BF16
#endif
#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define MOA_HAS_AMX_BF16
#endif

#include "isa/table.h"
#include "lora/linear.h"
#include "lora/ops.h"
#include "routing/router.h"
#include "routing/topk.h"

namespace moa {
namespace MOA_ISA {

#if defined(MOA_HAS_AVX512_BF16)
using Bf16Arithmetic = BF16;
#else
using Bf16Arithmetic = F32;  // converted to float on the way
#endif
#if defined(MOA_HAS_AMX_BF16)
using Bf16Lora = BF16Tiles;
#else
using Bf16Lora = Bf16Arithmetic;
#endif

// fn(Lora<arithmetic, x, adapters>) for the types at hand; the callers have checked that the pair is one of these.
template <class F>
static void for_types(const LoraParams& p, const F& fn) {
  const bool wider = p.adapter_type == DType::f32;
  switch (p.x_type) {
    case DType::f32: return fn(Lora<F32, float, float>(p));
    case DType::f64: return fn(Lora<F64, double, double>(p));
    case DType::bf16:
      if (wider) return fn(Lora<F32, bf16_t, float>(p));
      return fn(Lora<Bf16Lora, bf16_t, bf16_t>(p));
    case DType::f16:
      if (wider) return fn(Lora<F32, f16_t, float>(p));
      return fn(Lora<F32, f16_t, f16_t>(p));
  }
}

static void forward(const ForwardParams& p) {
  for_types(p, [&](const auto& lora) { lora.forward(p); });
}
static bool own_linear(DType type, int64_t tokens, int64_t in, int64_t out) {
  constexpr plan::Linear library = plan::Linear::library;
  switch (type) {
    case DType::f32: return linear_form<F32, float>(type, tokens, in, out) != library;
    case DType::f64: return linear_form<F64, double>(type, tokens, in, out) != library;
    case DType::bf16: return linear_form<Bf16Arithmetic, bf16_t>(type, tokens, in, out) != library;
    case DType::f16: return linear_form<F32, f16_t>(type, tokens, in, out) != library;
  }
  return false;
}
static void linear(const LinearParams& p) {
  switch (p.type) {
    case DType::f32: return linear<F32, float>(p);
    case DType::f64: return linear<F64, double>(p);
    case DType::bf16: return linear<Bf16Arithmetic, bf16_t>(p);
    case DType::f16: return linear<F32, f16_t>(p);
  }
}
static bool linear_backward(const LinearBackwardParams& p) {
  switch (p.type) {
    case DType::f32: return linear_backward<F32, float>(p);
    case DType::f64: return linear_backward<F64, double>(p);
    case DType::bf16: return linear_backward<Bf16Arithmetic, bf16_t>(p);
    case DType::f16: return linear_backward<F32, f16_t>(p);
  }
  return false;
}
static void backward_shrink(const BackwardParams& p) {
  for_types(p, [&](const auto& lora) { lora.backward_shrink(p); });
}
static void backward_outer(const BackwardParams& p) {
  for_types(p, [&](const auto& lora) { lora.backward_outer(p); });
}

static void topk(const TopkParams& p) {
  switch (p.logits_type) {
    case DType::f32: return topk_rows<float, float>(p);
    case DType::f64: return topk_rows<double, double>(p);
    case DType::bf16: return topk_rows<bf16_t, float>(p);
    case DType::f16: return topk_rows<f16_t, float>(p);
  }
}
static void topk_backward(const TopkBackwardParams& p) {
  switch (p.logits_type) {
    case DType::f32: return topk_backward_rows<float, float>(p);
    case DType::f64: return topk_backward_rows<double, double>(p);
    case DType::bf16: return topk_backward_rows<bf16_t, float>(p);
    case DType::f16: return topk_backward_rows<f16_t, float>(p);
  }
}
static void router(const RouterParams& p) {
  switch (p.x_type) {
    case DType::f32: return router_logits<F32, float>(p);
    case DType::f64: return router_logits<F64, double>(p);
    case DType::bf16: return router_logits<F32, bf16_t>(p);
    case DType::f16: return router_logits<F32, f16_t>(p);
  }
}
static void router_backward(const RouterBackwardParams& p) {
  switch (p.x_type) {
    case DType::f32: return router_backward<F32, float>(p);
    case DType::f64: return router_backward<F64, double>(p);
    case DType::bf16: return router_backward<F32, bf16_t>(p);
    case DType::f16: return router_backward<F32, f16_t>(p);
  }
}

extern const KernelTable kTable;
const KernelTable kTable = {MOA_STRING(MOA_ISA), topk,   topk_backward,   router,          router_backward, forward,
                            own_linear,          linear, linear_backward, backward_shrink, backward_outer};

}  // namespace MOA_ISA
}  // namespace moa
