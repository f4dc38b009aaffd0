// Decode: y[t] += sum_j w[t,j] s_e B_e (A_e x[t]) for few tokens, with w and e from the logits W_r x[t], in two
// launches; and the choice between this, where every expert's A is read, and routed.cu.
//
//   1  dense.cu: planes of A_e x[t] of every expert and of the logits, one for each split of the depth
//   2  a block owns 4 tokens and 64 outputs, a thread one output of one. It adds the planes of its tokens' logits,
//      selects, asks for the chosen rows of B, adds the planes of the selected h while they come, and then expands: y's
//      element is read early and written once. What takes time here is latency, so the loads of a sum, or of a dot, are
//      all under way together. Or, with the base's weight: skinny.cu, which multiplies that as well.
//
// Each block of the second launch repeats the selection of its tokens: that costs less than a third launch, and needs
// neither counters, which two streams could not share, nor a wait between blocks. Planes are added in order, so the
// result is bitwise reproducible, and the selection is the same in every block.
//
// Limits: plan_cuda::decode_dense.
#include "lora/decode.cuh"

#include "lora/dense.cuh"
#include "routing/cuda.h"
#include "routing/select.cuh"

namespace moa {
namespace {

using plan_cuda::kDecodeColumns;
using plan_cuda::kDecodeRows;
using plan_cuda::kDecodeThreads;
static_assert(kDecodeThreads == kDecodeRows * kDecodeColumns && kDecodeColumns % kWarp == 0, "a warp has one token");

// Ids and weights of the block's tokens, from their logits; L threads a token, whole warps.
template <class A, int L, int V>
__device__ __forceinline__ void select(const TopkParams& p) {
  const int t = threadIdx.x / L, tokens = static_cast<int>(p.tokens);
  if (t / (kWarp / L) * (kWarp / L) >= tokens) return;
  route_token<A, L, V>(p, t < tokens ? t : tokens - 1, t < tokens, nullptr);
}
template <class A>
__device__ __forceinline__ void select(const TopkParams& p) {
  if constexpr (std::is_same<A, double>::value) {
    for (int t = threadIdx.x / kWarp; t < p.tokens; t += kDecodeThreads / kWarp)
      route_token<A, kWarp, 0>(p, t, true, nullptr);
  } else if (p.experts <= 32) {
    select<A, 8, 4>(p);
  } else if (p.experts <= 128) {
    select<A, kWarp, 4>(p);
  } else {
    select<A, kWarp, 16>(p);
  }
}
static_assert(kDecodeRows * kWarp <= kDecodeThreads && plan_cuda::kDecodeExperts <= 16 * kWarp, "selected at once");

template <class T, class TA>
__global__ void __launch_bounds__(kDecodeThreads, sizeof(Acc<T>) == 8 ? 2 : 4) decode_expand(const DecodeLaunch p) {
  using A = Acc<T>;
  MOA_DYNAMIC_SHARED(A, coef);  // [kDecodeRows][round][each * kSize]
  const int experts = static_cast<int>(p.seg.experts), k = static_cast<int>(p.seg.top_k);
  const int rank = static_cast<int>(p.rank);
  constexpr int kSize = Dot<A, TA>::kSize;
  const int each = (rank + kSize - 1) / kSize;
  int64_t* const ids = reinterpret_cast<int64_t*>(coef + kDecodeRows * p.round * each * kSize);  // [kDecodeRows][k]
  A* const logits = reinterpret_cast<A*>(ids + kDecodeRows * k);
  A* const weights = logits + kDecodeRows * experts;

  const int64_t token = blockIdx.y * static_cast<int64_t>(kDecodeRows);
  const int tokens = static_cast<int>(clamp(p.seg.tokens - token, 0, kDecodeRows));
  const int64_t o0 = blockIdx.x * static_cast<int64_t>(kDecodeColumns), o = o0 + threadIdx.x % kDecodeColumns;
  const int t = threadIdx.x / kDecodeColumns;
  const bool there = t < tokens && o < p.out;
  T* const y = static_cast<T*>(p.y) + (token + t) * p.out + o;
  const A base = there ? to_acc(*y) : A(0);
  if (p.fetch) fetch_rows<TA>(p, o0, kDecodeColumns, threadIdx.x, kDecodeThreads);

  for (int i = threadIdx.x; i < tokens * experts; i += kDecodeThreads)
    logits[i] = logit<A>(p, token + i / experts, i % experts);
  __syncthreads();
  select<A>(selection<A>(p, tokens, logits, weights, ids));
  __syncthreads();

  A sum = 0;
  for (int first = 0; first < k; first += p.round) {
    const int slots = k - first < p.round ? k - first : p.round, width = each * kSize;
    Dot<A, TA> dot{p, o, ids + t * k + first, slots, each, {}, {}};
    if (there) dot.load(0);
    for (int i = threadIdx.x; i < tokens * slots * width; i += kDecodeThreads) {
      const int row = i % width, j = i / width % slots, of = i / width / slots * k + first + j;
      coef[i] = coefficient<A>(p, token + i / width / slots, ids[of], weights[of], row);
    }
    __syncthreads();
    for (int q = 0; there && q < slots * each; q += Dot<A, TA>::kAtOnce) {
      if (q > 0) dot.load(q);
      sum += dot.product(q, coef + t * slots * width);
    }
    if (first + slots < k) __syncthreads();  // all have left the coefficients
  }
  if (there) *y = from_acc<T>(base + sum);
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
  const dim3 grid(static_cast<unsigned>(plan_cuda::ceil_div(p.out, kDecodeColumns)),
                  static_cast<unsigned>(plan_cuda::ceil_div(p.seg.tokens, kDecodeRows)));
  const int64_t size = 16 / element_size(p.adapter_type), ranks = plan_cuda::ceil_div(p.rank, size) * size;
  const size_t shared =
      kDecodeRows * ((p.round * ranks + p.seg.experts + p.seg.top_k) * sizeof(Acc<T>) + p.seg.top_k * sizeof(int64_t));
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
bool decode_multiplies(const DecodeParams& p) { return is_dense(p) && skinny_mixture_fits(p, p.seg.experts); }
size_t decode_work(const DecodeParams& p) {
  return is_dense(p) ? planes_size(dense_of(p, nullptr), p.seg.experts * (p.rank + 1)) : routed_work(p);
}

static bool is_empty(const DecodeParams& p) { return p.seg.tokens == 0 || (p.out == 0 && p.logits == nullptr); }

cudaError_t decode_first_cuda(const DecodeParams& p, void* work, cudaStream_t stream) {
  if (!decode_fits(p)) return cudaErrorInvalidValue;
  if (p.weight != nullptr && !decode_multiplies(p)) return cudaErrorInvalidValue;
  if (is_empty(p)) return cudaSuccess;
  return is_dense(p) ? dense_cuda(dense_of(p, work), stream) : routed_first_cuda(p, work, stream);
}

cudaError_t decode_second_cuda(const DecodeParams& params, void* work, cudaStream_t stream) {
  if (is_empty(params)) return cudaSuccess;
  if (!is_dense(params)) return routed_second_cuda(params, work, stream);
  const DenseParams dense = dense_of(params, work);
  DecodeLaunch p{};
  static_cast<DecodeParams&>(p) = params;
  p.planes = dense.h;
  p.logit_planes = dense.logits;
  p.splits = plan_of(dense).splits;
  p.round = static_cast<int>(plan_cuda::least(plan_cuda::decode_round(static_cast<int>(p.rank)), p.seg.top_k));
  p.fetch = plan_cuda::decode_fetch(p.seg.experts * p.out * p.rank * element_size(p.adapter_type));
  p.direct = chunks(p.lora_B, p.rank, element_size(p.adapter_type));
  if (p.weight != nullptr) return skinny_mixture_cuda(p, stream);
  switch (p.x_type) {
    case DType::bf16: return launch<__nv_bfloat16>(p, stream);
    case DType::f16: return launch<__half>(p, stream);
    case DType::f64: return launch<double>(p, stream);
    default: return launch<float>(p, stream);
  }
}

cudaError_t decode_cuda(const DecodeParams& p, void* work, cudaStream_t stream) {
  const cudaError_t error = decode_first_cuda(p, work, stream);
  return error != cudaSuccess ? error : decode_second_cuda(p, work, stream);
}

}  // namespace moa
