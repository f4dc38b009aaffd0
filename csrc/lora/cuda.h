// The LoRA kernels on the GPU: the parameters and equations of lora/lora.h, all pointers on the device.
//
//   scale   [experts], or null for 1; `scaling` multiplies it
//   ranks   [experts], or null for all of them; what is outside 0 .. rank is clamped
//
// Nothing is read on the host and nothing waits: every call only puts kernels on the stream, so that a CUDA graph can
// hold it. offsets, order and ranks come from outside: kernels clamp what they use as an address. Rows of slots without
// an expert, the last ones in sorted order, come out as zeros. `work` is memory of at least the size that the function
// beside it names, contents undefined. dtypes as on the CPU; results are bitwise reproducible.
#pragma once
#include "common/cuda_api.h"
#include "lora/lora.h"
#include "routing/routing.h"

namespace moa {

// h
size_t shrink_work(const ForwardParams& p);
cudaError_t shrink_cuda(const ForwardParams& p, void* work, cudaStream_t stream);
// y, from h
size_t expand_work(const ForwardParams& p);
cudaError_t expand_cuda(const ForwardParams& p, void* work, cudaStream_t stream);

// y, and h where that is not null, from x: for few tokens in two launches, shrink and expand. With weight, which only
// what mixture_multiplies may have, y = bias + x W^T + mixture, in as many.
bool mixture_multiplies(const ForwardParams& p);
size_t mixture_work(const ForwardParams& p);
cudaError_t mixture_cuda(const ForwardParams& p, void* work, cudaStream_t stream);

// Shrink for a layer that routes its own x, where x is read once for both: every expert's product of every token, and
// the router's logits; once they are routed, pick_cuda takes h from `all`, of the same sizes. seg says sizes alone here.
struct RoutedShrinkParams : ForwardParams {
  const void* router_weight;  // [experts, in] accumulator type
  void* all;                  // memory of routed_shrink_all's size
  void* logits;               // [tokens, experts] accumulator type
};
bool routed_shrink_fits(const ForwardParams& p);
size_t routed_shrink_all(const RoutedShrinkParams& p);
size_t routed_shrink_work(const RoutedShrinkParams& p);
cudaError_t routed_shrink_cuda(const RoutedShrinkParams& p, void* work, cudaStream_t stream);
cudaError_t pick_cuda(const ForwardParams& p, const void* all, cudaStream_t stream);
// y from `all` without h and without the sorted order: ids [tokens, top_k] are the router's own.
bool expand_all_fits(const ForwardParams& p);
size_t expand_all_work(const RoutedShrinkParams& p);
cudaError_t expand_all_cuda(const RoutedShrinkParams& p, const int64_t* ids, void* work, cudaStream_t stream);

// u, and dw where it is not null
size_t backward_shrink_work(const BackwardParams& p);
cudaError_t backward_shrink_cuda(const BackwardParams& p, void* work, cudaStream_t stream);
// dx, from u, with the router's share where dz is not null
size_t backward_expand_work(const BackwardParams& p);
cudaError_t backward_expand_cuda(const BackwardParams& p, void* work, cudaStream_t stream);
// those of dA, dB and d_router that are not null, from u and h
size_t gram_work(const BackwardParams& p);
cudaError_t gram_cuda(const BackwardParams& p, void* work, cudaStream_t stream);

// y = start + x W^T for few tokens in 16-bit types; skinny_fits: whether it is for it.
struct SkinnyParams : LinearParams {
  const void* start;  // [tokens, out] rows ldstart apart, 0 for a bias of all; may be y; or null
  int64_t ldstart;
};
bool skinny_fits(const LinearParams& p);
cudaError_t skinny_linear_cuda(const SkinnyParams& p, cudaStream_t stream);

// The mixture of x that its own logits route: router, top-k, shrink and expand in two launches, for few tokens
// (plan_cuda.h). seg says sizes alone, its pointers are not used, nor are weights. What a backward needs is given out, all
// of it with h, or nothing; then base is not used either: y holds it, or weight is given, which only what
// decode_multiplies may have, and y = bias + x W^T + mixture.
struct DecodeParams : ForwardParams {
  const void* router_weight;  // [experts, in] accumulator type
  ScoreFunc score_func;
  bool norm_topk_prob;
  const void* selection_bias;  // [experts] accumulator type, or null
  void* logits;                // [tokens, experts] accumulator type, or null: nothing is given out
  void* gates;                 // [tokens, top_k] accumulator type: the weights
  int64_t* indices;            // [tokens, top_k]
  int32_t *offsets, *order;    // [experts + 1], [tokens * top_k]
};
bool decode_fits(const DecodeParams& p);
bool decode_multiplies(const DecodeParams& p);
size_t decode_work(const DecodeParams& p);
cudaError_t decode_cuda(const DecodeParams& p, void* work, cudaStream_t stream);
// Its launches one by one: the first does not touch y, and may run beside what makes a base that y holds.
cudaError_t decode_first_cuda(const DecodeParams& p, void* work, cudaStream_t stream);
cudaError_t decode_second_cuda(const DecodeParams& p, void* work, cudaStream_t stream);
// Its way where something is given out, or where reading all of A is too much.
size_t routed_work(const DecodeParams& p);
cudaError_t routed_first_cuda(const DecodeParams& p, void* work, cudaStream_t stream);
cudaError_t routed_second_cuda(const DecodeParams& p, void* work, cudaStream_t stream);

// logits
size_t router_work(const RouterParams& p);
cudaError_t router_cuda(const RouterParams& p, void* work, cudaStream_t stream);
// dx += dz W, and d_weight where it is not null; `rows` is not used
size_t router_backward_work(const RouterBackwardParams& p);
cudaError_t router_backward_cuda(const RouterBackwardParams& p, void* work, cudaStream_t stream);

}  // namespace moa
