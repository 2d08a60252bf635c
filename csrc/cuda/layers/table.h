// The kernel table of CUDA and the emulator: which functions a kind of layer has. Each function here is its
// file's, layers/NAME.cu, whose kernels are in layers/NAME.cuh; those of linear and linear_narrow too are in
// conv.cu.
#pragma once

#include <stdexcept>

#include "call.h"

namespace metafast::METAFAST_GPU {

namespace layers {
template <class Real>
LayerFunctions<Real> linear();  // y = x W' + b, with relu and gated; W as a convolution's of one tap
template <class Real>
LayerFunctions<Real> linear_narrow();  // the same, W as rows of in.pixel elements, one for each output
template <class Real>
LayerFunctions<Real> conv2d();
template <class Real>
LayerFunctions<Real> batch_norm();
template <class Real>
LayerFunctions<Real> batch_norm_relu_pool();
template <class Real>
LayerFunctions<Real> layer_norm();
template <class Real>
LayerFunctions<Real> group_norm();
template <class Real>
LayerFunctions<Real> activation(Kind kind);
template <class Real>
LayerFunctions<Real> max_pool();
template <class Real>
LayerFunctions<Real> avg_pool();
template <class Real>
LayerFunctions<Real> flatten();
template <class Real>
LayerFunctions<Real> add();
}  // namespace layers

template <class Real>
LayerFunctions<Real> functions_of(Kind kind) {
  switch (kind) {
    case Kind::linear:
      return layers::linear<Real>();
    case Kind::linear_narrow:
      return layers::linear_narrow<Real>();
    case Kind::conv2d:
      return layers::conv2d<Real>();
    case Kind::batch_norm:
      return layers::batch_norm<Real>();
    case Kind::batch_norm_relu_pool:
      return layers::batch_norm_relu_pool<Real>();
    case Kind::layer_norm:
      return layers::layer_norm<Real>();
    case Kind::group_norm:
      return layers::group_norm<Real>();
    case Kind::max_pool:
      return layers::max_pool<Real>();
    case Kind::avg_pool:
      return layers::avg_pool<Real>();
    case Kind::flatten:
      return layers::flatten<Real>();
    case Kind::add:
      return layers::add<Real>();
    case Kind::relu:
    case Kind::leaky_relu:
    case Kind::elu:
    case Kind::tanh:
    case Kind::sigmoid:
    case Kind::gelu:
    case Kind::gelu_tanh:
    case Kind::silu:
    case Kind::softplus:
      return layers::activation<Real>(kind);
  }
  throw std::invalid_argument("metafast: a kind of layer that has no kernels");
}

}  // namespace metafast::METAFAST_GPU
