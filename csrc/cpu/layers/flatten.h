// An image (C, H, W) as features in torch's order: y[c H W + i W + j] = x[i, j, c]. No parameters; linear:
//   fwd   y = flat(x)       bwd   dx = flat^T(dy)
//   tfwd  ty = flat(tx)     tbwd  tdx = flat^T(tdy)
// All overwrite; nothing is kept (saved, tsaved, scratch: 0). Lanes beyond the features of y and ty, and
// lanes beyond C of dx and tdx, become zero. Tested by tests/engine/test_layers.py.
#pragma once

#include "pixels.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

template <class Real>
void flatten_forward(const Call<Real>& c, const Real* x, Real* y) {
  const Value &in = *c.in, &out = *c.out;
  const int64_t pixels = in.h * in.w;
  for (int64_t n = 0; n < c.samples; ++n) {
    Real* const features = y + out.origin + n * out.sample;
    for_each_pixel(in, in, n, [=, channels = in.c](int64_t from, int64_t, int64_t number) {
      for (int64_t k = 0; k < channels; ++k) features[k * pixels + number] = x[from + k];
    });
    for (int64_t k = out.c; k < out.pixel; ++k) features[k] = 0;
  }
}

template <class Real>
void flatten_gather(const Call<Real>& c, const Real* dy, Real* dx) {
  const Value &in = *c.in, &out = *c.out;
  const int64_t pixels = in.h * in.w;
  for (int64_t n = 0; n < c.samples; ++n) {
    const Real* const features = dy + out.origin + n * out.sample;
    for_each_pixel(in, in, n, [=, channels = in.c, pixel = in.pixel](int64_t from, int64_t, int64_t number) {
      for (int64_t k = 0; k < channels; ++k) dx[from + k] = features[k * pixels + number];
      for (int64_t k = channels; k < pixel; ++k) dx[from + k] = 0;
    });
  }
}

template <class Real>
void flatten_fwd(const Call<Real>& c) {
  flatten_forward(c, c.x, c.y);
}

template <class Real>
void flatten_bwd(const Call<Real>& c) {
  if (c.dx != nullptr) flatten_gather(c, c.dy, c.dx);
}

template <class Real>
void flatten_tfwd(const Call<Real>& c) {
  if (c.tx == nullptr) {
    clear_pixels(*c.out, c.samples, c.ty);
  } else {
    flatten_forward(c, c.tx, c.ty);
  }
}

template <class Real>
void flatten_tbwd(const Call<Real>& c) {
  if (c.tdx != nullptr) flatten_gather(c, c.tdy, c.tdx);
}

template <class Real>
constexpr LayerFunctions<Real> kFlatten{Split::none, flatten_fwd<Real>, flatten_bwd<Real>, flatten_tfwd<Real>,
                                        flatten_tbwd<Real>};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
