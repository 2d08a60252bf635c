// Loops over the pixels that a layer's input and output have in common, wherever their borders put them.
#pragma once

#include "call.h"
#include "simd.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// No border: all of its pixels lie without a gap.
inline bool is_dense(const Value& v) { return v.row == v.w * v.pixel && v.sample == v.h * v.row; }

// visit(offset in `in`, offset in `out`) for every vector of every pixel; both have as many channels.
template <class Real, class Visit>
inline void for_each_vector(const Value& in, const Value& out, int64_t samples, const Visit& visit) {
  const bool dense = is_dense(in) && is_dense(out);
  const int64_t planes = dense ? 1 : samples, rows = dense ? 1 : in.h;
  const int64_t count = dense ? samples * in.sample : in.w * in.pixel;
  for (int64_t n = 0; n < planes; ++n) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t from = in.origin + n * in.sample + i * in.row,
                    to = out.origin + n * out.sample + i * out.row;
      for (int64_t k = 0; k < count; k += kLanes<Real>) visit(from + k, to + k);
    }
  }
}

// Zeros in all lanes of every pixel.
template <class Real>
inline void clear_pixels(const Value& v, int64_t samples, Real* x) {
  for_each_vector<Real>(v, v, samples, [x](int64_t i, int64_t) { store(x + i, Vec<Real>{}); });
}

// visit(offset in `in`, offset in `out`, number of the pixel) for every pixel of sample n.
template <class Visit>
inline void for_each_pixel(const Value& in, const Value& out, int64_t n, const Visit& visit) {
  for (int64_t i = 0; i < in.h; ++i) {
    int64_t from = in.origin + n * in.sample + i * in.row, to = out.origin + n * out.sample + i * out.row;
    for (int64_t j = 0; j < in.w; ++j, from += in.pixel, to += out.pixel) visit(from, to, i * in.w + j);
  }
}

// visit.template operator()<count>(lane): all lanes of a pixel, in blocks of `count` vectors that registers
// hold, in order: as many of 4 as there are, then one of 2, then one of 1.
template <class Real, class Visit>
inline void for_each_block(int64_t pixel, const Visit& visit) {
  constexpr int kL = kLanes<Real>;
  int64_t lane = 0;
  for (; lane + 4 * kL <= pixel; lane += 4 * kL) visit.template operator()<4>(lane);
  if (lane + 2 * kL <= pixel) {
    visit.template operator()<2>(lane);
    lane += 2 * kL;
  }
  if (lane < pixel) visit.template operator()<1>(lane);
}

// True in the first `count` lanes.
template <class Real>
inline typename Simd<Real>::Mask first_lanes(int64_t count) {
  typename Simd<Real>::Mask lane;
  for (int l = 0; l < kLanes<Real>; ++l) lane[l] = l;
  return lane < static_cast<decltype(lane[0] + 0)>(count);
}

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
