// What a layer's four functions get, for one task. See engine/program.h for how values and parameters lie.
//
//   fwd    y   = f(x, w)                                     may keep things in `saved` for the other three
//   bwd    dx, dw   = vjp of f at (x, w) on dy               after fwd; may keep more in `saved`
//   tfwd   ty  = jvp of f at (x, w) on (tx, tw)              after fwd; may keep things in `tsaved`
//   tbwd   tdx, tdw = derivative of bwd along (tx, tw, tdy)  after fwd, bwd and tfwd
//
// All overwrite what they give. dx is null where no gradient flows to the input, and so is tdx; tx is null
// where the input has no tangent (it is zero); dw is null where it is not wanted. tdw is never null where
// there are parameters. A layer without parameters has w, tw, dw, tdw null. `x1`, `tx1`, `dx1`, `tdx1` are
// add's second input; dx and dx1 of one add may be wanted or not each on its own.
//
// A layer that gives dx must write all lanes of every pixel, zeros in lanes C..pixel-1, and no border.
// `saved` and `tsaved` have layer.saved_per_sample * N + layer.saved_per_layer elements each, 64-byte
// aligned, kept from fwd to tbwd. `scratch` is `scratch_size` elements, for the call alone.
#pragma once

#ifndef METAFAST_ISA
#error "define METAFAST_ISA, the instruction set's namespace, before including a kernel"
#endif

#include "../../engine/program.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

template <class Real>
struct Call {
  const Layer* layer;
  const Value* in;   // of x, tx, dx, tdx
  const Value* in1;  // of x1, tx1, dx1, tdx1; null but for add
  const Value* out;  // of y, ty, dy, tdy
  int64_t samples;   // N
  const Real *w, *tw;
  Real *dw, *tdw;
  const Real *x, *x1, *tx, *tx1;
  Real *y, *ty;
  const Real *dy, *tdy;
  Real *dx, *dx1, *tdx, *tdx1;
  Real *saved, *tsaved;
  Real* scratch;
};

// A layer's row in the table: what is missing does not compile.
template <class Real>
struct LayerFunctions {
  using Function = void (*)(const Call<Real>&);
  Function fwd, bwd, tfwd, tbwd;
  constexpr LayerFunctions(Function f, Function b, Function tf, Function tb)
      : fwd(f), bwd(b), tfwd(tf), tbwd(tb) {}
};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
