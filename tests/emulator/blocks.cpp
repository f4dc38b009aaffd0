// Which blocks are on the machine, and which of them runs.
#include <algorithm>
#include <numeric>

#include "common/cuda_api.h"
#include "emulator/scheduler.h"

namespace emu {
namespace {

// What the threads of the running block wait for.
std::string waits() {
  std::string text;
  for (unsigned i = 0; i < thread_count;) {
    const Thread& t = threads[i];
    const State state = state_of(t);
    unsigned end = i + 1;
    const auto same = [&](const Thread& o) {
      return state_of(o) == state && (state == State::done || (o.operation == t.operation && o.site == t.site));
    };
    while (end < thread_count && same(threads[end])) ++end;
    text += "\n  threads " + std::to_string(i) + " to " + std::to_string(end - 1);
    if (state == State::done) {
      text += " have exited";
    } else {
      char mask[32] = "";
      if (t.combine != nullptr || t.mask != 0) snprintf(mask, sizeof mask, " with mask %08x", t.mask);
      text += std::string(" wait in ") + t.operation + mask + " at " + describe(t.site);
    }
    i = end;
  }
  return std::string(block.kernel) + ", block (" + std::to_string(block.index.x) + "," + std::to_string(block.index.y) +
         "," + std::to_string(block.index.z) + "): " + text;
}

void turn_to(unsigned place) {
  resident = place;
  now = residents + place;
  block = now->block;
  threads = now->threads.get();
  shared_turn();
}

void begin_block(unsigned place, const Block& of) {
  Resident& r = residents[place];
  r.block = of;
  r.here = true;
  r.stalled = false;
  if (r.threads == nullptr) r.threads = std::make_unique<Thread[]>(kMaxThreads);
  turn_to(place);
  shared_begin(block.dynamic_bytes);
  prepare_block();
  races_block_begin();
  if (shuffled) shuffle_warps();
}

// Runs the block of a place until it ends, until it stalls, or for a while.
void run_block(unsigned place) {
  turn_to(place);
  const unsigned long long before = steps;
  wake_spinning();
  preempted = false;
  while (now->alive > 0 && !preempted) {
    Thread* t = next_thread();
    if (t == nullptr) break;
    to_thread(t);  // and from there to others
    if (!failure.empty()) throw std::runtime_error(failure);
  }
  if (steps != before) {
    for (Resident& r : residents) r.stalled = false;
  }
  if (now->alive == 0) {
    now->here = false;
    races_block_end();
    shared_end();
    device_check();
  } else if (!preempted) {
    if (now->spinning == 0) throw std::runtime_error("deadlock: nobody can run.\n" + waits());
    now->stalled = true;
  }
}

// The blocks in `order`, `places` at once.
void run_blocks(const std::vector<unsigned long long>& order) {
  failure.clear();
  for (Resident& r : residents) r.here = r.stalled = false;
  for (size_t begun = 0;;) {
    unsigned here[kMaxResidents], count = 0, able = 0;
    for (unsigned place = 0; place < places; ++place) {
      if (!residents[place].here && begun < order.size()) {
        Block of = block;
        of.number = order[begun++];
        const unsigned long long b = of.number, x = of.grid.x, y = of.grid.y;
        of.index = {static_cast<unsigned>(b % x), static_cast<unsigned>(b / x % y), static_cast<unsigned>(b / x / y)};
        begin_block(place, of);
      }
      if (!residents[place].here) continue;
      ++count;
      if (!residents[place].stalled) here[able++] = place;
    }
    if (count == 0) return;
    if (able == 0) {
      std::string text = "deadlock: every block on the machine waits for others, and " +
                         std::to_string(order.size() - begun) + " cannot begin.";
      for (unsigned place = 0; place < places; ++place) {
        if (residents[place].here) turn_to(place), text += "\n" + waits();
      }
      throw std::runtime_error(text);
    }
    run_block(here[shuffled ? random_bits() % able : 0]);
  }
}

}  // namespace

bool early, launched;

std::vector<Launch>& launches() {
  static std::vector<Launch> all;
  return all;
}

void launch_in_front_ended() { races_await_launch(); }

cudaError_t run_grid(const char* kernel, const void* function, dim3 grid, dim3 size, size_t dynamic_bytes, Body run,
                     void* with) {
  const unsigned long long count = 1ull * size.x * size.y * size.z, blocks = 1ull * grid.x * grid.y * grid.z;
  const bool is_early = early;
  early = false;
  if (blocks == 0) return cudaSuccess;
  if (is_early && !launched) {
    throw std::runtime_error(std::string(kernel) + " is launched early, with no launch of this call in front of it");
  }
  launched = true;
  if (count == 0 || count > kMaxThreads || size.z > 64 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (dynamic_bytes > moa::kSharedMost) return cudaErrorInvalidValue;
  launches().push_back({kernel, function});
  if (settings.dry) return cudaSuccess;
  body = run;
  closure = with;
  block = {kernel, {}, size, grid, dynamic_bytes, 0};
  shuffled = settings.seed != 0;
  random_state = settings.seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
  places = settings.residents == 0 ? static_cast<unsigned>(settings.seed % kMaxResidents) + 1 : settings.residents;
  races_grid_begin(is_early);
  std::vector<unsigned long long> order(blocks);
  std::iota(order.begin(), order.end(), 0ull);
  for (unsigned long long i = blocks; shuffled && i > 1; --i) std::swap(order[i - 1], order[random_bits() % i]);
  run_blocks(order);
  return cudaSuccess;
}

}  // namespace emu

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emu::settings.multiprocessors
                                                       : static_cast<int>(emu::settings.shared_limit);
  return cudaSuccess;
}
