// Maximum over windows, no parameters; floor mode, dilation 1. Only real pixels count: padding is -infinity.
// Of equal values the first in the window's rows wins, and NaN wins over all, the last one of several, as in
// torch.
//
//   fwd   y = x at k, k the window's winner        bwd   dx = sum of dy over the windows that the pixel wins
//   tfwd  ty = tx at k                             tbwd  tdx = sum of tdy over the same windows
//
// saved: each output element's k, the tap u * kernel_w + v, in one byte where the kernel has at most 256
// taps, else in one element: out.h out.w out.pixel / (taps <= 256 ? 4 : 1) elements a sample, the whole
// rounded up to 64 bytes. tsaved is as large and not used; scratch: none.
// All four overwrite. Windows may overlap (dx is then gathered pixel by pixel) or leave gaps.
// Tested by tests/engine/test_layers.py.
#pragma once

#include "window.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// The taps in memory: of the q-th vector of outputs in byte q % 4 of the lanes of vector q / 4. (GCC converts
// vectors to and from bytes an element at a time; shifts do it on every instruction set.)
template <class Real, bool kBytes>
struct Winners {
  using Mask = typename Simd<Real>::Mask;
  typedef Mask Stored __attribute__((aligned(sizeof(Real)), may_alias));
  static constexpr int kShare = kBytes ? 4 : 1;

  Stored* vectors;
  int64_t per_pixel;

  Winners(Real* saved, int64_t pixel)
      : vectors(reinterpret_cast<Stored*>(saved)), per_pixel(pixel / kLanes<Real>) {}

  // Those of `kCount` vectors of output pixel `number`. To be put in order: the first byte clears the others.
  template <int kCount>
  void put(int64_t number, int64_t lane, const Mask (&taps)[kCount]) const {
    const int64_t q = number * per_pixel + lane / kLanes<Real>, first = q % kShare;
    if (first + kCount <= kShare) {
      Mask bytes = taps[0];
      for (int k = 1; k < kCount; ++k) bytes |= taps[k] << 8 * k;
      join(q, bytes);
    } else {
      for (int k = 0; k < kCount; ++k) join(q + k, taps[k]);
    }
  }
  template <int kCount>
  void get(int64_t number, int64_t lane, Mask (&taps)[kCount]) const {
    const int64_t q = number * per_pixel + lane / kLanes<Real>, first = q % kShare;
    if (first + kCount <= kShare) {
      const Mask bytes = part(q);
      for (int k = 0; k < kCount; ++k) taps[k] = kBytes ? bytes >> 8 * k & 255 : bytes;
    } else {
      for (int k = 0; k < kCount; ++k) taps[k] = kBytes ? part(q + k) & 255 : part(q + k);
    }
  }

 private:
  void join(int64_t q, Mask bytes) const {
    Stored& to = vectors[q / kShare];
    const int shift = 8 * int(q % kShare);
    to = shift == 0 ? bytes : to | bytes << shift;
  }
  Mask part(int64_t q) const { return vectors[q / kShare] >> 8 * int(q % kShare); }
};

template <class Real>
inline typename Simd<Real>::Mask same_tap(int64_t tap) {
  using Mask = typename Simd<Real>::Mask;
  return Mask{} + static_cast<decltype(Mask{}[0] + 0)>(tap);
}

template <class Real, bool kBytes>
void max_pool_forward(const Call<Real>& c) {
  using V = Vec<Real>;
  using Mask = typename Simd<Real>::Mask;
  constexpr int kL = kLanes<Real>;
  const int64_t row = c.in->row, pixel = c.in->pixel, across = c.layer->kernel_w;
  const Winners<Real, kBytes> winners(c.saved, pixel);
  for_each_window(*c.layer, *c.in, *c.out, c.samples, [=, all = c.x, y = c.y](const Window& w) {
    for_each_block<Real>(pixel, [=]<int kCount>(int64_t lane) {
      V best[kCount];
      Mask winner[kCount];
      for (int k = 0; k < kCount; ++k) {
        best[k] = splat(-Real(__builtin_inf()));
        winner[k] = same_tap<Real>(w.rows.begin * across + w.columns.begin);
      }
      for (int64_t u = w.rows.begin; u < w.rows.end; ++u) {
        for (int64_t v = w.columns.begin; v < w.columns.end; ++v) {
          const Real* x = all + w.from + u * row + v * pixel + lane;
          const Mask tap = same_tap<Real>(u * across + v);
          for (int k = 0; k < kCount; ++k) {
            const V value = load(x + k * kL);
            const auto wins = (value > best[k]) | (value != value);
            best[k] = select(wins, value, best[k]);
            winner[k] = select(wins, tap, winner[k]);
          }
        }
      }
      for (int k = 0; k < kCount; ++k) store(y + w.to + lane + k * kL, best[k]);
      winners.put(w.number, lane, winner);
    });
  });
}

template <class Real, bool kBytes>
void max_pool_tangent(const Call<Real>& c) {
  using V = Vec<Real>;
  using Mask = typename Simd<Real>::Mask;
  constexpr int kL = kLanes<Real>;
  const int64_t row = c.in->row, pixel = c.in->pixel, across = c.layer->kernel_w;
  const Winners<Real, kBytes> winners(c.saved, pixel);
  for_each_window(*c.layer, *c.in, *c.out, c.samples, [=, all = c.tx, ty = c.ty](const Window& w) {
    for_each_block<Real>(pixel, [=]<int kCount>(int64_t lane) {
      V won[kCount] = {};
      Mask winner[kCount];
      winners.get(w.number, lane, winner);
      for (int64_t u = w.rows.begin; u < w.rows.end; ++u) {
        for (int64_t v = w.columns.begin; v < w.columns.end; ++v) {
          const Real* tx = all + w.from + u * row + v * pixel + lane;
          const Mask tap = same_tap<Real>(u * across + v);
          for (int k = 0; k < kCount; ++k) won[k] = select(winner[k] == tap, load(tx + k * kL), won[k]);
        }
      }
      for (int k = 0; k < kCount; ++k) store(ty + w.to + lane + k * kL, won[k]);
    });
  });
}

// dx from dy where windows overlap: bwd and tbwd.
template <class Real, bool kBytes>
void max_pool_gather(const Call<Real>& c, const Real* dy, Real* dx) {
  using V = Vec<Real>;
  using Mask = typename Simd<Real>::Mask;
  constexpr int kL = kLanes<Real>;
  const int64_t row = c.out->row, pixel = c.out->pixel, across = c.out->w;
  const Winners<Real, kBytes> winners(c.saved, pixel);
  for_each_held_pixel(*c.layer, *c.in, *c.out, c.samples, [=](const Holders& h) {
    for_each_block<Real>(pixel, [=]<int kCount>(int64_t lane) {
      V sum[kCount] = {};
      for (int64_t i = 0; i < h.rows.size(); ++i) {
        for (int64_t j = 0; j < h.columns.size(); ++j) {
          const Mask tap = same_tap<Real>(h.tap - i * h.tap_row - j * h.tap_column);
          const Real* from = dy + h.to + i * row + j * pixel + lane;
          Mask winner[kCount];
          winners.get(h.number + i * across + j, lane, winner);
          for (int k = 0; k < kCount; ++k) sum[k] += select(winner[k] == tap, load(from + k * kL), V{});
        }
      }
      for (int k = 0; k < kCount; ++k) store(dx + h.from + lane + k * kL, sum[k]);
    });
  });
}

// The same where they do not: window by window.
template <class Real, bool kBytes>
void max_pool_scatter(const Call<Real>& c, const Real* dy, Real* dx) {
  using V = Vec<Real>;
  using Mask = typename Simd<Real>::Mask;
  constexpr int kL = kLanes<Real>;
  const Layer& l = *c.layer;
  const int64_t row = c.in->row, pixel = c.in->pixel, across = l.kernel_w;
  const Winners<Real, kBytes> winners(c.saved, pixel);
  if (!are_tiles(rows_of(l, *c.in, *c.out)) || !are_tiles(columns_of(l, *c.in, *c.out))) {
    clear_pixels(*c.in, c.samples, dx);
  }
  for_each_window(l, *c.in, *c.out, c.samples, [=](const Window& w) {
    for_each_block<Real>(pixel, [=]<int kCount>(int64_t lane) {
      V d[kCount];
      Mask winner[kCount];
      winners.get(w.number, lane, winner);
      for (int k = 0; k < kCount; ++k) d[k] = load(dy + w.to + lane + k * kL);
      for (int64_t u = w.rows.begin; u < w.rows.end; ++u) {
        for (int64_t v = w.columns.begin; v < w.columns.end; ++v) {
          const Mask tap = same_tap<Real>(u * across + v);
          Real* to = dx + w.from + u * row + v * pixel + lane;
          for (int k = 0; k < kCount; ++k) store(to + k * kL, select(winner[k] == tap, d[k], V{}));
        }
      }
    });
  });
}

// f.template operator()<whether a tap fits a byte>().
template <class F>
inline void by_taps(const Layer& l, const F& f) {
  if (l.kernel_h * l.kernel_w <= 256) {
    f.template operator()<true>();
  } else {
    f.template operator()<false>();
  }
}

template <class Real>
void max_pool_input_gradient(const Call<Real>& c, const Real* dy, Real* dx) {
  const Layer& l = *c.layer;
  const bool apart = are_apart(rows_of(l, *c.in, *c.out)) && are_apart(columns_of(l, *c.in, *c.out));
  by_taps(l, [&]<bool kBytes>() {
    apart ? max_pool_scatter<Real, kBytes>(c, dy, dx) : max_pool_gather<Real, kBytes>(c, dy, dx);
  });
}

template <class Real>
void max_pool_fwd(const Call<Real>& c) {
  by_taps(*c.layer, [&]<bool kBytes>() { max_pool_forward<Real, kBytes>(c); });
}

template <class Real>
void max_pool_bwd(const Call<Real>& c) {
  if (c.dx != nullptr) max_pool_input_gradient(c, c.dy, c.dx);
}

template <class Real>
void max_pool_tfwd(const Call<Real>& c) {
  if (c.tx == nullptr) {
    clear_pixels(*c.out, c.samples, c.ty);
  } else {
    by_taps(*c.layer, [&]<bool kBytes>() { max_pool_tangent<Real, kBytes>(c); });
  }
}

template <class Real>
void max_pool_tbwd(const Call<Real>& c) {
  if (c.tdx != nullptr) max_pool_input_gradient(c, c.tdy, c.tdx);
}

template <class Real>
constexpr LayerFunctions<Real> kMaxPool{Split::none, max_pool_fwd<Real>, max_pool_bwd<Real>,
                                        max_pool_tfwd<Real>, max_pool_tbwd<Real>};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
