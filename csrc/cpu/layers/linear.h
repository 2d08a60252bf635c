// Linear layers, rows of features times a matrix.
//
//   y[n, :] = b + sum_c x[n, c] w[c, :]
//   bwd    dw[c, :] = sum_n x[n, c] dy[n, :],  db = sum_n dy;  dx[n, :] = sum_o dy[n, o] w^T[o, :]
//   tfwd   ty = tb + x tw + tx w
//   tbwd   tdw = x tdy + tx dy,  tdb = sum_n tdy;  tdx = tdy w^T + dy tw^T
//
// The layer may have a ReLU's part (program.h, `relu` and `gated`): y = max(0, .), ty = 0 where y is 0; dx =
// tdx = 0 where x is. Where only a batch normalisation reads y, which takes out what b adds, db = tdb = 0.
// Parameters: w as [C of x][pixel of y], then b [pixel of y] where there is one. saved, tsaved: w and tw
// transposed, [C of y][pixel of x], where dx is wanted. Networks of few and narrow layers spend their time
// between the products rather than in them: nothing here is general that need not be. Tested by
// tests/engine/test_layers.py.
#pragma once

#include "call.h"
#include "row_products.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// The sizes of a call, and its pointers at the first sample.
template <class Real>
struct LinearCall {
  const Call<Real>& c;
  int64_t from, to;       // a sample of x, of y
  int64_t x_at, y_at;     // where the first lies
  int64_t inputs, lanes;  // C of x; lanes of a row of w

  explicit LinearCall(const Call<Real>& call)
      : c(call),
        from(call.in->sample),
        to(call.out->sample),
        x_at(call.in->origin),
        y_at(call.out->origin),
        inputs(call.in->c),
        lanes(call.out->pixel) {}

  const Real* bias(const Real* w) const { return c.layer->bias ? w + inputs * lanes : nullptr; }

  // Factors of outputs, x w; and of input gradients, dy wt. None where x or dy is null.
  Factors<Real> forth(const Real* x, const Real* w) const {
    return {x == nullptr ? nullptr : x + x_at, w, from, lanes, inputs};
  }
  Factors<Real> back(const Real* dy, const Real* wt) const {
    return {dy == nullptr ? nullptr : dy + y_at, wt, to, c.in->pixel, c.out->c};
  }

  // y = bias + x w (+ x1 w1)
  void outputs(const Factors<Real>& first, const Factors<Real>& second, const Real* b, bool relu,
               const Real* gate, Real* y) const {
    run_row_product<Real>(c.team,
                          {.first = first,
                           .second = second,
                           .c = y + y_at,
                           .c_row = to,
                           .bias = b,
                           .relu = relu,
                           .gate = gate == nullptr ? nullptr : gate + y_at},
                          c.samples, lanes_of<Real>(c.out->c));
  }
  // dw = x^T dy (+ x1^T dy1), db = sum dy
  void weight_gradient(const Real* x, const Real* dy, const Real* x1, const Real* dy1, Real* dw) const {
    const bool both = x1 != nullptr;
    run_outer_product<Real>(c.team,
                            {.x = x + x_at,
                             .g = dy + y_at,
                             .x_row = from,
                             .g_row = to,
                             .samples = c.samples,
                             .d = dw,
                             .d_row = lanes,
                             .x1 = both ? x1 + x_at : nullptr,
                             .g1 = both ? dy1 + y_at : nullptr,
                             .onto = c.onto},
                            inputs, lanes_of<Real>(c.out->c));
    if (!c.layer->bias) return;
    const int64_t bias_at = inputs * lanes, rows = c.layer->bias_cancels ? 0 : c.samples;
    sum_rows(dy + y_at, rows, to, lanes, c.onto.from(bias_at), dw + bias_at);
  }
  // dx = dy wt (+ dy1 wt1)
  void input_gradient(const Factors<Real>& first, const Factors<Real>& second, Real* dx) const {
    run_row_product<Real>(c.team,
                          {.first = first,
                           .second = second,
                           .c = dx + x_at,
                           .c_row = from,
                           .gate = c.layer->gated ? c.x + x_at : nullptr},
                          c.samples, lanes_of<Real>(c.in->c));
  }
  void transposed(const Real* w, Real* wt) const { transpose(w, inputs, c.out->c, lanes, wt, c.in->pixel); }
};

template <class Real>
void linear_fwd(const Call<Real>& c) {
  const LinearCall<Real> l(c);
  l.outputs(l.forth(c.x, c.w), {}, l.bias(c.w), c.layer->relu != 0, nullptr, c.y);
}

template <class Real>
void linear_bwd(const Call<Real>& c) {
  const LinearCall<Real> l(c);
  if (c.dw != nullptr) l.weight_gradient(c.x, c.dy, nullptr, nullptr, c.dw);
  if (c.dx == nullptr) return;
  if (!c.w_is_known) l.transposed(c.w, c.saved);
  l.input_gradient(l.back(c.dy, c.saved), {}, c.dx);
}

template <class Real>
void linear_tfwd(const Call<Real>& c) {
  const LinearCall<Real> l(c);
  l.outputs(l.forth(c.x, c.tw), l.forth(c.tx, c.w), l.bias(c.tw), false, c.layer->relu ? c.y : nullptr, c.ty);
}

template <class Real>
void linear_tbwd(const Call<Real>& c) {
  const LinearCall<Real> l(c);
  if (c.tdx != nullptr) {
    l.transposed(c.tw, c.tsaved);
    l.input_gradient(l.back(c.tdy, c.saved), l.back(c.dy, c.tsaved), c.tdx);
  }
  l.weight_gradient(c.x, c.tdy, c.tx, c.dy, c.tdw);
}

template <class Real>
constexpr LayerFunctions<Real> kLinear{Split::inside,     linear_fwd<Real>,  linear_bwd<Real>,
                                       linear_tfwd<Real>, linear_tbwd<Real>, true};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
