// Mean over windows, no parameters; floor mode. With `bias` (count_include_pad) a window counts kernel_h x
// kernel_w elements of which padding is zero, else its real pixels. AdaptiveAvgPool2d(1) is a window of
// H x W. Linear, hence
//   fwd   y = pool(x)       bwd   dx = pool^T(dy)
//   tfwd  ty = pool(tx)     tbwd  tdx = pool^T(tdy)
// All overwrite; nothing is kept (saved, tsaved, scratch: 0). dx is gathered pixel by pixel, so that windows
// may overlap or leave gaps. Tested by tests/engine/test_layers.py.
#pragma once

#include "window.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// All windows count as many: no division for each.
inline bool equal_counts(const Layer& l) { return l.bias != 0 || (l.pad_h == 0 && l.pad_w == 0); }

template <class Real>
void avg_pool_forward(const Call<Real>& c, const Real* x, Real* y) {
  using V = Vec<Real>;
  constexpr int kL = kLanes<Real>;
  const Layer& l = *c.layer;
  const bool equal = equal_counts(l);
  const Real share = Real(1) / Real(l.kernel_h * l.kernel_w);
  const int64_t row = c.in->row, pixel = c.in->pixel;
  for_each_window(l, *c.in, *c.out, c.samples, [=](const Window& w) {
    const Real scale = equal ? share : Real(1) / Real(w.rows.size() * w.columns.size());
    for_each_block<Real>(pixel, [=]<int kCount>(int64_t lane) {
      V total[kCount] = {};
      for (int64_t u = w.rows.begin; u < w.rows.end; ++u) {
        V sum[kCount] = {};
        for (int64_t v = w.columns.begin; v < w.columns.end; ++v) {
          for (int k = 0; k < kCount; ++k) sum[k] += load(x + w.from + u * row + v * pixel + lane + k * kL);
        }
        for (int k = 0; k < kCount; ++k) total[k] += sum[k];
      }
      for (int k = 0; k < kCount; ++k) store(y + w.to + lane + k * kL, total[k] * scale);
    });
  });
}

template <class Real>
void avg_pool_gather(const Call<Real>& c, const Real* dy, Real* dx) {
  using V = Vec<Real>;
  constexpr int kL = kLanes<Real>;
  const Layer& l = *c.layer;
  const Axis rows = rows_of(l, *c.in, *c.out), columns = columns_of(l, *c.in, *c.out);
  const bool equal = equal_counts(l);
  const Real share = Real(1) / Real(l.kernel_h * l.kernel_w);
  const int64_t row = c.out->row, pixel = c.out->pixel;
  for_each_held_pixel(l, *c.in, *c.out, c.samples, [=](const Holders& h) {
    for_each_block<Real>(pixel, [=]<int kCount>(int64_t lane) {
      V sum[kCount] = {};
      for (int64_t i = h.rows.begin; i < h.rows.end; ++i) {
        for (int64_t j = h.columns.begin; j < h.columns.end; ++j) {
          const Real scale = equal ? share : Real(1) / Real(rows.taps(i).size() * columns.taps(j).size());
          const Real* from = dy + h.to + (i - h.rows.begin) * row + (j - h.columns.begin) * pixel + lane;
          for (int k = 0; k < kCount; ++k) sum[k] += scale * load(from + k * kL);
        }
      }
      for (int k = 0; k < kCount; ++k) store(dx + h.from + lane + k * kL, sum[k]);
    });
  });
}

template <class Real>
void avg_pool_fwd(const Call<Real>& c) {
  avg_pool_forward(c, c.x, c.y);
}

template <class Real>
void avg_pool_bwd(const Call<Real>& c) {
  if (c.dx != nullptr) avg_pool_gather(c, c.dy, c.dx);
}

template <class Real>
void avg_pool_tfwd(const Call<Real>& c) {
  if (c.tx == nullptr) {
    clear_pixels(*c.out, c.samples, c.ty);
  } else {
    avg_pool_forward(c, c.tx, c.ty);
  }
}

template <class Real>
void avg_pool_tbwd(const Call<Real>& c) {
  if (c.tdx != nullptr) avg_pool_gather(c, c.tdy, c.tdx);
}

template <class Real>
constexpr LayerFunctions<Real> kAvgPool{Split::none, avg_pool_fwd<Real>, avg_pool_bwd<Real>,
                                        avg_pool_tfwd<Real>, avg_pool_tbwd<Real>};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
