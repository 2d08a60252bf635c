// The sum of two values of one shape, y = x + x1; no parameters:
//   bwd   dx = dy, dx1 = dy, each where it is wanted
//   tfwd  ty = tx + tx1, a tangent that is null being zero
//   tbwd  tdx = tdy, tdx1 = tdy
// All overwrite; nothing is kept (saved, tsaved, scratch: 0). The three values' borders may differ.
// Tested by tests/engine/test_layers.py.
#pragma once

#include "pixels.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// Each row of `out` from the rows of x (as `in` has them) and x1 (as `in1`).
template <class Real>
void add_values(const Call<Real>& c, const Real* x, const Real* x1, Real* y) {
  const Value &in = *c.in, &in1 = *c.in1, &out = *c.out;
  const int64_t count = out.w * out.pixel;
  for (int64_t n = 0; n < c.samples; ++n) {
    for (int64_t i = 0; i < out.h; ++i) {
      const Real* from = x + in.origin + n * in.sample + i * in.row;
      const Real* from1 = x1 + in1.origin + n * in1.sample + i * in1.row;
      Real* to = y + out.origin + n * out.sample + i * out.row;
      for (int64_t k = 0; k < count; k += kLanes<Real>) store(to + k, load(from + k) + load(from1 + k));
    }
  }
}

template <class Real>
void copy_pixels(const Value& from, const Value& to, int64_t samples, const Real* x, Real* y) {
  for_each_vector<Real>(from, to, samples, [=](int64_t i, int64_t o) { store(y + o, load(x + i)); });
}

template <class Real>
void add_fwd(const Call<Real>& c) {
  add_values(c, c.x, c.x1, c.y);
}

template <class Real>
void add_bwd(const Call<Real>& c) {
  if (c.dx != nullptr) copy_pixels(*c.out, *c.in, c.samples, c.dy, c.dx);
  if (c.dx1 != nullptr) copy_pixels(*c.out, *c.in1, c.samples, c.dy, c.dx1);
}

template <class Real>
void add_tfwd(const Call<Real>& c) {
  if (c.tx != nullptr && c.tx1 != nullptr) {
    add_values(c, c.tx, c.tx1, c.ty);
  } else if (c.tx != nullptr) {
    copy_pixels(*c.in, *c.out, c.samples, c.tx, c.ty);
  } else if (c.tx1 != nullptr) {
    copy_pixels(*c.in1, *c.out, c.samples, c.tx1, c.ty);
  } else {
    clear_pixels(*c.out, c.samples, c.ty);
  }
}

template <class Real>
void add_tbwd(const Call<Real>& c) {
  if (c.tdx != nullptr) copy_pixels(*c.out, *c.in, c.samples, c.tdy, c.tdx);
  if (c.tdx1 != nullptr) copy_pixels(*c.out, *c.in1, c.samples, c.tdy, c.tdx1);
}

template <class Real>
constexpr LayerFunctions<Real> kAdd{Split::samples, add_fwd<Real>, add_bwd<Real>, add_tfwd<Real>,
                                    add_tbwd<Real>};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
