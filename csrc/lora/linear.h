// The base's product for few tokens on a CPU: y += x W^T. Included only by csrc/isa/kernels.cpp.
//
// A GEMM library packs its operands before it multiplies, which pays for hundreds of tokens; with a few, reading W once
// is the whole work. Here every row of W is read once, as it lies, against all tokens, while the rows after it are
// fetched. A task owns some rows of W, which are columns of y.
#pragma once
#include "lora/kernels.h"

namespace moa {
namespace MOA_ISA {

template <class V, class T>
static void add_linear(const LinearParams& p) {
  using In = typename V::In;
  using Acc = typename V::Acc;
  constexpr bool direct = Same<T, In>::value;
  const T* weight = static_cast<const T*>(p.weight);
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  const In** rows = scratch<const In*>(Scratch::call_pointers, p.tokens);
  In* converted = direct ? nullptr : scratch<In>(Scratch::call_first, p.tokens * p.in);
  for (int64_t t = 0; t < p.tokens; ++t)
    rows[t] = row_as<V, T>(x + t * p.ldx, p.in, direct ? nullptr : converted + t * p.in);

  const int64_t block = plan::linear_rows(p.out);
  parallel_tasks(plan::ceil_div(p.out, block), plan::worth_threads(p.out * p.in * sizeof(T)), [&](int64_t task) {
    const int64_t begin = task * block, end = min64(begin + block, p.out);
    Acc* tile = scratch<Acc>(Scratch::tile, p.tokens * block);
    In* buffer = direct ? nullptr : scratch<In>(Scratch::panel, V::kDotN * p.in);
    for (int64_t o = begin; o < end; o += V::kDotN) {
      const int64_t n = min64(V::kDotN, end - o), left = min64(V::kDotN, p.out - o - n);
      const T* w = weight + o * p.ldw;
      const Ahead ahead(w + n * p.ldw, left * p.ldw * static_cast<int64_t>(sizeof(T)));
      if constexpr (direct) {
        dot_block<V>(rows, p.tokens, 0, w, p.ldw, n, p.in, tile + o - begin, block, false, ahead);
      } else {
        for (int64_t i = 0; i < n; ++i) convert_row(w + i * p.ldw, buffer + i * p.in, p.in);
        dot_block<V>(rows, p.tokens, 0, buffer, p.in, n, p.in, tile + o - begin, block, false, ahead);
      }
    }
    for (int64_t t = 0; t < p.tokens; ++t) {
      T* out = y + t * p.out + begin;
      const Acc* sum = tile + t * block;
      for (int64_t i = 0; i < end - begin; ++i) from_acc(to_acc(out[i]) + sum[i], out + i);
    }
  });
}

}  // namespace MOA_ISA
}  // namespace moa
