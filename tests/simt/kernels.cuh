// Kernels for tests/simt/test_emulator.py: sound ones, which must come out right in every order, and ones
// broken on purpose, each in one way. nvcc compiles them too.
#pragma once

#include "../../csrc/cuda/gpu.h"

namespace metafast::METAFAST_GPU {

constexpr unsigned kAll = 0xffffffff;

// ---- sound

// out[block] = sum of the block's inputs: warps by shuffles, then one warp over the warps' sums.
__global__ void block_sum(const float* in, float* out) {
  METAFAST_SHARED(float, sums, [32]);
  float sum = in[blockIdx.x * blockDim.x + threadIdx.x];
  for (int by = 16; by > 0; by /= 2) sum += __shfl_down_sync(kAll, sum, by);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = threadIdx.x < blockDim.x / 32 ? sums[threadIdx.x] : 0;
  for (int with = 16; with > 0; with /= 2) sum += __shfl_xor_sync(kAll, sum, with);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// out[z] = in[z] transposed, (n, n) each, by tiles; any n.
template <class Real>
__global__ void transpose(const Real* in, int n, Real* out) {
  METAFAST_SHARED(Real, tile, [8][9]);
  const int x = int(blockIdx.x) * 8, y = int(blockIdx.y) * 8, z = int(blockIdx.z) * n * n;
  const int column = int(threadIdx.x), row = int(threadIdx.y);
  if (y + row < n && x + column < n) tile[row][column] = in[z + (y + row) * n + x + column];
  __syncthreads();
  if (x + row < n && y + column < n) out[z + (x + row) * n + y + column] = tile[column][row];
}

// out = in reversed, through dynamic shared memory.
__global__ void reverse(const double* in, double* out) {
  METAFAST_DYNAMIC_SHARED(double, all);
  all[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = all[blockDim.x - 1 - threadIdx.x];
}

// What every vote, reduction and shuffle of a warp gives, a row of 16 for each thread.
__global__ void collectives(int* out) {
  const int lane = int(threadIdx.x % 32);
  int* const row = out + threadIdx.x * 16;
  row[0] = int(__ballot_sync(kAll, lane % 3 == 0));
  row[1] = __any_sync(kAll, lane == 7);
  row[2] = __all_sync(kAll, lane < 31);
  row[3] = __reduce_add_sync(kAll, lane);
  row[4] = __reduce_min_sync(kAll, lane - 5);
  row[5] = int(__reduce_max_sync(kAll, unsigned(lane)));
  row[6] = int(__reduce_xor_sync(kAll, unsigned(lane * lane)));
  row[7] = int(__match_any_sync(kAll, lane / 5));
  row[8] = __shfl_sync(kAll, lane, 9, 8);
  row[9] = __shfl_up_sync(kAll, lane, 3, 8);
  row[10] = __shfl_down_sync(kAll, lane, 3, 8);
  row[11] = __shfl_xor_sync(kAll, lane, 12, 8);
  if (lane < 20) {  // two groups that do not wait for each other
    row[12] = __reduce_add_sync(0x000fffff, lane);
  } else {
    row[12] = __reduce_add_sync(0xfff00000, lane);
  }
  row[13] = __syncthreads_count(threadIdx.x < 40);
  row[14] = __syncthreads_and(threadIdx.x < 64);
  row[15] = __syncthreads_or(threadIdx.x == 64);
}

// counts[v] = how often v is among the inputs; one lane adds for all that are here with it.
__global__ void histogram(const int* in, int n, int* counts) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  const unsigned same = __match_any_sync(__activemask(), in[i]);
  if (__ffs(int(same)) - 1 == int(threadIdx.x % 32)) atomicAdd(&counts[in[i]], __popc(same));
}

// Each atomic on a cell of its own, by all threads.
__global__ void atomics(unsigned* cells) {
  const unsigned i = threadIdx.x;
  atomicAdd(&cells[0], i), atomicSub(&cells[1], i), atomicMin(&cells[2], i), atomicMax(&cells[3], i);
  atomicAnd(&cells[4], ~(1u << i)), atomicOr(&cells[5], 1u << i), atomicXor(&cells[6], i * 77);
  atomicInc(&cells[7], 9), atomicDec(&cells[8], 9);
  unsigned seen = 1, before;  // a product by compare and swap
  do {
    before = seen;
    seen = atomicCAS(&cells[9], before, before * (2 * i + 1));
  } while (seen != before);
}

// out[i] = the neighbour's in its warp, through memory that __syncwarp orders.
__global__ void neighbours(const float4* in, float4* out) {
  METAFAST_SHARED(float4, all, [64]);
  const unsigned i = threadIdx.x;
  all[i] = in[i];
  __syncwarp();
  const float4 v = all[i ^ 1];
  out[i] = make_float4(v.w, v.z, v.y, v.x);
}

// ---- broken

__global__ void missing_barrier(float* out) {
  METAFAST_SHARED(float, all, [64]);
  all[threadIdx.x] = float(threadIdx.x);
  out[threadIdx.x] = all[63 - threadIdx.x];
}

__global__ void missing_warp_barrier(float* out) {
  METAFAST_SHARED(float, all, [64]);
  all[threadIdx.x] = float(threadIdx.x);
  __syncwarp();
  out[threadIdx.x] = all[threadIdx.x ^ 32];
}

// The tile is written again while others still read it.
__global__ void missing_second_barrier(float* out) {
  METAFAST_SHARED(float, all, [64]);
  for (int round = 0; round < 2; ++round) {
    all[threadIdx.x] = float(round);
    __syncthreads();
    out[threadIdx.x] += all[63 - threadIdx.x];
  }
}

__global__ void barrier_in_a_branch(int* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void two_barriers(int* out) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

__global__ void barrier_after_return(int* out) {
  if (threadIdx.x == 63) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void shuffle_without_all(int* out) {
  if (threadIdx.x % 32 == 5) return;
  out[threadIdx.x] = __shfl_sync(kAll, int(threadIdx.x), 0);
}

// All wait for the second warp, which waits for a lane of its own.
__global__ void shuffle_before_barrier(int* out) {
  if (threadIdx.x == 40) return;
  if (threadIdx.x >= 32) out[threadIdx.x] = __shfl_sync(kAll, int(threadIdx.x), 0);
  __syncthreads();
}

__global__ void shuffle_from_outside(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_down_sync(0x0000ffff, int(threadIdx.x), 1);
}

__global__ void shuffle_of_others(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffff0000, int(threadIdx.x), 16);
}

__global__ void two_collectives(int* out) {
  out[threadIdx.x] = threadIdx.x < 8 ? __any_sync(kAll, 1) : __all_sync(kAll, 1);
}

__global__ void vote_of_all(int* out) { out[threadIdx.x] = __all_sync(kAll, 1); }

__global__ void odd_width(int* out) { out[threadIdx.x] = __shfl_sync(kAll, 1, 0, 12); }

__global__ void unwritten(float* out) {
  METAFAST_SHARED(float, all, [65]);
  all[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = fmaxf(all[threadIdx.x + 1], 0.5f);
}

__global__ void unwritten_dynamic(float* out) {
  METAFAST_DYNAMIC_SHARED(float, all);
  out[threadIdx.x] = all[threadIdx.x];
}

__global__ void sum_in_any_order(const float* in, float* out) { atomicAdd(out, in[threadIdx.x]); }

__global__ void last_block_wins(int* out) {
  if (threadIdx.x == 0) *out = int(blockIdx.x);
}

__global__ void block_reads_block(int* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = blockIdx.x == 0 ? 0 : out[blockIdx.x - 1] + 1;
}

__global__ void plain_and_atomic(int* out) {
  if (threadIdx.x == 0) *out = 0;
  atomicAdd(out, 1);
}

#ifndef __CUDACC__  // nvcc refuses it
__global__ void too_much_shared(int* out) {
  METAFAST_SHARED(int, all, [12289]);
  all[threadIdx.x] = 1;
  out[threadIdx.x] = all[threadIdx.x];
}
#endif

__global__ void static_and_dynamic(int* out) {
  METAFAST_SHARED(int, all, [8192]);
  all[threadIdx.x] = 1;
  out[threadIdx.x] = all[threadIdx.x];
}

__global__ void past_global(const float* in, float* out) { out[threadIdx.x] = in[threadIdx.x + 1]; }

__global__ void past_shared(float* out) {
  METAFAST_SHARED(float, all, [64]);
  all[threadIdx.x + 1] = 1;
  __syncthreads();
  out[threadIdx.x] = all[63];
}

__global__ void past_dynamic(float* out) {
  METAFAST_DYNAMIC_SHARED(float, all);
  all[threadIdx.x + 1] = 1;
  __syncthreads();
  out[threadIdx.x] = all[63];
}

__global__ void nothing() {}

template __global__ void transpose<float>(const float*, int, float*);

}  // namespace metafast::METAFAST_GPU
