// The Python module: every bound kernel, the emulator's settings and what it counted.
#include <dlfcn.h>

#include <algorithm>

#include "emulator/bind.h"
#include "emulator/conflicts.h"
#include "emulator/internal.h"

namespace emu {

std::vector<Binder>& binders() {
  static std::vector<Binder> all;
  return all;
}

moa::DType dtype_of(const py::array& a) {
  const std::string name = py::str(a.dtype());
  if (name == "float32") return moa::DType::f32;
  if (name == "float64") return moa::DType::f64;
  if (name == "float16") return moa::DType::f16;
  if (name == "uint16") return moa::DType::bf16;
  throw py::type_error("an array of dtype " + name +
                       "; allowed are float32, float64, float16, and uint16 for bfloat16");
}

Device::Span Device::span_of(const py::array& a) {
  size_t last = 0;
  for (py::ssize_t d = 0; d < a.ndim(); ++d) {
    if (a.shape(d) == 0) return {nullptr, 0};
    if (a.strides(d) < 0) throw py::value_error("an array with a negative stride");
    last += static_cast<size_t>((a.shape(d) - 1) * a.strides(d));
  }
  auto* data = const_cast<unsigned char*>(static_cast<const unsigned char*>(a.data()));
  return {data, last + static_cast<size_t>(a.itemsize())};
}

void* Device::place(const py::object& object, const char* dtype, bool writable) {
  if (object.is_none()) return nullptr;
  if (!py::isinstance<py::array>(object)) throw py::type_error("a NumPy array or None is expected");
  const auto array = py::reinterpret_borrow<py::array>(object);
  const std::string given = py::str(array.dtype());
  if (dtype != nullptr && given != dtype) {
    throw py::type_error("an array of dtype " + given + " where the kernel takes " + dtype);
  }
  if (writable && !array.writeable()) throw py::value_error("an output array that is read-only");
  const Span span = span_of(array);
  if (span.bytes == 0) return nullptr;  // as a tensor without elements has it
  // So much that the test has it as pages which are not there until they are touched: no copy, no canaries.
  if (!writable && span.bytes >= size_t{1} << 30) return device_adopt(span.data, span.bytes), span.data;
  // As `unwritten` of arrays.py makes it.
  const bool all_ones = std::all_of(span.data, span.data + span.bytes, [](unsigned char byte) { return byte == 0xff; });
  // NumPy aligns to 16 bytes at least; beyond that nothing a kernel could see depends on the address.
  void* copy = device_alloc(span.bytes, reinterpret_cast<uintptr_t>(span.data) % 16, !writable || !all_ones);
  memcpy(copy, span.data, span.bytes);
  if (writable) outputs_.push_back({array, span, copy});
  return copy;
}

void Device::finish(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("the launch failed: ") + cudaGetErrorString(status));
  for (const Output& o : outputs_) {
    memcpy(o.span.data, o.copy, o.span.bytes);
  }
}

Device::~Device() { device_free_all(); }

}  // namespace emu

PYBIND11_MODULE(MOA_MODULE, m) {
  m.def(
      "seed", [](unsigned long long n) { emu::settings.seed = n; },
      "0: threads and blocks in index order; anything else: a random interleaving of its own.");
  m.def(
      "poison", [](unsigned char byte) { emu::settings.poison = byte; },
      "What work memory is full of before a kernel writes it: 255, so that numbers are NaN and ids -1.");
  m.def(
      "residents", [](unsigned n) { emu::settings.residents = n < emu::kMaxResidents ? n : emu::kMaxResidents; },
      "How many blocks are on the machine at once, 1 to 4; 0: seed % 4 + 1.");
  m.def("dry", [](bool on) { emu::settings.dry = on; }, "Launches are checked and noted, and nothing runs.");
  m.def(
      "take_launches",
      [] {
        py::list result;
        for (const emu::Launch& l : emu::launches()) {
          Dl_info where{};
          dladdr(l.function, &where);
          const auto at = static_cast<const char*>(l.function) - static_cast<const char*>(where.dli_fbase);
          result.append(py::make_tuple(l.kernel, at));
        }
        emu::launches().clear();
        return result;
      },
      "[(kernel, its address in this module)] of the launches since the last call.");
  m.def(
      "take_conflicts",
      [] {
        py::dict result;
        for (const auto& [where, c] : emu::take_conflicts()) {
          const std::string line = c.extra_cycles > 0 ? emu::describe(where.second) : "elsewhere";
          const py::str key(where.first + " at " + line);
          const auto sum = result.contains(key) ? result[key].cast<py::tuple>() : py::make_tuple(0, 0);
          result[key] =
              py::make_tuple(sum[0].cast<long long>() + c.requests, sum[1].cast<long long>() + c.extra_cycles);
        }
        return result;
      },
      "{kernel and line: (shared-memory requests, cycles lost to bank conflicts)} since the last call. Every build "
      "counts ldmatrix; tsan counts plain loads and stores too.");
  for (const emu::Binder bind : emu::binders()) bind(m);
}
