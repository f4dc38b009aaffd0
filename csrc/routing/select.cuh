// Selection of a token's experts and its gate weights: what topk.cu, decode.cu and routed.cu do with a row of
// logits. Equations: topk.cu.
//
// L neighbouring lanes own a token. Experts are ordered by key downwards, then by id upwards, and round j takes the
// next one; lane j % L keeps it and writes its slot. k may be anything up to E.
//
//   V > 0   lane l has the experts l V .. l V + V - 1 in registers, as lists of four in that order. A round is the
//           largest of the lists' heads, over the lanes too, and leaves its list. Of equal heads the first list of the
//           lowest lane has the lowest id. While all logits are finite they are the keys themselves.
//   V = 0   lane l has the experts l, l + L, ..., any number, in memory. A round takes the best pair (key, id) that is
//           worse than that of the round before: pairs are all different, so nothing is marked or removed.
#pragma once
#include <limits>

#include "routing/scores.cuh"

namespace moa {

template <class A>
struct Pair {
  using Key = decltype(order_key(A()));
  using Limits = std::numeric_limits<Key>;
  Key key;
  int id;
  // In front of every pair; behind every pair.
  static __device__ __forceinline__ Pair first() { return {Limits::max(), -1}; }
  static __device__ __forceinline__ Pair last() { return {Limits::lowest(), 0x7fffffff}; }
  __device__ __forceinline__ bool before(const Pair& o) const { return key > o.key || (key == o.key && id < o.id); }
};

// A lane's experts in lists of four. Key: int32_t, order_key's; or float where all of them are finite.
template <class Key, int L, int V>
struct Lists {
  static constexpr int kLists = V / 4;
  static constexpr unsigned kLanes = L == kWarp ? kFullMask : (1u << L % kWarp) - 1u;
  static_assert(V % 4 == 0 && V <= 256, "a byte says which of the lane's experts");
  Key keys[V];
  uint32_t places[kLists];  // of the lane's V, the head's in the lowest byte

  static __device__ __forceinline__ Key none() {  // behind every expert
    if constexpr (std::is_same<Key, float>::value) return minus_infinity<float>();
    return std::numeric_limits<Key>::lowest();
  }
  static __device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
  static __device__ __forceinline__ int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }
  static __device__ __forceinline__ float smaller(float a, float b) { return fminf(a, b); }
  static __device__ __forceinline__ int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

  // Neighbours alone are exchanged, and only where the second is larger: equal ones keep their order.
  __device__ __forceinline__ void sort() {
#pragma unroll
    for (int list = 0; list < kLists; ++list) {
      Key* const key = keys + 4 * list;
      uint32_t place = 0x03020100u + 0x04040404u * list;
      const auto exchange = [&](int i, unsigned exchanged) {
        const Key a = key[i], b = key[i + 1];
        place = b > a ? __byte_perm(place, 0, exchanged) : place;
        key[i] = larger(a, b);
        key[i + 1] = smaller(a, b);
      };
      exchange(0, 0x3201u);
      exchange(1, 0x3120u);
      exchange(2, 0x2310u);
      exchange(0, 0x3201u);
      exchange(1, 0x3120u);
      exchange(0, 0x3201u);
      places[list] = place;
    }
  }

  // The next one's id, known to all lanes of the token; *key: its key.
  __device__ __forceinline__ int next(Key* key) {
    Key head = keys[0];
#pragma unroll
    for (int list = 1; list < kLists; ++list) head = larger(head, keys[4 * list]);
    Key best = head;
#pragma unroll
    for (int step = L / 2; step > 0; step /= 2) best = larger(best, __shfl_xor_sync(kFullMask, best, step));
    const unsigned lane = threadIdx.x % kWarp, group = lane / L * L;
    const int from = __ffs(static_cast<int>(__ballot_sync(kFullMask, head == best) & kLanes << group)) - 1;
    bool here = static_cast<int>(lane) == from;
    uint32_t place = 0;
#pragma unroll
    for (int list = 0; list < kLists; ++list) {
      const bool leaves = here && keys[4 * list] == best;
      here = here && !leaves;
      if (leaves) {
        place = places[list];
        places[list] >>= 8;
        keys[4 * list] = keys[4 * list + 1];
        keys[4 * list + 1] = keys[4 * list + 2];
        keys[4 * list + 2] = keys[4 * list + 3];
        keys[4 * list + 3] = none();
      }
    }
    *key = best;
    return __shfl_sync(kFullMask, static_cast<int>((lane - group) * V + (place & 0xffu)), from);
  }
};

// One token's experts, as one lane sees them.
template <class A, int L, int V>
struct Experts {
  using Key = typename Pair<A>::Key;
  const TopkParams& p;
  int64_t row;  // offset of the token's logits
  int lane, count;
  bool softmax, biased;
  A top, sum;  // softmax over all experts: the largest logit, the sum of exp(z - top)
  A z[V > 0 ? V : 1];
  bool finite;  // all of them

  __device__ __forceinline__ Experts(const TopkParams& p, int64_t token)
      : p(p),
        row(token * p.ldz),
        lane(threadIdx.x % L),
        count(static_cast<int>(p.experts)),
        softmax(p.score_func == ScoreFunc::softmax),
        biased(p.selection_bias != nullptr),
        top(0),
        sum(1),
        finite(true) {}

  __device__ __forceinline__ Key key_of(A value, int e) const {
    if (!biased) return order_key(value);
    const A score = softmax ? exp_acc(value - top) / sum : sigmoid(value);
    return order_key(score + static_cast<const A*>(p.selection_bias)[e]);
  }

  // Logits, as far as they are kept, -inf beyond them; and the scores' normaliser.
  __device__ __forceinline__ void prepare() {
    const bool over_all = softmax && (biased || !p.norm_topk_prob);
    if constexpr (V > 0) {
      with_row<A>(p.logits_type, p.logits, row, [&](auto* logits) { load(logits); });
      if (over_all) {
        top = z[0];
#pragma unroll
        for (int v = 1; v < V; ++v) top = fmaxf(top, z[v]);
        top = largest(top);
        sum = A(0);
#pragma unroll
        for (int v = 0; v < V; ++v) sum += exp_acc(z[v] - top);
        sum = warp_sum<L>(sum);
      }
    } else if (over_all) {
      top = minus_infinity<A>();
      each([&](int, A value) { top = value > top ? value : top; });
      top = largest(top);
      sum = A(0);
      each([&](int, A value) { sum += exp_acc(value - top); });
      sum = warp_sum<L>(sum);
    }
  }

  // Four at a time where rows allow it.
  template <class T>
  __device__ __forceinline__ void load(const T* logits) {
    const int first = lane * V;
    A nothing = A(0);  // NaN where one is not finite
    if (count % 4 == 0 && p.ldz % 4 == 0 && reinterpret_cast<uintptr_t>(p.logits) % (4 * sizeof(T)) == 0) {
#pragma unroll
      for (int v = 0; v < V; v += 4) {
        float4 four = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
        if (first + v < count) {
          four = four_at(logits + first + v);
          nothing += (four.x * 0.0f + four.y * 0.0f) + (four.z * 0.0f + four.w * 0.0f);
        }
        z[v] = four.x;
        z[v + 1] = four.y;
        z[v + 2] = four.z;
        z[v + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        z[v] = minus_infinity<A>();
        if (first + v >= count) continue;
        z[v] = to_acc(logits[first + v]);
        nothing += z[v] * A(0);
      }
    }
    finite = nothing == A(0);
  }
  static __device__ __forceinline__ float4 four_at(const float* from) { return *reinterpret_cast<const float4*>(from); }
  template <class T>
  static __device__ __forceinline__ float4 four_at(const T* from) {
    const uint2 bits = *reinterpret_cast<const uint2*>(from);
    const float2 lo = unpack2<T>(bits.x), hi = unpack2<T>(bits.y);
    return make_float4(lo.x, lo.y, hi.x, hi.y);
  }

  // take(j, id, logit) for rounds 0 .. k - 1, by all lanes of the token; the logit is for lane j % L alone.
  template <class F>
  __device__ __forceinline__ void select(int k, const F& take) const {
    if constexpr (V > 0) {
      if (!biased && __all_sync(kFullMask, finite)) {
        Lists<float, L, V> lists;
#pragma unroll
        for (int v = 0; v < V; ++v) lists.keys[v] = z[v];
        rounds(lists, k, [&](int j, int id, float key) { take(j, id, key); });
      } else {
        Lists<Key, L, V> lists;
#pragma unroll
        for (int v = 0; v < V; ++v)
          lists.keys[v] = lane * V + v < count ? key_of(z[v], lane * V + v) : Lists<Key, L, V>::none();
        rounds(lists, k, [&](int j, int id, Key key) {
          const bool look = biased && j % L == lane;
          take(j, id, look ? logit_at<A>(p.logits_type, p.logits, row + id) : number_of(key));
        });
      }
    } else {
      Pair<A> taken = Pair<A>::first();
      for (int j = 0; j < k; ++j) {
        taken = behind(taken);
        take(j, taken.id, j % L == lane ? logit_at<A>(p.logits_type, p.logits, row + taken.id) : A(0));
      }
    }
  }
  template <class Ordered, class F>
  static __device__ __forceinline__ void rounds(Ordered& lists, int k, const F& take) {
    lists.sort();
    for (int j = 0; j < k; ++j) {
      decltype(Ordered::none()) key;
      const int id = lists.next(&key);
      take(j, id, key);
    }
  }

  // In memory: the best pair behind `previous`, known to every lane of the token.
  __device__ __forceinline__ Pair<A> behind(const Pair<A>& previous) const {
    Pair<A> best = Pair<A>::last();
    each([&](int e, A value) {
      const Key key = key_of(value, e);
      // A lane's ids ascend, so an equal key that comes later is behind.
      if (previous.before({key, e}) && key > best.key) best = {key, e};
    });
#pragma unroll
    for (int step = L / 2; step > 0; step /= 2) {
      const Pair<A> other = {__shfl_xor_sync(kFullMask, best.key, step), __shfl_xor_sync(kFullMask, best.id, step)};
      if (other.before(best)) best = other;
    }
    return best;
  }
  // In memory: f(e, z) for this lane's experts, upwards.
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    with_row<A>(p.logits_type, p.logits, row, [&](auto* logits) {
      for (int e = lane; e < count; e += L) f(e, static_cast<A>(to_acc(logits[e])));
    });
  }

  // NaN counts for nothing here; it shows in the sums.
  static __device__ __forceinline__ A largest(A v) { return warp_max<L>(v == v ? v : minus_infinity<A>()); }
};

// Ids and weights of one token; bin_counts null: nobody counts. `live` is false for a group without a token.
template <class A, int L, int V>
__device__ __forceinline__ void route_token(const TopkParams& p, int64_t token, bool live, int32_t* bin_counts) {
  Experts<A, L, V> experts(p, token);
  experts.prepare();
  const int lane = experts.lane, k = static_cast<int>(p.top_k), mine = live ? k : 0;
  int64_t* const ids = p.indices + token * k;
  A* const weights = static_cast<A*>(p.weights) + token * k;
  const bool routed = p.mask == nullptr || p.mask[token];

  int own_id = 0;  // of round `lane`; those beyond are kept where their weights will be
  A own_z = A(0);
  experts.select(k, [&](int j, int id, A z) {
    if (j % L != lane) return;
    if (j < L) {
      own_id = id;
      own_z = z;
    } else if (live) {
      ids[j] = id;
      weights[j] = z;
    }
  });

  const auto chosen = [&](int j) { return j < L ? own_z : weights[j]; };
  const bool over_all = experts.softmax && !p.norm_topk_prob;
  A top = minus_infinity<A>(), sum = A(1);
  if (over_all) {
    top = experts.top;
    sum = experts.sum;
  } else if (experts.softmax) {
    for (int j = lane; j < mine; j += L) {
      const A z = chosen(j);
      top = z > top ? z : top;
    }
    top = warp_max<L>(top);
    sum = A(0);
    for (int j = lane; j < mine; j += L) sum += exp_acc(chosen(j) - top);
    sum = warp_sum<L>(sum);
    // Biased scores that are all NaN are chosen by id, and may miss the logit that made them so.
    if (experts.biased && experts.sum != experts.sum) sum = experts.sum;
  } else if (p.norm_topk_prob) {
    sum = A(0);
    for (int j = lane; j < mine; j += L) sum += sigmoid(chosen(j));
    sum = warp_sum<L>(sum);
  }
  for (int j = lane; j < mine; j += L) {
    const A z = chosen(j);
    const int64_t id = j < L ? own_id : ids[j];
    if (bin_counts != nullptr) atomicAdd(&bin_counts[routed ? static_cast<int>(id) : experts.count], 1);
    weights[j] = routed ? (experts.softmax ? exp_acc(z - top) : sigmoid(z)) / sum : A(0);
    ids[j] = routed ? id : -1;
  }
}

}  // namespace moa
