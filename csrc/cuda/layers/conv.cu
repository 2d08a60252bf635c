// Linear and two-dimensional convolution layers on CUDA; overwrite. The equations and the parameters' layout
// are those of cpu/layers/conv.h and, for linear layers of few outputs, cpu/layers/linear_narrow.h; all of
// them are products of product.cuh:
//
//   fwd    y  = x * w (+ b)                     rows: pixels of y, depth: taps and channels of x
//   bwd    dx = dy * w'                         rows: pixels of x, depth: taps and channels of y
//          dw = x' * dy,  db = 1' * dy          rows: taps and channels of x, depth: pixels of y
//   tfwd   ty = x * tw + tx * w (+ tb)          each a product of two pairs
//   tbwd   tdx = tdy * w' + dy * tw',  tdw = x' * tdy + tx' * dy,  tdb = 1' * tdy
//
// What lies beyond the edges of x and dy are their borders' zeros. Nothing is saved.
//
// Products of plain matrices, those of linear layers and of one tap on one pixel, go by Call::products where
// there is one and they are large enough: to ATen's, that is cuBLAS's, on a device. A convolution's windows
// are no such matrix. Biases, ReLUs, gates and padding stay with our kernels. The bits then hang on what the
// library chooses for the sizes, the number of tasks among them; with one library, device and stream they
// are the same in each run.
//
// Tested by tests/simt/test_kernels.py, tests/engine/test_layers.py and test_batched_product.py.
#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "elements.h"
#include "product.cuh"
#include "table.h"

namespace metafast::METAFAST_GPU {
namespace {

int checked(int64_t count) {
  if (count < kMostProduct) return int(count);
  throw std::invalid_argument("metafast: a layer on CUDA: expected fewer than " +
                              std::to_string(kMostProduct) + " elements of a task, got " +
                              std::to_string(count));
}

template <class Real, int kWide, bool kADeep, bool kBDeep>
void start(const char* name, const Product<Real>& p, CUstream_st* stream) {
  constexpr int64_t kHigh = kProductThreads * kProductSide * kProductSide / kWide;
  constexpr int64_t kMostBlocks = 0x7fffffff;  // more tiles go round the kernel's loop
  const int64_t tiles = p.tasks * ((p.out_rows + kHigh - 1) / kHigh) * ((p.out_columns + kWide - 1) / kWide);
  if (tiles == 0) return;  // CUDA refuses an empty grid
  launch(name, product_kernel<Real, kWide, kADeep, kBDeep>, dim3(unsigned(std::min(tiles, kMostBlocks))),
         dim3(kProductThreads), 0, stream, p);
}

// Tiles as wide as the columns ask for.
template <bool kADeep, bool kBDeep, class Real>
void start(const char* name, const Product<Real>& p, CUstream_st* stream) {
  if (p.out_columns <= 16) return start<Real, 16, kADeep, kBDeep>(name, p, stream);
  if (p.out_columns <= 32) return start<Real, 32, kADeep, kBDeep>(name, p, stream);
  start<Real, 64, kADeep, kBDeep>(name, p, stream);
}

template <class Real>
bool by_library(const BatchedProducts<Real>& products, const Product<Real>& p) {
  for (const Axis* axis : {&p.a_row, &p.a_depth, &p.b_depth, &p.b_column, &p.out_row}) {
    if (axis->size1.by != 1 || axis->size2.by != 1) return false;
  }
  const int64_t work = p.tasks * p.rows * p.columns * p.depth * p.pairs;
  return products.function != nullptr && work > 0 && work >= products.fewest;
}

// p, of plain axes, by the library and what kernels follow it.
template <bool kADeep, bool kBDeep, class Real>
void start_library(const char* name, const BatchedProducts<Real>& products, const Product<Real>& p,
                   CUstream_st* stream) {
  const int row = p.out_row.origin;
  for (int pair = 0; pair < p.pairs; ++pair) {
    const Batch<const Real> a = p.a[pair] + (p.a_row.origin + p.a_depth.origin);
    const Batch<const Real> b = p.b[pair] + (p.b_depth.origin + p.b_column.origin);
    products.function({p.tasks,
                       p.rows,
                       p.columns,
                       p.depth,
                       {a.first, a.task, p.a_row.step0, p.a_depth.step0},
                       {b.first, b.task, p.b_depth.step0, p.b_column.step0},
                       {p.out.first + row, p.out.task, p.out_row.step0, 1},
                       pair > 0},
                      stream);
  }
  if (!p.bias.null() || p.relu || !p.gate.null() || p.out_columns > p.columns) {
    launch_elements(name, finish_product_kernel<Real>, p.tasks, int64_t(p.rows) * p.out_columns, stream, p);
  }
  if (p.out_rows == p.rows) return;
  // The row of ones, the biases': a product without other rows.
  Product<Real> last = p;
  last.rows = 0, last.out_rows = p.out_rows - p.rows, last.pairs = 1;
  last.out_row.origin += p.rows * p.out_row.step0;
  start<kADeep, kBDeep>(name, last, stream);
}

struct Size {
  int64_t of;
  int64_t step;
};

Axis axis(int64_t origin, Size i0, Size i1 = {1, 0}, Size i2 = {1, 0}) {
  int64_t reach = std::abs(origin);
  for (const Size& i : {i0, i1, i2}) reach += i.of * std::abs(i.step);
  checked(reach);
  return {int(origin),
          int(i0.step),
          int(i1.step),
          int(i2.step),
          Divisor(std::max<int64_t>(i1.of, 1)),
          Divisor(std::max<int64_t>(i2.of, 1))};
}

// The taps and the channels of each; of a single tap only channels, which need no division.
Axis taps_axis(int64_t origin, Size row, Size tap, Size channel) {
  return row.of * tap.of <= 1 ? axis(origin, channel) : axis(origin, row, tap, channel);
}

// Two factors; without a first one there is no pair.
template <class Real>
struct Pair {
  Batch<const Real> a, b;
};

template <class Real, bool kNarrow>
class Conv {
  using In = Batch<const Real>;
  using Out = Batch<Real>;

 public:
  Conv(const Call<Real>& call, CUstream_st* to)
      : c(call), stream(to), l(c.layer), in(c.in), out(c.out), taps(l.kernel_h * l.kernel_w) {}

  void outputs(Pair<Real> first, Pair<Real> second, In bias, bool relu, In gate, Out y) const {
    Product<Real> p = product(first, second, y);
    sizes(p, c.samples * out.h * out.w, taps * in.c, out);
    p.a_row = windows();
    p.a_depth = window();
    p.b_depth = axis(0, {taps * in.c, of_channel()});
    p.b_column = axis(0, {out.c, of_output()});
    p.out_row = out_pixels();
    p.bias = bias, p.relu = relu, p.gate = gate;
    multiply<true, false>("layer_outputs", p);
  }

  // Pixels of x by their place in the stride: those of one phase see the same taps.
  void input_gradient(Pair<Real> first, Pair<Real> second, Out dx) const {
    for (int64_t phase_h = 0; phase_h < l.stride_h; ++phase_h) {
      for (int64_t phase_w = 0; phase_w < l.stride_w; ++phase_w) {
        const Phase h(phase_h, in.h, l.kernel_h, l.stride_h, l.pad_h);
        const Phase w(phase_w, in.w, l.kernel_w, l.stride_w, l.pad_w);
        Product<Real> p = product(first, second, dx);
        // With no tap (a stride beyond the kernel) this writes the zeros.
        sizes(p, c.samples * h.pixels * w.pixels, h.taps * w.taps * out.c, in);
        p.a_row = axis(out.origin + h.output * out.row + w.output * out.pixel, {c.samples, out.sample},
                       {h.pixels, out.row}, {w.pixels, out.pixel});
        p.a_depth = taps_axis(0, {h.taps, -out.row}, {w.taps, -out.pixel}, {out.c, 1});
        p.b_depth = taps_axis((phase_h * l.kernel_w + phase_w) * of_tap(),
                              {h.taps, l.stride_h * l.kernel_w * of_tap()}, {w.taps, l.stride_w * of_tap()},
                              {out.c, of_output()});
        p.b_column = axis(0, {in.c, of_channel()});
        p.out_row = axis(in.origin + h.first * in.row + w.first * in.pixel, {c.samples, in.sample},
                         {h.pixels, l.stride_h * in.row}, {w.pixels, l.stride_w * in.pixel});
        if (l.gated) p.gate = c.x;
        multiply<true, true>("layer_input_gradient", p);
      }
    }
  }

  // Of pairs (x, dy).
  void weight_gradient(Pair<Real> first, Pair<Real> second, Out dw) const {
    const int64_t pixels = c.samples * out.h * out.w;
    Product<Real> p = product(first, second, dw);
    if constexpr (kNarrow) {
      std::swap(p.a, p.b);
      sizes(p, out.c, pixels, in);
      p.a_row = axis(0, {out.c, 1}), p.a_depth = out_pixels();
      p.b_depth = windows(), p.b_column = axis(0, {in.c, 1});
      p.out_row = axis(0, {out.c, in.pixel});
      multiply<false, false>("layer_weight_gradient", p);
      if (!l.bias) return;
      // Their row is of another length: a product of its own, of ones.
      p = product({first.b, first.b}, {}, dw + bias_at());
      sizes(p, 0, pixels, out);
    } else {
      sizes(p, taps * in.c, pixels, out);
      p.a_row = window(), p.a_depth = windows();
      p.out_row = axis(0, {taps * in.c + 1, out.pixel});
    }
    p.b_depth = out_pixels(), p.b_column = axis(0, {out.c, 1});
    // The biases' row follows the weights'.
    if (l.bias) p.out_rows = p.rows + 1, p.ones = !l.bias_cancels;
    multiply<false, false>("layer_weight_gradient", p);
  }

  In bias_of(In w) const { return l.bias ? w + bias_at() : In(); }

 private:
  // Along one axis of x: the pixels of a phase of the stride, the output that its first tap leads to from the
  // first of them, and its taps.
  struct Phase {
    Phase(int64_t phase, int64_t size, int64_t kernel, int64_t stride, int64_t pad)
        : first((phase - pad % stride + stride) % stride),
          pixels(first < size ? (size - first + stride - 1) / stride : 0),
          output((first + pad - phase) / stride),
          taps(phase < kernel ? (kernel - phase + stride - 1) / stride : 0) {}
    int64_t first, pixels, output, taps;
  };

  // The corners of the windows that y's pixels see, and from there to what they see.
  Axis windows() const {
    return axis(in.origin - l.pad_h * in.row - l.pad_w * in.pixel, {c.samples, in.sample},
                {out.h, l.stride_h * in.row}, {out.w, l.stride_w * in.pixel});
  }
  Axis window() const { return taps_axis(0, {l.kernel_h, in.row}, {l.kernel_w, in.pixel}, {in.c, 1}); }
  Axis out_pixels() const {
    return axis(out.origin, {c.samples, out.sample}, {out.h, out.row}, {out.w, out.pixel});
  }

  // From a tap of the weights to the next, a channel of x, an output.
  int64_t of_tap() const { return in.c * of_channel(); }
  int64_t of_channel() const { return kNarrow ? 1 : out.pixel; }
  int64_t of_output() const { return kNarrow ? in.pixel : 1; }
  int64_t bias_at() const { return kNarrow ? out.c * in.pixel : taps * in.c * out.pixel; }

  template <bool kADeep, bool kBDeep>
  void multiply(const char* name, const Product<Real>& p) const {
    by_library(c.products, p) ? start_library<kADeep, kBDeep>(name, c.products, p, stream)
                              : start<kADeep, kBDeep>(name, p, stream);
  }

  Product<Real> product(Pair<Real> first, Pair<Real> second, Out to) const {
    Product<Real> p{};
    p.tasks = c.tasks, p.out = to;
    p.pairs = second.a.null() ? 1 : 2;
    p.a[0] = first.a, p.b[0] = first.b, p.a[1] = second.a, p.b[1] = second.b;
    return p;
  }
  // The columns are the channels of `columns`.
  static void sizes(Product<Real>& p, int64_t rows, int64_t depth, const Value& columns) {
    p.rows = p.out_rows = checked(rows), p.depth = checked(depth);
    p.columns = checked(columns.c), p.out_columns = checked(columns.pixel);
  }

  const Call<Real>& c;
  CUstream_st* stream;
  const Layer& l;
  const Value &in, &out;
  int64_t taps;
};

template <class Real, bool kNarrow>
void conv_fwd(const Call<Real>& c, CUstream_st* stream) {
  const Conv<Real, kNarrow> conv(c, stream);
  conv.outputs({c.x, c.w}, {}, conv.bias_of(c.w), c.layer.relu != 0, {}, c.y);
}

template <class Real, bool kNarrow>
void conv_bwd(const Call<Real>& c, CUstream_st* stream) {
  const Conv<Real, kNarrow> conv(c, stream);
  if (!c.dw.null()) conv.weight_gradient({c.x, c.dy}, {}, c.dw);
  if (!c.dx.null()) conv.input_gradient({c.dy, c.w}, {}, c.dx);
}

template <class Real, bool kNarrow>
void conv_tfwd(const Call<Real>& c, CUstream_st* stream) {
  const Conv<Real, kNarrow> conv(c, stream);
  const Batch<const Real> gate = c.layer.relu ? Batch<const Real>(c.y) : Batch<const Real>();
  conv.outputs({c.x, c.tw}, {c.tx, c.w}, conv.bias_of(c.tw), false, gate, c.ty);
}

template <class Real, bool kNarrow>
void conv_tbwd(const Call<Real>& c, CUstream_st* stream) {
  const Conv<Real, kNarrow> conv(c, stream);
  conv.weight_gradient({c.x, c.tdy}, {c.tx, c.dy}, c.tdw);
  if (!c.tdx.null()) conv.input_gradient({c.tdy, c.w}, {c.dy, c.tw}, c.tdx);
}

template <class Real, bool kNarrow>
constexpr LayerFunctions<Real> kConv{conv_fwd<Real, kNarrow>, conv_bwd<Real, kNarrow>,
                                     conv_tfwd<Real, kNarrow>, conv_tbwd<Real, kNarrow>};

}  // namespace

namespace layers {
template <class Real>
LayerFunctions<Real> linear() {
  return kConv<Real, false>;
}
template <class Real>
LayerFunctions<Real> linear_narrow() {
  return kConv<Real, true>;
}
template <class Real>
LayerFunctions<Real> conv2d() {
  return kConv<Real, false>;
}
template LayerFunctions<float> linear();
template LayerFunctions<double> linear();
template LayerFunctions<float> linear_narrow();
template LayerFunctions<double> linear_narrow();
template LayerFunctions<float> conv2d();
template LayerFunctions<double> conv2d();
}  // namespace layers

}  // namespace metafast::METAFAST_GPU
