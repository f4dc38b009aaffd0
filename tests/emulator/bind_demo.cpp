// demo.cu for test_emulator.py.
#include "demo.h"
#include "emulator/bind.h"

MOA_BIND(m) {
  m.def("demo", [](const py::array& x, const py::array& w, const py::array& y) {
    emu::Device device;
    moa::DemoParams p{emu::dtype_of(x), x.shape(0),   w.shape(0),          x.shape(1),
                      device.in(x),     device.in(w), device.out<float>(y)};
    device.finish(moa::demo_cuda(p, nullptr));
  });
  m.def("count", [](const py::array& ids, const py::array& counts) {
    emu::Device device;
    const auto* in = device.in<int32_t>(ids);
    auto* out = device.out<int32_t>(counts);
    device.finish(moa::count_cuda(in, ids.size(), out, nullptr));
  });
  m.def("row_sums", [](const py::array& x, const py::array& y) {
    emu::Device device;
    const int64_t rows = x.shape(0), columns = x.shape(1);
    const auto* in = device.in<float>(x);
    auto* out = device.out<float>(y);
    void* work = device.work(moa::row_sums_work(rows, columns));
    device.finish(moa::row_sums_cuda(in, rows, columns, out, work, nullptr));
  });
}
