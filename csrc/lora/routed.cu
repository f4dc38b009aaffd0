// Few tokens of a layer that routes them itself, grouped by expert: router, top-k, sort, shrink and expand in two launches,
// and only what was chosen of A and B is read. Equations: shrink.cu, expand.cu and routing/topk.cu.
//
//   1  dense.cu: planes of the logits W_r x[t]; it also sets this call's counters to 0
//   2  blocks take items in turn, as many as there are:
//        a token   its logits' planes are added, and its experts selected; whoever is the last one sorts all slots
//        a tile of shrink.cu, as soon as the slots are sorted     planes of h
//        a tile of expand.cu, as soon as all of h is there        y; and h itself, where somebody wants it
//
// Who waits, waits for items that were taken before its own: by blocks that run, and of which the one with the lowest item
// waits for nobody. So it ends however few blocks there is room for, and beside other streams' kernels. Counters say
// who does an item and when it may begin, never in which order a sum goes: results are bitwise reproducible.
//
// The counters belong to the call, lie in its work memory, and are cleared by its first launch: a graph that is replayed
// needs no more, and two streams do not meet.
//
// Limits: plan_cuda::kDecodeTokens, kMaxExpertsCuda; T k < 2^31.
#include "lora/cuda.h"
#include "lora/dense.cuh"
#include "lora/expand_simt.cuh"
#include "lora/expand_tile.cuh"
#include "lora/shrink_tile.cuh"
#include "routing/cuda.h"
#include "routing/select.cuh"
#include "routing/sort.cuh"

namespace moa {
namespace {

constexpr int kThreads = plan_cuda::kTileThreads;
static_assert(kThreads == plan_cuda::kExpandThreads, "one block for both");
static_assert(plan_cuda::kDecodeTokens <= plan_cuda::kExpandRows, "one tile of tokens on tensor cores");

struct Head {  // shared, in front of what an item needs
  uint32_t item, arrived;
};
static_assert(plan_cuda::kRoutedHead >= sizeof(Head) && plan_cuda::kRoutedHead % 16 == 0, "what follows is aligned");

struct Counters {
  uint32_t taken;   // items
  uint32_t routed;  // tokens
  uint32_t sorted;  // 1 where the slots are
  uint32_t shrunk;  // tiles of the shrink
};
static_assert(sizeof(Counters) == kCounters * sizeof(uint32_t), "as the first launch clears them");

struct RoutedLaunch {
  Counters* counters;
  const void* planes;  // [splits][tokens][experts] of the logits
  int64_t splits;
  void* logits;  // [tokens, experts] or null
  TopkParams topk;
  SortParams sort;
  ShrinkParams shrink;
  ExpandParams expand;
  bool mma;                   // of the expand
  uint32_t shrinks, expands;  // items
};

// This block's arrival, once all of its threads have written; only the first thread knows how many came before.
__device__ __forceinline__ void block_arrives(uint32_t* counter, Head* head) {
  __syncthreads();
  if (threadIdx.x == 0) head->arrived = arrive(counter);
}

template <class A>
__device__ __forceinline__ void route(const RoutedLaunch& p, int64_t token, Head* head, unsigned char* shared) {
  A* const row = reinterpret_cast<A*>(shared);  // [experts]
  const int64_t experts = p.topk.experts, size = p.topk.tokens * experts;
  const A* const from = static_cast<const A*>(p.planes) + token * experts;
  for (int64_t e = threadIdx.x; e < experts; e += kThreads) {
    A sum = 0;
#pragma unroll 4
    for (int64_t s = 0; s < p.splits; ++s) sum += from[s * size + e];
    row[e] = sum;
    if (p.logits != nullptr) static_cast<A*>(p.logits)[token * experts + e] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kWarp) {
    TopkParams here = p.topk;
    here.logits_type = std::is_same<A, double>::value ? DType::f64 : DType::f32;  // known to the compiler
    here.logits = row;
    here.ldz = 0;  // whatever the token
    route_token<A, kWarp, 0>(here, token, true, nullptr);
  }
  block_arrives(&p.counters->routed, head);
  __syncthreads();
  if (head->arrived + 1 != p.topk.tokens) return;
  sort_block<true>(p.sort, 0, reinterpret_cast<int32_t*>(shared));
  block_arrives(&p.counters->sorted, head);
}

template <class T>
__device__ __forceinline__ void shrink_item(const RoutedLaunch& p, int64_t item, unsigned char* shared) {
  const auto tiles = static_cast<unsigned>(p.shrink.plan.tiles),
             column_tiles = static_cast<unsigned>(p.shrink.plan.column_tiles);
  const unsigned rest = static_cast<unsigned>(item) / tiles;
  const ShrinkPlace<Acc<T>> place(p.shrink, static_cast<unsigned>(item) % tiles, rest % column_tiles,
                                  rest / column_tiles);
  if constexpr (sizeof(T) == 2) {
    shrink_mma_block<T, plan_cuda::GroupedForm<plan_cuda::kNarrow, false>>(p.shrink, place,
                                                                           reinterpret_cast<T*>(shared));
  } else {
    T* const tile = reinterpret_cast<T*>(shared);
    using Tile = SimtTile<T, plan_cuda::kNarrow>;
    shrink_simt_block<T, plan_cuda::kNarrow>(p.shrink, place, tile,
                                             reinterpret_cast<const T**>(tile + Tile::kElements));
  }
}

template <class T>
__device__ __forceinline__ void expand_item(const RoutedLaunch& p, uint32_t item, unsigned char* shared) {
  add_planes<Acc<T>>(p.expand, item, p.expands);
  if constexpr (sizeof(T) == 2) {
    if (p.mma) return expand_mma_block<T, true>(p.expand, 0, item, shared);
  }
  const auto tiles = static_cast<unsigned>(plan_cuda::ceil_div(p.topk.tokens, plan_cuda::kExpandSimtRows));
  expand_simt_block<T>(p.expand, item % tiles, item / tiles, reinterpret_cast<ExpandSimtShared<Acc<T>>*>(shared));
}

// The block goes on once the counter is there.
__device__ __forceinline__ void wait(const uint32_t* counter, uint32_t value) {
  if (threadIdx.x == 0) await(counter, value);
  __syncthreads();
}

// The block's next item.
__device__ __forceinline__ uint32_t take(const RoutedLaunch& p, Head* head) {
  __syncthreads();  // all have left the item before, and its number
  if (threadIdx.x == 0) head->item = atomicAdd(&p.counters->taken, 1u);
  __syncthreads();
  return head->item;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) routed_mixture(const RoutedLaunch p) {
  MOA_DYNAMIC_SHARED(unsigned char, dynamic);
  Head* const head = reinterpret_cast<Head*>(dynamic);
  unsigned char* const shared = dynamic + plan_cuda::kRoutedHead;
  const uint32_t tokens = static_cast<uint32_t>(p.topk.tokens), before = tokens + p.shrinks, all = before + p.expands;
  uint32_t item = take(p, head);  // they ascend
  for (; item < tokens; item = take(p, head)) route<Acc<T>>(p, item, head, shared);
  if (item < before) wait(&p.counters->sorted, 1);
  for (; item < before; item = take(p, head)) {
    shrink_item<T>(p, item - tokens, shared);
    block_arrives(&p.counters->shrunk, head);
  }
  if (item < all) wait(&p.counters->shrunk, p.shrinks);
  for (; item < all; item = take(p, head)) expand_item<T>(p, item - before, shared);
}

// ---- on the host ----

// Memory one array after another, each at a whole 256 bytes; from null on it only counts.
struct Arrays {
  char* base;
  size_t used;
  void* take(int64_t bytes) {
    void* const at = base == nullptr ? nullptr : base + used;
    used += static_cast<size_t>(plan_cuda::ceil_div(bytes, 256) * 256);
    return at;
  }
};

struct Planned {
  RoutedLaunch launch;
  DenseParams logits;
  size_t shared, work;
};

template <class A>
constexpr size_t kSimtShared =
    SimtTile<A, plan_cuda::kNarrow>::kElements * sizeof(A) + plan_cuda::kTileRows * sizeof(void*);

Planned arrange(const DecodeParams& p, void* work) {
  Arrays arrays{static_cast<char*>(work), 0};
  const int64_t element = p.x_type == DType::f64 ? 8 : 4, tokens = p.seg.tokens, experts = p.seg.experts;
  const int64_t slots = tokens * p.seg.top_k;
  const bool keeps = p.logits != nullptr;
  Planned all{};
  RoutedLaunch& l = all.launch;
  l.counters = static_cast<Counters*>(arrays.take(sizeof(Counters)));

  DenseParams& d = all.logits;
  d.x_type = d.adapter_type = p.x_type;
  d.tokens = tokens;
  d.in = p.in;
  d.x = p.x;
  d.ldx = p.ldx;
  d.router_weight = p.router_weight;
  d.experts = experts;
  d.logits = arrays.take(static_cast<int64_t>(planes_size(d, experts)));
  d.counters = reinterpret_cast<uint32_t*>(l.counters);
  l.planes = d.logits;
  l.splits = plan_of(d).splits;
  l.logits = p.logits;

  TopkParams& t = l.topk;
  t.logits_type = p.x_type == DType::f64 ? DType::f64 : DType::f32;
  t.tokens = tokens;
  t.experts = experts;
  t.top_k = p.seg.top_k;
  t.score_func = p.score_func;
  t.norm_topk_prob = p.norm_topk_prob;
  t.selection_bias = p.selection_bias;
  t.weights = keeps ? p.gates : arrays.take(slots * element);
  t.indices = keeps ? p.indices : static_cast<int64_t*>(arrays.take(slots * 8));

  SortParams& s = l.sort;
  s.indices = t.indices;
  s.slots = s.slots_per_block = slots;
  s.experts = experts;
  s.blocks = 1;
  s.warps = plan_cuda::sort_warps(slots, experts, kThreads);
  while (s.warps > 1 && plan_cuda::sort_shared(experts, s.warps) > kSharedMost - plan_cuda::kRoutedHead) s.warps /= 2;
  s.offsets = keeps ? p.offsets : static_cast<int32_t*>(arrays.take((experts + 1) * 4));
  s.order = keeps ? p.order : static_cast<int32_t*>(arrays.take(slots * 4));

  ForwardParams f = p;
  f.seg.offsets = s.offsets;
  f.seg.order = s.order;
  f.weights = t.weights;
  const plan_cuda::Shrink shrink = plan_cuda::shrink(slots, experts, p.rank, p.in, p.x_type, false, true);
  const bool own = shrink.splits == 1 && keeps;  // h is where somebody wants it at once
  void* const values = own ? p.h : arrays.take(shrink.splits * slots * p.rank * element);
  f.h = values;
  l.shrink = shrink_params(f, p.x, p.ldx, p.in, p.lora_A, false, values, nullptr);
  l.shrink.plan = shrink;
  l.shrink.plan.finish = false;
  l.shrink.planes = shrink.splits > 1 ? values : nullptr;
  l.shrinks = static_cast<uint32_t>(shrink.tiles * shrink.column_tiles * shrink.splits);

  if (!keeps) {
    f.base = p.y;
    f.ldbase = p.out;
    f.bias = nullptr;
  }
  l.expand = expand_params(f, values);
  l.expand.c.planes = shrink.splits;
  l.expand.sums = keeps && !own ? p.h : nullptr;
  const plan_cuda::Expand expand = expand_plan(f, p.out, false);
  l.mma = on_tensor_cores(f, expand);
  prepare(&l.expand, expand);
  const int64_t parts = l.mma ? expand.parts
                              : plan_cuda::ceil_div(tokens, plan_cuda::kExpandSimtRows) *
                                    plan_cuda::ceil_div(p.out, plan_cuda::kExpandColumns);
  l.expands = static_cast<uint32_t>(keeps ? plan_cuda::most(parts, 1) : parts);

  const bool half = is_half(p.x_type);
  const size_t tile = half                     ? plan_cuda::GroupedForm<plan_cuda::kNarrow, false>::kShared
                      : p.x_type == DType::f64 ? kSimtShared<double>
                                               : kSimtShared<float>;
  const size_t of_expand = l.mma                    ? expand.shared
                           : p.x_type == DType::f64 ? sizeof(ExpandSimtShared<double>)
                                                    : sizeof(ExpandSimtShared<float>);
  for (const size_t size :
       {static_cast<size_t>(experts * element), plan_cuda::sort_shared(experts, s.warps), tile, of_expand})
    all.shared = size > all.shared ? size : all.shared;
  all.shared += plan_cuda::kRoutedHead;
  all.work = arrays.used;
  return all;
}

}  // namespace

size_t routed_work(const DecodeParams& p) { return arrange(p, nullptr).work; }

cudaError_t routed_first_cuda(const DecodeParams& p, void* work, cudaStream_t stream) {
  return dense_cuda(arrange(p, work).logits, stream);
}

cudaError_t routed_second_cuda(const DecodeParams& p, void* work, cudaStream_t stream) {
  const Planned all = arrange(p, work);
  const int64_t items = p.seg.tokens + int64_t{all.launch.shrinks} + all.launch.expands;
  const unsigned blocks = static_cast<unsigned>(plan_cuda::least(items, plan_cuda::kRoutedBlocks));
  switch (p.x_type) {
    case DType::bf16:
      return MOA_LAUNCH(routed_mixture<__nv_bfloat16>, blocks, kThreads, all.shared, stream, all.launch);
    case DType::f16: return MOA_LAUNCH(routed_mixture<__half>, blocks, kThreads, all.shared, stream, all.launch);
    case DType::f64: return MOA_LAUNCH(routed_mixture<double>, blocks, kThreads, all.shared, stream, all.launch);
    default: return MOA_LAUNCH(routed_mixture<float>, blocks, kThreads, all.shared, stream, all.launch);
  }
}

}  // namespace moa
