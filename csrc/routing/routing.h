// What the routing kernels are asked to do. Equations: see moa_ops/functional.py and the paper's gate.
#pragma once
#include "common/types.h"

namespace moa {

enum class ScoreFunc : int { softmax = 0, sigmoid = 1 };

struct TopkParams {
  DType logits_type;  // weights are float, or double for f64
  int64_t tokens, experts, top_k;
  const void* logits;  // [tokens, experts], rows ldz apart
  int64_t ldz;
  ScoreFunc score_func;
  bool norm_topk_prob;
  const void* selection_bias;  // [experts] weights' type, or null
  const bool* mask;            // [tokens] or null: false rows get index -1, weight 0
  void* weights;               // [tokens, top_k]
  int64_t* indices;            // [tokens, top_k]
};

struct TopkBackwardParams {
  DType logits_type;
  int64_t tokens, experts, top_k;
  const void* logits;  // [tokens, experts], rows ldz apart
  int64_t ldz;
  ScoreFunc score_func;
  bool norm_topk_prob;
  const int64_t* indices;    // [tokens, top_k]
  const void* grad_weights;  // [tokens, top_k] weights' type
  void* grad_logits;         // [tokens, experts] logits_type
};

// logits = x W^T in the accumulator type.
struct RouterParams {
  DType x_type;
  int64_t tokens, in, experts;
  const void* x;  // [tokens, in], rows ldx apart
  int64_t ldx;
  const void* weight;  // [experts, in] accumulator type
  void* logits;        // [tokens, experts] accumulator type
};

// dx += dz W (in place), dW = dz^T x, for a gradient that reaches every logit.
struct RouterBackwardParams {
  DType x_type;
  int64_t tokens, in, experts;
  const void* x;  // [tokens, in], rows ldx apart
  int64_t ldx;
  const void* weight;   // [experts, in] accumulator type
  const void* dz;       // [tokens, experts] accumulator type
  void* dx;             // [tokens, in] x_type, or null
  void* d_weight;       // [experts, in] accumulator type, or null
  const int32_t* rows;  // 0 .. tokens - 1
};

// Stable counting sort of slots by expert. False if an id is outside [-1, experts): nothing is read with it.
bool sort_by_expert(const int64_t* indices, int64_t slots, int64_t experts, int32_t* offsets, int32_t* order);

}  // namespace moa
