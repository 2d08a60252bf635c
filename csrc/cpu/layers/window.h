// The windows of a pooling layer, from both sides: the real pixels of each window, and the windows of each
// pixel.
#pragma once

#include "pixels.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// One axis of a pooling layer: output o's taps u lie on pixels o * stride - pad + u of `size`.
struct Axis {
  int64_t kernel, stride, pad, size, outputs;

  Range taps(int64_t output) const {
    const int64_t first = pad - output * stride, end = size + first;
    return {first > 0 ? first : 0, end < kernel ? end : kernel};
  }
  int64_t tap(int64_t pixel, int64_t output) const { return pixel + pad - output * stride; }
  // From the outputs whose windows hold the pixel before (none before the first) to those that hold `pixel`.
  void next(int64_t pixel, Range& holding) const {
    while (holding.end < outputs && tap(pixel, holding.end) >= 0) ++holding.end;
    while (holding.begin < holding.end && tap(pixel, holding.begin) >= kernel) ++holding.begin;
  }
};

// No two windows hold the same pixel.
inline bool are_apart(const Axis& a) { return a.stride >= a.kernel; }
// Each pixel lies in exactly one window.
inline bool are_tiles(const Axis& a) {
  return a.stride == a.kernel && a.pad == 0 && a.outputs * a.stride == a.size;
}

inline Axis rows_of(const Layer& l, const Value& in, const Value& out) {
  return {l.kernel_h, l.stride_h, l.pad_h, in.h, out.h};
}
inline Axis columns_of(const Layer& l, const Value& in, const Value& out) {
  return {l.kernel_w, l.stride_w, l.pad_w, in.w, out.w};
}

// One output pixel's window.
struct Window {
  Range rows, columns;  // taps on real pixels; never empty
  int64_t from;         // tap (u, v) lies at from + u * in.row + v * in.pixel
  int64_t to;           // the output pixel
  int64_t number;       // of the output pixel, counted over samples
};

// One input pixel's windows: those of the outputs in `rows` x `columns`, which may be none. In the first it
// is tap `tap`; in the next row's and column's, tap_row and tap_column less.
struct Holders {
  Range rows, columns;
  int64_t from;    // the input pixel
  int64_t to;      // the first output pixel
  int64_t number;  // of the first output pixel, counted over samples
  int64_t tap, tap_row, tap_column;
};

template <class Visit>
inline void for_each_window(const Layer& l, const Value& in, const Value& out, int64_t samples,
                            const Visit& visit) {
  const Axis rows = rows_of(l, in, out), columns = columns_of(l, in, out);
  Window w{};
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t i = 0; i < out.h; ++i) {
      w.rows = rows.taps(i);
      w.from = in.origin + n * in.sample + (i * l.stride_h - l.pad_h) * in.row - l.pad_w * in.pixel;
      w.to = out.origin + n * out.sample + i * out.row;
      for (int64_t j = 0; j < out.w; ++j, ++w.number, w.from += l.stride_w * in.pixel, w.to += out.pixel) {
        w.columns = columns.taps(j);
        visit(w);
      }
    }
  }
}

template <class Visit>
inline void for_each_held_pixel(const Layer& l, const Value& in, const Value& out, int64_t samples,
                                const Visit& visit) {
  const Axis rows = rows_of(l, in, out), columns = columns_of(l, in, out);
  Holders h{};
  h.tap_row = l.stride_h * l.kernel_w;
  h.tap_column = l.stride_w;
  for (int64_t n = 0; n < samples; ++n) {
    h.rows = {0, 0};
    for (int64_t i = 0; i < in.h; ++i) {
      rows.next(i, h.rows);
      h.columns = {0, 0};
      h.from = in.origin + n * in.sample + i * in.row;
      const int64_t tap = rows.tap(i, h.rows.begin) * l.kernel_w;
      const int64_t to = out.origin + n * out.sample + h.rows.begin * out.row;
      const int64_t number = (n * out.h + h.rows.begin) * out.w;
      for (int64_t j = 0; j < in.w; ++j, h.from += in.pixel) {
        columns.next(j, h.columns);
        h.tap = tap + columns.tap(j, h.columns.begin);
        h.to = to + h.columns.begin * out.pixel;
        h.number = number + h.columns.begin;
        visit(h);
      }
    }
  }
}

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
