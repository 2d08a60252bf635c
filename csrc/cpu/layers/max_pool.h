// Maximum over windows, no parameters; floor mode, dilation 1. Only real pixels count: padding is -infinity. Of equal
// values the first in the window's rows wins, and NaN wins over all, the last one of several, as in torch.
//
//   fwd   y = x at k, k the window's winner        bwd   dx = sum of dy over the windows that the pixel wins
//   tfwd  ty = tx at k                             tbwd  tdx = sum of tdy over the same windows
//
// saved: the winner's tap u * kernel_w + v of each output element, one byte where the kernel has at most 256 taps, else
// four: out.h out.w out.pixel / (taps <= 256 ? 4 : 1) elements a sample. tsaved is as large and not used; scratch: none.
// All four overwrite. dx is gathered pixel by pixel, so that windows may overlap or leave gaps.
// Tested by tests/engine/test_layers.py.
#pragma once

#include "window.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// Lanes' taps in memory: as many numbers of type Index as Real has lanes.
template <class Real, class Index>
struct Taken {
  using Mask = typename Simd<Real>::Mask;
  typedef Index Packed __attribute__((vector_size(kLanes<Real> * sizeof(Index))));
  typedef Index Stored __attribute__((vector_size(kLanes<Real> * sizeof(Index)), aligned(1), may_alias));

  Index* at;  // of output element (pixel number 0, lane 0)
  explicit Taken(Real* saved) : at(reinterpret_cast<Index*>(saved)) {}

  void put(int64_t k, Mask taps) const {
    *reinterpret_cast<Stored*>(at + k) = __builtin_convertvector(taps, Packed);
  }
  Mask get(int64_t k) const {
    const Packed packed = *reinterpret_cast<const Stored*>(at + k);
    return __builtin_convertvector(packed, Mask);
  }
};

template <class Real>
inline typename Simd<Real>::Mask same_tap(int64_t tap) {
  using Mask = typename Simd<Real>::Mask;
  return Mask{} + static_cast<decltype(Mask{}[0] + 0)>(tap);
}

template <class Real, class Index>
void max_pool_forward(const Call<Real>& c) {
  using V = Vec<Real>;
  using Mask = typename Simd<Real>::Mask;
  constexpr int kL = kLanes<Real>;
  const Taken<Real, Index> taken(c.saved);
  const int64_t row = c.in->row, pixel = c.in->pixel, across = c.layer->kernel_w;
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
      for (int k = 0; k < kCount; ++k) {
        store(y + w.to + lane + k * kL, best[k]);
        taken.put(w.number * pixel + lane + k * kL, winner[k]);
      }
    });
  });
}

template <class Real, class Index>
void max_pool_tangent(const Call<Real>& c) {
  using V = Vec<Real>;
  using Mask = typename Simd<Real>::Mask;
  constexpr int kL = kLanes<Real>;
  const Taken<Real, Index> taken(c.saved);
  const int64_t row = c.in->row, pixel = c.in->pixel, across = c.layer->kernel_w;
  for_each_window(*c.layer, *c.in, *c.out, c.samples, [=, all = c.tx, ty = c.ty](const Window& w) {
    for_each_block<Real>(pixel, [=]<int kCount>(int64_t lane) {
      V won[kCount] = {};
      Mask winner[kCount];
      for (int k = 0; k < kCount; ++k) winner[k] = taken.get(w.number * pixel + lane + k * kL);
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

// dx from dy: bwd and tbwd.
template <class Real, class Index>
void max_pool_gather(const Call<Real>& c, const Real* dy, Real* dx) {
  using V = Vec<Real>;
  constexpr int kL = kLanes<Real>;
  const Taken<Real, Index> taken(c.saved);
  const Layer& l = *c.layer;
  const Value& out = *c.out;
  const Axis rows = rows_of(l, *c.in, out), columns = columns_of(l, *c.in, out);
  for_each_held_pixel(l, *c.in, out, c.samples, [&, dy, dx](const Holders& h) {
    for_each_block<Real>(out.pixel, [&, dy, dx]<int kCount>(int64_t lane) {
      V sum[kCount] = {};
      for (int64_t i = h.rows.begin; i < h.rows.end; ++i) {
        for (int64_t j = h.columns.begin; j < h.columns.end; ++j) {
          const auto tap = same_tap<Real>(rows.tap(h.row, i) * l.kernel_w + columns.tap(h.column, j));
          const int64_t to = out.origin + h.sample * out.sample + i * out.row + j * out.pixel + lane;
          const int64_t element = ((h.sample * out.h + i) * out.w + j) * out.pixel + lane;
          for (int k = 0; k < kCount; ++k) {
            sum[k] += select(taken.get(element + k * kL) == tap, load(dy + to + k * kL), V{});
          }
        }
      }
      for (int k = 0; k < kCount; ++k) store(dx + h.from + lane + k * kL, sum[k]);
    });
  });
}

inline bool taps_fit_a_byte(const Layer& l) { return l.kernel_h * l.kernel_w <= 256; }

template <class Real>
void max_pool_fwd(const Call<Real>& c) {
  taps_fit_a_byte(*c.layer) ? max_pool_forward<Real, uint8_t>(c) : max_pool_forward<Real, int32_t>(c);
}

template <class Real>
void max_pool_bwd(const Call<Real>& c) {
  if (c.dx == nullptr) return;
  taps_fit_a_byte(*c.layer) ? max_pool_gather<Real, uint8_t>(c, c.dy, c.dx)
                            : max_pool_gather<Real, int32_t>(c, c.dy, c.dx);
}

template <class Real>
void max_pool_tfwd(const Call<Real>& c) {
  if (c.tx == nullptr) {
    clear_pixels(*c.out, c.samples, c.ty);
  } else {
    taps_fit_a_byte(*c.layer) ? max_pool_tangent<Real, uint8_t>(c) : max_pool_tangent<Real, int32_t>(c);
  }
}

template <class Real>
void max_pool_tbwd(const Call<Real>& c) {
  if (c.tdx == nullptr) return;
  taps_fit_a_byte(*c.layer) ? max_pool_gather<Real, uint8_t>(c, c.tdy, c.tdx)
                            : max_pool_gather<Real, int32_t>(c, c.tdy, c.tdx);
}

template <class Real>
constexpr LayerFunctions<Real> kMaxPool{max_pool_fwd<Real>, max_pool_bwd<Real>, max_pool_tfwd<Real>,
                                        max_pool_tbwd<Real>};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
