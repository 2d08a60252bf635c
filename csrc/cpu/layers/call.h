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
// A layer whose functions are Split::lanes handles the lanes from first_lane to last_lane alone, whole
// vectors of the instruction set; the others need not look at these. `saved` and `tsaved` have
// layer.saved_per_sample * N + layer.saved_per_layer elements each, 64-byte aligned, kept from fwd to tbwd.
// `scratch` is `scratch_size` elements, for the call alone.
#pragma once

#include "../../engine/program.h"
#include "simd.h"
#include "split.h"

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
  Onto<Real> onto;  // of dw, or tdw, where LayerFunctions::onto says that a layer looks at it; base may be tw
  bool w_is_known;  // bwd: at this w, and with this `saved`, it has run before
  const Team* team;               // the threads that share the call, null: one
  int64_t first_lane, last_lane;  // of the channels' vectors, what a call of a layer split by lanes is about

  // The call for samples begin..end alone, of a layer without parameters that saves nothing.
  Call part(int64_t begin, int64_t end) const {
    Call c = *this;
    c.samples = end - begin;
    const auto shift = [begin](const Value* v, auto&... pointers) {
      ((pointers = pointers == nullptr ? nullptr : pointers + begin * v->sample), ...);
    };
    shift(in, c.x, c.tx, c.dx, c.tdx);
    if (in1 != nullptr) shift(in1, c.x1, c.tx1, c.dx1, c.tdx1);
    shift(out, c.y, c.ty, c.dy, c.tdy);
    return c;
  }
};

// How a team shares a layer's call.
enum class Split {
  none,     // it does not
  inside,   // the functions see to it themselves
  lanes,    // calls for some of the channels each: [first_lane, last_lane) of every pixel
  samples,  // calls for some of the samples each; only where nothing is saved and there are no parameters
};

// A layer's row in the table: what is missing does not compile.
template <class Real>
struct LayerFunctions {
  using Function = void (*)(const Call<Real>&);
  Function fwd, bwd, tfwd, tbwd;
  Split split;
  bool onto;  // bwd and tbwd look at Call::onto; tbwd may then change what lies at tw, which it is done with
              // before
  constexpr LayerFunctions(Split s, Function f, Function b, Function tf, Function tb, bool o = false)
      : fwd(f), bwd(b), tfwd(tf), tbwd(tb), split(s), onto(o) {}
};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
