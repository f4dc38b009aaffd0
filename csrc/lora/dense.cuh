// The pass of dense.cu as decode.cu, routed.cu and shrink.cu use it: every expert's A, and the router, over the same rows
// of x; or, backward, every expert's B over rows of dy, where `in` is the layer's output.
#pragma once
#include "lora/cuda.h"
#include "lora/plan_cuda.h"

namespace moa {

constexpr int kCounters = 4;

struct DenseParams {
  DType x_type, adapter_type;
  int64_t tokens, in;
  const void* x;  // [tokens, in], rows ldx apart
  int64_t ldx;
  const void* lora;  // A [lora_rows, in]: E * rank rows; or none
  int64_t lora_rows;
  int64_t columns;            // backward, 16-bit x only: rank of B [E, in, rank]; lora_rows is E * 8 ceil(rank / 8)
  const void* router_weight;  // [experts, in] accumulator type; or none
  int64_t experts;
  // Planes, one for each split of the plan's: the results are their sums.
  void* h;             // [splits][tokens, lora_rows]
  void* logits;        // [splits][tokens, experts]
  uint32_t* counters;  // kCounters that the pass sets to 0 for the launch behind it, or null
};

plan_cuda::Dense plan_of(const DenseParams& p);
size_t planes_size(const DenseParams& p, int64_t columns);  // bytes
cudaError_t dense_cuda(const DenseParams& p, cudaStream_t stream);

int64_t routed_shrink_splits(const ForwardParams& f);  // planes in RoutedShrinkParams::all

}  // namespace moa
