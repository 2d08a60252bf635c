// The launchers of cuda/engine.h for tensors of a device: a GPU's, or with the backend simt, on the CPU's
// memory, the emulator's.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../cuda/engine.h"
#include "../cuda/mlp_meta_step.h"
#include "../cuda/weighted_sum.h"
#include "batched_product.h"
#include "simt.h"

#ifdef METAFAST_WITH_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

namespace metafast {

template <class Real>
struct GpuFunctions {
  decltype(&cuda::shared_workspace<Real>) shared_workspace;
  decltype(&cuda::run<Real>) run;
  decltype(&cuda::to_engine<Real>) to_engine;
  decltype(&cuda::to_user<Real>) to_user;
  decltype(&cuda::weighted_sum<Real>) weighted_sum;
  decltype(&cuda::fits_mlp_meta_step<Real>) fits_mlp_meta_step;
};

// Kernels go to the current stream of the device, which must be the current one.
class Gpu {
 public:
  // None for tensors that the CPU's tables run. Raises for a device that this build has no kernels for.
  static std::optional<Gpu> of(at::Device device) {
    if (device.is_cpu()) {
#ifdef METAFAST_WITH_SIMT
      if (simt_forced) return Gpu(device);
#endif
      return std::nullopt;
    }
#ifdef METAFAST_WITH_CUDA
    if (device.is_cuda()) return Gpu(device);
#endif
    TORCH_CHECK_VALUE(false, "x: expected a device that this build has kernels for, got ", device);
  }

  template <class Real>
  const GpuFunctions<Real>& functions() const {
#ifdef METAFAST_WITH_SIMT
    static constexpr GpuFunctions<Real> kSimt{simt::shared_workspace<Real>, simt::run<Real>,
                                              simt::to_engine<Real>,        simt::to_user<Real>,
                                              simt::weighted_sum<Real>,     simt::fits_mlp_meta_step<Real>};
    if (device_.is_cpu()) return kSimt;
#endif
#ifdef METAFAST_WITH_CUDA
    static constexpr GpuFunctions<Real> kCuda{cuda::shared_workspace<Real>, cuda::run<Real>,
                                              cuda::to_engine<Real>,        cuda::to_user<Real>,
                                              cuda::weighted_sum<Real>,     cuda::fits_mlp_meta_step<Real>};
    if (device_.is_cuda()) return kCuda;
#endif
    TORCH_INTERNAL_ASSERT(false, "no kernels for ", device_);  // of() made none
  }

  // Who does large products of matrices; the emulator's kernels do their own, but in tests of this way.
  template <class Real>
  BatchedProducts<Real> products() const {
#ifdef METAFAST_WITH_SIMT
    if (device_.is_cpu() && simt_library_products) return {batched_product_cpu<Real>, 1};
#endif
#ifdef METAFAST_WITH_CUDA
    if (device_.is_cuda()) return {batched_product_cuda<Real>, kFewestBatchedProduct};
#endif
    return {};
  }

  at::Device device() const { return device_; }
  CUstream_st* stream() const {
#ifdef METAFAST_WITH_CUDA
    if (device_.is_cuda()) return c10::cuda::getCurrentCUDAStream(device_.index());
#endif
    return nullptr;
  }

 private:
  explicit Gpu(at::Device device) : device_(device) {}

  at::Device device_;
};

}  // namespace metafast
