// What the bindings of the LoRA kernels share.
#pragma once
#include "emulator/bind.h"
#include "lora/cuda.h"
#include "lora/plan_cuda.h"

namespace emu {

inline int64_t row_stride(const py::array& a) { return a.shape(0) > 1 ? a.strides(0) / a.itemsize() : a.shape(1); }

// Segments, the adapter's dtype, scales and ranks: what forward and backward share.
inline void fill(Device* device, moa::LoraParams* p, int64_t tokens, const py::array& adapter, const py::array& offsets,
                 const py::array& order, const py::object& scale, double scaling, const py::object& ranks) {
  p->adapter_type = dtype_of(adapter);
  p->seg = {device->in<int32_t>(offsets), device->in<int32_t>(order), tokens, tokens > 0 ? order.size() / tokens : 1,
            offsets.size() - 1};
  p->scale = device->in<double>(scale);
  p->scaling = scaling;
  p->ranks = device->in<int32_t>(ranks);
}

// x, the adapters and the router of a layer that routes its own x.
template <class P>
void fill_layer(Device* device, P* p, const py::array& x, const py::array& lora_A, const py::array& router,
                int64_t top_k) {
  p->x_type = dtype_of(x);
  p->adapter_type = dtype_of(lora_A);
  p->seg = {nullptr, nullptr, x.shape(0), top_k, lora_A.shape(0)};
  p->rank = lora_A.shape(1);
  p->in = x.shape(1);
  p->x = device->in(x);
  p->ldx = row_stride(x);
  p->lora_A = device->in(lora_A);
  p->router_weight = device->in(router);
}

// x and the weight of a router.
template <class P>
void fill_router(Device* device, P* p, const py::array& x, const py::array& weight) {
  p->x_type = dtype_of(x);
  p->tokens = x.shape(0);
  p->in = x.shape(1);
  p->experts = weight.shape(0);
  p->x = device->in(x);
  p->ldx = row_stride(x);
  p->weight = device->in(weight);
}

}  // namespace emu
