// How a kernel is bound for tests: bind_<kernel>.cpp calls the kernel's launcher on copies of NumPy arrays.
//
//   MOA_BIND(m) {
//     m.def("shrink", [](py::array x, py::array h) {
//       emu::Device device;                        // this call's global memory
//       ShrinkParams p;
//       p.x = device.in(x);                        // an exact copy, strides and alignment included (1 GB: x itself)
//       p.h = device.out(h);                       // the same, and copied back by finish; all 0xFF: not to be read
//       void* work = device.work(bytes);           // poisoned, not to be read before it is written
//       device.finish(shrink_cuda(p, nullptr));
//     });
//   }
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "common/types.h"
#include "emulator/runtime.h"
#include "emulator/types.h"

namespace py = pybind11;

namespace emu {

using Binder = void (*)(py::module_&);
std::vector<Binder>& binders();
struct Registered {
  explicit Registered(Binder b) { binders().push_back(b); }
};
#define MOA_BIND(m)                                 \
  static void moa_bind(py::module_& m);             \
  static const emu::Registered moa_bound(moa_bind); \
  static void moa_bind(py::module_& m)

// float32, float64 and float16 arrays are themselves; bfloat16 travels as uint16.
moa::DType dtype_of(const py::array& a);

class Device {
 public:
  Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device();

  // None is null. T, if given, is checked against the array's dtype.
  template <class T = void>
  const T* in(const py::object& a) {
    return static_cast<const T*>(place(a, Kind<T>::name(), false));
  }
  template <class T = void>
  T* out(const py::object& a) {
    return static_cast<T*>(place(a, Kind<T>::name(), true));
  }
  template <class T = void>
  T* work(size_t bytes) {
    return static_cast<T*>(device_alloc(bytes, 0, false));
  }
  // Raises if the launch did not succeed; copies back what `out` gave.
  void finish(cudaError_t status);

 private:
  template <class T>
  struct Kind;
  struct Span {  // of an array's memory, first to last byte
    unsigned char* data;
    size_t bytes;
  };
  struct Output {
    py::array array;
    Span span;
    void* copy;
  };
  static Span span_of(const py::array& a);
  void* place(const py::object& a, const char* dtype, bool writable);

  std::vector<Output> outputs_;
};

#define MOA_KIND(T, dtype)                      \
  template <>                                   \
  struct Device::Kind<T> {                      \
    static const char* name() { return dtype; } \
  }
MOA_KIND(void, nullptr);
MOA_KIND(float, "float32");
MOA_KIND(double, "float64");
MOA_KIND(__half, "float16");
MOA_KIND(__nv_bfloat16, "uint16");
MOA_KIND(int32_t, "int32");
MOA_KIND(int64_t, "int64");
MOA_KIND(uint32_t, "uint32");
MOA_KIND(uint8_t, "uint8");
MOA_KIND(bool, "bool");
#undef MOA_KIND

}  // namespace emu
