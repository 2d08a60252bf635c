// What every front door asks of its tensors, with the user's name for each, and the way from a dtype to a
// type.
#pragma once

#include <ATen/core/Tensor.h>

namespace metafast {

inline void check_like(const char* name, const at::Tensor& t, at::ScalarType dtype, at::Device device) {
  TORCH_CHECK_VALUE(t.device() == device, name, ": expected device ", device, ", got ", t.device());
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, ": expected dtype ", dtype, ", got ", t.scalar_type());
}

inline void check_tensor(const char* name, const at::Tensor& t, at::IntArrayRef sizes, at::ScalarType dtype,
                         at::Device device) {
  check_like(name, t, dtype, device);
  TORCH_CHECK_VALUE(t.sizes() == sizes, name, ": expected shape ", sizes, ", got ", t.sizes());
}

inline void check_real(const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, name,
                   ": expected float32 or float64, got ", t.scalar_type());
}

// Calls f(Real{}) for the dtype, one of the two.
template <class F>
void with_real(at::ScalarType dtype, const F& f) {
  dtype == at::kFloat ? f(float{}) : f(double{});
}

}  // namespace metafast
