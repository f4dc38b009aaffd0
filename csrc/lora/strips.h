// Expand on AMX where it is not dense (dense.h): the tokens of one expert, sixteen at a time, in strips of 64 columns. What
// is summed stays in L1 between the tiles and the row it is added to. Included only by kernels.h.
#pragma once

namespace moa {
namespace MOA_ISA {

// Where a row's sum is so far, and where it goes: floats, and to the one a row of base is added, from the other y is made.
struct TileRow {
  const float* from;
  const bf16_t* base;  // or null
  float* to;
  bf16_t* out;  // or null: then it goes to `to`
};

// Rows of at most sixteen tokens by whole strips of 64 columns. The rows of coef stand `ldc` apart, sixteen of them
// readable; the panel's `pitch` bytes. The shapes of the tiles stay loaded from one call to the next of a task.
class ExpandTiles {
 public:
  // m <= 16 rows, columns [0, width).
  void run(int m, const TileRow* rows, const bf16_t* coef, int64_t ldc, const bf16_t* panel, int64_t pitch,
           int64_t k_size, int64_t width) {
    if (k_size != loaded_) load_strip_shapes(&shapes_, 16, k_size);
    loaded_ = k_size;
    for (int64_t col = 0; col < width; col += 64) {
      strip_product(coef, ldc, panel + 2 * col, pitch, k_size, sums_);
      for (int i = 0; i < m; ++i) add(rows[i], sums_ + i * 64, col);
    }
  }

 private:
  static void add(const TileRow& row, const float* sums, int64_t col) {
    MOA_UNROLL
    for (int64_t n = 0; n < 64; n += 16) {
      __m512 sum = _mm512_loadu_ps(row.from + col + n);
      if (row.base != nullptr) sum = _mm512_add_ps(sum, widened(row.base + col + n));
      sum = _mm512_add_ps(sum, _mm512_load_ps(sums + n));
      if (row.out != nullptr) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(row.out + col + n),
                            reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)));
      } else {
        _mm512_storeu_ps(row.to + col + n, sum);
      }
    }
  }

  alignas(64) float sums_[16 * 64];
  TileShapes shapes_;
  int64_t loaded_ = -1;  // the depth whose shapes are
};

// One task of expand (kernels.h): tokens [t0, t1), columns [c0, c0 + cols), whole strips.
template <class Depth, class Panel>
static void expand_strips(const Segments& s, const bf16_t* coef, int64_t ldc, int64_t width, bf16_t* y,
                          const bf16_t* base, int64_t ldbase, const bf16_t* bias, int64_t t0, int64_t t1, int64_t c0,
                          int64_t cols, const Depth& depth, const Panel& panel) {
  const TokenAt token_at(s);
  float* tile = scratch<float>(Scratch::tile, (t1 - t0 + 1) * cols);
  float* start = tile + (t1 - t0) * cols;
  if (bias != nullptr) {
    convert_row(bias + c0, start, cols);
  } else {
    memset(start, 0, cols * sizeof(float));
  }
  const bool all = t0 == 0 && t1 == s.tokens;
  auto segment = [&](int64_t e, int64_t* p0, int64_t* p1) {  // the expert's slots among these tokens
    *p0 = s.offsets[e];
    *p1 = depth(e) > 0 ? s.offsets[e + 1] : *p0;
    if (all || *p0 == *p1) return;
    *p0 = first_slot(s.order, *p0, *p1, t0 * s.top_k);
    *p1 = first_slot(s.order, *p0, *p1, t1 * s.top_k);
  };
  // Slots that each token still has to come, and whether one has been.
  int32_t* left = scratch<int32_t>(Scratch::counts, 2 * (t1 - t0));
  int32_t* begun = left + (t1 - t0);
  memset(left, 0, 2 * (t1 - t0) * sizeof(int32_t));
  for (int64_t e = 0, p0 = 0, p1 = 0; e < s.experts; ++e) {
    segment(e, &p0, &p1);
    for (int64_t p = p0; p < p1; ++p) ++left[token_at(p) - t0];
  }
  for (int64_t t = t0; t < t1; ++t) {
    if (left[t - t0] > 0) continue;
    float* row = tile + (t - t0) * cols;
    memcpy(row, start, cols * sizeof(float));
    if (base != nullptr) add_row(base + t * ldbase + c0, row, cols);
    convert_row(row, y + t * width + c0, cols);
  }

  ExpandTiles tiles;
  const bf16_t** b = scratch<const bf16_t*>(Scratch::pointers, ldc);
  for (int64_t e = 0, p0 = 0, p1 = 0; e < s.experts; ++e) {
    segment(e, &p0, &p1);
    if (p0 == p1) continue;
    const int64_t k_size = panel(e, c0, cols, b).count, pitch = panel_pitch(b, k_size);
    const int64_t ahead = all ? s.slots() : p1;
    for (int64_t p = p0; p < p1;) {
      TileRow rows[16];
      int m = 0;
      int64_t last = -1;
      for (; m < 16 && p + m < p1; ++m) {
        const int64_t t = token_at(p + m), i = t - t0;
        if (t == last) break;  // one token twice under one expert: the second adds after the first is stored
        last = t;
        rows[m].to = tile + i * cols;
        rows[m].from = begun[i] ? rows[m].to : start;
        rows[m].base = begun[i] || base == nullptr ? nullptr : base + t * ldbase + c0;
        rows[m].out = --left[i] == 0 ? y + t * width + c0 : nullptr;
        begun[i] = 1;
        if (p + 16 + m < ahead) {  // what the next group starts from
          const int64_t next = token_at(p + 16 + m);
          if (begun[next - t0] == 0)
            prefetch_row(base != nullptr ? base + next * ldbase + c0 : y + next * width + c0, cols);
        }
      }
      tiles.run(m, rows, coef + p * ldc, ldc, b[0], pitch, k_size, cols);
      p += m;
    }
  }
}

}  // namespace MOA_ISA
}  // namespace moa
