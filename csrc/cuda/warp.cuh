// What a warp's lanes do together: all of them must come.
#pragma once

#include "gpu.h"

namespace metafast::METAFAST_GPU {

constexpr unsigned kAllLanes = 0xffffffff;

// The sum of a warp's values, in each of its lanes.
template <class Real>
__device__ Real warp_sum(Real x) {
  for (int with = 16; with > 0; with /= 2) x += __shfl_xor_sync(kAllLanes, x, with);
  return x;
}
template <class Real>
__device__ Real warp_max(Real x) {
  for (int with = 16; with > 0; with /= 2) {
    const Real other = __shfl_xor_sync(kAllLanes, x, with);
    x = other > x ? other : x;
  }
  return x;
}

}  // namespace metafast::METAFAST_GPU
