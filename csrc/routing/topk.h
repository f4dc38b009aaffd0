// Top-k selection and its gradient on a CPU. Included only by csrc/isa/kernels.cpp, once per instruction set.
//
//   S        = the k largest of z (of score + selection_bias where that is given); NaN counts as largest, ties go to
//              the lower id
//   softmax  w_e = exp(z_e) / sum over all E, or over S when renormalised;   sigmoid  w_e = s(z_e) [/ sum over S]
//   backward, c = sum_S w dw:  softmax over S   dz_S = w (dw - c)
//                              softmax over E   dz = -p c on all, + w dw on S
//                              sigmoid          dz_S = dw p (1 - p);  renormalised  p (1 - p) (dw - c) / sum_S p
#pragma once
#include <cmath>

#include "common/convert.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "routing/routing.h"

namespace moa {
namespace MOA_ISA {

// Order-preserving integer of a float: NaN above +inf, -0 equal to +0.
static inline int32_t order_key(float v) {
  const float a = v + 0.0f;
  int32_t b;
  memcpy(&b, &a, 4);
  const int32_t key = b ^ ((b >> 31) & 0x7fffffff);
  return a != a ? 0x7fffffff : key;
}
static inline int64_t order_key(double v) {
  const double a = v + 0.0;
  int64_t b;
  memcpy(&b, &a, 8);
  const int64_t key = b ^ ((b >> 63) & 0x7fffffffffffffffLL);
  return a != a ? 0x7fffffffffffffffLL : key;
}

// exp in float32 to about 1 ulp, in plain arithmetic so that the loops below vectorise (Cody-Waite reduction, degree-6
// polynomial). Below -104 it is exactly 0, above 89 inf, NaN stays.
static inline float exp_acc(float x) {
  const float clipped = x > -104.0f ? (x < 89.0f ? x : 89.0f) : -104.0f;  // NaN too
  const float n = (clipped * 1.44269504f + 12582912.0f) - 12582912.0f;
  const float r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
  float q = 1.9875691500e-4f;
  q = q * r + 1.3981999507e-3f;
  q = q * r + 8.3334519073e-3f;
  q = q * r + 4.1665795894e-2f;
  q = q * r + 1.6666665459e-1f;
  q = q * r + 5.0000001201e-1f;
  q = q * r * r + r + 1.0f;
  // 2^n in two factors: n reaches -150, below the exponents of normal numbers.
  const int32_t i = static_cast<int32_t>(n), half = i / 2;
  const float y =
      q * as_float(static_cast<uint32_t>(half + 127) << 23) * as_float(static_cast<uint32_t>(i - half + 127) << 23);
  return x != x ? x : y;
}
static inline double exp_acc(double x) { return std::exp(x); }

template <class Acc>
static inline Acc sigmoid_acc(Acc z) {
  return Acc(1) / (Acc(1) + exp_acc(-z));
}

// p = softmax(z) over n entries, as torch.softmax: a row with NaN, +inf or only -inf becomes NaN.
template <class Acc>
static void softmax_row(const Acc* z, int64_t n, Acc* p) {
  Acc top = z[0];
  for (int64_t i = 1; i < n; ++i) top = z[i] > top ? z[i] : top;
  for (int64_t i = 0; i < n; ++i) p[i] = exp_acc(z[i] - top);
  Acc lanes[8] = {};  // eight running sums: fixed order, and shorter chains of rounding
  for (int64_t i = 0; i < n; ++i) lanes[i % 8] += p[i];
  const Acc sum = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
  const Acc inverse = Acc(1) / sum;
  for (int64_t i = 0; i < n; ++i) p[i] *= inverse;
}

static inline int32_t lowest(int32_t) { return INT32_MIN; }
static inline int64_t lowest(int64_t) { return INT64_MIN; }

// The k largest keys of n, best first, ties to the lower id: k times the maximum, which then leaves. No value's key is
// the lowest integer, so nothing is taken twice. keys is overwritten.
template <class Key>
static void select_top(Key* keys, int64_t n, int64_t k, int64_t* ids) {
  for (int64_t j = 0; j < k; ++j) {
    Key best = keys[0];
    for (int64_t i = 1; i < n; ++i) best = keys[i] > best ? keys[i] : best;
    int64_t at = 0;
    for (; at + 16 <= n; at += 16) {
      int found = 0;
      for (int i = 0; i < 16; ++i) found |= keys[at + i] == best;
      if (found != 0) break;
    }
    while (keys[at] != best) ++at;
    ids[j] = at;
    keys[at] = lowest(Key());
  }
}

#if defined(MOA_HAS_AVX512)
// The same, sixteen lanes abreast, each with its best key and the first place of it.
static inline void select_top(int32_t* keys, int64_t n, int64_t k, int64_t* ids) {
  if (n < 32) return select_top<int32_t>(keys, n, k, ids);
  const __m512i none = _mm512_set1_epi32(INT32_MIN), step = _mm512_set1_epi32(16);
  for (int64_t j = 0; j < k; ++j) {
    __m512i best = none, where = _mm512_setzero_si512();
    __m512i here = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 there = static_cast<__mmask16>(n - i < 16 ? (1u << (n - i)) - 1 : 0xffff);
      const __m512i key = _mm512_mask_loadu_epi32(none, there, keys + i);
      where = _mm512_mask_mov_epi32(where, _mm512_cmpgt_epi32_mask(key, best), here);
      best = _mm512_max_epi32(best, key);
      here = _mm512_add_epi32(here, step);
    }
    const __mmask16 tied = _mm512_cmpeq_epi32_mask(best, _mm512_set1_epi32(_mm512_reduce_max_epi32(best)));
    ids[j] = _mm512_mask_reduce_min_epi32(tied, where);
    keys[ids[j]] = INT32_MIN;
  }
}
#endif

// The same for many of them: a sorted list of the best so far, which most keys do not enter.
template <class Key>
static void select_many(const Key* keys, int64_t n, int64_t k, Key* best, int64_t* ids) {
  int64_t filled = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (filled == k && keys[i] <= best[k - 1]) continue;
    int64_t at = filled < k ? filled++ : k - 1;
    for (; at > 0 && best[at - 1] < keys[i]; --at) {  // stays behind equal keys: their ids are lower
      best[at] = best[at - 1];
      ids[at] = ids[at - 1];
    }
    best[at] = keys[i];
    ids[at] = i;
  }
}

// A row as accumulators: itself, or converted into the buffer.
template <class T, class Acc>
static inline const Acc* as_acc(const T* row, int64_t n, Acc* buffer) {
  if constexpr (Same<T, Acc>::value) {
    return row;
  } else {
    convert_row(row, buffer, n);
    return buffer;
  }
}

template <class T, class Acc>
static void topk_rows(const TopkParams& p) {
  using Key = decltype(order_key(Acc()));
  constexpr int64_t kRows = 64;
  const int64_t n = p.experts, k = p.top_k;
  const Acc* bias = static_cast<const Acc*>(p.selection_bias);
  parallel_tasks((p.tokens + kRows - 1) / kRows, p.tokens * (n + 32) > 8192, [&](int64_t task) {
    Acc* buffer = scratch<Acc>(Scratch::rows, 2 * n + k);
    Acc* score = buffer + n;
    Acc* chosen = score + n;
    Key* keys = scratch<Key>(Scratch::convert, n + k);
    const int64_t end = (task + 1) * kRows < p.tokens ? (task + 1) * kRows : p.tokens;
    for (int64_t t = task * kRows; t < end; ++t) {
      Acc* w = static_cast<Acc*>(p.weights) + t * k;
      int64_t* ids = p.indices + t * k;
      if (p.mask != nullptr && !p.mask[t]) {
        for (int64_t j = 0; j < k; ++j) {
          w[j] = Acc(0);
          ids[j] = -1;
        }
        continue;
      }
      const Acc* z = as_acc(static_cast<const T*>(p.logits) + t * p.ldz, n, buffer);
      const bool softmax = p.score_func == ScoreFunc::softmax;
      const bool all_scores = bias != nullptr || (softmax && !p.norm_topk_prob);
      if (all_scores) {
        if (softmax) {
          softmax_row(z, n, score);
        } else {
          for (int64_t e = 0; e < n; ++e) score[e] = sigmoid_acc(z[e]);
        }
      }
      if (bias != nullptr) {
        for (int64_t e = 0; e < n; ++e) keys[e] = order_key(score[e] + bias[e]);
      } else {
        for (int64_t e = 0; e < n; ++e) keys[e] = order_key(z[e]);
      }
      if (k <= 8) {
        select_top(keys, n, k, ids);
      } else {
        select_many(keys, n, k, keys + n, ids);
      }
      for (int64_t j = 0; j < k; ++j) chosen[j] = z[ids[j]];
      if (softmax) {
        if (p.norm_topk_prob) {
          softmax_row(chosen, k, w);
          // Biased scores that are all NaN are chosen by id, and may miss the logit that made them so.
          for (int64_t j = 0; all_scores && score[0] != score[0] && j < k; ++j) w[j] = score[0];
        } else {
          for (int64_t j = 0; j < k; ++j) w[j] = score[ids[j]];
        }
      } else {
        Acc sum = 0;
        for (int64_t j = 0; j < k; ++j) sum += w[j] = sigmoid_acc(chosen[j]);
        for (int64_t j = 0; p.norm_topk_prob && j < k; ++j) w[j] /= sum;
      }
    }
  });
}

template <class T, class Acc>
static void topk_backward_rows(const TopkBackwardParams& p) {
  constexpr int64_t kRows = 64;
  const int64_t n = p.experts, k = p.top_k;
  parallel_tasks((p.tokens + kRows - 1) / kRows, p.tokens * (n + 32) > 8192, [&](int64_t task) {
    Acc* z = scratch<Acc>(Scratch::rows, 2 * n + 2 * k);
    Acc* dz = z + n;
    Acc* chosen = dz + n;
    Acc* w = chosen + k;
    const int64_t end = (task + 1) * kRows < p.tokens ? (task + 1) * kRows : p.tokens;
    for (int64_t t = task * kRows; t < end; ++t) {
      const int64_t* ids = p.indices + t * k;
      const Acc* dw = static_cast<const Acc*>(p.grad_weights) + t * k;
      for (int64_t e = 0; e < n; ++e) dz[e] = Acc(0);
      if (ids[0] >= 0) {
        convert_row(static_cast<const T*>(p.logits) + t * p.ldz, z, n);
        for (int64_t j = 0; j < k; ++j) chosen[j] = z[ids[j]];
        Acc c = 0;
        if (p.score_func == ScoreFunc::softmax && p.norm_topk_prob) {
          softmax_row(chosen, k, w);
          for (int64_t j = 0; j < k; ++j) c += w[j] * dw[j];
          for (int64_t j = 0; j < k; ++j) dz[ids[j]] = w[j] * (dw[j] - c);
        } else if (p.score_func == ScoreFunc::softmax) {
          softmax_row(z, n, z);
          for (int64_t j = 0; j < k; ++j) c += z[ids[j]] * dw[j];
          for (int64_t e = 0; e < n; ++e) dz[e] = -z[e] * c;
          for (int64_t j = 0; j < k; ++j) dz[ids[j]] += z[ids[j]] * dw[j];
        } else {
          Acc sum = 0;
          for (int64_t j = 0; j < k; ++j) sum += w[j] = sigmoid_acc(chosen[j]);
          if (!p.norm_topk_prob) sum = Acc(1);
          for (int64_t j = 0; p.norm_topk_prob && j < k; ++j) c += w[j] / sum * dw[j];
          for (int64_t j = 0; j < k; ++j) dz[ids[j]] = w[j] * sigmoid_acc(-chosen[j]) * (dw[j] - c) / sum;
        }
      }
      convert_row(dz, static_cast<T*>(p.grad_logits) + t * n, n);
    }
  });
}

}  // namespace MOA_ISA
}  // namespace moa
