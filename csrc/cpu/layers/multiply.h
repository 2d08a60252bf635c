// The two matrix products that convolution layers are made of, on rows that lie anywhere.
//
//   multiply   c[q, :] = bias + sum_t sum_k a[q + offset_t + k] * b_t[k, :]         forward, input gradient
//   outer      d[m, :] = sum_q a[q + offset_m] * g[q, :] (+ a1, g1 likewise)        weight gradient
//
// q walks over pixels of several samples, in two values at once. A register tile holds `rows` x `vectors`
// accumulators; scalars of a are broadcast, so that a may have any strides; rows of b, c, d, g are whole
// vectors. Overwrites c; overwrites or adds to d. A team, which may be null, takes tiles.
#pragma once

#include "simd.h"
#include "split.h"
#include "sums.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// N x H x W pixels in two values: where pixel (n, i, j) lies in each, in elements.
struct Walk {
  int64_t samples, h, w;
  int64_t from_origin, from_sample, from_row, from_pixel;
  int64_t to_origin, to_sample, to_row, to_pixel;

  int64_t count() const { return samples * h * w; }
  // Samples of one pixel are one row of pixels: loops over rows are then long.
  Walk collapsed() const {
    if (h != 1 || w != 1) return *this;
    return {1, 1, samples, from_origin, 0, 0, from_sample, to_origin, 0, 0, to_sample};
  }
};

// Steps through a walk.
struct Cursor {
  const Walk& walk;
  int64_t n = 0, i = 0, j = 0, from, to;
  explicit Cursor(const Walk& w, int64_t pixel = 0) : walk(w), from(w.from_origin), to(w.to_origin) {
    if (pixel == 0) return;
    n = pixel / (w.h * w.w);
    i = pixel / w.w % w.h;
    j = pixel % w.w;
    go();
  }
  void next() {
    if (++j < walk.w) {
      from += walk.from_pixel;
      to += walk.to_pixel;
      return;
    }
    j = 0;
    if (++i == walk.h) {
      i = 0;
      ++n;
    }
    go();
  }
  void go() {
    from = walk.from_origin + n * walk.from_sample + i * walk.from_row + j * walk.from_pixel;
    to = walk.to_origin + n * walk.to_sample + i * walk.to_row + j * walk.to_pixel;
  }
};

// As a table: a division would take as long as a small product's row.
struct MostRows {
  int of[kMostVectors + 1] = {};
  constexpr MostRows() {
    for (int v = 1; v <= kMostVectors; ++v) of[v] = most_rows(v);
  }
};
constexpr MostRows kMostRowsOf{};

// `whole` in the fewest parts of at most `most`, as even as can be: the first `larger` have one more than
// `size`. Without divisions for the few parts of small products.
struct Parts {
  int64_t count, size, larger;

  constexpr Parts(int64_t n, int64_t each, int64_t with_more) : count(n), size(each), larger(with_more) {}
  Parts(int64_t whole, int64_t most) {
    if (whole <= most) {
      count = whole > 0 ? 1 : 0, size = whole, larger = 0;
    } else if (whole <= 2 * most) {
      count = 2, size = whole >> 1, larger = whole & 1;
    } else if (whole <= 3 * most) {
      count = 3, size = whole / 3, larger = whole % 3;
    } else if (whole <= 4 * most) {
      count = 4, size = whole >> 2, larger = whole & 3;
    } else {
      count = (whole + most - 1) / most, size = whole / count, larger = whole % count;
    }
  }
  int of(int64_t index) const { return int(size + (index < larger ? 1 : 0)); }
  int64_t begin(int64_t index) const { return size * index + std::min(index, larger); }
};

template <class Real>
struct Taps {
  int64_t count;
  const int64_t* offset;  // (count,)
  const Real* const* b;   // (count,) matrices (k, ldb)
  int64_t k, ldb;
};

// The second pair of factors of an outer product, as far from the first; without one `pairs` is 1.
struct Second {
  int64_t pairs, a, g;
};

template <class Real>
struct MultiplyTile {
  template <int kRows, int kVectors, bool kHalf>
  static void run(const Real* const* a, const Taps<Real>& taps, int64_t column, const Real* bias,
                  Real* const* c) {
    Sums<Real, kRows, kVectors, kHalf> sums;
    Shared<Real, kVectors, kHalf> shared;
    const Real* row[kRows];
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) row[m] = a[m];
    if (bias == nullptr) {
      sums.clear();
    } else {
      bias += column;
      sums.load_from([bias](int) { return bias; });
    }
    for (int64_t t = 0; t < taps.count; ++t) {
      const Real* b = taps.b[t] + column;
      const int64_t begin = taps.offset[t], end = begin + taps.k;
      for (int64_t k = begin; k < end; ++k, b += taps.ldb) {
        shared.load_from(b);
        sums.add_products([&](int m) { return row[m][k]; }, shared);
      }
    }
    sums.store_to([&](int m) { return c[m] + column; });
  }
};

template <class Real>
struct OuterTile {
  template <int kRows, int kVectors, bool kHalf>
  static void run(const Real* a, const int64_t* offset, const Real* g, const Walk& walk, const Second& second,
                  Real* d, int64_t ldd, bool add) {
    Sums<Real, kRows, kVectors, kHalf> sums;
    Shared<Real, kVectors, kHalf> shared;
    int64_t at[kRows];
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) at[m] = offset[m];
    const auto row = [&](int m) { return d + m * ldd; };
    if (add) {
      sums.load_from(row);
    } else {
      sums.clear();
    }
    for (int64_t pair = 0; pair < second.pairs; ++pair, a += second.a, g += second.g) {
      for (int64_t n = 0; n < walk.samples; ++n) {
        for (int64_t i = 0; i < walk.h; ++i) {
          const Real* x = a + walk.from_origin + n * walk.from_sample + i * walk.from_row;
          const Real* y = g + walk.to_origin + n * walk.to_sample + i * walk.to_row;
          for (int64_t j = 0; j < walk.w; ++j, x += walk.from_pixel, y += walk.to_pixel) {
            shared.load_from(y);
            sums.add_products([&](int m) { return x[at[m]]; }, shared);
          }
        }
      }
    }
    sums.store_to(row);
  }
};

template <class Real>
constexpr TilesOf<Real, void (*)(const Real* const*, const Taps<Real>&, int64_t, const Real*, Real* const*),
                  MultiplyTile<Real>>
    kMultiplyTiles{};
template <class Real>
constexpr TilesOf<Real,
                  void (*)(const Real*, const int64_t*, const Real*, const Walk&, const Second&, Real*,
                           int64_t, bool),
                  OuterTile<Real>>
    kOuterTiles{};

// How columns are cut into groups of vectors, the last of which may end in a half one.
template <class Real>
struct Columns {
  Parts groups;
  bool half;
  explicit Columns(int64_t columns)
      : groups(cut((columns + kLanes<Real> - 1) / kLanes<Real>)), half(columns % kLanes<Real> != 0) {}
  int across(int64_t group) const { return groups.of(group); }
  bool ends_half(int64_t group) const { return half && group == groups.count - 1; }

 private:
  static Parts cut(int64_t vectors) {
    static_assert(kUsualVectors == kMostVectors || (kUsualVectors == 2 && kMostVectors == 3));
    if constexpr (kUsualVectors == kMostVectors) {
      return Parts(vectors, kMostVectors);
    } else {
      return vectors <= 3 ? Parts{1, vectors, 0} : Parts{vectors >> 1, 2, vectors & 1};
    }
  }
};

// c at walk.to, `columns` lanes of each pixel; a at walk.from.
template <class Real>
void multiply(const Team* team, const Walk& where, const Real* a, const Taps<Real>& taps, int64_t columns,
              const Real* bias, Real* c) {
  const Walk walk = where.collapsed();
  const Columns<Real> cut(columns);
  const int64_t pixels = walk.count();
  const double work = 2.0 * double(pixels) * double(taps.count * taps.k) * double(columns);
  for (int64_t group = 0, column = 0; group < cut.groups.count; ++group) {
    const int across = cut.across(group);
    const auto& tiles_of = kMultiplyTiles<Real>.of[cut.ends_half(group)][across - 1];
    const Parts tiles(pixels, kMostRowsOf.of[across]);
    in_parts(team, tiles.count, work / double(cut.groups.count), [&](int64_t begin, int64_t end) {
      Cursor cursor(walk, tiles.begin(begin));
      for (int64_t tile = begin; tile < end; ++tile) {
        const int rows = tiles.of(tile);
        const Real* from[kMostRows];
        Real* to[kMostRows];
        for (int m = 0; m < rows; ++m, cursor.next()) {
          from[m] = a + cursor.from;
          to[m] = c + cursor.to;
        }
        tiles_of[rows - 1](from, taps, column, bias, to);
      }
    });
    column += across * kLanes<Real>;
  }
}

// How an outer product over samples is cut: its rows among the team, then blocks of samples of which both
// factors, `bytes` for each, stay in the cache over all tiles, groups of columns, and tiles of rows. Calls
// run(half, across, column, first sample, samples, tiles, first tile, last tile), the last group's vectors
// across ending in a half one where `half`; `work` as in_parts has it.
template <class Real, class Run>
void for_outer_tiles(const Team* team, int64_t samples, int64_t bytes, int64_t rows, int64_t columns,
                     double work, const Run& run) {
  constexpr int64_t kBlockBytes = 256 * 1024;
  const Parts blocks(samples,
                     bytes * samples <= kBlockBytes ? samples : std::max<int64_t>(kBlockBytes / bytes, 1));
  const Columns<Real> cut(columns);
  // Tiles high, for columns that are all but the first or the last kUsualVectors vectors wide.
  const int64_t most_tiles = Parts(rows, kMostRowsOf.of[kUsualVectors]).count;
  in_parts(team, most_tiles, work, [&](int64_t begin, int64_t end) {
    for (int64_t b = 0; b < blocks.count; ++b) {
      for (int64_t group = 0, column = 0; group < cut.groups.count; ++group) {
        const int across = cut.across(group);
        const Parts tiles(rows, kMostRowsOf.of[across]);
        run(cut.ends_half(group), across, column, blocks.begin(b), blocks.of(b), tiles,
            begin == 0 ? 0 : tiles.count * begin / most_tiles,
            end == most_tiles ? tiles.count : tiles.count * end / most_tiles);
        column += across * kLanes<Real>;
      }
    }
  });
}

// d (rows, ldd), `columns` lanes of each row: row m sums a at walk.from + offset[m] times g at walk.to, and
// with a second pair a1 times g1 after it.
template <class Real>
void outer(const Team* team, const Walk& pixels, const Real* a, const int64_t* offset, int64_t rows,
           const Real* g, const Real* a1, const Real* g1, int64_t columns, Real* d, int64_t ldd, bool add) {
  const Second second = a1 == nullptr ? Second{1, 0, 0} : Second{2, a1 - a, g1 - g};
  const Walk walk = pixels.collapsed();
  const int64_t bytes = walk.h * walk.w * (walk.from_pixel + walk.to_pixel) * int64_t(sizeof(Real));
  const double work = 2.0 * double(second.pairs * walk.count()) * double(rows * columns);
  for_outer_tiles<Real>(team, walk.samples, bytes, rows, columns, work,
                        [&](bool half, int across, int64_t column, int64_t first_sample, int64_t samples,
                            const Parts& tiles, int64_t first, int64_t last) {
                          Walk block = walk;
                          block.samples = samples;
                          block.from_origin += first_sample * block.from_sample;
                          block.to_origin += first_sample * block.to_sample;
                          int64_t row = tiles.begin(first);
                          for (int64_t tile = first; tile < last; ++tile) {
                            const int high = tiles.of(tile);
                            kOuterTiles<Real>.of[half][across - 1][high - 1](
                                a, offset + row, g + column, block, second, d + row * ldd + column, ldd,
                                add || first_sample > 0);
                            row += high;
                          }
                        });
}

// sums[:] = sum over pixels of g at walk.to; a row's sum first, for the rounding.
template <class Real>
void column_sums(const Walk& pixels, const Real* g, int64_t columns, Real* sums) {
  const Walk walk = pixels.collapsed();
  for (int64_t column = 0; column < columns; column += kLanes<Real>) {
    Vec<Real> total{};
    for (int64_t n = 0; n < walk.samples; ++n) {
      for (int64_t i = 0; i < walk.h; ++i) {
        const Real* row = g + walk.to_origin + n * walk.to_sample + i * walk.to_row + column;
        Vec<Real> sum{};
        for (int64_t j = 0; j < walk.w; ++j) sum += load(row + j * walk.to_pixel);
        total += sum;
      }
    }
    store(sums + column, total);
  }
}

// b (columns, ldb) = a (rows, lda) transposed; b's lanes beyond `rows` become zero. lda and ldb are whole
// vectors.
#if defined(__AVX2__)
// In blocks of 32 bytes a side, with AVX-512 too: larger ones need more shuffles than they save.
template <class Real>
struct Block;
template <>
struct Block<float> {
  typedef float Row __attribute__((vector_size(32)));
  typedef float Memory __attribute__((vector_size(32), aligned(4)));
  typedef float HalfMemory __attribute__((vector_size(16), aligned(4)));
  typedef int32_t Mask __attribute__((vector_size(32)));
  static constexpr int kSide = 8;
};
template <>
struct Block<double> {
  typedef double Row __attribute__((vector_size(32)));
  typedef double Memory __attribute__((vector_size(32), aligned(8)));
  typedef double HalfMemory __attribute__((vector_size(16), aligned(8)));
  typedef int64_t Mask __attribute__((vector_size(32)));
  static constexpr int kSide = 4;
};

// Half a row, zeros after it; and the first half of one. Through memory the core would have to wait.
inline Block<float>::Row load_half_row(const float* from) {
  const Block<float>::HalfMemory half = *reinterpret_cast<const Block<float>::HalfMemory*>(from);
  return __builtin_shufflevector(half, Block<float>::HalfMemory{}, 0, 1, 2, 3, 4, 5, 6, 7);
}
inline Block<double>::Row load_half_row(const double* from) {
  const Block<double>::HalfMemory half = *reinterpret_cast<const Block<double>::HalfMemory*>(from);
  return __builtin_shufflevector(half, Block<double>::HalfMemory{}, 0, 1, 2, 3);
}
inline void store_half_row(Block<float>::Row row, float* to) {
  *reinterpret_cast<Block<float>::HalfMemory*>(to) = __builtin_shufflevector(row, row, 0, 1, 2, 3);
}
inline void store_half_row(Block<double>::Row row, double* to) {
  *reinterpret_cast<Block<double>::HalfMemory*>(to) = __builtin_shufflevector(row, row, 0, 1);
}

// Rows and lanes change places, in log2(kSide) rounds of exchanging halves.
inline void transpose_block(Block<float>::Row* r) {
  using Mask = Block<float>::Mask;
  const auto exchange = [&](int i, int j, Mask low, Mask high) {
    const Block<float>::Row a = r[i], b = r[j];
    r[i] = __builtin_shuffle(a, b, low);
    r[j] = __builtin_shuffle(a, b, high);
  };
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    exchange(i, i + 4, Mask{0, 1, 2, 3, 8, 9, 10, 11}, Mask{4, 5, 6, 7, 12, 13, 14, 15});
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int at = i / 2 * 4 + i % 2;
    exchange(at, at + 2, Mask{0, 1, 8, 9, 4, 5, 12, 13}, Mask{2, 3, 10, 11, 6, 7, 14, 15});
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2)
    exchange(i, i + 1, Mask{0, 8, 2, 10, 4, 12, 6, 14}, Mask{1, 9, 3, 11, 5, 13, 7, 15});
}
inline void transpose_block(Block<double>::Row* r) {
  using Mask = Block<double>::Mask;
  const auto exchange = [&](int i, int j, Mask low, Mask high) {
    const Block<double>::Row a = r[i], b = r[j];
    r[i] = __builtin_shuffle(a, b, low);
    r[j] = __builtin_shuffle(a, b, high);
  };
  exchange(0, 2, Mask{0, 1, 4, 5}, Mask{2, 3, 6, 7});
  exchange(1, 3, Mask{0, 1, 4, 5}, Mask{2, 3, 6, 7});
  exchange(0, 1, Mask{0, 4, 2, 6}, Mask{1, 5, 3, 7});
  exchange(2, 3, Mask{0, 4, 2, 6}, Mask{1, 5, 3, 7});
}

// One block: `high` of its rows are there, the first `wide` of its columns wanted.
template <class Real, bool kWhole>
inline void transpose_block_at(const Real* a, int64_t lda, int64_t high, int64_t wide, Real* b, int64_t ldb) {
  using B = Block<Real>;
  using Row = typename B::Row;
  constexpr int kSide = B::kSide;
  Row block[kSide];
#pragma GCC unroll 8
  for (int i = 0; i < kSide; ++i) {
    block[i] = kWhole || i < high ? *reinterpret_cast<const typename B::Memory*>(a + i * lda) : Row{};
  }
  transpose_block(block);
  // Not a loop up to the last column: a variable bound would put the block into memory.
#pragma GCC unroll 8
  for (int i = 0; i < kSide; ++i) {
    if (kWhole || i < wide) *reinterpret_cast<typename B::Memory*>(b + i * ldb) = block[i];
  }
}

template <class Real>
void transpose(const Real* a, int64_t rows, int64_t columns, int64_t lda, Real* b, int64_t ldb) {
  constexpr int kSide = Block<Real>::kSide;
  const int64_t whole = columns / kSide * kSide;
  for (int64_t r = 0; r < ldb; r += kSide) {
    const int64_t high = rows - r;
    int64_t c = 0;
    if (high >= kSide) {
      for (; c < whole; c += kSide)
        transpose_block_at<Real, true>(a + r * lda + c, lda, high, kSide, b + c * ldb + r, ldb);
    } else if (high <= 0) {
      for (; c < columns; ++c)
        *reinterpret_cast<typename Block<Real>::Memory*>(b + c * ldb + r) = typename Block<Real>::Row{};
    }
    for (; c < columns; c += kSide)
      transpose_block_at<Real, false>(a + r * lda + c, lda, high, columns - c, b + c * ldb + r, ldb);
  }
}
#else
template <class Real>
void transpose(const Real* a, int64_t rows, int64_t columns, int64_t lda, Real* b, int64_t ldb) {
  for (int64_t c = 0; c < columns; ++c, b += ldb) {
    for (int64_t r = 0; r < rows; ++r) b[r] = a[r * lda + c];
    for (int64_t r = rows; r < ldb; ++r) b[r] = 0;
  }
}
#endif

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
