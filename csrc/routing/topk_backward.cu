// Gradient of the gate weights with respect to the logits.
//
//   with w the selected weights, dw their gradients, p the scores and c = sum_S w dw:
//   softmax over S   dz_S = w (dw - c)             softmax over E   dz = -p c on all, p (dw - c) on S
//   sigmoid          dz_S = dw p (1 - p)           renormalised     dz_S = p (1 - p) (dw - c) / sum_S p
//
// Weights are computed again from the logits: nothing but logits and ids is kept for the backward. A row whose ids are
// -1 has gradient zero; any other id outside [0, E) is treated like it, slot by slot.
#include "routing/cuda.h"
#include "routing/plan_cuda.h"
#include "routing/scores.cuh"

namespace moa {
namespace {

constexpr int kThreads = plan_cuda::kBackwardThreads;

// What a row's gradients need beside the slot's own weight: dz_S = slope(z) (dw - c) / sum.
template <class A>
struct Normaliser {
  A top, sum, c;
};

// Weight (times `sum`) and slope of a selected logit.
template <class A>
__device__ __forceinline__ A score_of(bool softmax, A z, A top) {
  return softmax ? exp_acc(z - top) : sigmoid(z);
}
template <class A>
__device__ __forceinline__ A slope_of(bool softmax, A z, A top) {
  return softmax ? exp_acc(z - top) : sigmoid(z) * sigmoid(-z);  // p (1 - p), without its cancellation near 1
}

// One slot of the row, if it has an expert: f(j, id, z).
template <class A, class F>
__device__ __forceinline__ void at_slot(const TopkBackwardParams& p, int64_t token, int j, const F& f) {
  const int64_t id = p.indices[token * p.top_k + j];
  if (id >= 0 && id < p.experts) f(j, id, logit_at<A>(p.logits_type, p.logits, token * p.ldz + id));
}

// Over the slots j = lane, lane + L, ... of a row, summed over L lanes.
template <class A, int L>
__device__ __forceinline__ Normaliser<A> normaliser(const TopkBackwardParams& p, int64_t token, int lane) {
  const bool softmax = p.score_func == ScoreFunc::softmax, over_all = softmax && !p.norm_topk_prob;
  const int k = static_cast<int>(p.top_k), experts = static_cast<int>(p.experts);
  const A* dw = static_cast<const A*>(p.grad_weights) + token * k;
  Normaliser<A> n = {minus_infinity<A>(), A(1), A(0)};
  if (over_all) {
    with_row<A>(p.logits_type, p.logits, token * p.ldz, [&](auto* row) {
      for (int e = lane; e < experts; e += L) {
        const A z = to_acc(row[e]);
        n.top = z > n.top ? z : n.top;
      }
      n.top = warp_max<L>(n.top);
      n.sum = A(0);
      for (int e = lane; e < experts; e += L) n.sum += exp_acc(static_cast<A>(to_acc(row[e])) - n.top);
      n.sum = warp_sum<L>(n.sum);
    });
  } else if (softmax || p.norm_topk_prob) {
    if (softmax)
      for (int j = lane; j < k; j += L)
        at_slot<A>(p, token, j, [&](int, int64_t, A z) { n.top = z > n.top ? z : n.top; });
    n.top = warp_max<L>(n.top);
    n.sum = A(0);
    for (int j = lane; j < k; j += L)
      at_slot<A>(p, token, j, [&](int, int64_t, A z) { n.sum += score_of(softmax, z, n.top); });
    n.sum = warp_sum<L>(n.sum);
  }
  if (softmax || p.norm_topk_prob) {
    for (int j = lane; j < k; j += L)
      at_slot<A>(p, token, j, [&](int i, int64_t, A z) { n.c += score_of(softmax, z, n.top) / n.sum * dw[i]; });
    n.c = warp_sum<L>(n.c);
  }
  return n;
}

// A warp per token: all logits first, then, behind a barrier, the selected ones over them.
template <class A>
__global__ void __launch_bounds__(kThreads, 4) backward_kernel(const TopkBackwardParams p) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (token >= p.tokens) return;  // whole warps
  const int lane = threadIdx.x % kWarp, k = static_cast<int>(p.top_k), experts = static_cast<int>(p.experts);
  const bool softmax = p.score_func == ScoreFunc::softmax, over_all = softmax && !p.norm_topk_prob;
  const A* dw = static_cast<const A*>(p.grad_weights) + token * k;
  const Normaliser<A> n = normaliser<A, kWarp>(p, token, lane);

  bool any = false;
  for (int j = lane; j < k; j += kWarp) at_slot<A>(p, token, j, [&](int, int64_t, A) { any = true; });
  const bool everywhere = __any_sync(kFullMask, any) && over_all;
  with_row<A>(p.logits_type, p.logits, token * p.ldz, [&](auto* row) {
    using T = std::remove_const_t<std::remove_reference_t<decltype(*row)>>;
    T* dz = static_cast<T*>(p.grad_logits) + token * experts;
    for (int e = lane; e < experts; e += kWarp)
      dz[e] = from_acc<T>(everywhere ? -(exp_acc(static_cast<A>(to_acc(row[e])) - n.top) / n.sum * n.c) : A(0));
    __syncwarp();
    for (int j = lane; j < k; j += kWarp)
      at_slot<A>(p, token, j, [&](int i, int64_t id, A z) {
        dz[id] = from_acc<T>(slope_of(softmax, z, n.top) * (dw[i] - n.c) / n.sum);
      });
  });
}

// A thread per sorted position; its row's normaliser is summed again by each of the row's k threads.
template <class A>
__global__ void __launch_bounds__(kThreads, 4)
    backward_sorted_kernel(const TopkBackwardParams p, const int32_t* order) {
  const int64_t q = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, slots = p.tokens * p.top_k;
  if (q >= slots) return;
  const int64_t slot = order[q];
  A dz = A(0);
  if (slot >= 0 && slot < slots) {
    const int64_t token = slot / p.top_k;
    const bool softmax = p.score_func == ScoreFunc::softmax;
    const Normaliser<A> n = normaliser<A, 1>(p, token, 0);
    at_slot<A>(p, token, static_cast<int>(slot - token * p.top_k), [&](int, int64_t, A z) {
      dz = slope_of(softmax, z, n.top) * (static_cast<const A*>(p.grad_weights)[slot] - n.c) / n.sum;
    });
  }
  static_cast<A*>(p.grad_logits)[q] = dz;
}

unsigned blocks_of(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

}  // namespace

cudaError_t topk_backward_cuda(const TopkBackwardParams& p, cudaStream_t stream) {
  const unsigned blocks = blocks_of(p.tokens * kWarp);
  if (p.logits_type == DType::f64) return MOA_LAUNCH(backward_kernel<double>, blocks, kThreads, 0, stream, p);
  return MOA_LAUNCH(backward_kernel<float>, blocks, kThreads, 0, stream, p);
}

cudaError_t topk_backward_sorted_cuda(const TopkBackwardParams& p, const int32_t* order, cudaStream_t stream) {
  const unsigned blocks = blocks_of(p.tokens * p.top_k);
  if (p.logits_type == DType::f64)
    return MOA_LAUNCH(backward_sorted_kernel<double>, blocks, kThreads, 0, stream, p, order);
  return MOA_LAUNCH(backward_sorted_kernel<float>, blocks, kThreads, 0, stream, p, order);
}

}  // namespace moa
