// The arguments of the LoRA operators as the CPU's kernels take them: scales and ranks as plain arrays, and a routing
// whose contents have been checked before anything indexes with them.
#pragma once
#include <vector>

#include "torch/arguments.h"

namespace moa {

inline std::vector<double> scales(const OptionalTensor& expert_scaling, double scaling, int64_t experts) {
  std::vector<double> scale(experts, scaling);
  if (!expert_scaling.has_value()) return scale;
  const bool f64 = expert_scaling->scalar_type() == ScalarType::Double;
  for (int64_t e = 0; e < experts; ++e)
    scale[e] *= f64 ? data<double>(*expert_scaling)[e] : double{data<float>(*expert_scaling)[e]};
  return scale;
}

// A routing that came from outside: its contents are checked before a kernel indexes with them.
struct Arguments : Mixture {
  std::vector<double> scale;
  std::vector<int32_t> used;

  Arguments(LoraParams* p, const Tensor& x_, const Tensor& A, const Tensor& B, const Tensor& w, const Tensor& off,
            const Tensor& ord, const OptionalTensor& expert_scaling_, double scaling, const OptionalTensor& ranks_)
      : Mixture(p, x_, A, B, w, off, ord, expert_scaling_, ranks_),
        scale(scales(expert_scaling, scaling, p->seg.experts)) {
    check_segments(p->seg);
    p->scale = scale.data();
    if (!ranks.has_value()) return;
    const bool wide = ranks->scalar_type() == ScalarType::Long;
    for (int64_t e = 0; e < p->seg.experts; ++e) {
      const int64_t rank = wide ? data<int64_t>(*ranks)[e] : data<int32_t>(*ranks)[e];
      STD_TORCH_CHECK(rank >= 0 && rank <= p->rank, "ranks[", e, "] is ", rank, "; allowed are 0 to ", p->rank,
                      ", the rows of lora_A");
      used.push_back(static_cast<int32_t>(rank));
    }
    p->ranks = used.data();
  }

  // What a kernel will index with, before it does.
  static void check_segments(const Segments& s) {
    const int64_t slots = s.tokens * s.top_k;
    STD_TORCH_CHECK(s.offsets[0] == 0 && s.offsets[s.experts] <= slots, "expert_offsets run from ", s.offsets[0],
                    " to ", s.offsets[s.experts], "; they must start at 0 and end at most at ", slots);
    for (int64_t e = 0; e < s.experts; ++e)
      STD_TORCH_CHECK(s.offsets[e] <= s.offsets[e + 1], "expert_offsets fall from ", s.offsets[e], " to ",
                      s.offsets[e + 1], " at expert ", e, "; they must ascend");
    uint32_t outside = 0;
    for (int64_t i = 0; i < slots; ++i) outside |= static_cast<uint32_t>(s.order[i]) >= static_cast<uint32_t>(slots);
    STD_TORCH_CHECK(outside == 0, "order has an entry outside 0 to ", slots - 1, ": it must permute the ", slots,
                    " slots");
    // Kernels find an expert's slots in a block of tokens by bisection.
    for (int64_t e = 0; e < s.experts; ++e) {
      int falls = 0;
      for (int64_t i = s.offsets[e] + 1; i < s.offsets[e + 1]; ++i) falls |= s.order[i] <= s.order[i - 1];
      STD_TORCH_CHECK(falls == 0, "order does not ascend within the segment of expert ", e,
                      "; moa_ops::sort_by_expert makes it so");
    }
  }
};

}  // namespace moa
