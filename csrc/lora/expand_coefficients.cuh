// Coefficients of a tile of expand_tile.cuh, in shared memory: 128 rows (tokens) by the ranks of the experts that they
// chose.
//
//   c[row, e, j] = w s v[p][j] where the row's token chose e at position p, summed where it did so twice; else 0
//
// A step is 16 ranks of an expert that some token of the tile chose. 8 rows by 16 ranks are a fragment, 256 bytes; only
// those are there whose rows chose the step's expert at all, one behind the other in the order of the steps. That is all
// of them where experts are few, and then this is the dense, masked matrix; few of them where experts are many.
//
// Where not all of a tile's fragments fit, its experts are taken by chunks, in ascending order.
#pragma once
#include "lora/expand_params.cuh"

namespace moa {

template <class T>
struct ExpandCoefficients {
  static constexpr int kRows = plan_cuda::kExpandRows, kThreads = plan_cuda::kExpandThreads, kFrags = kRows / 8;
  static constexpr int kStages = plan_cuda::kExpandStages, kStrip = plan_cuda::kExpandStrip;
  static constexpr int kStage = 16 * kStrip, kFragment = 8 * 16;  // elements
  static_assert(kFrags == 16 && kRows == kThreads, "a bit of 16 per fragment; a row a thread");

  struct Step {
    int expert, rank, used;  // ranks from `rank` on, below `used`
    uint16_t mask, first;    // fragments that take part, and where they start
  };
  struct alignas(16) Head {
    T ring[kThreads / kWarp][kStages][kStage];  // of panels, for each warp its own
    int token[kRows];                           // or -1
    int steps, fragments, next;
  };
  static_assert(plan_cuda::kExpandHead == sizeof(Head) && plan_cuda::kExpandStep == sizeof(Step), "as the plan counts");

  const ExpandParams& p;
  Head* const head;
  T* const coef;           // [fragments][8][16]
  float* const dz;         // [fragments][8], where p.dz
  Step* const step;        // [fragments]
  unsigned* const expert;  // [experts] mask of the fragments that chose it; above 16 bits the first one of this chunk
  Place* const own;        // [slots of the tile], where not p.places
  const Place* places;     // of slots from first_slot on
  int64_t first_slot;
  const int lane, warp;

  __device__ __forceinline__ ExpandCoefficients(const ExpandParams& p, unsigned char* shared)
      : p(p),
        head(reinterpret_cast<Head*>(shared)),
        coef(reinterpret_cast<T*>(head + 1)),
        dz(reinterpret_cast<float*>(coef + p.fragments * kFragment)),
        step(reinterpret_cast<Step*>(dz + (p.dz == nullptr ? 0 : p.fragments * 8))),
        expert(reinterpret_cast<unsigned*>(step + p.fragments)),
        own(reinterpret_cast<Place*>(expert + (p.c.experts + 1) / 2 * 2)),
        places(p.places),
        first_slot(0),
        lane(threadIdx.x % kWarp),
        warp(threadIdx.x / kWarp) {}

  __device__ __forceinline__ void find_experts(int64_t row0) {
    for (int i = threadIdx.x; i < kRows; i += kThreads) {
      const int64_t row = row0 + i;
      head->token[i] = row >= p.tokens ? -1 : p.rows == nullptr ? static_cast<int>(row) : p.rows[row];
    }
    for (int i = threadIdx.x; i < p.c.experts; i += kThreads) expert[i] = 0;
    if (places == nullptr) find_places(row0);
    __syncthreads();
    const int row = threadIdx.x, token = head->token[row];
    for (int64_t j = 0; token >= 0 && j < p.c.top_k; ++j) {
      const int e = place_at(token, j).expert;
      if (e >= 0 && e < p.c.experts) atomicOr(&expert[e], 1u << row / 8);
    }
    __syncthreads();
  }

  // All positions are looked through for those of the tile's slots.
  __device__ __forceinline__ void find_places(int64_t row0) {
    places = own;
    first_slot = row0 * p.c.top_k;
    const int64_t count = clamp((p.tokens - row0) * p.c.top_k, 0, kRows * p.c.top_k);
    for (int i = threadIdx.x; i < count; i += kThreads) own[i] = {0, -1, 0};
    __syncthreads();
    constexpr int kEach = 4;  // loads under way together
    for (int64_t first = threadIdx.x; first < p.c.slots; first += kEach * kThreads) {
      int64_t i[kEach];
#pragma unroll
      for (int u = 0; u < kEach; ++u) {
        const int64_t position = first + u * kThreads;
        i[u] = position < p.c.slots ? p.c.order[position] - first_slot : -1;
      }
#pragma unroll
      for (int u = 0; u < kEach; ++u)
        if (i[u] >= 0 && i[u] < count) own[i[u]] = place_of(p.c, first + u * kThreads, first_slot + i[u]);
    }
  }
  __device__ __forceinline__ Place place_at(int64_t token, int64_t j) const {
    return places[token * p.c.top_k + j - first_slot];
  }

  // The steps of experts from `from` on, as many as there is room for; one warp.
  __device__ __forceinline__ void list_steps(int from) const {
    const int experts = static_cast<int>(p.c.experts);
    int steps = 0, fragments = 0, e0 = from, fitting = kWarp;
    for (; e0 < experts && fitting == kWarp; e0 += fitting) {
      const int e = e0 + lane;
      const unsigned mask = e < experts ? expert[e] & 0xffffu : 0u;
      const int used = mask == 0 ? 0 : static_cast<int>(p.c.used(e));
      int depth = (used + 15) / 16;
      if (mask != 0 && depth == 0 && p.dz != nullptr) depth = 1;
      const int each = __popc(mask), size = depth * each;
      const int fragments_to = fragments + sum_to_lane(size), steps_to = steps + sum_to_lane(depth);
      const unsigned beyond = __ballot_sync(kFullMask, fragments_to > p.fragments);
      fitting = beyond == 0 ? kWarp : __ffs(static_cast<int>(beyond)) - 1;
      if (lane < fitting && size > 0) {
        const int first = fragments_to - size;
        expert[e] = mask | static_cast<unsigned>(first) << 16;
        for (int s = 0; s < depth; ++s)
          step[steps_to - depth + s] = {e, 16 * s, used, static_cast<uint16_t>(mask),
                                        static_cast<uint16_t>(first + s * each)};
      }
      if (fitting > 0) {
        fragments = __shfl_sync(kFullMask, fragments_to, fitting - 1);
        steps = __shfl_sync(kFullMask, steps_to, fitting - 1);
      }
    }
    if (lane == 0) {
      head->steps = steps;
      head->fragments = fragments;
      head->next = e0 < experts ? e0 : experts;
    }
  }

  // Coefficients of experts from `from` on; says where the next chunk begins. The whole block.
  __device__ __forceinline__ int make_coefficients(int from) const {
    __syncthreads();  // all have left the chunk of before
    if (warp == 0) list_steps(from);
    __syncthreads();
    const int next = head->next;
    for (int i = threadIdx.x; i < head->fragments * (kFragment / 8); i += kThreads)
      *reinterpret_cast<uint4*>(coef + 8 * i) = make_uint4(0, 0, 0, 0);
    for (int i = threadIdx.x; p.dz != nullptr && i < head->fragments * 8; i += kThreads) dz[i] = 0.0f;
    __syncthreads();
    for (int64_t j = 0; j < p.c.top_k; ++j) fill(j, from, next);
    __syncthreads();
    return next;
  }

  // The tokens' j-th slots; four threads a row, 4 ranks each of 16. Loads of a thread's rows are under way together.
  __device__ __forceinline__ void fill(int64_t j, int from, int next) const {
    constexpr int kEach = kRows * 4 / kThreads;
    const int row0 = threadIdx.x / 4, quarter = threadIdx.x % 4;
    Place place[kEach];
    float factor[kEach];
    int used[kEach], depth = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int token = head->token[row0 + i * (kThreads / 4)];
      place[i].expert = -1;
      if (token >= 0) place[i] = place_at(token, j);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int e = place[i].expert;
      used[i] = -1;
      if (e < from || e >= next) continue;
      const int64_t twins = clamp(place[i].twins, 0, p.c.slots - 1);  // what is no routing leaves places unwritten
      place[i].twins = static_cast<uint16_t>(twins);
      place[i].position = static_cast<int>(clamp(place[i].position, 0, p.c.slots - 1 - twins));
      factor[i] = p.c.factor<float>(e, head->token[row0 + i * (kThreads / 4)] * p.c.top_k + j);
      used[i] = static_cast<int>(p.c.used(e));
      depth = used[i] > depth ? used[i] : depth;
    }
    for (int j0 = 4 * quarter; j0 < (depth + 15) / 16 * 16; j0 += 16) {
      float4 v[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) v[i] = values(place[i].position, j0, used[i]);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (j0 >= (used[i] + 15) / 16 * 16) continue;
        float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        add(c, v[i], factor[i], used[i] - j0);
        for (int twin = 1; twin <= place[i].twins; ++twin) {
          const int64_t position = place[i].position + twin;
          add(c, values(position, j0, used[i]), p.c.factor<float>(place[i].expert, p.c.slot_at(position)),
              used[i] - j0);
        }
        const int row = row0 + i * (kThreads / 4), each = __popc(expert[place[i].expert] & 0xffffu);
        T* const to = coef + (fragment_of(place[i].expert, row) + j0 / 16 * each) * kFragment + row % 8 * 16;
        *reinterpret_cast<uint2*>(to + 4 * quarter) = make_uint2(pack2<T>(c[0], c[1]), pack2<T>(c[2], c[3]));
      }
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (p.dz == nullptr || quarter != 0 || used[i] < 0) continue;
      const int row = row0 + i * (kThreads / 4);
      float v = 0.0f;
      for (int twin = 0; twin <= place[i].twins; ++twin) v += static_cast<const float*>(p.dz)[place[i].position + twin];
      dz[fragment_of(place[i].expert, row) * 8 + row % 8] = v;
    }
  }

  // The fragment of an expert's first step in which a row is.
  __device__ __forceinline__ int fragment_of(int e, int row) const {
    return static_cast<int>(expert[e] >> 16) + __popc(expert[e] & ((1u << row / 8) - 1u));
  }

  // Four of a position's values from rank j on; what is not below `used` is not to be used.
  __device__ __forceinline__ float4 values(int64_t position, int j, int used) const {
    const float* from = static_cast<const float*>(p.c.values) + position * p.c.rank + j;
    float4 sum = four(from, used - j);
#pragma unroll 4
    for (int64_t s = 1; s < p.c.planes; ++s) {
      from += p.c.slots * p.c.rank;
      const float4 v = four(from, used - j);
      sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
    }
    return sum;
  }
  __device__ __forceinline__ float4 four(const float* from, int n) const {
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (p.c.rank % 4 == 0) {
      if (n > 0) v = *reinterpret_cast<const float4*>(from);
    } else {
      if (n > 0) v.x = from[0];
      if (n > 1) v.y = from[1];
      if (n > 2) v.z = from[2];
      if (n > 3) v.w = from[3];
    }
    return v;
  }
  static __device__ __forceinline__ void add(float (&c)[4], float4 v, float factor, int n) {
    if (n > 0) c[0] += factor * v.x;
    if (n > 1) c[1] += factor * v.y;
    if (n > 2) c[2] += factor * v.z;
    if (n > 3) c[3] += factor * v.w;
  }
};

}  // namespace moa
