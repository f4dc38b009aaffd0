// Decode: y[t] += sum_j w[t,j] s_e B_e (A_e x[t]) for few tokens, with w and e from the logits W_r x[t], in two
// launches; and the choice between this, where every expert's A is read, and routed.cu.
//
//   1  dense.cu: planes of A_e x[t] of every expert and of the logits, one for each split of the depth
//   2  a block owns 8 tokens and 128 outputs, a thread one output. It adds the planes of its tokens' logits, selects (a
//      warp a token), adds the planes of the selected h, and then expands: y's element is read early and written once.
//
// Each block of the second launch repeats the selection of its tokens: that costs less than a third launch, and needs
// neither counters, which two streams could not share, nor a wait between blocks. Planes are added in order, so the
// result is bitwise reproducible, and the selection is the same in every block.
//
// Limits: plan_cuda::decode_dense.
#include "lora/cuda.h"
#include "lora/dense.cuh"
#include "lora/tile.cuh"
#include "routing/cuda.h"
#include "routing/select.cuh"

namespace moa {
namespace {

using plan_cuda::kDecodeRows;
using plan_cuda::kDecodeThreads;

struct DecodeLaunch : DecodeParams {
  const void *planes, *logit_planes;  // [splits][tokens][E r], [splits][tokens][E]
  int64_t splits;
  int round;    // slots of a token at once
  bool direct;  // rows of B are whole 16-byte chunks
};

// The sum of planes of `columns` columns.
template <class A>
__device__ __forceinline__ A plane_sum(const DecodeLaunch& p, const void* planes, int64_t columns, int64_t token,
                                       int64_t column) {
  const int64_t size = p.seg.tokens * columns;
  const A* const at = static_cast<const A*>(planes) + token * columns + column;
  A sum = 0;
#pragma unroll 8
  for (int64_t s = 0; s < p.splits; ++s) sum += at[s * size];
  return sum;
}

// Ids and weights (times scale) of token t of the block, from its logits; a whole warp, of which lane j % 32 writes slot j.
template <class A>
__device__ __forceinline__ void select(const DecodeLaunch& p, int t, const A* logits, int64_t* ids, A* weights) {
  TopkParams token{};
  token.logits_type = std::is_same<A, double>::value ? DType::f64 : DType::f32;
  token.experts = token.ldz = p.seg.experts;
  token.top_k = p.seg.top_k;
  token.logits = logits;
  token.score_func = p.score_func;
  token.norm_topk_prob = p.norm_topk_prob;
  token.selection_bias = p.selection_bias;
  token.weights = weights;
  token.indices = ids;
  route_token<A, kWarp, 0>(token, t, true, nullptr);
  for (int64_t j = t * p.seg.top_k + threadIdx.x % kWarp; j < (t + 1) * p.seg.top_k; j += kWarp)
    weights[j] *= static_cast<A>(p.scaling * (p.scale == nullptr ? 1.0 : p.scale[ids[j]]));
}

// sum over slots and ranks of coef [slots][rank] times rows of B at output o. Loads of several slots are under way
// together: at one token their latency is what there is to wait for.
template <class A, class TA>
__device__ __forceinline__ A dot_rows(const DecodeLaunch& p, const A* coef, const int64_t* ids, int slots, int64_t o) {
  constexpr int kChunk = 16 / sizeof(TA);
  const int rank = static_cast<int>(p.rank), step = p.direct ? kChunk : 1, each = rank / step;
  // Unused ranks of B may hold anything: they are not taken.
  const auto used = [&](int64_t e) { return p.ranks == nullptr ? rank : static_cast<int>(clamp(p.ranks[e], 0, rank)); };
  const auto row = [&](int64_t e) { return static_cast<const TA*>(p.lora_B) + (e * p.out + o) * rank; };
  A sum = 0;
  if (p.direct) {
#pragma unroll 4
    for (int q = 0; q < slots * each; ++q) {
      const int64_t e = ids[q / each];
      const int i = q % each * kChunk, count = used(e) - i;
      alignas(16) TA b[kChunk];
      *reinterpret_cast<uint4*>(b) = *reinterpret_cast<const uint4*>(row(e) + i);
#pragma unroll
      for (int v = 0; v < kChunk; ++v) sum += v < count ? coef[q * kChunk + v] * static_cast<A>(to_acc(b[v])) : A(0);
    }
  } else {
#pragma unroll 1
    for (int q = 0; q < slots * each; ++q) {
      const int64_t e = ids[q / each];
      const int i = q % each;
      if (i < used(e)) sum += coef[q] * static_cast<A>(to_acc(row(e)[i]));
    }
  }
  return sum;
}

template <class T, class TA>
__global__ void __launch_bounds__(kDecodeThreads, 3) decode_expand(const DecodeLaunch p) {
  using A = Acc<T>;
  MOA_DYNAMIC_SHARED(int64_t, ids);  // [kDecodeRows][k]
  const int experts = static_cast<int>(p.seg.experts), k = static_cast<int>(p.seg.top_k);
  const int rank = static_cast<int>(p.rank);
  A* const sums = reinterpret_cast<A*>(ids + kDecodeRows * k);  // [kDecodeRows][kDecodeThreads], each thread its own
  A* const coef = sums + kDecodeRows * kDecodeThreads;          // [kDecodeRows][round][rank]
  A* const logits = coef + kDecodeRows * p.round * rank;
  A* const weights = logits + kDecodeRows * experts;

  const int64_t token = blockIdx.y * static_cast<int64_t>(kDecodeRows);
  const int tokens = static_cast<int>(clamp(p.seg.tokens - token, 0, kDecodeRows));
  const int64_t o = blockIdx.x * static_cast<int64_t>(kDecodeThreads) + threadIdx.x;
  const bool there = o < p.out;
  T* const y = static_cast<T*>(p.y) + token * p.out + o;
  A base[kDecodeRows];
#pragma unroll
  for (int t = 0; t < kDecodeRows; ++t) base[t] = there && t < tokens ? to_acc(y[t * p.out]) : A(0);

  for (int i = threadIdx.x; i < tokens * experts; i += kDecodeThreads)
    logits[i] = plane_sum<A>(p, p.logit_planes, p.seg.experts, token + i / experts, i % experts);
  __syncthreads();
  for (int t = threadIdx.x / kWarp; t < tokens; t += kDecodeThreads / kWarp) select<A>(p, t, logits, ids, weights);
  __syncthreads();

  for (int first = 0; first < k; first += p.round) {
    const int slots = k - first < p.round ? k - first : p.round, each = slots * rank;
    for (int i = threadIdx.x; i < tokens * each; i += kDecodeThreads) {
      const int t = i / each, j = first + i % each / rank;
      const int64_t e = ids[t * k + j];
      const int used = p.ranks == nullptr ? rank : static_cast<int>(clamp(p.ranks[e], 0, rank));
      const int row = i % rank;
      const A h = row < used ? plane_sum<A>(p, p.planes, p.seg.experts * rank, token + t, e * rank + row) : A(0);
      coef[i] = row < used ? weights[t * k + j] * h : A(0);
    }
    __syncthreads();
#pragma unroll 1
    for (int t = 0; t < tokens && there; ++t) {
      A* const sum = sums + t * kDecodeThreads + threadIdx.x;
      const A more = dot_rows<A, TA>(p, coef + t * each, ids + t * k + first, slots, o);
      *sum = first == 0 ? more : *sum + more;
    }
    __syncthreads();
  }
#pragma unroll
  for (int t = 0; t < kDecodeRows; ++t)
    if (there && t < tokens) y[t * p.out] = from_acc<T>(base[t] + sums[t * kDecodeThreads + threadIdx.x]);
}

int64_t element_size(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

DenseParams dense_of(const DecodeParams& p, void* planes) {
  DenseParams d{};
  d.x_type = p.x_type;
  d.adapter_type = p.adapter_type;
  d.tokens = p.seg.tokens;
  d.in = p.in;
  d.x = p.x;
  d.ldx = p.ldx;
  d.lora = p.lora_A;
  d.lora_rows = p.seg.experts * p.rank;
  d.router_weight = p.router_weight;
  d.experts = p.seg.experts;
  d.h = planes;
  d.logits = static_cast<char*>(planes) + planes_size(d, d.lora_rows);
  return d;
}

template <class T>
cudaError_t launch(const DecodeLaunch& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan_cuda::ceil_div(p.out, kDecodeThreads)),
                  static_cast<unsigned>(plan_cuda::ceil_div(p.seg.tokens, kDecodeRows)));
  const size_t shared =
      kDecodeRows * ((kDecodeThreads + p.round * p.rank + p.seg.experts + p.seg.top_k) * sizeof(Acc<T>) +
                     p.seg.top_k * sizeof(int64_t));
  if constexpr (sizeof(T) == 2) {
    if (p.adapter_type == DType::f32)
      return MOA_LAUNCH((decode_expand<T, float>), grid, kDecodeThreads, shared, stream, p);
  }
  return MOA_LAUNCH((decode_expand<T, T>), grid, kDecodeThreads, shared, stream, p);
}

}  // namespace

static bool is_dense(const DecodeParams& p) {
  return p.logits == nullptr &&
         plan_cuda::decode_dense(p.seg.tokens, p.seg.top_k, p.seg.experts, p.rank, p.in, element_size(p.adapter_type));
}

bool decode_fits(const DecodeParams& p) {
  return p.seg.tokens <= plan_cuda::kDecodeTokens && p.seg.experts <= kMaxExpertsCuda;
}
size_t decode_work(const DecodeParams& p) { return is_dense(p) ? planes_size(dense_of(p, nullptr), p.seg.experts * (p.rank + 1)) : routed_work(p); }

cudaError_t decode_cuda(const DecodeParams& params, void* work, cudaStream_t stream) {
  if (!decode_fits(params)) return cudaErrorInvalidValue;
  if (params.seg.tokens == 0 || (params.out == 0 && params.logits == nullptr)) return cudaSuccess;
  if (!is_dense(params)) return routed_cuda(params, work, stream);
  const DenseParams dense = dense_of(params, work);
  const cudaError_t error = dense_cuda(dense, stream);
  if (error != cudaSuccess) return error;
  DecodeLaunch p{};
  static_cast<DecodeParams&>(p) = params;
  p.planes = dense.h;
  p.logit_planes = dense.logits;
  p.splits = plan_of(dense).splits;
  p.round = static_cast<int>(plan_cuda::least(plan_cuda::decode_round(static_cast<int>(p.rank)), p.seg.top_k));
  p.direct = chunks(p.lora_B, p.rank, element_size(p.adapter_type));
  switch (p.x_type) {
    case DType::bf16: return launch<__nv_bfloat16>(p, stream);
    case DType::f16: return launch<__half>(p, stream);
    case DType::f64: return launch<double>(p, stream);
    default: return launch<float>(p, stream);
  }
}

}  // namespace moa
