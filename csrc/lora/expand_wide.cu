// Expand and combine for many tokens in 16-bit types: equation in expand.cu, tiles in expand_wide.cuh.
//
//   1  expand_places (expand.cu): where each slot is in the sorted order; the router's weight in two terms. Not where ids are
//      given and every expert's values: nothing is sorted then
//   2  expand_rows, where tokens are grouped by pairs of experts: the token of each row
//   3  expand_fragments: coefficients of 32 rows each, as the product takes them
//   4  expand_dense, where steps are few, or expand_listed: y
//
// Every sum has a fixed order, by ascending step: results are bitwise reproducible, and no token's depends on its
// neighbours. The router's share is a product of two terms of bfloat16 each, (u + l)(U + L), off by about 2^-17.
#include "lora/expand_dense.cuh"
#include "lora/expand_listed.cuh"

namespace moa {
namespace {

using plan_cuda::kClusterThreads;
using plan_cuda::kFragmentThreads;
using plan_cuda::kWideThreads;

// ---- rows ----

__device__ __forceinline__ int spread_bits(int v) {  // 6 bits, to every second one
  v = (v | v << 4) & 0x030f;
  v = (v | v << 2) & 0x0333;
  return (v | v << 1) & 0x0555;
}

__device__ __forceinline__ int expert_of(const ExpandParams& p, int64_t slot) {
  return p.ids != nullptr ? static_cast<int>(p.ids[slot]) : p.places[slot].expert;
}

// A tile reads the panel of every expert that one of its tokens chose. Tokens are therefore grouped by the pair of
// experts they chose, pairs (low, high) in Morton's order: any run of rows is about a square of pairs. At T = 8192,
// k = 2, E = 64 there are 4 tokens a pair; 256 rows are 64 pairs, which about 18 experts make, and 32 rows 7.
//
// Rows of one pair come in any order (atomics place them), which shows nowhere: a token's sum does not depend on its
// neighbours.
//
// A block orders the tokens of a window; a thread has every 1024th.
__global__ void __launch_bounds__(kClusterThreads) expand_rows(const ExpandParams p, int32_t* rows) {
  constexpr int kSide = plan_cuda::kClusterSide, kBins = kSide * kSide, kThreads = kClusterThreads;
  constexpr int kEach = kBins / kThreads, kTokens = plan_cuda::kClusterWindow / kThreads;
  static_assert(kBins % kThreads == 0 && kThreads == kWarp * kWarp, "a thread's bins; one warp scans the warps' sums");
  static_assert(kSide == 64 && plan_cuda::kClusterWindow <= 65536, "spread_bits; out; own");
  await_launch();
  next_may_begin();
  MOA_SHARED(int, bins, kBins);
  MOA_SHARED(uint16_t, out, plan_cuda::kClusterWindow);
  MOA_SHARED(int, sums, kWarp);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Coefficients& c = p.c;
  const int64_t first = blockIdx.x * static_cast<int64_t>(plan_cuda::kClusterWindow);
  const int count = static_cast<int>(clamp(p.tokens - first, 0, plan_cuda::kClusterWindow));
  int shift = 0;
  while ((c.experts - 1) >> shift >= kSide) ++shift;
  int own[kTokens];  // of this thread's tokens the bin, and above it the place in the bin; or -1
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const int t = threadIdx.x + i * kThreads;
    own[i] = -1;
    if (t >= count) continue;
    const int64_t slot = (first + t) * c.top_k;
    int a = expert_of(p, slot), b = c.top_k > 1 ? expert_of(p, slot + 1) : a;
    if (a < 0) a = b;
    if (b < 0) b = a;
    const int low = (a < b ? a : b) >> shift & (kSide - 1), high = (a < b ? b : a) >> shift & (kSide - 1);
    own[i] = spread_bits(low) | spread_bits(high) << 1;
  }
  for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTokens; ++i)
    if (own[i] >= 0) own[i] |= atomicAdd(&bins[own[i]], 1) * kBins;
  __syncthreads();

  int size[kEach], total = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    size[i] = bins[threadIdx.x * kEach + i];
    total += size[i];
  }
  const int upto = sum_to_lane(total);
  if (lane == kWarp - 1) sums[warp] = upto;
  __syncthreads();
  if (warp == 0) sums[lane] = sum_to_lane(sums[lane]);
  __syncthreads();
  int start = upto - total + (warp == 0 ? 0 : sums[warp - 1]);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    bins[threadIdx.x * kEach + i] = start;
    start += size[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTokens; ++i)
    if (own[i] >= 0) out[bins[own[i] % kBins] + own[i] / kBins] = static_cast<uint16_t>(threadIdx.x + i * kThreads);
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kThreads) rows[first + i] = static_cast<int32_t>(first + out[i]);
}

// ---- coefficients ----

// A group's: steps its rows take part in, and a fragment for each of them. c[row][i] lies where lane 4 (row % 8) +
// i / 2 % 4 has it in register row / 8 + 2 (i / 8), which is what mma_m16n8k16 takes as a.
template <class T>
__global__ void __launch_bounds__(kFragmentThreads, 4) expand_fragments(const WideParams p) {
  MOA_DYNAMIC_SHARED(Place, place);  // [32][top_k]
  await_launch();
  next_may_begin();
  const Coefficients& c = p.e.c;
  const int top_k = static_cast<int>(c.top_k), slots = 32 * top_k;
  uint32_t* const mask = reinterpret_cast<uint32_t*>(place + slots);
  int* const before = reinterpret_cast<int*>(mask + p.words);  // [words + 1] fragments of the words before
  const int64_t row0 = blockIdx.x * int64_t{32};
  const int lane = threadIdx.x % kWarp;
  const auto token_of = [&](int i) {
    const int64_t row = row0 + static_cast<unsigned>(i) / static_cast<unsigned>(top_k);
    return row >= p.e.tokens ? -1 : p.e.rows == nullptr ? static_cast<int>(row) : p.e.rows[row];
  };
  const auto take_part = [&](int step) { atomicOr(&mask[step / 32], 1u << step % 32); };

  for (int i = threadIdx.x; i < p.words; i += kFragmentThreads) mask[i] = p.every;
  __syncthreads();
  for (int i = threadIdx.x; i < slots; i += kFragmentThreads) {
    const int token = token_of(i);
    Place at{0, -1, 0};
    const int64_t slot = token * c.top_k + i % top_k;
    if (token >= 0) at = p.e.ids != nullptr ? Place{0, static_cast<int16_t>(p.e.ids[slot]), 0} : p.e.places[slot];
    if (at.expert >= c.experts) at.expert = -1;
    const int64_t twins = clamp(at.twins, 0, c.slots - 1);  // what is no routing leaves places unwritten
    at.twins = static_cast<uint16_t>(twins);
    at.position = static_cast<int>(clamp(at.position, 0, c.slots - 1 - twins));
    place[i] = at;
    if (at.expert < 0) continue;
    const int depth = (static_cast<int>(c.used(at.expert)) + 15) / 16;
    for (int s = 0; s < depth; ++s) take_part(at.expert * p.depth + s);
    if (p.e.dz == nullptr) continue;
    take_part(p.lora_steps + at.expert / 8 * 2);
    take_part(p.lora_steps + at.expert / 8 * 2 + 1);
  }
  __syncthreads();
  if (threadIdx.x < kWarp) {
    int total = 0;
    for (int w0 = 0; w0 < p.words; w0 += kWarp) {
      const int here = w0 + lane < p.words ? __popc(mask[w0 + lane]) : 0, upto = sum_to_lane(here);
      if (w0 + lane < p.words) before[w0 + lane] = total + upto - here;
      total += __shfl_sync(kFullMask, upto, kWarp - 1);
    }
    if (lane == 0) before[p.words] = total;
  }
  for (int i = threadIdx.x; i < p.words; i += kFragmentThreads)
    p.masks[blockIdx.x * static_cast<int64_t>(p.words) + i] = mask[i];
  __syncthreads();
  uint4* const fragments = p.fragments + blockIdx.x * (int64_t{p.fragments_each} * 2 * kWarp);
  // Also what expand_wide reads but does not multiply: all that it keeps, and one behind the last, which may be the next
  // group's first.
  const int total = before[p.words], read = total < p.kept ? p.kept : total + 1;
  const int own = blockIdx.x + 1 < gridDim.x && read > p.fragments_each ? p.fragments_each : read;
  for (int i = threadIdx.x; i < own * 2 * kWarp; i += kFragmentThreads) fragments[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();

  const auto fragment = [&](int step) {
    const int n = before[step / 32] + __popc(mask[step / 32] & ((1u << step % 32) - 1u));
    return fragments + n * 2 * kWarp;
  };
  const int64_t plane = (c.all ? p.e.tokens * c.experts : c.slots) * c.rank;
  for (int i = threadIdx.x; i < 4 * slots; i += kFragmentThreads) {  // four ranks of each 16
    const int slot = i / 4, quarter = i % 4, row = static_cast<unsigned>(slot) / static_cast<unsigned>(top_k);
    const Place at = place[slot];
    if (at.expert < 0) continue;
    const int used = static_cast<int>(c.used(at.expert)), lanes = row % 8 * 4, high = row / 8 % 2;
    const float factor = c.factor<float>(at.expert, token_of(slot) * c.top_k + slot % top_k);
    for (int j = 4 * quarter; j < (used + 15) / 16 * 16; j += 16) {
      float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      for (int twin = 0; twin <= at.twins; ++twin) {
        const int64_t position = at.position + twin;
        const float f = twin == 0 ? factor : c.factor<float>(at.expert, c.slot_at(position));
        const int64_t at_row = c.all ? token_of(slot) * c.experts + at.expert : position;
        const float* from = static_cast<const float*>(c.values) + at_row * c.rank + j;
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
        for (int64_t s = 0; s < c.planes; ++s, from += plane) {
          if (c.rank % 4 == 0 && j + 4 <= used) {
            const float4 four = *reinterpret_cast<const float4*>(from);
            sum[0] += four.x;
            sum[1] += four.y;
            sum[2] += four.z;
            sum[3] += four.w;
          } else {
#pragma unroll
            for (int u = 0; u < 4; ++u)
              if (j + u < used) sum[u] += from[u];
          }
        }
#pragma unroll
        for (int u = 0; u < 4; ++u) v[u] += f * sum[u];
      }
      uint32_t* const to = reinterpret_cast<uint32_t*>(fragment(at.expert * p.depth + j / 16) + row / 16 * kWarp);
      const int reg = high + quarter / 2 * 2, first = lanes + quarter % 2 * 2;
      to[first * 4 + reg] = pack2<T>(v[0], v[1]);
      to[first * 4 + 4 + reg] = pack2<T>(v[2], v[3]);
    }
    if (p.e.dz == nullptr || quarter != 0) continue;
    float z = 0.0f;
    for (int twin = 0; twin <= at.twins; ++twin) z += static_cast<const float*>(p.e.dz)[at.position + twin];
    const __nv_bfloat16 upper = from_acc<__nv_bfloat16>(z);
    const __nv_bfloat16 lower = from_acc<__nv_bfloat16>(z - to_acc(upper));
    for (int term = 0; term < 2; ++term) {  // of dz, times the upper and the lower of the weight
      const int step = p.lora_steps + at.expert / 8 * 2 + term, k = at.expert % 8;
      __nv_bfloat16* const to = reinterpret_cast<__nv_bfloat16*>(fragment(step) + row / 16 * kWarp);
      const int pair = (lanes + k / 2) * 4 + high;
      to[2 * pair + k % 2] = to[2 * (pair + 2) + k % 2] = term == 0 ? upper : lower;
    }
  }
}

// ---- y ----

template <template <class, bool> class Tile, class T, bool kByRows>
__device__ __forceinline__ void wide_block(const WideParams& p, unsigned char* shared) {
  const int64_t all = (p.e.width + plan_cuda::kWideColumns - 1) / plan_cuda::kWideColumns,
                unit = blockIdx.y * p.e.units;
  Tile<T, kByRows>(p, shared).run(blockIdx.x, unit, static_cast<int>(clamp(all - unit, 0, p.e.units)));
}

template <class T, bool kByRows>
__global__ void __launch_bounds__(kWideThreads, blocks_at_once(2, plan_cuda::kWideShared))
    expand_dense(const WideParams p) {
  MOA_DYNAMIC_SHARED(unsigned char, shared);
  wide_block<DenseTile, T, kByRows>(p, shared);
}

template <class T, bool kByRows>
__global__ void __launch_bounds__(kWideThreads, blocks_at_once(2, plan_cuda::kWideShared))
    expand_listed(const WideParams p) {
  MOA_DYNAMIC_SHARED(unsigned char, shared);
  await_launch();
  wide_block<ListedTile, T, kByRows>(p, shared);
}

// ---- launchers ----

template <class T>
cudaError_t launch_wide(const WideParams& p, const plan_cuda::ExpandWide& plan, cudaStream_t stream) {
  const cudaError_t error = MOA_LAUNCH_EARLY((expand_fragments<T>), static_cast<unsigned>(plan.groups),
                                             kFragmentThreads, plan.fragments_shared, stream, p);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.parts));
  const bool by_rows = p.e.panel_j == 1 && p.e.dz == nullptr;  // width 1: either
  if (plan.dense) {
    if (by_rows) return MOA_LAUNCH_EARLY((expand_dense<T, true>), grid, kWideThreads, plan.shared, stream, p);
    return MOA_LAUNCH_EARLY((expand_dense<T, false>), grid, kWideThreads, plan.shared, stream, p);
  }
  if (by_rows) return MOA_LAUNCH_EARLY((expand_listed<T, true>), grid, kWideThreads, plan.shared, stream, p);
  return MOA_LAUNCH_EARLY((expand_listed<T, false>), grid, kWideThreads, plan.shared, stream, p);
}

// Work memory, each part at a whole 256 bytes; from null on it only counts.
struct WideWork {
  char* base;
  size_t used;
  template <class V>
  V* take(int64_t count) {
    char* const at = base == nullptr ? nullptr : base + used;
    used += static_cast<size_t>(plan_cuda::ceil_div(count * static_cast<int64_t>(sizeof(V)), 256) * 256);
    return reinterpret_cast<V*>(at);
  }
};

WideParams arrange(const ExpandParams& e, const plan_cuda::ExpandWide& plan, WideWork* work) {
  WideParams p{};
  p.e = e;
  p.words = plan.words;
  p.steps = plan.steps;
  p.lora_steps = plan.lora_steps;
  p.depth = plan.depth;
  p.fragments_each = plan.fragments;
  p.entries = plan.entries;
  p.kept = plan.kept;
  p.every = plan.dense ? (1u << plan.steps) - 1u : 0;
  p.e.units = plan.units;
  p.e.places = work->take<Place>(e.c.slots);
  p.e.rows = plan.cluster ? work->take<int32_t>(e.tokens) : nullptr;
  p.masks = work->take<uint32_t>(plan.groups * plan.words);
  p.fragments = work->take<uint4>((plan.groups * plan.fragments + 1) * 2 * kWarp);
  if (e.dz != nullptr) p.terms = work->take<__nv_bfloat16>(plan_cuda::ceil_div(e.c.experts, 8) * 16 * e.width);
  p.terms_direct = chunks(p.terms, e.width, 2);
  p.whole_chunks = e.panel_direct && e.c.ranks == nullptr && (e.dz == nullptr || p.terms_direct);
  const auto eights = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  p.eights = e.width % 8 == 0 && e.ldbase % 8 == 0 && eights(e.y) && eights(e.base) && eights(e.bias);
  return p;
}

}  // namespace

size_t expand_wide_work(const ExpandParams& e, const plan_cuda::ExpandWide& plan) {
  WideWork work{nullptr, 0};
  arrange(e, plan, &work);
  return work.used;
}

cudaError_t expand_wide_cuda(const ExpandParams& e, const plan_cuda::ExpandWide& plan, void* memory,
                             cudaStream_t stream) {
  WideWork work{static_cast<char*>(memory), 0};
  const WideParams p = arrange(e, plan, &work);
  cudaError_t error = e.ids == nullptr ? expand_places_cuda(p.e, p.terms, stream) : cudaSuccess;
  if (error == cudaSuccess && plan.cluster) {
    const auto windows = static_cast<unsigned>(plan_cuda::ceil_div(e.tokens, plan_cuda::kClusterWindow));
    error = MOA_LAUNCH_EARLY(expand_rows, windows, kClusterThreads, 0, stream, p.e, const_cast<int32_t*>(p.e.rows));
  }
  if (error != cudaSuccess) return error;
  return e.type == DType::bf16 ? launch_wide<__nv_bfloat16>(p, plan, stream) : launch_wide<__half>(p, plan, stream);
}

}  // namespace moa
