// What the second launches of few tokens have in common: decode.cu's own, and skinny.cu's, which multiplies the base, too.
#pragma once
#include "lora/cuda.h"
#include "lora/tile.cuh"
#include "routing/select.cuh"

namespace moa {

struct DecodeLaunch : DecodeParams {
  const void *planes,
      *logit_planes;  // [splits][tokens][E r], [splits][tokens][E]; or [splits][slots][r], null: seg has
  int64_t splits;     // the routing then, and weights those of its slots
  int round;          // slots of a token at once
  bool direct;        // rows of B are whole 16-byte chunks
  bool fetch;         // all of B into L2, whoever is chosen
};

// The sum of planes [rows][columns].
template <class A>
__device__ __forceinline__ A plane_sum(const DecodeLaunch& p, const void* planes, int64_t rows, int64_t columns,
                                       int64_t row, int64_t column) {
  constexpr int kAtOnce = 16;
  const int64_t size = rows * columns;
  const A* at = static_cast<const A*>(planes) + row * columns + column;
  const int splits = static_cast<int>(p.splits);
  A sum = 0;
#pragma unroll 1
  for (int first = 0; first < splits; first += kAtOnce) {
    A plane[kAtOnce];
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s, at += size) plane[s] = first + s < splits ? *at : A(0);
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) sum += plane[s];
  }
  return sum;
}

// Selection from rows of logits in shared memory; of `tokens` tokens.
template <class A>
__device__ __forceinline__ TopkParams selection(const DecodeLaunch& p, int tokens, const A* logits, A* weights,
                                                int64_t* ids) {
  TopkParams routing{};
  routing.logits_type = std::is_same<A, double>::value ? DType::f64 : DType::f32;
  routing.tokens = tokens;
  routing.experts = routing.ldz = p.seg.experts;
  routing.top_k = p.seg.top_k;
  routing.logits = logits;
  routing.score_func = p.score_func;
  routing.norm_topk_prob = p.norm_topk_prob;
  routing.selection_bias = p.selection_bias;
  routing.weights = weights;
  routing.indices = ids;
  return routing;
}

template <class A>
__device__ __forceinline__ A logit(const DecodeLaunch& p, int64_t token, int64_t e) {
  return plane_sum<A>(p, p.logit_planes, p.seg.tokens, p.seg.experts, token, e);
}

// What rank j of expert e's B counts for whoever has it with this weight: a token or, where the routing is given, the slot
// at this position.
template <class A>
__device__ __forceinline__ A coefficient(const DecodeLaunch& p, int64_t at, int64_t e, A weight, int j) {
  if (j >= (p.ranks == nullptr ? p.rank : clamp(p.ranks[e], 0, p.rank))) return A(0);
  const bool given = p.logit_planes == nullptr;
  const int64_t rows = p.seg.tokens * (given ? p.seg.top_k : 1), columns = (given ? 1 : p.seg.experts) * p.rank;
  return weight * static_cast<A>(p.scaling * (p.scale == nullptr ? 1.0 : p.scale[e])) *
         plane_sum<A>(p, p.planes, rows, columns, at, (given ? 0 : e * p.rank) + j);
}

// B's rows of outputs o0 .. o0 + columns - 1, of all experts, are on their way to L2; thread `index` of `threads`.
template <class TA>
__device__ __forceinline__ void fetch_rows(const DecodeLaunch& p, int64_t o0, int columns, int index, int threads) {
  constexpr int kLine = 128;
  const int bytes = static_cast<int>(clamp(p.out - o0, 0, columns) * p.rank * static_cast<int64_t>(sizeof(TA)));
  const int lines = (bytes + kLine - 1) / kLine;
  for (int i = index; i < p.seg.experts * lines; i += threads)
    prefetch_l2(reinterpret_cast<const char*>(static_cast<const TA*>(p.lora_B) + (i / lines * p.out + o0) * p.rank) +
                i % lines * kLine);
}

// A thread's output of one token: the products of its slots' rows of B with coef [slots][each * kSize], by chunks of 16
// bytes; chunk q is chunk q % each of slot q / each.
template <class A, class TA>
struct Dot {
  static constexpr int kSize = 16 / sizeof(TA), kAtOnce = 4;
  const DecodeLaunch& p;
  const int64_t o;
  const int64_t* ids;  // of the slots; -1 for no expert
  int slots, each;
  alignas(16) TA b[kAtOnce][kSize];
  int count[kAtOnce];  // ranks of each: unused ones of B may hold anything, and are not taken

  __device__ __forceinline__ void load(int first) {
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int slot = (first + u) / each, rank = (first + u) % each * kSize;
      count[u] = 0;
      const int64_t e = slot < slots ? ids[slot] : -1;
      if (e < 0) continue;
      const int used = static_cast<int>(p.ranks == nullptr ? p.rank : clamp(p.ranks[e], 0, p.rank));
      const TA* const from = static_cast<const TA*>(p.lora_B) + (e * p.out + o) * p.rank + rank;
      count[u] = used - rank;
      if (p.direct) {
        *reinterpret_cast<uint4*>(b[u]) = *reinterpret_cast<const uint4*>(from);
      } else {
#pragma unroll
        for (int v = 0; v < kSize; ++v)
          if (v < count[u]) b[u][v] = from[v];
      }
    }
  }
  __device__ __forceinline__ A product(int first, const A* coef) const {
    A sum = 0;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (count[u] <= 0) continue;
#pragma unroll
      for (int v = 0; v < kSize; ++v)
        sum += v < count[u] ? coef[(first + u) * kSize + v] * static_cast<A>(to_acc(b[u][v])) : A(0);
    }
    return sum;
  }
};

// The second launch where it multiplies the base, too (skinny.cu); experts: those of the router, 0 where the routing is
// given.
bool skinny_mixture_fits(const ForwardParams& p, int64_t experts);
cudaError_t skinny_mixture_cuda(const DecodeLaunch& p, cudaStream_t stream);

}  // namespace moa
