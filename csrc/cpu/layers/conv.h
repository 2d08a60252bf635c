// Two-dimensional convolution layers.
//
//   y[n, i, j, o] = b[o] + sum_{u, v, c} x[n, i s + u - p, j s + v - p, c] w[u, v, c, o]
//
// Parameters: w as [kernel_h * kernel_w][C of x][pixel of y], then b [pixel of y] where there is one.
//   fwd    y            bwd   dw (db) from x and dy; dx from dy and w
//   tfwd   ty = x*tw + tx*w + tb
//   tbwd   tdw = x*tdy + tx*dy, tdb = sum tdy;  tdx = dy*tw + tdy*w
// Where only a batch normalisation reads y, which takes out what b adds, db = tdb = 0. The borders of x hold
// the zeros that padding means, those of dy the zeros beyond its edges; build.cpp makes them wide enough.
// saved, tsaved: w and tw with channels transposed, [kernel_h * kernel_w][C of y][pixel of x], where dx is
// wanted. 3 x 3 kernels of stride 1 go by winograd.h where that pays. Tested by tests/engine/test_layers.py.
#pragma once

#include "call.h"
#include "multiply.h"
#include "winograd.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// A kernel of more taps than this is not lowered (build.cpp).
constexpr int64_t kMostTaps = 169;

// From each output pixel to the corner of its window.
inline Walk conv_walk(const Layer& l, const Value& in, const Value& out, int64_t samples) {
  return {samples,
          out.h,
          out.w,
          in.origin - l.pad_h * in.row - l.pad_w * in.pixel,
          in.sample,
          l.stride_h * in.row,
          l.stride_w * in.pixel,
          out.origin,
          out.sample,
          out.row,
          out.pixel};
}

// dx = w^T * dy, and with a second pair (dy1, wt1) the sum of both.
template <class Real>
void conv_input_gradient(const Call<Real>& c, const Real* dy, const Real* wt, const Real* dy1,
                         const Real* wt1, Real* dx) {
  const Layer& l = *c.layer;
  const Value &in = *c.in, &out = *c.out;
  int64_t offset[2 * kMostTaps];
  const Real* b[2 * kMostTaps];
  // Pixels of x by their place in the stride: those of one phase see the same taps.
  for (int64_t phase_h = 0; phase_h < l.stride_h; ++phase_h) {
    for (int64_t phase_w = 0; phase_w < l.stride_w; ++phase_w) {
      const int64_t i = (phase_h - l.pad_h % l.stride_h + l.stride_h) % l.stride_h;  // first pixel with
      const int64_t j =
          (phase_w - l.pad_w % l.stride_w + l.stride_w) % l.stride_w;  // (i + pad) % stride == phase
      if (i >= in.h || j >= in.w) continue;
      int64_t taps = 0;
      for (int pair = 0; pair < (dy1 == nullptr ? 1 : 2); ++pair) {
        for (int64_t u = phase_h; u < l.kernel_h; u += l.stride_h) {
          for (int64_t v = phase_w; v < l.kernel_w; v += l.stride_w, ++taps) {
            const int64_t row = (i + l.pad_h - u) / l.stride_h, pixel = (j + l.pad_w - v) / l.stride_w;
            offset[taps] = row * out.row + pixel * out.pixel + (pair == 0 ? 0 : dy1 - dy);
            b[taps] = (pair == 0 ? wt : wt1) + (u * l.kernel_w + v) * out.c * in.pixel;
          }
        }
      }
      const Walk walk{c.samples,
                      (in.h - i + l.stride_h - 1) / l.stride_h,
                      (in.w - j + l.stride_w - 1) / l.stride_w,
                      out.origin,
                      out.sample,
                      out.row,
                      out.pixel,
                      in.origin + i * in.row + j * in.pixel,
                      in.sample,
                      l.stride_h * in.row,
                      l.stride_w * in.pixel};
      // With no tap (a stride beyond the kernel) this writes the zeros.
      multiply<Real>(c.team, walk, dy, Taps<Real>{taps, offset, b, out.c, in.pixel}, lanes_of<Real>(in.c),
                     nullptr, dx);
    }
  }
}

// dw = x^T * dy, and with a second pair (x1, dy1) the sum of both.
template <class Real>
void conv_weight_gradient(const Call<Real>& c, const Real* x, const Real* dy, const Real* x1, const Real* dy1,
                          Real* dw) {
  const Layer& l = *c.layer;
  const Value &in = *c.in, &out = *c.out;
  outer(c.team, conv_walk(l, in, out, c.samples), x, l.reads, l.kernel_h * l.kernel_w * in.c, dy, x1, dy1,
        lanes_of<Real>(out.c), dw, out.pixel, false);
}

template <class Real>
void conv_bias_gradient(const Call<Real>& c, const Real* dy, Real* dw) {
  const Layer& l = *c.layer;
  if (!l.bias) return;
  Real* const db = dw + l.kernel_h * l.kernel_w * c.in->c * c.out->pixel;
  if (l.bias_cancels) {
    std::fill_n(db, c.out->pixel, Real(0));
  } else {
    column_sums(conv_walk(l, *c.in, *c.out, c.samples), dy, c.out->pixel, db);
  }
}

template <class Real>
void conv_fwd(const Call<Real>& c) {
  if (c.samples >= c.layer->winograd_from) return winograd_fwd(c);
  const Layer& l = *c.layer;
  const Value &in = *c.in, &out = *c.out;
  int64_t offset[kMostTaps];
  const Real* b[kMostTaps];
  const int64_t taps = l.kernel_h * l.kernel_w, block = in.c * out.pixel;
  for (int64_t t = 0; t < taps; ++t) {
    offset[t] = l.reads[t * in.c];
    b[t] = c.w + t * block;
  }
  multiply<Real>(c.team, conv_walk(l, in, out, c.samples), c.x, Taps<Real>{taps, offset, b, in.c, out.pixel},
                 lanes_of<Real>(out.c), l.bias ? c.w + taps * block : nullptr, c.y);
}

template <class Real>
void conv_bwd(const Call<Real>& c) {
  if (c.dw != nullptr) conv_bias_gradient(c, c.dy, c.dw);
  if (c.samples >= c.layer->winograd_from) return winograd_bwd(c);
  if (c.dw != nullptr) conv_weight_gradient<Real>(c, c.x, c.dy, nullptr, nullptr, c.dw);
  if (c.dx == nullptr) return;
  transpose_taps(c, c.w, c.saved);
  conv_input_gradient<Real>(c, c.dy, c.saved, nullptr, nullptr, c.dx);
}

template <class Real>
void conv_tfwd(const Call<Real>& c) {
  if (c.samples >= c.layer->winograd_from) return winograd_tfwd(c);
  const Layer& l = *c.layer;
  const Value &in = *c.in, &out = *c.out;
  int64_t offset[2 * kMostTaps];
  const Real* b[2 * kMostTaps];
  const int64_t kernel = l.kernel_h * l.kernel_w, block = in.c * out.pixel;
  const int64_t taps = c.tx == nullptr ? kernel : 2 * kernel;
  for (int64_t t = 0; t < taps; ++t) {
    const bool second = t >= kernel;  // tx * w, as further taps that lie where tx does
    const int64_t tap = second ? t - kernel : t;
    offset[t] = l.reads[tap * in.c] + (second ? c.tx - c.x : 0);
    b[t] = (second ? c.w : c.tw) + tap * block;
  }
  multiply<Real>(c.team, conv_walk(l, in, out, c.samples), c.x, Taps<Real>{taps, offset, b, in.c, out.pixel},
                 lanes_of<Real>(out.c), l.bias ? c.tw + kernel * block : nullptr, c.ty);
}

template <class Real>
void conv_tbwd(const Call<Real>& c) {
  conv_bias_gradient(c, c.tdy, c.tdw);
  if (c.samples >= c.layer->winograd_from) return winograd_tbwd(c);
  conv_weight_gradient(c, c.x, c.tdy, c.tx, c.dy, c.tdw);
  if (c.tdx == nullptr) return;
  transpose_taps(c, c.tw, c.tsaved);
  conv_input_gradient<Real>(c, c.tdy, c.saved, c.dy, c.tsaved, c.tdx);
}

template <class Real>
constexpr LayerFunctions<Real> kConv{Split::inside, conv_fwd<Real>, conv_bwd<Real>, conv_tfwd<Real>,
                                     conv_tbwd<Real>};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
