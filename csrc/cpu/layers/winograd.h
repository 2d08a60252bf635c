// 3 x 3 convolutions of stride 1 with fewer products: Winograd's minimal filtering F(4 x 4, 3 x 3), in which
// a tile of 4 x 4 outputs costs 36 products of channels, not 144.
//
//   y = A' [(G w G') . (B' x B)] A          for each tile, x being the 6 x 6 pixels that it reads
//
// with the polynomial's points 0, +-5/8, +-3/2 and infinity. The usual 0, +-1, +-2 need fewer operations, but
// round twice as badly: in float32 the error is 7e-7 of the result against 14e-7, and 3e-7 of the direct sum
// (64 channels). Since y is linear in x and in w, so is everything else, and the other three functions are
// transposes of the same transforms: with U = B' x B, V = A dy A', W = G w G', for each of the 36 components
//
//   fwd    M = U W              y = A' M A
//   bwd    D = U' V             dw = G' D G           X = V W'             dx = sum over tiles B X B'
//   tfwd   M = U tW + tU W      ty = A' M A
//   tbwd   D = U' tV + tU' V    tdw = G' D G          X = tV W' + V tW'    tdx likewise
//
// In blocks of tiles, which stay in the cache from the transform to its inverse; nothing of the size of U is
// kept. saved: W, [36][C of x][pixel of y] and a vector, then W' with channels transposed, [36][C of y][pixel
// of x] and a vector (where dx is wanted); tsaved: tW and tW'. The vector keeps the components from lying a
// power of two apart, where they would share a few sets of the cache. Layout of the blocks in `scratch`:
// decide_saved in engine/build.cpp. Tested by tests/engine/test_winograd.py.
//
// S. Winograd, Arithmetic Complexity of Computations, 1980; A. Lavin and S. Gray, Fast Algorithms for
// Convolutional Neural Networks, CVPR 2016; B. Barabasz et al., Error Analysis and Improving the Accuracy of
// Winograd Convolution for Deep Neural Networks, ACM TOMS 2020.
#pragma once

#include <algorithm>

#include "call.h"
#include "multiply.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

constexpr int kWinogradTile = 4;        // outputs a side
constexpr int kWinogradReads = 6;       // inputs a side
constexpr int kWinogradParts = 36;      // components
constexpr double kTransformWork = 200;  // operations of a transform for a tile's channel, roughly

// The transforms: each along one side replaces elements at p[0], p[s], p[2 s], ...
template <class Real>
struct Winograd {
  using V = Vec<Real>;
  // The points are 0, +-a, +-b, infinity.
  static constexpr double a = 0.625, b = 1.5, a2 = a * a, b2 = b * b;
  static constexpr double at_0 = 1 / (a2 * b2), at_a = 1 / (2 * a2 * (a2 - b2)),
                          at_b = 1 / (2 * b2 * (b2 - a2));

  static V times(double k, V x) { return Real(k) * x; }

  // B': 6 to 6.
  struct Reads {
    template <int s>
    static void along(V* p) {
      const V d0 = p[0], d1 = p[s], d2 = p[2 * s], d3 = p[3 * s], d4 = p[4 * s], d5 = p[5 * s];
      const V even_a = d4 - times(b2, d2), odd_a = d3 - times(b2, d1);
      const V even_b = d4 - times(a2, d2), odd_b = d3 - times(a2, d1);
      p[0] = times(a2 * b2, d0) + (d4 - times(a2 + b2, d2));
      p[s] = even_a + times(a, odd_a);
      p[2 * s] = even_a - times(a, odd_a);
      p[3 * s] = even_b + times(b, odd_b);
      p[4 * s] = even_b - times(b, odd_b);
      p[5 * s] = times(a2 * b2, d1) + (d5 - times(a2 + b2, d3));
    }
  };
  // B: its transpose.
  struct ReadsTransposed {
    template <int s>
    static void along(V* p) {
      const V r0 = p[0], r5 = p[5 * s];
      const V sum_a = p[s] + p[2 * s], difference_a = p[s] - p[2 * s];
      const V sum_b = p[3 * s] + p[4 * s], difference_b = p[3 * s] - p[4 * s];
      p[0] = times(a2 * b2, r0);
      p[s] = times(a2 * b2, r5) - times(a * b2, difference_a) - times(b * a2, difference_b);
      p[2 * s] = -times(a2 + b2, r0) - times(b2, sum_a) - times(a2, sum_b);
      p[3 * s] = times(a, difference_a) + times(b, difference_b) - times(a2 + b2, r5);
      p[4 * s] = r0 + (sum_a + sum_b);
      p[5 * s] = r5;
    }
  };
  // A': 6 to 4.
  struct Outputs {
    template <int s>
    static void along(V* p) {
      const V sum_a = p[s] + p[2 * s], difference_a = p[s] - p[2 * s];
      const V sum_b = p[3 * s] + p[4 * s], difference_b = p[3 * s] - p[4 * s];
      p[0] = p[0] + (sum_a + sum_b);
      p[s] = times(a, difference_a) + times(b, difference_b);
      p[2 * s] = times(a2, sum_a) + times(b2, sum_b);
      p[3 * s] = p[5 * s] + (times(a2 * a, difference_a) + times(b2 * b, difference_b));
    }
  };
  // A: its transpose, 4 to 6.
  struct OutputsTransposed {
    template <int s>
    static void along(V* p) {
      const V y0 = p[0], y1 = p[s], y2 = p[2 * s], y3 = p[3 * s];
      const V even_a = y0 + times(a2, y2), odd_a = y1 + times(a2, y3);
      const V even_b = y0 + times(b2, y2), odd_b = y1 + times(b2, y3);
      p[s] = even_a + times(a, odd_a);
      p[2 * s] = even_a - times(a, odd_a);
      p[3 * s] = even_b + times(b, odd_b);
      p[4 * s] = even_b - times(b, odd_b);
      p[5 * s] = y3;
    }
  };
  // G: 3 to 6.
  struct Weights {
    template <int s>
    static void along(V* p) {
      const V w0 = p[0], w1 = p[s], w2 = p[2 * s];
      const V even_a = times(at_a, w0) + times(at_a * a2, w2),
              even_b = times(at_b, w0) + times(at_b * b2, w2);
      p[0] = times(at_0, w0);
      p[s] = even_a + times(at_a * a, w1);
      p[2 * s] = even_a - times(at_a * a, w1);
      p[3 * s] = even_b + times(at_b * b, w1);
      p[4 * s] = even_b - times(at_b * b, w1);
      p[5 * s] = w2;
    }
  };
  // G': its transpose, 6 to 3.
  struct WeightsTransposed {
    template <int s>
    static void along(V* p) {
      const V sum_a = p[s] + p[2 * s], difference_a = p[s] - p[2 * s];
      const V sum_b = p[3 * s] + p[4 * s], difference_b = p[3 * s] - p[4 * s];
      p[0] = times(at_0, p[0]) + (times(at_a, sum_a) + times(at_b, sum_b));
      p[s] = times(at_a * a, difference_a) + times(at_b * b, difference_b);
      p[2 * s] = p[5 * s] + (times(at_a * a2, sum_a) + times(at_b * b2, sum_b));
    }
  };

  // to(row, column, .) gets Side' x Side of the kFrom x kFrom elements from(row, column): down the columns,
  // then along the rows.
  template <class Side, int kFrom, int kTo, class From, class To>
  static inline void both_sides(const From& from, const To& to) {
    V p[kWinogradParts];
#pragma GCC unroll 6
    for (int x = 0; x < kFrom; ++x) {
#pragma GCC unroll 6
      for (int y = 0; y < kFrom; ++y) p[y * 6 + x] = from(y, x);
      Side::template along<6>(p + x);
    }
#pragma GCC unroll 6
    for (int y = 0; y < kTo; ++y) {
      Side::template along<1>(p + y * 6);
#pragma GCC unroll 6
      for (int x = 0; x < kTo; ++x) to(y, x, p[y * 6 + x]);
    }
  }
};

// transposed [tap][C of y][pixel of x] = w [tap][C of x][pixel of y], channels exchanged.
template <class Real>
void transpose_taps(const Call<Real>& c, const Real* w, Real* transposed) {
  const int64_t taps = c.layer->kernel_h * c.layer->kernel_w, block = c.in->c * c.out->pixel;
  for (int64_t t = 0; t < taps; ++t) {
    transpose(w + t * block, c.in->c, c.out->c, c.out->pixel, transposed + t * c.out->c * c.in->pixel,
              c.in->pixel);
  }
}

// What a call's tiles and buffers are.
template <class Real>
struct WinogradCall {
  using V = Vec<Real>;
  using Transform = Winograd<Real>;
  const Call<Real>& c;
  const Value &in, &out;
  int64_t across, each, tiles;                 // tiles in a row, of a sample, of all samples
  int64_t in_part, out_part, w_part, wt_part;  // from a component to the next: blocks of x, of y; weights

  explicit WinogradCall(const Call<Real>& call)
      : c(call),
        in(*call.in),
        out(*call.out),
        across((out.w + kWinogradTile - 1) / kWinogradTile),
        each((out.h + kWinogradTile - 1) / kWinogradTile * across),
        tiles(each * call.samples),
        in_part(call.layer->block * in.pixel + kPad),
        out_part(call.layer->block * out.pixel + kPad),
        w_part(in.c * out.pixel + kPad),
        wt_part(out.c * in.pixel + kPad) {}

  static constexpr int64_t kPad = kVectorBytes / int64_t(sizeof(Real));

  // Blocks of transformed tiles: of x, tx, y (or dy), tdy; and D.
  Real* u() const { return c.scratch; }
  Real* tu() const { return u() + kWinogradParts * in_part; }
  Real* v() const { return tu() + kWinogradParts * in_part; }
  Real* tv() const { return v() + kWinogradParts * out_part; }
  Real* d() const { return tv() + kWinogradParts * out_part; }
  Real* w() const { return c.saved; }
  Real* wt() const { return c.saved + kWinogradParts * w_part; }
  Real* tw() const { return c.tsaved; }
  Real* twt() const { return c.tsaved + kWinogradParts * w_part; }

  // visit(first, count) for blocks of tiles, which are as even as can be.
  template <class Visit>
  void for_each_block(const Visit& visit) const {
    const Parts blocks(tiles, c.layer->block);
    for (int64_t b = 0, first = 0; b < blocks.count; ++b) {
      const int count = blocks.of(b);
      visit(first, count);
      first += count;
    }
  }

  // visit(number in the block, sample, output row, output column of its first pixel), for the tiles from
  // number `begin` of the block to `end`.
  template <class Visit>
  void for_each_tile(int64_t first, int64_t begin, int64_t end, const Visit& visit) const {
    const int64_t tile = first + begin;
    int64_t n = tile / each, i = tile % each / across, j = tile % each % across;
    for (int64_t t = begin; t < end; ++t) {
      visit(t, n, i * kWinogradTile, j * kWinogradTile);
      if (++j < across) continue;
      j = 0;
      if (++i * kWinogradTile < out.h) continue;
      i = 0;
      ++n;
    }
  }

  // The same for all tiles of the block, by the team; a tile has so many channels.
  template <class Visit>
  void for_each_tile_at_once(int64_t first, int64_t count, int64_t channels, const Visit& visit) const {
    in_parts(c.team, count, kTransformWork * double(count * channels),
             [&](int64_t begin, int64_t end) { for_each_tile(first, begin, end, visit); });
  }

  // u = B' x B of the block's tiles. What lies beyond x's border is zero.
  void transform_reads(int64_t first, int64_t count, const Real* x, Real* u) const {
    for_each_tile_at_once(first, count, in.pixel, [&](int64_t t, int64_t n, int64_t i, int64_t j) {
      const int64_t row = i - c.layer->pad_h, column = j - c.layer->pad_w;
      const Real* from = x + in.origin + n * in.sample + row * in.row + column * in.pixel;
      const int64_t h = std::min<int64_t>(kWinogradReads, in.h + in.border - row),
                    w = std::min<int64_t>(kWinogradReads, in.w + in.border - column);
      const bool inside = h == kWinogradReads && w == kWinogradReads;
      for (int64_t lane = 0; lane < in.pixel; lane += kLanes<Real>) {
        const auto read = [&](int y, int x) { return load(from + y * in.row + x * in.pixel + lane); };
        const auto read_some = [&](int y, int x) { return y < h && x < w ? read(y, x) : V{}; };
        const auto put = [&](int y, int x, V part) {
          store(u + (y * 6 + x) * in_part + t * in.pixel + lane, part);
        };
        if (inside) {
          Transform::template both_sides<typename Transform::Reads, 6, 6>(read, put);
        } else {
          Transform::template both_sides<typename Transform::Reads, 6, 6>(read_some, put);
        }
      }
    });
  }

  // v = A dy A' of the block's tiles. What lies beyond y's edges is zero.
  void transform_adjoints(int64_t first, int64_t count, const Real* dy, Real* v) const {
    for_each_tile_at_once(first, count, out.pixel, [&](int64_t t, int64_t n, int64_t i, int64_t j) {
      const Real* from = dy + out.origin + n * out.sample + i * out.row + j * out.pixel;
      const int64_t h = std::min<int64_t>(kWinogradTile, out.h - i),
                    w = std::min<int64_t>(kWinogradTile, out.w - j);
      for (int64_t lane = 0; lane < out.pixel; lane += kLanes<Real>) {
        Transform::template both_sides<typename Transform::OutputsTransposed, 4, 6>(
            [&](int y, int x) {
              return y < h && x < w ? load(from + y * out.row + x * out.pixel + lane) : V{};
            },
            [&](int y, int x, V part) { store(v + (y * 6 + x) * out_part + t * out.pixel + lane, part); });
      }
    });
  }

  // y = bias + A' m A.
  void inverse_outputs(int64_t first, int64_t count, const Real* m, const Real* bias, Real* to) const {
    for_each_tile_at_once(first, count, out.pixel, [&](int64_t t, int64_t n, int64_t i, int64_t j) {
      Real* const y0 = to + out.origin + n * out.sample + i * out.row + j * out.pixel;
      const int64_t h = std::min<int64_t>(kWinogradTile, out.h - i),
                    w = std::min<int64_t>(kWinogradTile, out.w - j);
      for (int64_t lane = 0; lane < out.pixel; lane += kLanes<Real>) {
        const V shift = bias == nullptr ? V{} : load(bias + lane);
        Transform::template both_sides<typename Transform::Outputs, 6, 4>(
            [&](int y, int x) { return load(m + (y * 6 + x) * out_part + t * out.pixel + lane); },
            [&](int y, int x, V value) {
              if (y < h && x < w) store(y0 + y * out.row + x * out.pixel + lane, value + shift);
            });
      }
    });
  }

  // dx += B m B', where tiles overlap; a sample begins as zeros. The team shares channels, not tiles.
  void inverse_reads(int64_t first, int64_t count, const Real* m, Real* dx) const {
    const int64_t vectors = in.pixel / kLanes<Real>;
    in_parts(c.team, vectors, kTransformWork * double(count * in.pixel), [&](int64_t begin, int64_t end) {
      inverse_reads_of(first, count, m, dx, begin * kLanes<Real>, end * kLanes<Real>);
    });
  }
  void inverse_reads_of(int64_t first, int64_t count, const Real* m, Real* dx, int64_t lanes_begin,
                        int64_t lanes_end) const {
    for_each_tile(first, 0, count, [&](int64_t t, int64_t n, int64_t i, int64_t j) {
      const int64_t row = i - c.layer->pad_h, column = j - c.layer->pad_w;
      Real* const sample = dx + in.origin + n * in.sample;
      if (i == 0 && j == 0) clear(sample, lanes_begin, lanes_end);
      Real* const to = sample + row * in.row + column * in.pixel;
      for (int64_t lane = lanes_begin; lane < lanes_end; lane += kLanes<Real>) {
        Transform::template both_sides<typename Transform::ReadsTransposed, 6, 6>(
            [&](int y, int x) { return load(m + (y * 6 + x) * in_part + t * in.pixel + lane); },
            [&](int y, int x, V value) {
              const bool inside = row + y >= 0 && row + y < in.h && column + x >= 0 && column + x < in.w;
              Real* const at = to + y * in.row + x * in.pixel + lane;
              if (inside) store(at, load(at) + value);
            });
      }
    });
  }
  // Zeros in some lanes of a sample of x.
  void clear(Real* sample, int64_t lanes_begin, int64_t lanes_end) const {
    for (int64_t y = 0; y < in.h; ++y) {
      for (int64_t x = 0; x < in.w; ++x) {
        Real* const at = sample + y * in.row + x * in.pixel;
        for (int64_t lane = lanes_begin; lane < lanes_end; lane += kLanes<Real>) store(at + lane, V{});
      }
    }
  }

  // W = G w G', of taps of so many elements, into components so far apart.
  void transform_taps(const Real* taps, int64_t tap, int64_t part, Real* to) const {
    for_each_weight(tap, [&](int64_t at) {
      Transform::template both_sides<typename Transform::Weights, 3, 6>(
          [&](int y, int x) { return load(taps + (y * 3 + x) * tap + at); },
          [&](int y, int x, V value) { store(to + (y * 6 + x) * part + at, value); });
    });
  }
  // visit(element of a tap), a vector at a time.
  template <class Visit>
  void for_each_weight(int64_t tap, const Visit& visit) const {
    in_parts(c.team, tap / kLanes<Real>, kTransformWork * double(tap), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) visit(i * kLanes<Real>);
    });
  }
  void transform_weights(const Real* weights, Real* to) const {
    transform_taps(weights, in.c * out.pixel, w_part, to);
  }
  // The same with channels transposed; by way of d, as nine transposes are fewer than 36.
  void transform_transposed_weights(const Real* weights, Real* to) const {
    transpose_taps(c, weights, d());
    transform_taps(d(), out.c * in.pixel, wt_part, to);
  }

  // dw = G' d G.
  void inverse_weights(const Real* d, Real* dw) const {
    const int64_t tap = in.c * out.pixel;
    for_each_weight(tap, [&](int64_t at) {
      Transform::template both_sides<typename Transform::WeightsTransposed, 6, 3>(
          [&](int y, int x) { return load(d + (y * 6 + x) * w_part + at); },
          [&](int y, int x, V value) { store(dw + (y * 3 + x) * tap + at, value); });
    });
  }

  // m = u w, and with a second pair + u1 w1, for each component; rows of `from` elements and columns of `to`.
  void products(int64_t count, const Real* u, const Real* w, const Real* u1, const Real* w1, int64_t from_c,
                int64_t from, int64_t from_part, int64_t weights_part, int64_t to, int64_t to_part,
                Real* m) const {
    const Walk walk{1, 1, count, 0, 0, 0, from, 0, 0, 0, to};
    for_each_part((u1 == nullptr ? 1 : 2) * double(count * from * to), [&](int64_t part) {
      const int64_t offset[2] = {0, u1 == nullptr ? 0 : u1 - u};
      const Real* const b[2] = {w + part * weights_part, u1 == nullptr ? nullptr : w1 + part * weights_part};
      multiply<Real>(nullptr, walk, u + part * from_part,
                     Taps<Real>{u1 == nullptr ? 1 : 2, offset, b, from_c, to}, to, nullptr,
                     m + part * to_part);
    });
  }
  // visit(component), of which each takes `work` multiplications.
  template <class Visit>
  void for_each_part(double work, const Visit& visit) const {
    in_parts(c.team, kWinogradParts, 2 * kWinogradParts * work, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) visit(part);
    });
  }
  void forward_products(int64_t count, const Real* u, const Real* w, const Real* u1, const Real* w1,
                        Real* m) const {
    products(count, u, w, u1, w1, in.c, in.pixel, in_part, w_part, out.pixel, out_part, m);
  }
  void backward_products(int64_t count, const Real* v, const Real* wt, const Real* v1, const Real* wt1,
                         Real* m) const {
    products(count, v, wt, v1, wt1, out.c, out.pixel, out_part, wt_part, in.pixel, in_part, m);
  }
  // d = u' v, and with a second pair + u1' v1; added to where `add`.
  void weight_products(int64_t count, const Real* u, const Real* v, const Real* u1, const Real* v1,
                       bool add) const {
    const Walk walk{1, 1, count, 0, 0, 0, in.pixel, 0, 0, 0, out.pixel};
    for_each_part((u1 == nullptr ? 1 : 2) * double(count * in.c * out.pixel), [&](int64_t part) {
      // The first of the layer's reads are the channels of one tap: 0, 1, 2, ...
      outer(nullptr, walk, u + part * in_part, c.layer->reads, in.c, v + part * out_part,
            u1 == nullptr ? nullptr : u1 + part * in_part, u1 == nullptr ? nullptr : v1 + part * out_part,
            out.pixel, d() + part * w_part, out.pixel, add);
    });
  }
};

template <class Real>
void winograd_fwd(const Call<Real>& c) {
  const WinogradCall<Real> call(c);
  const Real* const bias = c.layer->bias ? c.w + 9 * c.in->c * c.out->pixel : nullptr;
  call.transform_weights(c.w, call.w());
  call.for_each_block([&](int64_t first, int64_t count) {
    call.transform_reads(first, count, c.x, call.u());
    call.forward_products(count, call.u(), call.w(), nullptr, nullptr, call.v());
    call.inverse_outputs(first, count, call.v(), bias, c.y);
  });
}

template <class Real>
void winograd_bwd(const Call<Real>& c) {
  const WinogradCall<Real> call(c);
  if (c.dx != nullptr) call.transform_transposed_weights(c.w, call.wt());
  call.for_each_block([&](int64_t first, int64_t count) {
    call.transform_adjoints(first, count, c.dy, call.v());
    if (c.dw != nullptr) {
      call.transform_reads(first, count, c.x, call.u());
      call.weight_products(count, call.u(), call.v(), nullptr, nullptr, first > 0);
    }
    if (c.dx == nullptr) return;
    call.backward_products(count, call.v(), call.wt(), nullptr, nullptr, call.u());
    call.inverse_reads(first, count, call.u(), c.dx);
  });
  if (c.dw != nullptr) call.inverse_weights(call.d(), c.dw);
}

template <class Real>
void winograd_tfwd(const Call<Real>& c) {
  const WinogradCall<Real> call(c);
  const Real* const bias = c.layer->bias ? c.tw + 9 * c.in->c * c.out->pixel : nullptr;
  const bool moves = c.tx != nullptr;
  call.transform_weights(c.tw, call.tw());
  call.for_each_block([&](int64_t first, int64_t count) {
    call.transform_reads(first, count, c.x, call.u());
    if (moves) call.transform_reads(first, count, c.tx, call.tu());
    call.forward_products(count, call.u(), call.tw(), moves ? call.tu() : nullptr, call.w(), call.v());
    call.inverse_outputs(first, count, call.v(), bias, c.ty);
  });
}

template <class Real>
void winograd_tbwd(const Call<Real>& c) {
  const WinogradCall<Real> call(c);
  const bool moves = c.tx != nullptr, wants = c.tdx != nullptr;
  if (wants) call.transform_transposed_weights(c.tw, call.twt());
  call.for_each_block([&](int64_t first, int64_t count) {
    call.transform_reads(first, count, c.x, call.u());
    call.transform_adjoints(first, count, c.tdy, call.tv());
    if (moves || wants) call.transform_adjoints(first, count, c.dy, call.v());
    if (moves) call.transform_reads(first, count, c.tx, call.tu());
    call.weight_products(count, call.u(), call.tv(), moves ? call.tu() : nullptr, call.v(), first > 0);
    if (!wants) return;
    call.backward_products(count, call.tv(), call.wt(), call.v(), call.twt(), call.u());
    call.inverse_reads(first, count, call.u(), c.tdx);
  });
  call.inverse_weights(call.d(), c.tdw);
}

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
