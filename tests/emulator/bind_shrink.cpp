// Shrink, router and decode for test_shrink.py, test_router.py and test_decode.py. Arguments are named as the fields of
// csrc/lora/lora.h.
#include "emulator/bind_lora.h"
#include "routing/cuda.h"

using emu::fill;
using emu::fill_layer;
using emu::fill_router;
using emu::row_stride;

namespace {

void fill_decode(emu::Device* device, moa::DecodeParams* p, const py::array& x, const py::array& lora_A,
                 const py::array& lora_B, const py::array& router, int64_t top_k, int score_func, bool norm,
                 const py::object& selection_bias, const py::object& scale, double scaling, const py::object& ranks,
                 const py::array& y) {
  fill_layer(device, p, x, lora_A, router, top_k);
  p->out = lora_B.shape(1);
  p->lora_B = device->in(lora_B);
  p->scale = device->in<double>(scale);
  p->scaling = scaling;
  p->ranks = device->in<int32_t>(ranks);
  p->score_func = static_cast<moa::ScoreFunc>(score_func);
  p->norm_topk_prob = norm;
  p->selection_bias = device->in(selection_bias);
  p->y = device->out(y);
}

}  // namespace

MOA_BIND(m) {
  m.def("shrink", [](const py::array& x, const py::array& lora_A, const py::array& offsets, const py::array& order,
                     const py::object& ranks, const py::array& h) {
    emu::Device device;
    moa::ForwardParams p{};
    fill(&device, &p, x.shape(0), lora_A, offsets, order, py::none(), 1.0, ranks);
    p.x_type = emu::dtype_of(x);
    p.rank = lora_A.shape(1);
    p.in = x.shape(1);
    p.x = device.in(x);
    p.ldx = row_stride(x);
    p.lora_A = device.in(lora_A);
    p.h = device.out(h);
    device.finish(moa::shrink_cuda(p, device.work(moa::shrink_work(p)), nullptr));
  });
  // With the routing that the logits are taken to have given.
  m.def("routed_shrink",
        [](const py::array& x, const py::array& lora_A, const py::array& router, int64_t top_k,
           const py::array& offsets, const py::array& order, const py::array& logits, const py::array& h) {
          emu::Device device;
          moa::RoutedShrinkParams p{};
          fill_layer(&device, &p, x, lora_A, router, top_k);
          p.all = device.work(moa::routed_shrink_all(p));
          p.logits = device.out(logits);
          const cudaError_t error = moa::routed_shrink_cuda(p, device.work(moa::routed_shrink_work(p)), nullptr);
          const bool fits = moa::routed_shrink_fits(p);
          p.seg.offsets = device.in<int32_t>(offsets);
          p.seg.order = device.in<int32_t>(order);
          p.h = device.out(h);
          device.finish(error != cudaSuccess ? error : moa::pick_cuda(p, p.all, nullptr));
          return fits;
        });
  // y = bias + mixture from the same pass and the ids of its logits, which are not sorted.
  m.def("routed_expand",
        [](const py::array& x, const py::array& lora_A, const py::array& lora_B, const py::array& router, int64_t top_k,
           int score_func, bool norm, double scaling, const py::object& bias, const py::array& logits,
           const py::array& weights, const py::array& indices, const py::array& y) {
          emu::Device device;
          moa::RoutedShrinkParams p{};
          fill_layer(&device, &p, x, lora_A, router, top_k);
          p.out = lora_B.shape(1);
          p.lora_B = device.in(lora_B);
          p.scaling = scaling;
          p.bias = device.in(bias);
          p.all = device.work(moa::routed_shrink_all(p));
          p.logits = device.out(logits);
          p.y = device.out(y);
          cudaError_t error = moa::routed_shrink_cuda(p, device.work(moa::routed_shrink_work(p)), nullptr);
          moa::TopkParams t{};
          t.logits_type = moa::DType::f32;
          t.tokens = p.seg.tokens;
          t.experts = t.ldz = p.seg.experts;
          t.top_k = top_k;
          t.logits = p.logits;
          t.score_func = static_cast<moa::ScoreFunc>(score_func);
          t.norm_topk_prob = norm;
          t.weights = device.out(weights);
          t.indices = device.out<int64_t>(indices);
          if (error == cudaSuccess) error = moa::topk_cuda(t, nullptr, nullptr, nullptr, nullptr);
          p.weights = t.weights;
          if (error == cudaSuccess)
            error = moa::expand_all_cuda(p, t.indices, device.work(moa::expand_all_work(p)), nullptr);
          device.finish(error);
          return moa::routed_shrink_fits(p) && moa::expand_all_fits(p);
        });
  m.def("backward_shrink", [](const py::array& dy, const py::array& lora_B, const py::array& offsets,
                              const py::array& order, const py::object& scale, double scaling, const py::object& ranks,
                              const py::array& h, const py::array& u, const py::object& dw) {
    emu::Device device;
    moa::BackwardParams p{};
    fill(&device, &p, dy.shape(0), lora_B, offsets, order, scale, scaling, ranks);
    p.x_type = emu::dtype_of(dy);
    p.rank = lora_B.shape(2);
    p.out = dy.shape(1);
    p.dy = device.in(dy);
    p.lddy = row_stride(dy);
    p.lora_B = device.in(lora_B);
    p.h = device.in(h);
    p.u = device.out(u);
    p.dw = device.out(dw);
    device.finish(moa::backward_shrink_cuda(p, device.work(moa::backward_shrink_work(p)), nullptr));
  });
  m.def("shrink_plan", [](int64_t slots, int64_t experts, int64_t rank, int64_t width, int type, bool dot) {
    const auto p = moa::plan_cuda::shrink(slots, experts, rank, width, static_cast<moa::DType>(type), dot);
    return py::make_tuple(p.tiles, p.columns, p.column_tiles, p.splits, p.by_slot, p.finish);
  });
  m.def("router", [](const py::array& x, const py::array& weight, const py::array& logits) {
    emu::Device device;
    moa::RouterParams p{};
    fill_router(&device, &p, x, weight);
    p.logits = device.out(logits);
    device.finish(moa::router_cuda(p, device.work(moa::router_work(p)), nullptr));
  });
  m.def("decode", [](const py::array& x, const py::array& lora_A, const py::array& lora_B, const py::array& router,
                     int64_t top_k, int score_func, bool norm, const py::object& bias, const py::object& scale,
                     double scaling, const py::object& ranks, const py::array& y) {
    emu::Device device;
    moa::DecodeParams p{};
    fill_decode(&device, &p, x, lora_A, lora_B, router, top_k, score_func, norm, bias, scale, scaling, ranks, y);
    device.finish(moa::decode_cuda(p, device.work(moa::decode_work(p)), nullptr));
  });
  // The same with the base, y = bias + x W^T + mixture; and the base alone, y = start + x W^T: start may be y.
  m.def("decode_linear",
        [](const py::array& x, const py::array& weight, const py::object& bias, const py::array& lora_A,
           const py::array& lora_B, const py::array& router, int64_t top_k, int score_func, bool norm, double scaling,
           const py::object& selection_bias, const py::object& scale, const py::object& ranks, const py::array& y) {
          emu::Device device;
          moa::DecodeParams p{};
          fill_decode(&device, &p, x, lora_A, lora_B, router, top_k, score_func, norm, selection_bias, scale, scaling,
                      ranks, y);
          p.bias = device.in(bias);
          p.weight = device.in(weight);
          p.ldw = row_stride(weight);
          device.finish(moa::decode_cuda(p, device.work(moa::decode_work(p)), nullptr));
        });
  m.def("skinny", [](const py::array& x, const py::array& weight, const py::object& start, const py::array& y) {
    emu::Device device;
    moa::SkinnyParams p{};
    p.type = emu::dtype_of(x);
    p.tokens = x.shape(0);
    p.in = x.shape(1);
    p.out = weight.shape(0);
    p.x = device.in(x);
    p.ldx = row_stride(x);
    p.weight = device.in(weight);
    p.ldw = row_stride(weight);
    p.y = device.out(y);
    p.start = start.is(y) ? p.y : device.in(start);
    p.ldstart = start.is_none() || start.cast<py::array>().ndim() == 1 ? 0 : row_stride(start.cast<py::array>());
    device.finish(moa::skinny_linear_cuda(p, nullptr));
  });
  // The same given out, with bias: y = bias + mixture.
  m.def("routed", [](const py::array& x, const py::array& lora_A, const py::array& lora_B, const py::array& router,
                     int64_t top_k, int score_func, bool norm, double scaling, const py::object& bias,
                     const py::array& y, const py::array& logits, const py::array& weights, const py::array& indices,
                     const py::array& offsets, const py::array& order, const py::array& h) {
    emu::Device device;
    moa::DecodeParams p{};
    fill_layer(&device, &p, x, lora_A, router, top_k);
    p.out = lora_B.shape(1);
    p.lora_B = device.in(lora_B);
    p.scaling = scaling;
    p.score_func = static_cast<moa::ScoreFunc>(score_func);
    p.norm_topk_prob = norm;
    p.bias = device.in(bias);
    p.y = device.out(y);
    p.logits = device.out(logits);
    p.gates = device.out(weights);
    p.indices = device.out<int64_t>(indices);
    p.offsets = device.out<int32_t>(offsets);
    p.order = device.out<int32_t>(order);
    p.h = device.out(h);
    device.finish(moa::decode_cuda(p, device.work(moa::decode_work(p)), nullptr));
  });
  m.def("dense_plan", [](int64_t tokens, int64_t lora_rows, int64_t experts, int64_t width, int type) {
    const auto p = moa::plan_cuda::dense(tokens, lora_rows, experts, width, static_cast<moa::DType>(type));
    const char* const names[] = {"few", "apart", "mixed", "narrow", "wide"};
    return py::make_tuple(names[static_cast<int>(p.kind)], p.rows, p.column_tiles, p.splits);
  });
  m.def("decode_plan", [](int64_t tokens, int64_t top_k, int64_t experts, int64_t rank, int64_t in, int64_t size) {
    return moa::plan_cuda::decode_dense(tokens, top_k, experts, rank, in, size);
  });
  m.def("dense_shrink_plan", [](int64_t tokens, int64_t top_k, int64_t experts, int64_t rank, bool half) {
    return moa::plan_cuda::dense_shrink(tokens, top_k, experts, rank, half);
  });
}
