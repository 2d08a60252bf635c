// Layer normalisation on CUDA: the equations and what is saved are those of cpu/layers/layer_norm.h, but that
// p and q are saved only where dx is wanted. A block has a sample of a task; the gradient of the parameters,
// a sum over the samples, is a launch of its own, a thread an element. All four overwrite. Tested by
// tests/engine/test_layers.py.
#pragma once

#include "statistics.cuh"

namespace metafast::METAFAST_GPU {

// Where an element of a sample is: in x and dx, in y and dy, in gamma.
struct LayerNormElement {
  int64_t in, out, at;
  bool inside;  // else it is padding

  // `number` counts channels, so many a pixel, then pixels.
  template <class Real>
  __device__ LayerNormElement(const Call<Real>& c, const Domain& pixels, unsigned n, unsigned number,
                              const Divider& channels) {
    const unsigned pixel = channels(number), channel = number - pixel * channels.by;
    Place place(pixels, pixel);
    place.n = n;
    in = offset(c.in, place, channel);
    out = offset(c.out, place, channel);
    at = pixel * c.in.pixel + channel;
    inside = channel < c.in.c;
  }
};

struct LayerNormLaunch {
  Domain pixels;                // of a sample
  Divider channels, lanes;      // C and C with the padding
  unsigned elements, of_gamma;  // with C and with the padding

  explicit LayerNormLaunch(const Value& in)
      : pixels(1, in.h, in.w),
        channels(in.c),
        lanes(in.pixel),
        elements(counted(in.h * in.w * in.c)),
        of_gamma(counted(in.h * in.w * in.pixel)) {}
};

// One task: what a thread has of it.
template <class Real>
struct LayerNormTask {
  const Call<Real>& c;
  const Real *x, *tx, *dy, *tdy, *w, *tw;  // w and tw null: gamma 1, beta 0
  Real *saved, *tsaved;
  int64_t size;  // of gamma
  bool moves;

  __device__ LayerNormTask(const Call<Real>& call, int64_t t)
      : c(call),
        x(c.x.of(t)),
        tx(c.tx.of(t)),
        dy(c.dy.of(t)),
        tdy(c.tdy.of(t)),
        w(c.layer.bias ? c.w.of(t) : nullptr),
        tw(c.layer.bias ? c.tw.of(t) : nullptr),
        saved(c.saved.of(t)),
        tsaved(c.tsaved.of(t)),
        size(c.in.h * c.in.w * c.in.pixel),
        moves(!c.tx.null()) {}

  __device__ Real gamma(int64_t at) const { return w != nullptr ? w[at] : Real(1); }
  __device__ Real beta(int64_t at) const { return w != nullptr ? w[size + at] : Real(0); }
  __device__ Real tgamma(int64_t at) const { return tw != nullptr ? tw[at] : Real(0); }
  __device__ Real tbeta(int64_t at) const { return tw != nullptr ? tw[size + at] : Real(0); }
};

// One sample of it: what is kept of it, and what follows from that.
template <class Real>
struct LayerNormSample : LayerNormTask<Real> {
  unsigned n;
  Real mean, r, tmean, tc;

  // Before fwd there is nothing yet, and before tfwd no tangent's.
  __device__ LayerNormSample(const LayerNormTask<Real>& task, unsigned sample, bool after_fwd,
                             bool after_tfwd)
      : LayerNormTask<Real>(task),
        n(sample),
        mean(after_fwd ? task.saved[4 * n] : Real(0)),
        r(after_fwd ? task.saved[4 * n + 1] : Real(0)),
        tmean(after_tfwd && task.moves ? task.tsaved[4 * n] : Real(0)),
        tc(after_tfwd && task.moves ? task.tsaved[4 * n + 1] : Real(0)) {}

  __device__ Real xhat(int64_t in) const { return (this->x[in] - mean) * r; }
  __device__ Real txhat(Real xhat, int64_t in) const {
    return this->moves ? r * (this->tx[in] - tmean - xhat * tc) : Real(0);
  }
};

// The four functions: what is reduced over a sample, what becomes of it, in all threads, which is then saved,
// and what each element becomes; element(number) is where it is.
template <class Real>
struct LayerNormFwd : LayerNormSample<Real> {
  using Part = Moments<Real>;
  __device__ LayerNormFwd(const LayerNormTask<Real>& task, unsigned n)
      : LayerNormSample<Real>(task, n, false, false) {}

  template <class Element>
  __device__ Part reduce(unsigned first, unsigned end, unsigned step, const Element& element) const {
    return moments_of<Real>(first, end, step, [&](unsigned q) { return this->x[element(q).in]; });
  }
  __device__ void finish(const Part& all, Real) {
    this->mean = all.mean;
    this->r = all.inverse_deviation(this->c.layer.number);
  }
  __device__ void save() const {
    this->saved[4 * this->n] = this->mean;
    this->saved[4 * this->n + 1] = this->r;
  }
  __device__ int64_t to(const LayerNormElement& e) const { return e.out; }
  __device__ Real apply(const LayerNormElement& e) const {
    return this->gamma(e.at) * this->xhat(e.in) + this->beta(e.at);
  }
};

template <class Real>
struct LayerNormBwd : LayerNormSample<Real> {
  using Part = Sums<Real>;
  Real p, q;
  __device__ LayerNormBwd(const LayerNormTask<Real>& task, unsigned n)
      : LayerNormSample<Real>(task, n, true, false) {}

  template <class Element>
  __device__ Part reduce(unsigned first, unsigned end, unsigned step, const Element& element) const {
    return sums_of<Real>(first, end, step, [&](unsigned number, Part& sums) {
      const LayerNormElement e = element(number);
      const Real v = this->gamma(e.at) * this->dy[e.out];
      sums.a += v;
      sums.b += v * this->xhat(e.in);
    });
  }
  __device__ void finish(const Part& all, Real per_element) {
    p = all.a * per_element, q = all.b * per_element;
  }
  __device__ void save() const { this->saved[4 * this->n + 2] = p, this->saved[4 * this->n + 3] = q; }
  __device__ int64_t to(const LayerNormElement& e) const { return e.in; }
  __device__ Real apply(const LayerNormElement& e) const {
    return this->r * (this->gamma(e.at) * this->dy[e.out] - p - this->xhat(e.in) * q);
  }
};

template <class Real>
struct LayerNormTfwd : LayerNormSample<Real> {
  using Part = Sums<Real>;
  __device__ LayerNormTfwd(const LayerNormTask<Real>& task, unsigned n)
      : LayerNormSample<Real>(task, n, true, false) {}

  template <class Element>
  __device__ Part reduce(unsigned first, unsigned end, unsigned step, const Element& element) const {
    return sums_of<Real>(first, end, step, [&](unsigned number, Part& sums) {
      const LayerNormElement e = element(number);
      const Real t = this->tx[e.in];
      sums.a += t;
      sums.b += t * this->xhat(e.in);
    });
  }
  __device__ void finish(const Part& all, Real per_element) {
    this->tmean = all.a * per_element, this->tc = all.b * per_element;
  }
  __device__ void save() const {
    this->tsaved[4 * this->n] = this->tmean, this->tsaved[4 * this->n + 1] = this->tc;
  }
  __device__ int64_t to(const LayerNormElement& e) const { return e.out; }
  __device__ Real apply(const LayerNormElement& e) const {
    const Real xhat = this->xhat(e.in);
    return this->tgamma(e.at) * xhat + this->gamma(e.at) * this->txhat(xhat, e.in) + this->tbeta(e.at);
  }
};

template <class Real>
struct LayerNormTbwd : LayerNormSample<Real> {
  using Part = Sums<Real>;
  Real p, q, tp, tq;
  __device__ LayerNormTbwd(const LayerNormTask<Real>& task, unsigned n)
      : LayerNormSample<Real>(task, n, true, true), p(task.saved[4 * n + 2]), q(task.saved[4 * n + 3]) {}

  template <class Element>
  __device__ Part reduce(unsigned first, unsigned end, unsigned step, const Element& element) const {
    return sums_of<Real>(first, end, step, [&](unsigned number, Part& sums) {
      const LayerNormElement e = element(number);
      const Real d = this->dy[e.out], gamma = this->gamma(e.at), xhat = this->xhat(e.in);
      const Real tv = this->tgamma(e.at) * d + gamma * this->tdy[e.out];
      sums.a += tv;
      sums.b += tv * xhat + gamma * d * this->txhat(xhat, e.in);
    });
  }
  __device__ void finish(const Part& all, Real per_element) {
    tp = all.a * per_element, tq = all.b * per_element;
  }
  __device__ void save() const {}
  __device__ int64_t to(const LayerNormElement& e) const { return e.in; }
  __device__ Real apply(const LayerNormElement& e) const {
    const Real d = this->dy[e.out], gamma = this->gamma(e.at), xhat = this->xhat(e.in);
    const Real u = gamma * d - p - xhat * q;
    const Real tv = this->tgamma(e.at) * d + gamma * this->tdy[e.out];
    const Real tu = tv - tp - this->txhat(xhat, e.in) * q - xhat * tq;
    return this->r * (tu - this->r * this->tc * u);
  }
};

// `results`: y, dx, ty or tdx.
template <class Function, class Real>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    layer_norm_kernel(const Call<Real> c, const LayerNormLaunch l, bool reduces, const Batch<Real> results) {
  using Part = typename Function::Part;
  METAFAST_SHARED(Part, shared, [kNormThreads]);
  const unsigned n = blockIdx.x;
  for (int64_t t = blockIdx.y; t < c.tasks; t += gridDim.y) {
    Function f(LayerNormTask<Real>(c, t), n);
    if (reduces) {
      Part part = f.reduce(threadIdx.x, l.elements, kNormThreads, [&](unsigned number) {
        return LayerNormElement(c, l.pixels, n, number, l.channels);
      });
      merge_columns<1>(part, shared);
      __syncthreads();
      f.finish(shared[0], Real(1) / Real(l.elements));
      if (threadIdx.x == 0) f.save();
    }
    Real* const to = results.of(t);
    for (unsigned number = threadIdx.x; number < l.of_gamma; number += kNormThreads) {
      const LayerNormElement e(c, l.pixels, n, number, l.lanes);
      to[f.to(e)] = e.inside ? f.apply(e) : Real(0);
    }
  }
}

// dw, or with kTangent tdw.
template <class Real, bool kTangent>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    layer_norm_gradient_kernel(const Call<Real> c, const LayerNormLaunch l, const Batch<Real> gradient) {
  const unsigned size = l.of_gamma, number = blockIdx.x * kNormThreads + threadIdx.x;
  if (number >= size) return;
  for (int64_t t = blockIdx.y; t < c.tasks; t += gridDim.y) {
    const LayerNormTask<Real> task(c, t);
    Sums<Real> all{};
    if (LayerNormElement(c, l.pixels, 0, number, l.lanes).inside) {
      all = sums_of<Real>(0, unsigned(c.samples), 1, [&](unsigned n, Sums<Real>& sums) {
        const LayerNormElement e(c, l.pixels, n, number, l.lanes);
        const LayerNormSample<Real> sample(task, n, true, kTangent);
        const Real d = task.dy[e.out], xhat = sample.xhat(e.in);
        if constexpr (kTangent) {
          sums.a += task.tdy[e.out];
          sums.b += task.tdy[e.out] * xhat + d * sample.txhat(xhat, e.in);
        } else {
          sums.a += d;
          sums.b += d * xhat;
        }
      });
    }
    gradient.of(t)[number] = all.b;
    gradient.of(t)[size + number] = all.a;
  }
}

}  // namespace metafast::METAFAST_GPU
