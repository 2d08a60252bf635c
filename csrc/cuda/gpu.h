// What every CUDA kernel includes. nvcc compiles this folder into metafast::cuda; g++ compiles the same files
// against the emulator (csrc/simt, whose cuda_runtime.h it finds first) into metafast::simt.
#pragma once

#include <cuda_runtime.h>

// Every kernel has __launch_bounds__(threads), or (threads, 1) where ptxas would rather spill registers than
// have fewer blocks on a multiprocessor; `make cuda-check` finds both wanting.
#ifdef __CUDACC__

#define METAFAST_GPU cuda
#define METAFAST_SHARED(Type, name, ...) __shared__ Type name __VA_ARGS__
#define METAFAST_DYNAMIC_SHARED(Type, name)                         \
  extern __shared__ __align__(16) unsigned char metafast_dynamic[]; \
  Type* const name = reinterpret_cast<Type*>(metafast_dynamic)

#else

#define METAFAST_GPU simt
// An array of the block: METAFAST_SHARED(float, tile, [32][33]); without sizes it is one variable.
#define METAFAST_SHARED(Type, name, ...)          \
  static const char name##_key = 0;               \
  auto& name = *static_cast<Type(*) __VA_ARGS__>( \
      ::emulator::shared_array(#name, &name##_key, sizeof(Type __VA_ARGS__), alignof(Type)))
// The block's memory whose size the launch gives, as Type*.
#define METAFAST_DYNAMIC_SHARED(Type, name) \
  Type* const name = static_cast<Type*>(::emulator::dynamic_shared())

#endif
