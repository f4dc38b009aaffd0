// Runs the AVX2 kernels once each on fixed shapes and fixed data, on one thread and without torch, for callgrind to
// count: every case passes through measured(), and its name is printed in that order. tests/instructions.py reads both.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "common/parallel.h"
#include "common/scratch.h"
#include "isa/table.h"

namespace moa {
namespace avx2 {
extern const KernelTable kTable;
}
int64_t thread_count() { return 1; }
void parallel_run(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) { body(0, n, context); }
}  // namespace moa

// What callgrind is told to count: nothing outside it.
extern "C" __attribute__((noinline)) void measured(const std::function<void()>& call) { call(); }

namespace {

using namespace moa;

void measure(const std::string& name, const std::function<void()>& call) {
  std::puts(name.c_str());
  measured(call);
}

// The same numbers everywhere: a congruential generator, uniform in (-1, 1).
struct Numbers {
  uint64_t state = 1;
  float operator()() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(state >> 40) / 8388608.0f - 1.0f;
  }
};

// n elements of 2 or 4 bytes, aligned alike in every run; counts depend on alignment.
class Array {
 public:
  Array(DType type, int64_t n, Numbers* numbers = nullptr) {
    const size_t size = type == DType::bf16 ? 2 : 4;
    bytes_ = static_cast<char*>(std::aligned_alloc(4096, (n * size + 4096) / 4096 * 4096));
    for (int64_t i = 0; i < n; ++i) {
      const float v = numbers != nullptr ? (*numbers)() : 0.0f;
      memcpy(bytes_ + i * size, reinterpret_cast<const char*>(&v) + 4 - size, size);  // bfloat16: the upper half
    }
  }
  Array(const Array&) = delete;
  ~Array() { std::free(bytes_); }
  template <class T = void>
  T* as() const {
    return reinterpret_cast<T*>(bytes_);
  }

 private:
  char* bytes_;
};

struct Shape {
  const char* name;
  int64_t tokens, in, out, experts, top_k, rank;
};

const Shape kShapes[] = {
    {"decode", 1, 2048, 2048, 8, 2, 16},
    {"mid", 256, 1024, 1024, 8, 2, 16},
    {"many experts", 512, 256, 256, 256, 2, 16},
    {"odd sizes", 97, 515, 333, 7, 3, 5},
};

void run(const Shape& s, DType type) {
  const KernelTable& kernels = avx2::kTable;
  constexpr DType f32 = DType::f32;
  const int64_t slots = s.tokens * s.top_k;
  Numbers numbers;
  const Array x(type, s.tokens * s.in, &numbers), dy(type, s.tokens * s.out, &numbers), bias(type, s.out, &numbers);
  const Array A(type, s.experts * s.rank * s.in, &numbers), B(type, s.experts * s.out * s.rank, &numbers);
  const Array router_weight(f32, s.experts * s.in, &numbers), dz(f32, slots, &numbers);
  const Array logits(f32, s.tokens * s.experts), dlogits(f32, s.tokens * s.experts), weights(f32, slots);
  const Array dw(f32, slots), h(f32, slots * s.rank), u(f32, slots * s.rank);
  const Array y(type, s.tokens * s.out), dx(type, s.tokens * s.in);
  const Array dA(type, s.experts * s.rank * s.in), dB(type, s.experts * s.out * s.rank);
  const Array d_router(f32, s.experts * s.in), offsets(f32, s.experts + 1), order(f32, slots);
  std::vector<int64_t> indices(slots);
  const std::vector<double> scale(s.experts, 2.0);

  RouterParams router{type, s.tokens, s.in, s.experts, x.as(), s.in, router_weight.as(), logits.as()};
  TopkParams topk{};
  topk.logits_type = f32;
  topk.tokens = s.tokens;
  topk.experts = s.experts;
  topk.top_k = s.top_k;
  topk.logits = logits.as();
  topk.ldz = s.experts;
  topk.norm_topk_prob = true;
  topk.weights = weights.as();
  topk.indices = indices.data();
  TopkBackwardParams topk_backward{f32,  s.tokens,     s.experts, s.top_k,     logits.as(), s.experts, topk.score_func,
                                   true, topk.indices, dw.as(),   dlogits.as()};
  ForwardParams forward{};
  forward.x_type = forward.adapter_type = type;
  forward.seg = {offsets.as<int32_t>(), order.as<int32_t>(), s.tokens, s.top_k, s.experts};
  forward.in = s.in;
  forward.out = s.out;
  forward.rank = s.rank;
  forward.x = x.as();
  forward.ldx = s.in;
  forward.lora_A = A.as();
  forward.lora_B = B.as();
  forward.weights = weights.as();
  forward.scale = scale.data();
  forward.bias = bias.as();
  forward.y = y.as();
  forward.h = h.as();
  BackwardParams backward{};
  static_cast<LoraParams&>(backward) = forward;
  backward.dy = dy.as();
  backward.lddy = s.out;
  backward.h = h.as();
  backward.u = u.as();
  backward.router_weight = router_weight.as();

  const auto route = [&] {
    kernels.topk(topk);
    if (!sort_by_expert(topk.indices, slots, s.experts, offsets.as<int32_t>(), order.as<int32_t>())) std::abort();
  };
  const auto measure_here = [&](const char* kernel, const std::function<void()>& call) {
    measure(std::string(s.name) + (type == DType::bf16 ? ", bfloat16: " : ": ") + kernel, call);
  };
  const auto outer = [&](void* dx_, void* dA_, void* dB_) {
    BackwardParams p = backward;
    p.dx = dx_;
    p.dA = dA_;
    p.dB = dB_;
    kernels.backward_outer(p);
  };
  measure_here("layer", [&] {
    kernels.router(router);
    route();
    kernels.forward(forward);
  });
  measure_here("backward", [&] {
    BackwardParams p = backward;
    p.dw = dw.as();
    kernels.backward_shrink(p);
    kernels.topk_backward(topk_backward);
    p.dz = dz.as();
    p.dx = dx.as();
    p.dA = dA.as();
    p.dB = dB.as();
    p.d_router = d_router.as();
    kernels.backward_outer(p);
  });
  measure_here("router", [&] { kernels.router(router); });
  measure_here("routing", route);
  measure_here("shrink", [&] {  // no output, no expand
    ForwardParams p = forward;
    p.out = 0;
    kernels.forward(p);
  });
  measure_here("expand", [&] { outer(dx.as(), nullptr, nullptr); });
  measure_here("gram of A", [&] { outer(nullptr, dA.as(), nullptr); });
  measure_here("gram of B", [&] { outer(nullptr, nullptr, dB.as()); });
}

}  // namespace

int main() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    std::fputs("this processor has no AVX2 and FMA\n", stderr);
    return 1;
  }
  for (int slot = 0; slot < static_cast<int>(Scratch::count); ++slot)
    scratch_bytes(static_cast<Scratch>(slot), 64 << 20);  // so that no case pays for an allocation
#if defined(__clang__)
  std::printf("Clang %d\n", __clang_major__);
#else
  std::printf("GCC %d\n", __GNUC__);
#endif
  for (const Shape& shape : kShapes) run(shape, DType::f32);
  run(kShapes[1], DType::bf16);
}
