// Routing kernels for test_routing.py. Arguments are named as the fields of csrc/routing/routing.h.
#include "emulator/bind.h"
#include "routing/cuda.h"
#include "routing/plan_cuda.h"

namespace {

moa::ScoreFunc score(int value) { return static_cast<moa::ScoreFunc>(value); }

}  // namespace

MOA_BIND(m) {
  m.def("topk", [](const py::array& logits, int64_t top_k, int score_func, bool norm, const py::object& bias,
                   const py::object& mask, const py::array& weights, const py::array& indices, const py::array& offsets,
                   const py::array& order) {
    emu::Device device;
    moa::TopkParams p{};
    p.logits_type = emu::dtype_of(logits);
    p.tokens = logits.shape(0);
    p.experts = logits.shape(1);
    p.top_k = top_k;
    p.logits = device.in(logits);
    p.ldz = logits.strides(0) / logits.itemsize();
    p.score_func = score(score_func);
    p.norm_topk_prob = norm;
    p.selection_bias = device.in(bias);
    p.mask = device.in<bool>(mask);
    p.weights = device.out(weights);
    p.indices = device.out<int64_t>(indices);
    auto* first = device.out<int32_t>(offsets);
    auto* sorted = device.out<int32_t>(order);
    device.finish(moa::topk_cuda(p, first, sorted, device.work(moa::topk_work(p)), nullptr));
  });
  m.def("sort_by_expert", [](const py::array& ids, int64_t experts, const py::array& offsets, const py::array& order) {
    emu::Device device;
    const auto* in = device.in<int64_t>(ids);
    auto* first = device.out<int32_t>(offsets);
    auto* sorted = device.out<int32_t>(order);
    void* work = device.work(moa::sort_work(ids.size(), experts));
    device.finish(moa::sort_by_expert_cuda(in, ids.size(), experts, first, sorted, work, nullptr));
  });
  m.def("topk_backward", [](const py::array& dw, const py::array& logits, const py::array& indices, int score_func,
                            bool norm, const py::object& order, const py::array& dz) {
    emu::Device device;
    moa::TopkBackwardParams p{};
    p.logits_type = emu::dtype_of(logits);
    p.tokens = logits.shape(0);
    p.experts = logits.shape(1);
    p.top_k = indices.shape(1);
    p.logits = device.in(logits);
    p.ldz = logits.strides(0) / logits.itemsize();
    p.score_func = score(score_func);
    p.norm_topk_prob = norm;
    p.indices = device.in<int64_t>(indices);
    p.grad_weights = device.in(dw);
    p.grad_logits = device.out(dz);
    const auto* sorted = device.in<int32_t>(order);
    device.finish(sorted != nullptr ? moa::topk_backward_sorted_cuda(p, sorted, nullptr)
                                    : moa::topk_backward_cuda(p, nullptr));
  });
  // The plan: launches (0 one, 1 fused, 2 apart), threads and blocks of the selection.
  m.def("route_plan", [](int64_t tokens, int64_t top_k, int64_t experts, bool f64) {
    const auto r = moa::plan_cuda::route(tokens, top_k, experts, f64);
    return py::make_tuple(static_cast<int>(r.launches), r.threads, r.blocks);
  });
  m.def("sort_plan", [](int64_t slots, int64_t experts) { return moa::plan_cuda::sort_blocks(slots, experts); });
}
