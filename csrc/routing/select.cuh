// Selection of a token's experts and its gate weights: what topk.cu, decode.cu and routed.cu do with a row of
// logits. Equations: topk.cu.
//
// L neighbouring lanes own a token; lane l has the experts l, l + L, ..., V of them in registers or, with V = 0, any
// number in memory. Pairs (key, id) are all different and totally ordered: by key downwards, then by id upwards. Round j
// takes the best pair that is worse than that of round j - 1, so nothing is marked or removed, and k may be anything
// up to E. Lane j % L keeps and writes the id of round j.
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

// One token's experts, as one lane sees them.
template <class A, int L, int V>
struct Experts {
  using Key = typename Pair<A>::Key;
  const TopkParams& p;
  int64_t row;  // offset of the token's logits
  int lane, count;
  bool softmax, biased;
  A top, sum;  // softmax over all experts: the largest logit, the sum of exp(z - top)
  Key keys[V > 0 ? V : 1];

  __device__ __forceinline__ Experts(const TopkParams& p, int64_t token)
      : p(p),
        row(token * p.ldz),
        lane(threadIdx.x % L),
        count(static_cast<int>(p.experts)),
        softmax(p.score_func == ScoreFunc::softmax),
        biased(p.selection_bias != nullptr),
        top(0),
        sum(1) {}

  __device__ __forceinline__ Key key_of(A z, int e) const {
    if (!biased) return order_key(z);
    const A score = softmax ? exp_acc(z - top) / sum : sigmoid(z);
    return order_key(score + static_cast<const A*>(p.selection_bias)[e]);
  }

  // Logits, scores' normaliser and keys, as far as they are kept.
  __device__ __forceinline__ void prepare() {
    const bool over_all = softmax && (biased || !p.norm_topk_prob);
    if constexpr (V > 0) {
      A z[V];
      with_row<A>(p.logits_type, p.logits, row, [&](auto* logits) {
#pragma unroll
        for (int v = 0; v < V; ++v)
          z[v] = v * L + lane < count ? static_cast<A>(to_acc(logits[v * L + lane])) : minus_infinity<A>();
      });
      if (over_all) {
        top = z[0];
#pragma unroll
        for (int v = 1; v < V; ++v) top = z[v] > top ? z[v] : top;
        top = largest(top);
        sum = A(0);
#pragma unroll
        for (int v = 0; v < V; ++v) sum += v * L + lane < count ? exp_acc(z[v] - top) : A(0);
        sum = warp_sum<L>(sum);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) keys[v] = v * L + lane < count ? key_of(z[v], v * L + lane) : Pair<A>::last().key;
    } else if (over_all) {
      top = minus_infinity<A>();
      each([&](int, A z) { top = z > top ? z : top; });
      top = largest(top);
      sum = A(0);
      each([&](int, A z) { sum += exp_acc(z - top); });
      sum = warp_sum<L>(sum);
    }
  }

  // The best pair behind `previous`, known to every lane of the token.
  __device__ __forceinline__ Pair<A> next(const Pair<A>& previous) const {
    Pair<A> best = Pair<A>::last();
    const auto consider = [&](Key key, int e) {
      // A lane's ids ascend, so an equal key that comes later is behind.
      if (previous.before({key, e}) && key > best.key) best = {key, e};
    };
    if constexpr (V > 0) {
#pragma unroll
      for (int v = 0; v < V; ++v) consider(keys[v], v * L + lane);
    } else {
      each([&](int e, A z) { consider(key_of(z, e), e); });
    }
#pragma unroll
    for (int step = L / 2; step > 0; step /= 2) {
      const Pair<A> other = {__shfl_xor_sync(kFullMask, best.key, step), __shfl_xor_sync(kFullMask, best.id, step)};
      if (other.before(best)) best = other;
    }
    return best;
  }

  // f(e, z) for this lane's experts, upwards.
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
  const int lane = experts.lane, k = static_cast<int>(p.top_k);
  int64_t* const ids = p.indices + token * k;
  A* const weights = static_cast<A*>(p.weights) + token * k;
  const bool routed = p.mask == nullptr || p.mask[token];

  int own = 0;  // the id of round `lane`
  Pair<A> taken = Pair<A>::first();
  for (int j = 0; j < k; ++j) {
    taken = experts.next(taken);
    if (j % L != lane) continue;
    if (j < L) own = taken.id;
    if (!live) continue;
    ids[j] = taken.id;
    if (bin_counts != nullptr) atomicAdd(&bin_counts[routed ? taken.id : experts.count], 1);
  }

  // z of the rounds j = lane, lane + L, ... that this lane wrote.
  const auto chosen = [&](int j) {
    const int64_t id = j < L ? own : ids[j];
    return logit_at<A>(p.logits_type, p.logits, experts.row + id);
  };
  const int mine = live ? k : 0;
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
    weights[j] = routed ? (experts.softmax ? exp_acc(z - top) : sigmoid(z)) / sum : A(0);
    if (!routed) ids[j] = -1;
  }
}

}  // namespace moa
