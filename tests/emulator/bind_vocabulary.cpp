// vocabulary.cu for test_vocabulary.py.
#include "emulator/bind.h"
#include "vocabulary.h"

MOA_BIND(m) {
  using Array = const py::array&;
  m.def("lanes", [](Array in, Array out) {
    emu::Device d;
    d.finish(moa::lanes_cuda(d.in<int32_t>(in), d.out<uint32_t>(out), nullptr));
  });
  m.def("bits", [](Array in, Array out) {
    emu::Device d;
    d.finish(moa::bits_cuda(d.in<uint32_t>(in), d.out<uint32_t>(out), nullptr));
  });
  m.def("ldmatrix", [](Array tile, Array out) {
    emu::Device d;
    d.finish(moa::ldmatrix_cuda(static_cast<const uint16_t*>(d.in(tile)), d.out<uint32_t>(out), nullptr));
  });
  m.def("mma", [](Array a, Array b, Array c) {
    emu::Device d;
    d.finish(moa::mma_cuda(emu::dtype_of(a), d.in(a), d.in(b), d.out<float>(c), nullptr));
  });
  m.def("convert", [](Array x, Array rounded, Array back, const py::object& pairs, const py::object& pairs_back) {
    emu::Device d;
    d.finish(moa::convert_cuda(emu::dtype_of(rounded), d.in<float>(x), x.size(), d.out(rounded), d.out<float>(back),
                               d.out<uint32_t>(pairs), d.out<float>(pairs_back), nullptr));
  });
  m.def("atomics", [](Array v, Array wide, Array votes) {
    emu::Device d;
    d.finish(moa::atomics_cuda(d.out<uint32_t>(v), static_cast<unsigned long long*>(d.out(wide)), d.out<int32_t>(votes),
                               nullptr));
  });
  m.def("early", [](Array x, Array y, Array z) {
    emu::Device d;
    d.finish(moa::early_cuda(d.in<float>(x), x.size(), d.out<float>(y), d.out<float>(z), nullptr));
  });
  m.def("relay", [](Array x, int blocks, Array y, Array z, Array counters) {
    emu::Device d;
    d.finish(moa::relay_cuda(d.in<float>(x), static_cast<int>(x.size()), blocks, d.out<float>(y), d.out<float>(z),
                             d.out<uint32_t>(counters), nullptr));
  });
  m.def("sum", [](Array x, Array parts, Array counter, Array sum) {
    emu::Device d;
    d.finish(moa::sum_cuda(d.in<float>(x), x.size(), d.out<float>(parts), d.out<uint32_t>(counter), d.out<float>(sum),
                           nullptr));
  });
}
