// The backend simt: CUDA's kernels on the emulator (csrc/simt), on CPU tensors. Only in builds for tests.
#pragma once

#ifdef METAFAST_WITH_SIMT
#include <atomic>

namespace metafast {

// Whether the operators' CPU side goes there; metafast/backend.py sets it.
inline std::atomic<bool> simt_forced{false};

// Whether there products of plain matrices, of whatever size, go by ATen as large ones do on a device.
inline std::atomic<bool> simt_library_products{false};

}  // namespace metafast
#endif
