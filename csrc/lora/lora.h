// What the LoRA kernels are asked to do: pointers, sizes and strides, no tensors.
//
//   h[p]  = A_e x[t]                             shrink           p = position in the sorted slots, slot = order[p],
//   y[t]  = base[t] + bias + sum_p s w B_e h[p]  expand-combine   t = slot / top_k, w = weights[slot], s = scale[e]
//   u[p]  = dy[t] B_e,  dw[slot] = s <h[p], u[p]>                 shrink with a dot in its epilogue
//   dx[t] = sum_p s w A_e^T u[p] + dz[t,e] W_r[e]                 expand-combine
//   dA_e  = sum_p (s w u[p])^T x[t]   dW_r[e] = sum_p dz[t,e] x[t]        gram
//   dB_e  = sum_p dy[t]^T (s w h[p])                              gram
#pragma once
#include "common/types.h"

namespace moa {

// Slots t * top_k + j sorted by expert: those of expert e are order[offsets[e] .. offsets[e + 1]).
struct Segments {
  const int32_t* offsets;  // [experts + 1]
  const int32_t* order;    // [tokens * top_k]
  int64_t tokens, top_k, experts;
  int64_t slots() const { return offsets[experts]; }  // those with an adapter
};

struct LoraParams {
  DType x_type, adapter_type;  // accumulators are float, or double for f64
  Segments seg;
  int64_t in, out, rank;  // rank: rows of A allocated per expert
  const void* x;          // [tokens, in], rows ldx apart
  int64_t ldx;
  const void* lora_A;    // [experts, rank, in]
  const void* lora_B;    // [experts, out, rank]
  const void* weights;   // [tokens, top_k] accumulator type
  const double* scale;   // [experts]
  double scaling;        // on CUDA, where scale may be null, a factor of it; the CPU has it in scale
  const int32_t* ranks;  // [experts] rows of A in use
};

struct ForwardParams : LoraParams {
  const void* base;  // [tokens, out] or null, rows ldbase apart
  int64_t ldbase;
  const void* bias;  // [out] or null
  void* y;           // [tokens, out]
  void* h;           // [tokens * top_k, rank] accumulator type
  // CUDA alone: W [out, in], rows ldw apart, where y takes x W^T as well (lora/cuda.h), or null
  const void* weight;
  int64_t ldw;
};

// y += x W^T, all of one type.
struct LinearParams {
  DType type;
  int64_t tokens, in, out;
  const void* x;  // [tokens, in], rows ldx apart
  int64_t ldx;
  const void* weight;  // [out, in], rows ldw apart
  int64_t ldw;
  void* y;  // [tokens, out]
};

// dx += dy W, all of one type.
struct LinearBackwardParams {
  DType type;
  int64_t tokens, in, out;
  const void* dy;  // [tokens, out], rows lddy apart
  int64_t lddy;
  const void* weight;  // [out, in], rows ldw apart
  int64_t ldw;
  void* dx;  // [tokens, in]
};

struct BackwardParams : LoraParams {
  const void* dy;  // [tokens, out], rows lddy apart
  int64_t lddy;
  const void* h;
  void* u;   // [tokens * top_k, rank] accumulator type, work memory
  void* dw;  // [tokens, top_k] or null
  // The router's share, when its weight reads the same x: gradient of the selected logits, at their sorted position.
  const void* dz;             // [tokens * top_k] accumulator type, or null
  const void* router_weight;  // [experts, in] accumulator type
  void* dx;                   // [tokens, in] or null
  void* dA;                   // or null
  void* dB;                   // or null
  void* d_router;             // [experts, in] accumulator type, or null
};

}  // namespace moa
