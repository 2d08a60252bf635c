// The windows of a pooling layer on CUDA, from both sides: the real pixels of each window, and the windows of
// each pixel (gradients are gathered over them, so that nothing is added up by two threads). A thread has a
// lane of one pixel at a time.
#pragma once

#include "elements.cuh"

namespace metafast::METAFAST_GPU {

struct Range {
  int64_t begin, end;
  __device__ int64_t size() const { return end - begin; }
};

// One axis: output o's taps u lie on pixels o * stride - pad + u of `size`.
struct Axis {
  int64_t kernel, stride, pad, size, outputs;

  // Those on real pixels; never none.
  __device__ Range taps(int64_t output) const {
    const int64_t first = pad - output * stride, end = size + first;
    return {first > 0 ? first : 0, end < kernel ? end : kernel};
  }
  __device__ int64_t tap(int64_t pixel, int64_t output) const { return pixel + pad - output * stride; }
  // The outputs whose windows hold the pixel; maybe none.
  __device__ Range holders(int64_t pixel) const {
    const int64_t least = pixel + pad - kernel, end = (pixel + pad) / stride + 1;
    return {least < 0 ? 0 : least / stride + 1, end < outputs ? end : outputs};
  }
};

// One output element's window.
struct Window {
  Range rows, columns;  // taps
  int64_t from;         // tap (u, v) lies at from + u * in.row + v * in.pixel
  int64_t to;           // the output
  int64_t number;       // of the output, counted without borders
};

// One input element's windows, those of the outputs in `rows` x `columns`.
struct Holders {
  Range rows, columns;
  int64_t i, j;        // of its pixel
  int64_t from;        // the input
  int64_t to, number;  // output (0, 0) of its sample and lane
};

struct Pool {
  Value in, out;
  Axis rows, columns;
  int64_t tasks, samples;

  template <class Real>
  explicit Pool(const Call<Real>& c)
      : in(c.in),
        out(c.out),
        rows{c.layer.kernel_h, c.layer.stride_h, c.layer.pad_h, c.in.h, c.out.h},
        columns{c.layer.kernel_w, c.layer.stride_w, c.layer.pad_w, c.in.w, c.out.w},
        tasks(c.tasks),
        samples(c.samples) {}

  __device__ __host__ int64_t count(const Value& v) const { return samples * v.h * v.w * v.pixel; }

  // visit(task, window) for each output element.
  template <class Visit>
  __device__ void each_window(const Visit& visit) const {
    for_each_element(tasks, count(out), [&](int64_t t, int64_t at) {
      const Place p(at, out);
      visit(t, Window{rows.taps(p.i), columns.taps(p.j),
                      in.origin + p.n * in.sample + (p.i * rows.stride - rows.pad) * in.row +
                          (p.j * columns.stride - columns.pad) * in.pixel + p.lane,
                      p.offset(out), at});
    });
  }
  // visit(task, holders) for each input element.
  template <class Visit>
  __device__ void each_input(const Visit& visit) const {
    for_each_element(tasks, count(in), [&](int64_t t, int64_t at) {
      const Place p(at, in);
      visit(t, Holders{rows.holders(p.i), columns.holders(p.j), p.i, p.j, p.offset(in),
                       out.origin + p.n * out.sample + p.lane, p.n * out.h * out.w * out.pixel + p.lane});
    });
  }

 private:
  struct Place {
    int64_t n, i, j, lane;
    __device__ Place(int64_t at, const Value& v) {
      int64_t rest = at / v.pixel;
      lane = at - rest * v.pixel;
      j = rest, rest /= v.w, j -= rest * v.w;
      i = rest, rest /= v.h, i -= rest * v.h;
      n = rest;
    }
    __device__ int64_t offset(const Value& v) const {
      return v.origin + n * v.sample + i * v.row + j * v.pixel + lane;
    }
  };
};

}  // namespace metafast::METAFAST_GPU
