// What the race detector keeps of the bytes of a shared memory or a buffer.
#pragma once
#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "emulator/internal.h"

namespace emu {

struct Event {  // 0: none
  unsigned long long stamp : 22, clock : 28, thread : 10, is_write : 1, is_atomic : 1, in_flight : 1, : 1;
};
struct Cell {
  Event write, other[2];
  unsigned write_site, other_site[2];  // relative to the module
  unsigned parts;                      // of a word: 0, or where the cells of its bytes are, which differ
};
static_assert(sizeof(Event) == 8 && sizeof(Cell) == 40, "compact");

inline bool none(Event e) { return e.stamp == 0; }
inline bool same(Event a, Event b) { return memcmp(&a, &b, sizeof a) == 0; }
inline bool same(const Cell& a, const Cell& b) { return memcmp(&a, &b, sizeof a) == 0; }

// A cell per byte: one for the four bytes of an aligned word as long as they have the same history.
class History {
 public:
  // Memory that is not touched is not there.
  explicit History(size_t bytes) : words_(static_cast<Cell*>(calloc(bytes / 4 + 1, sizeof(Cell)))) {
    if (words_ == nullptr) throw std::bad_alloc();
  }

  // update(at, cell) for the bytes from `at` to `end`; of neighbours with the same history, for the first. What
  // update does must depend on the cell alone.
  template <class F>
  void visit(size_t at, size_t end, const F& update) {
    if (at % 4 == 0 && end == at + 4 && words_.get()[at / 4].parts == 0) return update(at, words_.get()[at / 4]);
    Cell before{}, after{};
    for (bool first = true; at < end;) {
      const size_t next = std::min(end, at / 4 * 4 + 4);
      Cell& word = words_.get()[at / 4];
      if (next - at < 4 || word.parts != 0) {
        visit_bytes(word, at, next, update);
      } else if (!first && same(word, before)) {
        word = after;
      } else {
        first = false;
        before = word;
        update(at, word);
        after = word;
      }
      at = next;
    }
  }

 private:
  template <class F>
  __attribute__((noinline)) void visit_bytes(Cell& word, size_t at, size_t end, const F& update) {
    if (word.parts == 0) take_apart(word);
    Cell* const cells = parts_[word.parts - 1].data();
    Cell before = cells[at % 4];
    update(at, cells[at % 4]);
    const Cell after = cells[at % 4];
    for (size_t i = at + 1; i < end; ++i) {
      Cell& cell = cells[i % 4];
      if (same(cell, before)) {
        cell = after;
      } else {
        update(i, cell);
      }
    }
    if (same(cells[1], cells[2]) && same(cells[0], cells[1]) && same(cells[2], cells[3])) {
      unused_.push_back(word.parts);
      word = cells[0];
    }
  }
  void take_apart(Cell& word) {
    unsigned parts;
    if (unused_.empty()) {
      parts_.emplace_back();
      parts = static_cast<unsigned>(parts_.size());
    } else {
      parts = unused_.back();
      unused_.pop_back();
    }
    parts_[parts - 1].fill(word);
    word = {};
    word.parts = parts;
  }

  struct Free {
    void operator()(Cell* p) const { free(p); }
  };
  std::unique_ptr<Cell, Free> words_;
  std::vector<std::array<Cell, 4>> parts_;
  std::vector<unsigned> unused_;  // of them
};

}  // namespace emu
