// A lowered network: layers in order, shapes known, and where everything lies. Plain structs, no functions
// that the linker could merge between instruction sets; engine/program.cpp makes them, the kernels of cpu/
// read them.
//
// Letters: T tasks, N samples of a task, C channels (or features), H, W pixels, P parameters, K inner steps.
//
// A value (the input, or a layer's output) is N samples of H x W pixels with C channels, channels innermost,
// all of it padded so that kernels need no edges:
//
//   element (n, i, j, c) at  n * sample + (i + border) * row + (j + border) * pixel + c
//
// `pixel` >= C is C rounded up to whole vectors of 64 bytes; `border` pixels of zeros surround each sample,
// as wide as the convolutions beside the value need. Features (N, C) are the case H = W = 1. What the padding
// holds:
//   - borders are zero in values, tangents and adjoints: nobody writes them, and the workspace starts as
//   zeros;
//   - lanes C..pixel-1 are finite in values and tangents, and zero in adjoints, adjoints' tangents and
//   parameters.
//
// Parameters lie in the same manner: vectors of `pixel` elements, see each layer's file. Where each element
// comes from in the user's flat (P,) vector is in `Program::source` (-1: padding).
#pragma once

#include <cstdint>

#include "../mlp_meta_step.h"

namespace metafast {

constexpr int kVectorBytes = 64;

enum class Kind : int32_t {
  linear = 1,
  conv2d,
  batch_norm,
  layer_norm,
  group_norm,
  relu,
  leaky_relu,
  elu,
  tanh,
  sigmoid,
  gelu,       // exact, by erf
  gelu_tanh,  // the tanh approximation
  silu,
  softplus,
  max_pool,
  avg_pool,
  flatten,  // (C, H, W) in torch's order to features
  add,
  batch_norm_relu_pool,  // in the place of batch_norm, relu and, unless the kernel is 1, max_pool; see
                         // engine/build.cpp
  linear_narrow,         // in the place of linear, where outputs are few
};

enum class LossKind : int32_t { cross_entropy = 1, mse = 2 };

struct Value {
  int64_t c, h, w;
  int64_t border;
  int64_t pixel, row, sample;  // strides, elements
  int64_t origin;              // offset of element (0, 0, 0, 0)
};

// Where a layer's gradient with respect to an input goes.
enum class Destination : int32_t {
  none,       // nothing upstream has parameters
  overwrite,  // the first that arrives at this value
  add,        // the others: into a buffer of their own, which is then added
};

// What one layer is. `in` and `out` are its values; `in1` is the second input of add, else -1.
struct Layer {
  Kind kind;
  int32_t in, in1, out;        // indices into Program::values
  int64_t kernel_h, kernel_w;  // conv2d, pools
  int64_t stride_h, stride_w;  // conv2d, pools
  int64_t pad_h, pad_w;        // conv2d, pools
  int64_t groups;              // group_norm
  int32_t bias;                // linear, conv2d: has one; norms: is affine; avg_pool: count_include_pad
  int32_t relu, gated;  // linear: y is max(0, .), a relu's part; linear, linear_narrow: x is of such a layer,
                        // whose backward functions are this one's: dx and tdx are zero where x is not above 0
  int32_t bias_cancels;   // linear, conv2d: only a batch_norm reads y, so that the loss does not move with b
  int32_t live;           // it or something before it has parameters: its output has tangent and adjoint
  Destination dx, dx1;    // of in and in1
  double number;          // norms: eps; leaky_relu: slope; elu: alpha; softplus: beta
  double number1;         // softplus: threshold
  int64_t param, params;  // its parameters: [param, param + params) of a task's vector
  int64_t saved_per_sample, saved_per_layer;  // elements that a call may keep, see cpu/layers/call.h
  int64_t winograd_from;  // conv2d: the fewest samples with which it goes by cpu/layers/winograd.h,
  int64_t block;          // in blocks of so many tiles
  const int64_t* reads;   // linear, conv2d: from a window's corner to tap t, channel c, at [t * C + c]
};

struct Program {
  const Value* values;  // 0 is the input
  int32_t value_count;
  const Layer* layers;
  int32_t layer_count;
  int64_t params;         // length of a task's parameter vector, padding included
  const int64_t* source;  // (params,): index in the user's flat vector, -1 for padding
  // (adapting,): the other way round, -1 for what no layer uses; the CPU's alone.
  const int64_t* place;
  int64_t adapting;  // of those indices, the first so many adapt; the others are constants
  LossKind loss;
  const MlpShape* mlp;  // the network as this, its parameters in the user's order; null: it is none
};

// Where the buffers of one pass over N samples lie in a thread's workspace, in elements, -1 where there is
// none: for each value (adjoint, tangent, ...) or layer (saved, tsaved).
struct Pass {
  int64_t samples;
  const int64_t *value, *adjoint, *extra, *tangent, *tadjoint;  // (value_count,)
  const int64_t *saved, *tsaved;                                // (layer_count,)
  int64_t scratch;
};

}  // namespace metafast
