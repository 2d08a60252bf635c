// Batch normalisation, ReLU and k x k max-pooling of stride k in one layer on CUDA: the equations and what is
// saved are those of cpu/layers/batch_norm_relu_pool.h, with tdb / M and tdg / M where tsaved has room; the
// second of its planes, and where tx is null the first, stay as they are. Statistics go over the pixels, the
// sums of the backward functions over the output pixels; fwd and tfwd then go through the windows, bwd and
// tbwd through these and what is left of windows at the right and the bottom. The kernel is batch_norm.cuh's.
// All four overwrite. Tested by tests/engine/test_layers.py.
#pragma once

#include "batch_norm.cuh"

namespace metafast::METAFAST_GPU {

// Of the channel Base is about. kWindow: k, or 0 where it is known at run time only.
template <class Base, int kWindow>
struct Windows : Base {
  using Base::Base, Base::c, Base::t, Base::channel, Base::inside;
  using Real = std::remove_cvref_t<decltype(Base::mean)>;

  __device__ int k() const { return kWindow > 0 ? kWindow : int(c.layer.kernel_h); }

  // xhat_a, a (-1: not alive) and txhat_a of the output pixel of that number.
  __device__ int64_t plane() const { return c.samples * c.out.h * c.out.w * c.in.pixel; }
  __device__ Real& chosen(int64_t q) const { return c.saved.of(t)[(4 + q) * c.in.pixel + channel]; }
  __device__ Real& place(int64_t q) const { return c.saved.of(t)[plane() + (4 + q) * c.in.pixel + channel]; }
  __device__ Real& tchosen(int64_t q) const { return c.tsaved.of(t)[(4 + q) * c.in.pixel + channel]; }
  __device__ int64_t number(const Place& window) const {
    return (int64_t(window.n) * c.out.h + window.i) * c.out.w + window.j;
  }
  __device__ int64_t first(const Place& window) const {
    return offset(c.in, {window.n, window.i * k(), window.j * k()}, channel);
  }
  // f(offset in x, place) for the pixels of a window.
  template <class F>
  __device__ void for_each_in_window(const Place& window, const F& f) const {
    const int64_t corner = first(window);
#pragma unroll
    for (int u = 0; u < k(); ++u) {
#pragma unroll
      for (int v = 0; v < k(); ++v) f(corner + u * c.in.row + v * c.in.pixel, u * k() + v);
    }
  }
  // What arrives at the normalised values of the window's pixels, of which some may not be there, and where:
  // f(offset in x, whether that is a).
  template <class F>
  __device__ void for_each_that_is_there(const Place& window, int a, const F& f) const {
    const int64_t corner = first(window), down = c.in.h - window.i * k(), across = c.in.w - window.j * k();
#pragma unroll
    for (int u = 0; u < k(); ++u) {
#pragma unroll
      for (int v = 0; v < k(); ++v) {
        if (u < down && v < across) f(corner + u * c.in.row + v * c.in.pixel, u * k() + v == a);
      }
    }
  }
  // a of a window that is whole, else -1.
  __device__ int winner(const Place& window) const {
    const bool whole = window.i < c.out.h && window.j < c.out.w;
    return inside && whole ? int(place(number(window))) : -1;
  }
};

template <class Real, int kWindow>
struct PooledNormFwd : Windows<BatchNormFwd<Real>, kWindow> {
  using Base = Windows<BatchNormFwd<Real>, kWindow>;
  using Base::Base, Base::c, Base::t, Base::mean, Base::r, Base::gamma, Base::beta;

  __device__ void apply(const Place& at) const {
    const Real* const x = c.x.of(t);
    Real best = -Real(INFINITY), best_xhat = 0;
    int a = -1;
    this->for_each_in_window(at, [&](int64_t in, int here) {
      const Real xhat = (x[in] - mean) * r, value = gamma * xhat + beta;
      if (value <= best) return;  // not where it is NaN, which must not be lost
      best = value, best_xhat = xhat, a = here;
    });
    const bool alive = this->inside && !(best <= 0);
    const int64_t q = this->number(at);
    c.y.of(t)[offset(c.out, at, this->channel)] = alive ? best : Real(0);
    this->chosen(q) = best_xhat;
    this->place(q) = Real(alive ? a : -1);
  }
};

template <class Real, int kWindow>
struct PooledNormBwd : Windows<BatchNormBwd<Real>, kWindow> {
  using Base = Windows<BatchNormBwd<Real>, kWindow>;
  using Base::Base, Base::c, Base::t;
  using Part = Sums<Real>;

  __device__ Part reduce(const Domain& outputs, unsigned first, unsigned end, unsigned step) const {
    return sums_of<Real>(first, end, step, [&](unsigned q, Part& sums) {
      const Real dy = c.dy.of(t)[offset(c.out, Place(outputs, q), this->channel)];
      const Real dh = this->place(q) < 0 ? Real(0) : dy;
      sums.a += dh;
      sums.b += dh * this->chosen(q);
    });
  }
  __device__ void apply(const Place& window) const {
    const int a = this->winner(window);
    const Real dh = a < 0 ? Real(0) : c.dy.of(t)[offset(c.out, window, this->channel)];
    this->for_each_that_is_there(window, a,
                                 [&](int64_t in, bool taken) { this->put(in, taken ? dh : Real(0)); });
  }
};

template <class Real, int kWindow>
struct PooledNormTfwd : Windows<BatchNormTfwd<Real>, kWindow> {
  using Base = Windows<BatchNormTfwd<Real>, kWindow>;
  using Base::Base, Base::c, Base::t;

  __device__ void apply(const Place& at) const {
    const int64_t q = this->number(at);
    const int a = this->winner(at);
    Real ty = 0, txhat = 0;
    if (a >= 0) {
      const Real xhat = this->chosen(q);
      const int u = a / this->k(), v = a - u * this->k();
      txhat = this->txhat(xhat, this->first(at) + u * c.in.row + v * c.in.pixel);
      ty = this->tgamma * xhat + this->gamma * txhat + this->tbeta;
    }
    if (this->moves) this->tchosen(q) = txhat;
    c.ty.of(t)[offset(c.out, at, this->channel)] = ty;
  }
};

template <class Real, int kWindow>
struct PooledNormTbwd : Windows<NormTbwd<Real>, kWindow> {
  using Base = Windows<NormTbwd<Real>, kWindow>;
  using Base::Base, Base::c, Base::t;
  using Part = Sums<Real>;

  __device__ Part reduce(const Domain& outputs, unsigned first, unsigned end, unsigned step) const {
    const bool moves = !c.tx.null();
    return sums_of<Real>(first, end, step, [&](unsigned q, Part& sums) {
      const int64_t out = offset(c.out, Place(outputs, q), this->channel);
      const bool alive = this->place(q) >= 0;
      const Real tdy = c.tdy.of(t)[out], tdh = alive ? tdy : Real(0);
      sums.a += tdh;
      sums.b += tdh * this->chosen(q);
      if (!moves) return;
      const Real dy = c.dy.of(t)[out];
      sums.b += (alive ? dy : Real(0)) * this->tchosen(q);
    });
  }
  __device__ void apply(const Place& window) const {
    const int a = this->winner(window);
    const int64_t out = a < 0 ? 0 : offset(c.out, window, this->channel);
    const Real dh = a < 0 ? Real(0) : c.dy.of(t)[out], tdh = a < 0 ? Real(0) : c.tdy.of(t)[out];
    this->for_each_that_is_there(window, a, [&](int64_t in, bool taken) {
      this->put(in, taken ? dh : Real(0), taken ? tdh : Real(0));
    });
  }
};

}  // namespace metafast::METAFAST_GPU
