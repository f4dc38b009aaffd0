// Expand, gram and the router's backward for test_expand.py and test_gram.py. Arguments are named as the fields of
// csrc/lora/lora.h; None is null.
#include "emulator/bind_lora.h"

using emu::row_stride;

namespace {

// What forward and backward share. `values` (h or u) tells slots and rank.
void fill(emu::Device* device, moa::LoraParams* p, int64_t tokens, const py::array& values, const py::array& adapter,
          const py::array& offsets, const py::array& order, const py::array& weights, const py::object& scale,
          double scaling, const py::object& ranks) {
  emu::fill(device, p, tokens, adapter, offsets, order, scale, scaling, ranks);
  p->rank = values.shape(1);
  p->weights = device->in(weights);
}

void fill_mixture(emu::Device* device, moa::ForwardParams* p, const py::array& x, const py::array& lora_A,
                  const py::array& lora_B, const py::array& offsets, const py::array& order, const py::array& weights,
                  const py::object& scale, double scaling, const py::object& ranks, const py::array& y) {
  emu::fill(device, p, y.shape(0), lora_A, offsets, order, scale, scaling, ranks);
  p->x_type = emu::dtype_of(x);
  p->rank = lora_A.shape(1);
  p->in = x.shape(1);
  p->out = y.shape(1);
  p->weights = device->in(weights);
  p->x = device->in(x);
  p->ldx = row_stride(x);
  p->lora_A = device->in(lora_A);
  p->lora_B = device->in(lora_B);
  p->y = device->out(y);
}

}  // namespace

MOA_BIND(m) {
  // base may be y itself
  m.def("expand", [](const py::array& h, const py::array& lora_B, const py::array& offsets, const py::array& order,
                     const py::array& weights, const py::object& scale, double scaling, const py::object& ranks,
                     const py::object& base, const py::object& bias, const py::array& y) {
    emu::Device device;
    moa::ForwardParams p{};
    fill(&device, &p, y.shape(0), h, lora_B, offsets, order, weights, scale, scaling, ranks);
    p.x_type = emu::dtype_of(y);
    p.out = y.shape(1);
    p.lora_B = device.in(lora_B);
    p.h = const_cast<void*>(device.in(h));
    p.y = device.out(y);
    p.base = base.is(y) ? p.y : device.in(base);
    p.ldbase = base.is_none() ? 0 : row_stride(base.cast<py::array>());
    p.bias = device.in(bias);
    device.finish(moa::expand_cuda(p, device.work(moa::expand_work(p)), nullptr));
  });
  m.def("mixture", [](const py::array& x, const py::array& lora_A, const py::array& lora_B, const py::array& offsets,
                      const py::array& order, const py::array& weights, const py::object& scale, double scaling,
                      const py::object& ranks, const py::object& base, const py::object& bias, const py::array& y,
                      const py::object& h) {
    emu::Device device;
    moa::ForwardParams p{};
    fill_mixture(&device, &p, x, lora_A, lora_B, offsets, order, weights, scale, scaling, ranks, y);
    p.base = device.in(base);
    p.ldbase = base.is_none() ? 0 : row_stride(base.cast<py::array>());
    p.bias = device.in(bias);
    p.h = device.out(h);
    device.finish(moa::mixture_cuda(p, device.work(moa::mixture_work(p)), nullptr));
  });
  // The same with the base, y = bias + x W^T + mixture.
  m.def("mixture_linear",
        [](const py::array& x, const py::array& weight, const py::object& bias, const py::array& lora_A,
           const py::array& lora_B, const py::array& offsets, const py::array& order, const py::array& weights,
           const py::object& scale, double scaling, const py::object& ranks, const py::array& y) {
          emu::Device device;
          moa::ForwardParams p{};
          fill_mixture(&device, &p, x, lora_A, lora_B, offsets, order, weights, scale, scaling, ranks, y);
          p.bias = device.in(bias);
          p.weight = device.in(weight);
          p.ldw = row_stride(weight);
          device.finish(moa::mixture_cuda(p, device.work(moa::mixture_work(p)), nullptr));
        });
  m.def("backward_expand",
        [](const py::array& u, const py::array& lora_A, const py::array& offsets, const py::array& order,
           const py::array& weights, const py::object& scale, double scaling, const py::object& ranks,
           const py::object& dz, const py::object& router_weight, const py::array& dx) {
          emu::Device device;
          moa::BackwardParams p{};
          fill(&device, &p, dx.shape(0), u, lora_A, offsets, order, weights, scale, scaling, ranks);
          p.x_type = emu::dtype_of(dx);
          p.in = dx.shape(1);
          p.lora_A = device.in(lora_A);
          p.u = const_cast<void*>(device.in(u));
          p.dz = device.in(dz);
          p.router_weight = device.in(router_weight);
          p.dx = device.out(dx);
          device.finish(moa::backward_expand_cuda(p, device.work(moa::backward_expand_work(p)), nullptr));
        });
  m.def("gram", [](const py::array& x, const py::array& dy, const py::array& u, const py::array& h,
                   const py::array& offsets, const py::array& order, const py::array& weights, const py::object& scale,
                   double scaling, const py::object& ranks, const py::object& dz, const py::object& dA,
                   const py::object& dB, const py::object& d_router) {
    emu::Device device;
    moa::BackwardParams p{};
    const py::array adapter = dA.is_none() ? (dB.is_none() ? x : dB.cast<py::array>()) : dA.cast<py::array>();
    fill(&device, &p, x.shape(0), u, adapter, offsets, order, weights, scale, scaling, ranks);
    p.x_type = emu::dtype_of(x);
    p.in = x.shape(1);
    p.out = dy.shape(1);
    p.x = device.in(x);
    p.ldx = row_stride(x);
    p.dy = device.in(dy);
    p.lddy = row_stride(dy);
    p.u = const_cast<void*>(device.in(u));
    p.h = device.in(h);
    p.dz = device.in(dz);
    p.dA = device.out(dA);
    p.dB = device.out(dB);
    p.d_router = device.out(d_router);
    device.finish(moa::gram_cuda(p, device.work(moa::gram_work(p)), nullptr));
  });
  m.def("router_backward", [](const py::array& x, const py::array& weight, const py::array& dz, const py::object& dx,
                              const py::object& d_weight) {
    emu::Device device;
    moa::RouterBackwardParams p{};
    emu::fill_router(&device, &p, x, weight);
    p.dz = device.in(dz);
    p.dx = device.out(dx);
    p.d_weight = device.out(d_weight);
    device.finish(moa::router_backward_cuda(p, device.work(moa::router_backward_work(p)), nullptr));
  });
  m.def("expand_plan", [](int64_t tokens, int64_t top_k, int64_t experts, int64_t rank, int64_t width, bool router) {
    const auto p = moa::plan_cuda::expand(tokens, top_k, experts, rank, width, router);
    return py::dict(py::arg("fits") = p.fits, py::arg("inside") = p.inside, py::arg("tiles") = p.tiles,
                    py::arg("parts") = p.parts, py::arg("units") = p.units, py::arg("fragments") = p.fragments,
                    py::arg("shared") = p.shared);
  });
  m.def(
      "expand_wide_plan", [](int64_t tokens, int64_t top_k, int64_t experts, int64_t rank, int64_t width, bool router) {
        const auto p = moa::plan_cuda::expand_wide(tokens, top_k, experts, rank, width, router);
        return py::dict(py::arg("fits") = p.fits, py::arg("cluster") = p.cluster, py::arg("dense") = p.dense,
                        py::arg("tiles") = p.tiles, py::arg("parts") = p.parts, py::arg("units") = p.units,
                        py::arg("steps") = p.steps, py::arg("fragments") = p.fragments, py::arg("entries") = p.entries,
                        py::arg("shared") = p.shared, py::arg("fragments_shared") = p.fragments_shared);
      });
  m.def("gram_plan", [](int64_t slots, int64_t experts) {  // for multiply-adds
    const auto p = moa::plan_cuda::gram(slots, experts, moa::plan_cuda::kGramSimtStage);
    return py::make_tuple(p.chunk, p.group, moa::plan_cuda::kGramSimtStage);
  });
}
