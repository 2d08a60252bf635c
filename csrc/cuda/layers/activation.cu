#include "activation.cuh"
#include "elements.h"
#include "table.h"

namespace metafast::METAFAST_GPU {
namespace {

template <class Real>
Elements elements_of(const Call<Real>& c) {
  return {c.in, c.out, c.tasks, c.samples};
}

template <class Real, class A>
void activation_fwd(const Call<Real>& c, CUstream_st* stream) {
  launch_elements("activation_fwd", activation_value_kernel<Real, A>, elements_of(c), stream, A(c.layer), c.x,
                  c.y);
}

template <class Real, class A>
void activation_bwd(const Call<Real>& c, CUstream_st* stream) {
  if (c.dx.null()) return;
  launch_elements("activation_bwd", activation_slope_kernel<Real, A, true>, elements_of(c), stream,
                  A(c.layer), c.x, c.dy, c.dx);
}

template <class Real, class A>
void activation_tfwd(const Call<Real>& c, CUstream_st* stream) {
  if (c.tx.null()) return clear_output_tangent("activation_tfwd", c, stream);
  launch_elements("activation_tfwd", activation_slope_kernel<Real, A, false>, elements_of(c), stream,
                  A(c.layer), c.x, c.tx, c.ty);
}

template <class Real, class A>
void activation_tbwd(const Call<Real>& c, CUstream_st* stream) {
  if (c.tdx.null()) return;
  if constexpr (!A::kPiecewiseLinear) {
    if (!c.tx.null()) {
      return launch_elements("activation_tbwd", activation_bend_kernel<Real, A>, elements_of(c), stream,
                             A(c.layer), c.x, c.tx, c.dy, c.tdy, c.tdx);
    }
  }
  launch_elements("activation_tbwd", activation_slope_kernel<Real, A, true>, elements_of(c), stream,
                  A(c.layer), c.x, c.tdy, c.tdx);
}

template <class Real, template <class> class A>
LayerFunctions<Real> functions() {
  return {activation_fwd<Real, A<Real>>, activation_bwd<Real, A<Real>>, activation_tfwd<Real, A<Real>>,
          activation_tbwd<Real, A<Real>>};
}

}  // namespace

template <class Real>
LayerFunctions<Real> layers::activation(Kind kind) {
  switch (kind) {
    case Kind::relu:
      return functions<Real, Relu>();
    case Kind::leaky_relu:
      return functions<Real, LeakyRelu>();
    case Kind::elu:
      return functions<Real, Elu>();
    case Kind::tanh:
      return functions<Real, Tanh>();
    case Kind::sigmoid:
      return functions<Real, Sigmoid>();
    case Kind::gelu:
      return functions<Real, Gelu>();
    case Kind::gelu_tanh:
      return functions<Real, GeluTanh>();
    case Kind::silu:
      return functions<Real, Silu>();
    case Kind::softplus:
      return functions<Real, Softplus>();
    default:
      throw std::invalid_argument("metafast: a kind of layer that is no activation");
  }
}

template LayerFunctions<float> layers::activation(Kind);
template LayerFunctions<double> layers::activation(Kind);

}  // namespace metafast::METAFAST_GPU
