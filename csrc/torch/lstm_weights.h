// The weights of a coordinatewise LSTM as the kernels see them, from tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <string>
#include <vector>

#include "../lstm.h"
#include "checks.h"

namespace metafast {

// Raises where a tensor is not what LstmWeights says, of `dtype` on `device`; one more tensor is the start,
// where that is allowed.
inline void check_lstm_weights(at::TensorList weights, int64_t hidden, int64_t layers, at::ScalarType dtype,
                               bool may_start = false, at::Device device = at::kCPU) {
  TORCH_CHECK_VALUE(layers >= 1 && layers <= kMostLstmLayers && hidden >= 1, "weights: expected 1 to ",
                    kMostLstmLayers, " layers and at least one unit, got ", layers, " of ", hidden);
  const int64_t size = int64_t(weights.size()), whole = 3 * layers + 2;
  TORCH_CHECK_VALUE(size == whole || (may_start && size == whole + 1), "weights: expected ", whole,
                    " tensors, got ", size);
  const auto check = [&](int64_t index, at::IntArrayRef sizes) {
    const std::string name = "weights[" + std::to_string(index) + "]";
    check_tensor(name.c_str(), weights[size_t(index)], sizes, dtype, device);
  };
  for (int64_t l = 0; l < layers; ++l) {
    check(3 * l, {4 * hidden, l == 0 ? 2 : hidden});
    check(3 * l + 1, {4 * hidden, hidden});
    check(3 * l + 2, {4 * hidden});
  }
  check(3 * layers, {hidden});
  check(3 * layers + 1, {});
  if (size > whole) check(whole, {layers, 2, hidden});
}

// Holds the memory that it points to; checked before.
template <class Real>
class HeldLstmWeights {
 public:
  // The first 3 L + 2 tensors are weights; one after them is the start.
  HeldLstmWeights(at::TensorList weights, int64_t hidden, int64_t layers, double p) {
    for (const at::Tensor& w : weights) tensors_.push_back(w.contiguous());
    for (const at::Tensor& w : tensors_) pointers_.push_back(w.template const_data_ptr<Real>());
    const bool starts = int64_t(tensors_.size()) > 3 * layers + 2;
    weights_ = {hidden,
                layers,
                Real(p),
                Real(std::exp(-p)),
                Real(std::exp(p)),
                pointers_.data(),
                starts ? pointers_.back() : nullptr};
  }
  HeldLstmWeights(const HeldLstmWeights&) = delete;
  HeldLstmWeights& operator=(const HeldLstmWeights&) = delete;

  const LstmWeights<Real>& operator*() const { return weights_; }

 private:
  std::vector<at::Tensor> tensors_;
  std::vector<const Real*> pointers_;
  LstmWeights<Real> weights_;
};

}  // namespace metafast
