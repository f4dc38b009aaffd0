// The base of few tokens in 16-bit types, W read once:
//
//   y[t][o] = start[t][o] + sum over k of W[o][k] x[t][k]  [+ sum_j w[t,j] s_e B_e[o] (A_e x[t]), behind the launch that
//   makes A_e x[t]: decode.cu's first, or where the routing is given the shrink]
//
// A product of so few tokens is W's bytes. A block owns 32 outputs; eight warps stream their rows, each its own runs of 64
// k, from memory into the registers that the tensor cores take: W's as the product's columns, of which a thread has two
// registers in a row. Which k of a row a product's k is does not matter as long as it is the same in W and in x, so a thread
// takes eight that lie together. Half a run is asked for as soon as the one before it in the same registers is multiplied,
// and later runs' lines are on their way to L2. Nothing is shared and nobody waits until all is summed; then the warps' parts
// are added in order.
//
// What a token's mixture needs from the planes of that launch (its experts, its coefficients) is latency, not bytes: two
// more warps find it while the others stream, which may begin beside that launch. Sums have a fixed order, so results are
// bitwise reproducible.
//
// Limits: plan_cuda::kSkinnyTokens; rows of x and W in whole 16-byte chunks.
#include "lora/combine.cuh"
#include "lora/decode.cuh"

namespace moa {
namespace {

using plan_cuda::kSkinnyGates;
using plan_cuda::kSkinnyRows;
using plan_cuda::kSkinnyStreams;
using plan_cuda::kSkinnyTokens;
constexpr int kRun = 64, kTokens = kSkinnyTokens;  // elements: a line of memory
constexpr int kPitch = kSkinnyRows + 8;            // floats of a token's sums: no bank is met twice
constexpr int kStreaming = kSkinnyStreams * kWarp;
static_assert(kSkinnyRows == kWarp && kTokens == 16, "numbering below");

struct SkinnyLaunch : SkinnyParams {
  DecodeLaunch decode;  // with the mixture
  Coefficients given;   // the routing, where it is given
  int width;            // ranks of a slot, filled up to whole chunks of B
};

template <class T>
struct Stream {
  struct Half {
    uint4 w[4], x[2];  // rows g, g + 8, g + 16, g + 24; tokens g, g + 8
  };
  const char *weight, *tokens;  // the block's first row; all of x
  uint32_t row[4], token[2];    // bytes from there to this thread's part of the next run
  uint32_t line;                // and to that of row `lane`, of a run to come
  bool there[2];
  int left, ahead;       // elements of the rows from `row`, from `line` on
  float sum[4][4] = {};  // [f]: tokens g, g + 8 by outputs 8 f + 2 q, 8 f + 2 q + 1

  __device__ __forceinline__ Stream(const SkinnyParams& p, int64_t o0, int warp)
      : weight(reinterpret_cast<const char*>(static_cast<const T*>(p.weight) + o0 * p.ldw)),
        tokens(static_cast<const char*>(p.x)) {
    const int lane = threadIdx.x % kWarp, last = static_cast<int>(clamp(p.out - o0, 1, kSkinnyRows)) - 1;
    const uint32_t first = (warp * kRun + lane % 4 * 8) * sizeof(T), apart = static_cast<uint32_t>(p.ldw * sizeof(T));
    const auto of_row = [&](int i) { return static_cast<uint32_t>(i < last ? i : last) * apart; };  // or the last again
#pragma unroll
    for (int i = 0; i < 4; ++i) row[i] = of_row(8 * i + lane / 4) + first;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = 8 * i + lane / 4;
      there[i] = t < p.tokens;
      token[i] = static_cast<uint32_t>((there[i] ? t : 0) * p.ldx * sizeof(T)) + first;
    }
    left = static_cast<int>(p.in) - warp * kRun - lane % 4 * 8;
    line = of_row(lane) + warp * kRun * sizeof(T);
    ahead = static_cast<int>(p.in) - warp * kRun;
  }

  __device__ __forceinline__ void fetch() {
    if (ahead > 0) prefetch_l2(weight + line);
    line += kSkinnyStreams * kRun * sizeof(T);
    ahead -= kSkinnyStreams * kRun;
  }
  // What is behind the end is zeros.
  template <int kHalf>
  __device__ __forceinline__ void load(Half& to) {
    constexpr int kAt = kHalf * kRun / 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) to.w[i] = load_once(weight + row[i] + kAt * sizeof(T), left > kAt);
#pragma unroll
    for (int i = 0; i < 2; ++i) to.x[i] = load_once(tokens + token[i] + kAt * sizeof(T), left > kAt && there[i]);
  }
  __device__ __forceinline__ void advance() {
    constexpr uint32_t kBytes = kSkinnyStreams * kRun * sizeof(T);
#pragma unroll
    for (int i = 0; i < 4; ++i) row[i] += kBytes;
#pragma unroll
    for (int i = 0; i < 2; ++i) token[i] += kBytes;
    left -= kSkinnyStreams * kRun;
  }
  __device__ __forceinline__ void multiply(const Half& h) {
    const uint32_t first[4] = {h.x[0].x, h.x[1].x, h.x[0].y, h.x[1].y};
    const uint32_t then[4] = {h.x[0].z, h.x[1].z, h.x[0].w, h.x[1].w};
#pragma unroll
    for (int f = 0; f < 4; ++f) mma_m16n8k16<T>(sum[f], first, {h.w[f].x, h.w[f].y});
#pragma unroll
    for (int f = 0; f < 4; ++f) mma_m16n8k16<T>(sum[f], then, {h.w[f].z, h.w[f].w});
  }
  __device__ __forceinline__ void run() {
    Half half[2];
    const int runs = (ahead + kSkinnyStreams * kRun - 1) / (kSkinnyStreams * kRun);
#pragma unroll
    for (int i = 0; i < 1 + plan_cuda::kSkinnyFetched; ++i) fetch();
    load<0>(half[0]);
    load<1>(half[1]);
#pragma unroll 1
    for (int done = 0; done < runs; ++done) {
      advance();
      fetch();
      multiply(half[0]);
      load<0>(half[0]);
      multiply(half[1]);
      load<1>(half[1]);
    }
  }
  // to [kTokens][kPitch]
  __device__ __forceinline__ void store(float* to) const {
    const int g = threadIdx.x % kWarp / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int f = 0; f < 4; ++f)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        *reinterpret_cast<float2*>(to + (8 * i + g) * kPitch + 8 * f + 2 * q) =
            make_float2(sum[f][2 * i], sum[f][2 * i + 1]);
  }
};

// What the tokens' mixtures take: shared memory, [tokens] of each.
struct Gates {
  float* coef;     // [top_k][width]
  int64_t* ids;    // [top_k]; -1 for no expert
  float* weights;  // [top_k]
  float* logits;   // [experts]
  int* positions;  // or, where the routing is given, [top_k] in the sorted slots
  static size_t bytes(int64_t tokens, int64_t top_k, int64_t experts, int64_t width) {
    return static_cast<size_t>(tokens * (top_k * (4 * width + 8 + 4) + 4 * (experts > top_k ? experts : top_k)));
  }
  __device__ __forceinline__ Gates(const SkinnyLaunch& p, float* shared) : coef(shared) {
    const int64_t slots = p.tokens * p.decode.seg.top_k;
    ids = reinterpret_cast<int64_t*>(coef + slots * p.width);  // width is even
    weights = reinterpret_cast<float*>(ids + slots);
    logits = weights + slots;
    positions = reinterpret_cast<int*>(logits);
  }

  // `count` tokens from `first` on, by one warp; the others may be anywhere.
  __device__ __forceinline__ void find(const SkinnyLaunch& p, int first, int count) const {
    const DecodeLaunch& d = p.decode;
    const int lane = threadIdx.x % kWarp, k = static_cast<int>(d.seg.top_k), end = (first + count) * k;
    if (d.logit_planes != nullptr) {
      route(d, first, count);
    } else {
      place(p.given, first * k, end);
    }
    __syncwarp();
    for (int i = first * k * p.width + lane; i < end * p.width; i += kWarp) {
      const int slot = i / p.width, at = d.logit_planes != nullptr ? slot / k : positions[slot];
      coef[i] = ids[slot] < 0 ? 0.0f : coefficient<float>(d, at, ids[slot], weights[slot], i % p.width);
    }
  }
  __device__ __forceinline__ void route(const DecodeLaunch& d, int first, int count) const {
    const int lane = threadIdx.x % kWarp, experts = static_cast<int>(d.seg.experts);
    for (int i = first * experts + lane; i < (first + count) * experts; i += kWarp)
      logits[i] = logit<float>(d, i / experts, i % experts);
    __syncwarp();
    const TopkParams routing = selection<float>(d, static_cast<int>(d.seg.tokens), logits, weights, ids);
    if (experts <= 32) {
      for (int t = lane / 8; t - lane / 8 < count; t += 4)
        route_token<float, 8, 4>(routing, first + (t < count ? t : count - 1), t < count, nullptr);
    } else {
      for (int t = first; t < first + count; ++t) route_token<float, kWarp, 4>(routing, t, true, nullptr);
    }
  }
  // Where slots first .. end - 1 are in the sorted order, and whose.
  __device__ __forceinline__ void place(const Coefficients& c, int first, int end) const {
    const int lane = threadIdx.x % kWarp;
    for (int slot = first + lane; slot < end; slot += kWarp) {
      ids[slot] = -1;
      weights[slot] = static_cast<const float*>(c.weights)[slot];
    }
    __syncwarp();
    const int64_t routed = c.offset_at(c.experts);
    for (int64_t position = lane; position < routed; position += kWarp) {
      const int slot = static_cast<int>(c.slot_at(position));
      if (slot < first || slot >= end) continue;
      int64_t lo = 0, hi = c.experts;  // the last expert that starts at or before it
      while (hi - lo > 1) {
        const int64_t mid = (lo + hi) / 2;
        if (c.offset_at(mid) <= position) {
          lo = mid;
        } else {
          hi = mid;
        }
      }
      ids[slot] = lo;
      positions[slot] = static_cast<int>(position);
    }
  }
};

template <class T, bool kMixture>
__global__ void __launch_bounds__(kStreaming + (kMixture ? kSkinnyGates * kWarp : 0), 2)
    skinny_linear(const SkinnyLaunch p) {
  MOA_SHARED(float, parts, kSkinnyStreams * kTokens * kPitch);
  MOA_DYNAMIC_SHARED(float, shared);
  constexpr int kThreads = kStreaming + (kMixture ? kSkinnyGates * kWarp : 0);
  constexpr int kEach = (kTokens * kSkinnyRows + kThreads - 1) / kThreads;  // elements of y
  const int64_t o0 = blockIdx.x * static_cast<int64_t>(kSkinnyRows);
  const int warp = threadIdx.x / kWarp, tokens = static_cast<int>(p.tokens);
  const auto there = [&](int i) { return i < tokens * kSkinnyRows && o0 + i % kSkinnyRows < p.out; };
  if (warp < kSkinnyStreams) {
    Stream<T> stream(p, o0, warp);
    stream.run();
    stream.store(parts + warp * kTokens * kPitch);
  } else if constexpr (kMixture) {
    constexpr int kMost = kTokens / kSkinnyGates;
    if (p.decode.fetch) fetch_rows<T>(p.decode, o0, kSkinnyRows, threadIdx.x - kStreaming, kThreads - kStreaming);
    const int first = (warp - kSkinnyStreams) * kMost, count = tokens - first < kMost ? tokens - first : kMost;
    await_launch();
    if (count > 0) Gates(p, shared).find(p, first, count);
  }
  float start[kEach];
#pragma unroll
  for (int u = 0; u < kEach; ++u) {
    const int i = threadIdx.x + u * kThreads;
    const bool some = p.start != nullptr && there(i);
    start[u] = some ? to_acc(static_cast<const T*>(p.start)[i / kSkinnyRows * p.ldstart + o0 + i % kSkinnyRows]) : 0.0f;
  }
  __syncthreads();  // all sums are there, and all coefficients
#pragma unroll
  for (int u = 0; u < kEach; ++u) {
    const int i = threadIdx.x + u * kThreads, t = i / kSkinnyRows, row = i % kSkinnyRows;
    if (!there(i)) continue;
    float sum = start[u], base = 0.0f;
    const auto add_base = [&] {
#pragma unroll
      for (int w = 0; w < kSkinnyStreams; ++w) base += parts[(w * kTokens + t) * kPitch + row];
    };
    if constexpr (kMixture) {
      const Gates gates(p, shared);
      const int k = static_cast<int>(p.decode.seg.top_k), each = p.width / Dot<float, T>::kSize;
      Dot<float, T> dot{p.decode, o0 + row, gates.ids + t * k, k, each, {}, {}};
      dot.load(0);
      add_base();  // while B's rows come
      for (int q = 0; q < k * each; q += Dot<float, T>::kAtOnce) {
        if (q > 0) dot.load(q);
        sum += dot.product(q, gates.coef + t * k * p.width);
      }
    } else {
      add_base();
    }
    static_cast<T*>(p.y)[t * p.out + o0 + row] = from_acc<T>(sum + base);
  }
}

template <bool kMixture, class T>
cudaError_t launch(const SkinnyLaunch& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(plan_cuda::ceil_div(p.out, kSkinnyRows));
  constexpr int kThreads = kStreaming + (kMixture ? kSkinnyGates * kWarp : 0);
  const int64_t experts = p.decode.logit_planes == nullptr ? 0 : p.decode.seg.experts;
  const size_t shared = kMixture ? Gates::bytes(p.tokens, p.decode.seg.top_k, experts, p.width) : 0;
  if constexpr (kMixture) return MOA_LAUNCH_EARLY((skinny_linear<T, true>), blocks, kThreads, shared, stream, p);
  return MOA_LAUNCH((skinny_linear<T, false>), blocks, kThreads, shared, stream, p);
}
template <bool kMixture>
cudaError_t launch(const SkinnyLaunch& p, cudaStream_t stream) {
  if (!skinny_fits(p)) return cudaErrorInvalidValue;
  return p.type == DType::bf16 ? launch<kMixture, __nv_bfloat16>(p, stream) : launch<kMixture, __half>(p, stream);
}

SkinnyParams base_of(const ForwardParams& p) {
  SkinnyParams s{};
  s.type = p.x_type;
  s.tokens = p.seg.tokens;
  s.in = p.in;
  s.out = p.out;
  s.x = p.x;
  s.ldx = p.ldx;
  s.weight = p.weight;
  s.ldw = p.ldw;
  s.start = p.bias;
  s.y = p.y;
  return s;
}

}  // namespace

bool skinny_fits(const LinearParams& p) {
  return is_half(p.type) && plan_cuda::skinny(p.tokens, p.in, p.out, p.ldx, p.ldw) && chunks(p.x, p.ldx, 2) &&
         chunks(p.weight, p.ldw, 2);
}

cudaError_t skinny_linear_cuda(const SkinnyParams& params, cudaStream_t stream) {
  SkinnyLaunch p{};
  static_cast<SkinnyParams&>(p) = params;
  return launch<false>(p, stream);
}

bool skinny_mixture_fits(const ForwardParams& p, int64_t experts) {
  return p.weight != nullptr && p.base == nullptr && p.adapter_type == p.x_type && skinny_fits(base_of(p)) &&
         plan_cuda::skinny_mixture(p.seg.tokens, p.seg.top_k, experts, p.rank);
}

cudaError_t skinny_mixture_cuda(const DecodeLaunch& decode, cudaStream_t stream) {
  SkinnyLaunch p{};
  static_cast<SkinnyParams&>(p) = base_of(decode);
  p.decode = decode;
  if (decode.logit_planes == nullptr) p.given = coefficients_of(decode, decode.planes);
  p.width = static_cast<int>(plan_cuda::ceil_div(decode.rank, 8) * 8);
  return launch<true>(p, stream);
}

}  // namespace moa
