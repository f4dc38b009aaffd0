// Counting sort of slots by expert id.
//
//   offsets[e] = number of slots with an id in [0, e);  order = slots by (id, slot), those of -1 last
//
// Large inputs: a histogram per fixed chunk of slots, one serial scan over (expert, chunk), and a scatter per chunk.
// A chunk starts where the chunks before it end within each expert, and walks its slots upwards, so equal ids keep
// their order: stable, and the same for any number of threads.
#include "common/parallel.h"
#include "common/scratch.h"
#include "routing/routing.h"

namespace moa {

bool sort_by_expert(const int64_t* indices, int64_t slots, int64_t experts, int32_t* offsets, int32_t* order) {
  constexpr int64_t kChunk = 16384;
  const int64_t bins = experts + 1;  // the last one takes -1
  // One chunk for each bin-sized piece at least, so that the histograms never outgrow the input.
  const int64_t chunk = kChunk > bins ? kChunk : bins;
  const int64_t chunks = slots > 0 ? (slots + chunk - 1) / chunk : 1;
  int32_t* counts = scratch<int32_t>(Scratch::call_first, chunks * bins + chunks);
  int32_t* bad = counts + chunks * bins;

  parallel_tasks(chunks, chunks > 1, [&](int64_t c) {
    int32_t* count = counts + c * bins;
    for (int64_t b = 0; b < bins; ++b) count[b] = 0;
    bad[c] = 0;
    const int64_t end = (c + 1) * chunk < slots ? (c + 1) * chunk : slots;
    for (int64_t i = c * chunk; i < end; ++i) {
      const int64_t id = indices[i];
      if (id < -1 || id >= experts) {
        bad[c] = 1;
      } else {
        ++count[id < 0 ? experts : id];
      }
    }
  });
  for (int64_t c = 0; c < chunks; ++c)
    if (bad[c] != 0) return false;

  int32_t next = 0;
  for (int64_t b = 0; b < bins; ++b) {
    offsets[b] = next;
    for (int64_t c = 0; c < chunks; ++c) {
      const int32_t n = counts[c * bins + b];
      counts[c * bins + b] = next;
      next += n;
    }
  }
  parallel_tasks(chunks, chunks > 1, [&](int64_t c) {
    int32_t* at = counts + c * bins;
    const int64_t end = (c + 1) * chunk < slots ? (c + 1) * chunk : slots;
    for (int64_t i = c * chunk; i < end; ++i) {
      const int64_t id = indices[i];
      order[at[id < 0 ? experts : id]++] = static_cast<int32_t>(i);
    }
  });
  return true;
}

}  // namespace moa
