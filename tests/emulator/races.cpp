// The build "tsan": GCC's ThreadSanitizer instrumentation calls a function before every access of a kernel; here it
// ends in a race detector for CUDA's threads instead of libtsan, which knows only the host's.
//
// An access is an event (block, thread, clock of the thread). A thread's clock ticks at every barrier it passes. An
// earlier event is ordered before this thread if
//   it is this thread's own, or of an earlier launch, which under an early one somebody must have awaited: this thread,
//     or one that it knows of as below;
//   or of this warp, and a __syncwarp or __syncthreads of both came between: what each lane has seen of each other;
//   or of another warp of this block, and a __syncthreads came between;
//   or of another block, which then handed it on by `arrive` at a counter that this thread, or one it knows of as above,
//     has taken by `await` or `arrive`; what a block has taken it hands on too. An atomic without an order hands on what
//     a __threadfence before it covers, and takes at the next __threadfence.
// Two unordered events on one byte, one of them a write and not both atomic, are a race, whatever order they ran in.
// Per byte the last write and two other events are kept: any race with the last write, and of readers one per warp
// where there are two, is found.
//
// The last write also tells whether a byte of work memory has been written at all: nobody may read it before.
#include <algorithm>
#include <map>
#include <memory>
#include <unordered_map>

#include "emulator/history.h"

namespace emu {
namespace {

// ---- Clocks.
using View = std::vector<unsigned>;  // of each thread of one block, the clock up to which its accesses are seen
using Views = std::map<unsigned, std::shared_ptr<const View>>;  // by the block's stamp
struct Acquired {
  unsigned thread, clock;  // who took it when
  std::shared_ptr<const View> view;
};
struct BlockClocks {
  unsigned stamp;
  unsigned clocks[kMaxThreads], at_barrier[kMaxThreads], fenced[kMaxThreads], fenced_at_barrier[kMaxThreads];
  bool fenced_since_barrier[kMaxThreads];
  unsigned seen[kMaxThreads][32];                      // [thread][lane of its warp]
  std::map<unsigned, std::vector<Acquired>> acquired;  // by the stamp of the block it is from
  std::map<unsigned, Views> pending;                   // by thread: met by atomics, no fence since
  std::vector<std::pair<unsigned, unsigned>> awaits;   // of the launches in front: thread, clock
  std::unique_ptr<History> shared_history;
};
BlockClocks all_clocks[kMaxResidents];
BlockClocks& own() { return all_clocks[resident]; }
constexpr unsigned kHost = 1;              // its stamp, before every block's
unsigned last_stamp = kHost, first_stamp;  // of the newest block; of the launch's first
unsigned chain_stamp;                      // the first of the newest launch that is not early
std::map<const void*, Views> released;     // by counter

// What happened up to `clock` of `thread` in this block is known to the running thread.
bool knows(const BlockClocks& mine, unsigned thread, unsigned clock) {
  const unsigned me = self->rank;
  if (thread == me) return true;
  if (thread / 32 == me / 32) return mine.seen[me][thread % 32] >= clock;
  return mine.at_barrier[thread] >= clock;
}

bool looking_at_shared;  // memory: it is another one in another block

bool ordered_by_counters(const BlockClocks& mine, Event e) {
  const auto from = mine.acquired.find(e.stamp);
  if (from == mine.acquired.end()) return false;
  return std::any_of(from->second.begin(), from->second.end(), [&](const Acquired& a) {
    return (*a.view)[e.thread] >= e.clock && knows(mine, a.thread, a.clock);
  });
}

inline bool ordered(Event e) {
  const BlockClocks& mine = own();
  if (e.stamp == mine.stamp) return knows(mine, static_cast<unsigned>(e.thread), static_cast<unsigned>(e.clock));
  if (e.stamp < chain_stamp || looking_at_shared) return true;  // none, too
  if (e.stamp >= first_stamp) return ordered_by_counters(mine, e);
  return std::any_of(mine.awaits.begin(), mine.awaits.end(),
                     [&](const auto& a) { return knows(mine, a.first, a.second); });
}

void merge(Views* into, unsigned stamp, const std::shared_ptr<const View>& view) {
  std::shared_ptr<const View>& there = (*into)[stamp];
  if (there == view) return;
  if (there == nullptr) {
    there = view;
    return;
  }
  auto both = std::make_shared<View>(*there);
  for (size_t t = 0; t < both->size(); ++t) (*both)[t] = std::max((*both)[t], (*view)[t]);
  if (*both != *there) there = both;
}

void take(const Views& views) {
  BlockClocks& mine = own();
  for (const auto& [stamp, view] : views) {
    if (stamp == mine.stamp) continue;
    auto& known = mine.acquired[stamp];
    const auto same_view = [&, v = view](const Acquired& a) { return a.view == v && knows(mine, a.thread, a.clock); };
    if (std::none_of(known.begin(), known.end(), same_view)) {
      known.push_back({self->rank, mine.clocks[self->rank], view});
    }
  }
}

// What this thread knows, as if it passed a fence.
void hand_on(const void* counter) {
  const BlockClocks& mine = own();
  const unsigned me = self->rank;
  auto view = std::make_shared<View>(thread_count);
  for (unsigned t = 0; t < thread_count; ++t)
    (*view)[t] = t == me ? mine.clocks[t] : t / 32 == me / 32 ? mine.seen[me][t % 32] : mine.at_barrier[t];
  Views& views = released[counter];
  merge(&views, mine.stamp, view);
  for (const auto& [stamp, all] : mine.acquired)
    for (const Acquired& a : all)
      if (knows(mine, a.thread, a.clock)) merge(&views, stamp, a.view);
  ++own().clocks[me];  // what comes now is not handed on
}

// An atomic without an order: hands on what a fence before it covers, and has the others' for a fence behind it.
void meet_at_counter(const void* counter) {
  if (is_shared(counter)) return;
  BlockClocks& mine = own();
  const unsigned me = self->rank;
  for (const auto& [stamp, view] : released[counter]) merge(&mine.pending[me], stamp, view);
  auto view = std::make_shared<View>(thread_count);
  for (unsigned t = 0; t < thread_count; ++t) {
    const unsigned by_me = !mine.fenced_since_barrier[me] ? 0
                           : t / 32 == me / 32            ? mine.seen[me][t % 32]
                                                          : mine.at_barrier[t];
    (*view)[t] = t == me ? mine.fenced[t] : std::max(by_me, mine.fenced_at_barrier[t]);
  }
  if (std::any_of(view->begin(), view->end(), [](unsigned c) { return c != 0; })) {
    merge(&released[counter], mine.stamp, view);
  }
}

// ---- The bytes' history.
std::unordered_map<const unsigned char*, History> histories;  // by the begin of a buffer

// An array or a buffer, and its history. A line of a kernel mostly has to do with one.
struct Place {
  const unsigned char *begin, *end, *base;  // base: what the history counts from, 4-byte aligned
  History* history;
  unsigned resident;  // whose shared memory it is
  bool is_shared, written;
  unsigned long long version;
};
constexpr unsigned kPlaces = 256;
Place known_places[kPlaces];     // by the line
unsigned long long version = 1;  // of all that is known of places

const unsigned char* base_of(const Region& buffer) {
  return buffer.begin - reinterpret_cast<uintptr_t>(buffer.begin) % 4;
}
History* history_of(const Region& buffer) {
  return &histories.try_emplace(buffer.begin, buffer.bytes + 3).first->second;
}

const Place* look_up(const unsigned char* p, size_t bytes, Site site) {
  const Region region = region_of(p);
  if (region.begin == nullptr) return nullptr;  // a local variable, a constant
  const size_t offset = static_cast<size_t>(p - region.begin);
  if (p < region.begin || offset + bytes > region.bytes) {
    fail(site, "out of bounds: %zu bytes at byte %td of %s, which has %zu", bytes, p - region.begin, region.name,
         region.bytes);
  }
  const bool shared = is_shared(p);
  History* history;
  const unsigned char* base;
  if (shared) {
    history = own().shared_history.get();
    base = p - shared_offset(p);
  } else {
    base = base_of(region);
    history = history_of(region);
  }
  Place& place = known_places[reinterpret_cast<uintptr_t>(site) % kPlaces];
  place = {region.begin, region.begin + region.bytes, base, history, resident, shared, region.written, version};
  return &place;
}

// Null: it is none of the memory that threads share.
inline const Place* place_of(const unsigned char* p, size_t bytes, Site site) {
  const Place& place = known_places[reinterpret_cast<uintptr_t>(site) % kPlaces];
  const bool inside = p >= place.begin && p < place.end && bytes <= static_cast<size_t>(place.end - p);
  if (inside && place.version == version && (!place.is_shared || place.resident == resident)) return &place;
  return look_up(p, bytes, site);
}

const char module_marker = 0;
unsigned short_site(Site site) { return static_cast<unsigned>(static_cast<const char*>(site) - &module_marker); }
Site long_site(unsigned site) { return &module_marker + static_cast<int>(site); }

[[noreturn]] void report(const unsigned char* p, Event now, Site site, Event then, unsigned then_site) {
  const auto verb = [](Event e) { return e.is_atomic ? "changes" : e.is_write ? "writes" : "reads"; };
  const Region region = region_of(p);
  char whose[64] = "of another block ";
  if (then.stamp < first_stamp) strcpy(whose, "of the launch in front ");
  if (then.stamp == own().stamp) whose[0] = 0;
  fail(site, "a race: this thread %s byte %td of %s, which thread %u %s%s at %s with no barrier between", verb(now),
       p - region.begin, region.name, static_cast<unsigned>(then.thread), whose, verb(then),
       describe(long_site(then_site)).c_str());
}

inline void check(const unsigned char* p, Event now, Site site, Event then, unsigned then_site) {
  if (!(now.is_write | then.is_write) || (now.is_atomic & then.is_atomic)) return;
  if (!ordered(then)) report(p, now, site, then, then_site);
}

// Keeps `now` among the two others: instead of its own thread's last, of one that is ordered before it (whatever races
// with that races with `now`), or else of one of its own warp.
inline void keep(Cell& cell, Event now, unsigned site) {
  int slot = 0;
  const auto rank = [&](Event e) {
    return none(e) || (e.stamp == now.stamp && e.thread == now.thread) ? 0
           : ordered(e)                                                ? 1
           : e.stamp == now.stamp && e.thread / 32 == now.thread / 32  ? 2
                                                                       : 3;
  };
  if (const int first = rank(cell.other[0]); first > 0 && rank(cell.other[1]) < first) slot = 1;
  cell.other[slot] = now;
  cell.other_site[slot] = site;
}

inline void update(const unsigned char* p, Cell& cell, Event now, Site site, bool written) {
  if (!written && none(cell.write) && (now.is_atomic || !now.is_write)) {
    const Region region = region_of(p);
    fail(site, "this reads what nobody has written: byte %td of a buffer of %zu in global memory", p - region.begin,
         region.bytes);
  }
  if (cell.write.in_flight && cell.write.stamp == own().stamp && !now.is_write) {
    fail(site, "this reads what the cp.async of thread %u at %s has not delivered: no cp_async_wait came between",
         static_cast<unsigned>(cell.write.thread), describe(long_site(cell.write_site)).c_str());
  }
  // The same again: no other thread knows of this clock, so what came between is this thread's, or was a race.
  if (!now.is_write && same(cell.other[0], now)) {
    cell.other_site[0] = short_site(site);
    return;
  }
  if (!now.is_atomic && same(cell.write, now)) {
    cell.write_site = short_site(site);
    return;
  }
  check(p, now, site, cell.write, cell.write_site);
  for (int i = 0; i < 2; ++i) check(p, now, site, cell.other[i], cell.other_site[i]);
  if (!now.is_write) {
    keep(cell, now, short_site(site));
  } else {
    if (now.is_atomic && cell.write.is_atomic && !ordered(cell.write)) keep(cell, cell.write, cell.write_site);
    cell.write = now;
    cell.write_site = short_site(site);
  }
}

}  // namespace

void record_access(const void* address, size_t bytes, Access access, Site site) {
  const auto* p = static_cast<const unsigned char*>(address);
  const Place* const place = place_of(p, bytes, site);
  if (place == nullptr) return;
  looking_at_shared = place->is_shared;
  Event now{};
  now.stamp = own().stamp;
  now.clock = own().clocks[self->rank];
  now.thread = self->rank;
  now.is_write = access != kRead && access != kAcquire;
  now.is_atomic = access == kAtomic || access == kAcquire || access == kAcquireRelease;
  now.in_flight = access == kAsyncWrite;
  if (access == kAtomic) meet_at_counter(address);
  if (access == kAcquire || access == kAcquireRelease) take(released[address]);
  if (access == kAcquireRelease) hand_on(address);
  const auto at = static_cast<size_t>(p - place->base);
  const bool written = place->written;
  place->history->visit(at, at + bytes, [=](size_t i, Cell& cell) { update(p + (i - at), cell, now, site, written); });
}

void races_grid_begin(bool early) {
  first_stamp = last_stamp + 1;
  if (!early) chain_stamp = first_stamp;
  released.clear();
}

void races_block_begin() {
  BlockClocks& c = own();
  c.stamp = ++last_stamp;
  c.acquired.clear();
  c.pending.clear();
  c.awaits.clear();
  if (c.shared_history == nullptr) c.shared_history = std::make_unique<History>(kArena);
  ++version;
  for (unsigned t = 0; t < thread_count; ++t) {
    c.clocks[t] = 1;
    c.at_barrier[t] = c.fenced[t] = c.fenced_at_barrier[t] = 0;
    c.fenced_since_barrier[t] = false;
    std::fill(c.seen[t], c.seen[t] + 32, 0u);
  }
}

void races_block_end() {
  if (chain_stamp < first_stamp && own().awaits.empty()) {
    throw std::runtime_error(std::string(block.kernel) + ": a block of an early launch has ended without await_launch");
  }
}

void races_await_launch() { own().awaits.emplace_back(self->rank, own().clocks[self->rank]); }

void races_block_barrier() {
  BlockClocks& c = own();
  for (unsigned t = 0; t < thread_count; ++t) {
    c.at_barrier[t] = c.clocks[t];
    c.fenced_at_barrier[t] = c.fenced[t];
    c.fenced_since_barrier[t] = false;
  }
  for (unsigned t = 0; t < thread_count; ++t) {
    const unsigned first = t / 32 * 32, lanes = std::min(32u, thread_count - first);
    std::copy(c.at_barrier + first, c.at_barrier + first + lanes, c.seen[t]);
    ++c.clocks[t];
  }
}

void races_warp_barrier(Warp& warp, unsigned mask) {
  BlockClocks& c = own();
  unsigned all[32] = {};
  for (unsigned l = 0; l < 32; ++l) {
    if (!(mask >> l & 1u)) continue;
    const unsigned t = warp.lanes[l]->rank;
    for (unsigned m = 0; m < 32; ++m) all[m] = std::max(all[m], c.seen[t][m]);
    all[l] = std::max(all[l], c.clocks[t]);
  }
  for (unsigned l = 0; l < 32; ++l) {
    if (!(mask >> l & 1u)) continue;
    const unsigned t = warp.lanes[l]->rank;
    std::copy(all, all + 32, c.seen[t]);
    ++c.clocks[t];
  }
}

void races_fence() {
  BlockClocks& c = own();
  c.fenced[self->rank] = c.clocks[self->rank];
  c.fenced_since_barrier[self->rank] = true;
  ++c.clocks[self->rank];
  if (const auto met = c.pending.find(self->rank); met != c.pending.end()) {
    take(met->second);
    c.pending.erase(met);
  }
}

void races_host_writes(const void* p, size_t bytes) {
  const Region region = region_of(p);
  const auto* const begin = static_cast<const unsigned char*>(p);
  if (region.begin == nullptr || begin < region.begin || begin + bytes > region.begin + region.bytes) {
    throw std::runtime_error("cudaMemsetAsync is out of bounds");
  }
  Event now{};
  now.stamp = kHost;
  now.is_write = 1;
  const auto at = static_cast<size_t>(begin - base_of(region));
  history_of(region)->visit(at, at + bytes, [=](size_t, Cell& cell) { cell.write = now; });
}

// Buffers come and go at the same addresses.
void races_forget_buffers() {
  histories.clear();
  ++version;
  if (last_stamp < (1u << 21)) return;
  // Of 22 bits, too few may be left for the next call's blocks.
  for (BlockClocks& c : all_clocks) c.shared_history.reset();
  last_stamp = kHost;
}

}  // namespace emu
