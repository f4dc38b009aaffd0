// What expand.cu is asked to do, whoever launches it: equation and limits there.
#pragma once
#include "lora/expand_order.cuh"

namespace moa {

struct ExpandParams {
  DType type;
  Coefficients c;
  int64_t tokens, width;
  const void* panel;  // element (e, j, o) at e rank width + j panel_j + o panel_o
  int64_t panel_j, panel_o;
  bool panel_f32, panel_direct;  // float under 16-bit y; rows are whole 16-byte chunks
  const void* dz;                // [slots] or null
  const void* router;            // [experts, width] accumulator type
  const void* base;              // [tokens, width], rows ldbase apart, or null; may be y
  int64_t ldbase;
  const void* bias;  // [width] or null
  void* y;           // [tokens, width]
  // Tensor cores
  bool fours;           // y, base and bias can be taken by four elements
  const Place* places;  // [slots], or null: each block finds those of its tokens
  const int64_t* ids;   // [slots] instead of places, for values that are `all`: no token names an expert twice
  const int32_t* rows;  // [tokens], or null: row t is token t
  int fragments;        // of coefficients that shared memory holds
  int64_t units;        // of 128 columns per block
  void* sums;           // [slots, rank] or null: what the planes of c sum up to (add_planes)
};

// sums, by all blocks together: this one is `block` of `blocks`.
template <class A>
__device__ __forceinline__ void add_planes(const ExpandParams& p, int64_t block, int64_t blocks) {
  if (p.sums == nullptr) return;
  constexpr int kThreads = plan_cuda::kExpandThreads;
  for (int64_t i = block * kThreads + threadIdx.x; i < p.c.slots * p.c.rank; i += blocks * kThreads)
    static_cast<A*>(p.sums)[i] = p.c.value<A>(0, i);
}

// ---- on the host ----

inline plan_cuda::Expand expand_plan(const LoraParams& l, int64_t width, bool router) {
  return plan_cuda::expand(l.seg.tokens, l.seg.top_k, l.seg.experts, l.rank, width, router);
}
inline plan_cuda::ExpandWide expand_wide_plan(const ExpandParams& p) {
  return plan_cuda::expand_wide(p.tokens, p.c.top_k, p.c.experts, p.c.rank, p.width, p.dz != nullptr);
}
inline bool on_tensor_cores(const LoraParams& l, const plan_cuda::Expand& plan) {
  return is_half(l.x_type) && plan.fits;
}

inline ExpandParams expand_params(const LoraParams& l, const void* values, const void* panel, int64_t width,
                                  bool by_rows, void* y) {
  ExpandParams p{};
  p.type = l.x_type;
  p.c = coefficients_of(l, values);
  p.tokens = l.seg.tokens;
  p.width = width;
  p.panel = panel;
  p.panel_j = by_rows ? 1 : width;
  p.panel_o = by_rows ? l.rank : 1;
  p.panel_f32 = is_half(l.x_type) && l.adapter_type == DType::f32;
  p.panel_direct = is_half(l.x_type) && !p.panel_f32 && chunks(panel, by_rows ? l.rank : width, 2);
  p.y = y;
  return p;
}
inline ExpandParams expand_params(const ForwardParams& f, const void* values) {
  ExpandParams p = expand_params(f, values, f.lora_B, f.out, true, f.y);
  p.base = f.base;
  p.ldbase = f.ldbase;
  p.bias = f.bias;
  return p;
}

// expand.cu: p.places, and the router's weight in two terms where `terms` is not null.
cudaError_t expand_places_cuda(const ExpandParams& p, __nv_bfloat16* terms, cudaStream_t stream);
// expand_wide.cu
size_t expand_wide_work(const ExpandParams& p, const plan_cuda::ExpandWide& plan);
cudaError_t expand_wide_cuda(const ExpandParams& p, const plan_cuda::ExpandWide& plan, void* work, cudaStream_t stream);

// What the tensor cores' tile takes from its plan.
inline void prepare(ExpandParams* p, const plan_cuda::Expand& plan) {
  const auto fours = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 8 == 0; };
  p->fours = p->width % 4 == 0 && p->ldbase % 4 == 0 && fours(p->y) && fours(p->base) && fours(p->bias);
  p->fragments = static_cast<int>(plan.fragments);
  p->units = plan.units;
}

}  // namespace moa
