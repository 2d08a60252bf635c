// The backend simt: CUDA's kernels on the emulator (csrc/simt), on CPU tensors. Only in builds for tests.
#pragma once

#ifdef METAFAST_WITH_SIMT
#include <atomic>

namespace metafast {

// Whether the operators' CPU side goes there; metafast/backend.py sets it.
inline std::atomic<bool> simt_forced{false};

}  // namespace metafast
#endif
