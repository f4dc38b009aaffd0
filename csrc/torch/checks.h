// Checks of arguments that are numbers.
#pragma once
#include "routing/routing.h"
#include "torch/tensors.h"

namespace moa {

inline ScoreFunc score_func_of(int64_t value) {
  STD_TORCH_CHECK(value == 0 || value == 1, "score_func is ", value, "; allowed are 0 (softmax) and 1 (sigmoid)");
  return static_cast<ScoreFunc>(value);
}

inline void check_slots(int64_t tokens, int64_t top_k, int64_t experts) {
  STD_TORCH_CHECK(tokens * top_k < (int64_t{1} << 31) && experts < (int64_t{1} << 31) - 1, tokens, " tokens x ", top_k,
                  " and ", experts, " experts: slots and experts are counted in int32; route in pieces");
}

inline void check_topk(int64_t tokens, int64_t experts, int64_t top_k) {
  STD_TORCH_CHECK(top_k >= 1 && top_k <= experts, "top_k is ", top_k, " with ", experts,
                  " experts; allowed are 1 to the number of experts");
  check_slots(tokens, top_k, experts);
}

}  // namespace moa
