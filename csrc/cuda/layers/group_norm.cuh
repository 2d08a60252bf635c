// Group normalisation on CUDA: the equations are those of cpu/layers/group_norm.h; of a sample and a channel
// are saved mean and r, its group's, b and g, its own; m and c, its group's, tb and tg, its own. A block has
// some groups of a sample of a task; the gradient of the parameters, a sum over the samples, is a launch of
// its own. All four overwrite. Tested by tests/engine/test_layers.py.
#pragma once

#include "statistics.cuh"

namespace metafast::METAFAST_GPU {

constexpr int kGroupLanes = 32, kGroupRows = kNormThreads / kGroupLanes;
constexpr int kMostGroups = 32;  // of a block

// The parts of a warp's threads put together, in all of them.
template <class T>
__device__ T of_lane(T x, int lane) {
  return __shfl_sync(0xffffffff, x, lane);
}
template <class T>
__device__ T from_below(T x, int by) {
  return __shfl_down_sync(0xffffffff, x, by);
}
template <class Real>
__device__ Sums<Real> merge_warp(Sums<Real> mine) {
  for (int by = 16; by > 0; by /= 2) mine.merge({from_below(mine.a, by), from_below(mine.b, by)});
  return {of_lane(mine.a, 0), of_lane(mine.b, 0)};
}
template <class Real>
__device__ Moments<Real> merge_warp(Moments<Real> mine) {
  for (int by = 16; by > 0; by /= 2)
    mine.merge({from_below(mine.mean, by), from_below(mine.squares, by), from_below(mine.count, by)});
  return {of_lane(mine.mean, 0), of_lane(mine.squares, 0), of_lane(mine.count, 0)};
}

// One sample of one task: what a thread has of it, now with one channel, now with another.
template <class Real>
struct GroupNormSample {
  const Call<Real>& c;
  const Domain& domain;
  int64_t t, n, channel = 0;
  unsigned pixels;
  bool affine, moves;

  __device__ GroupNormSample(const Call<Real>& call, const Domain& of_sample, int64_t task, int64_t sample)
      : c(call),
        domain(of_sample),
        t(task),
        n(sample),
        pixels(of_sample.count),
        affine(c.layer.bias != 0),
        moves(!c.tx.null()) {}

  // Numbers of a sample's channels, [pixel] each.
  enum Saved { kMean, kInverse, kDy, kDyXhat };
  enum Tsaved { kMeanTx, kMeanTxXhat, kTdy, kTdyXhat };
  __device__ Real& saved(Saved what, int64_t k) const {
    return c.saved.of(t)[(4 * n + what) * c.in.pixel + k];
  }
  __device__ Real& tsaved(Tsaved what, int64_t k) const {
    return c.tsaved.of(t)[(4 * n + what) * c.in.pixel + k];
  }

  __device__ Real gamma(int64_t k) const { return affine ? c.w.of(t)[k] : Real(1); }
  __device__ Real beta(int64_t k) const { return affine ? c.w.of(t)[c.in.pixel + k] : Real(0); }
  __device__ Real tgamma(int64_t k) const { return affine ? c.tw.of(t)[k] : Real(0); }
  __device__ Real tbeta(int64_t k) const { return affine ? c.tw.of(t)[c.in.pixel + k] : Real(0); }

  // The channel's element of pixel q, in x and dx, and in y and dy.
  __device__ int64_t in(unsigned q) const { return n * c.in.sample + offset(c.in, place(q), channel); }
  __device__ int64_t out(unsigned q) const { return n * c.out.sample + offset(c.out, place(q), channel); }
  __device__ Place place(unsigned q) const { return {domain, q}; }

  // The channel's, after fwd and tfwd.
  Real mean, r, tmean, tc;
  __device__ void take_fwd() { mean = saved(kMean, channel), r = saved(kInverse, channel); }
  __device__ void take_tfwd() {
    tmean = moves ? tsaved(kMeanTx, channel) : Real(0);
    tc = moves ? tsaved(kMeanTxXhat, channel) : Real(0);
  }
  __device__ Real xhat(int64_t in) const { return (c.x.of(t)[in] - mean) * r; }
  __device__ Real txhat(Real xhat, int64_t in) const {
    return moves ? r * (c.tx.of(t)[in] - tmean - xhat * tc) : Real(0);
  }

  // Two sums over a group's channels, a warp's work; f(channel) is a channel's part.
  template <class F>
  __device__ Sums<Real> group_means(int64_t first, int64_t end, const F& f) const {
    Sums<Real> sums{};
    for (int64_t k = first + threadIdx.x % 32; k < end; k += 32) sums.merge(f(k));
    sums = merge_warp(sums);
    const Real elements = Real((end - first) * pixels);
    return {sums.a / elements, sums.b / elements};
  }
};

// The four functions: reduce() what is reduced over the pixels of the channel, keep() it; group() what is to
// be known of a group's channels, which a warp does, and leaves in `numbers`; take() that for the channel,
// and apply() to each of its pixels.
template <class Real>
struct GroupNormFwd : GroupNormSample<Real> {
  using Base = GroupNormSample<Real>;
  using Base::Base, Base::c, Base::channel, Base::kInverse, Base::kMean, Base::saved;
  using Part = Moments<Real>;
  Real scale, shift;

  __device__ Part reduce(unsigned first, unsigned step) const {
    const Real* const x = c.x.of(this->t);
    return moments_of<Real>(first, this->pixels, step, [&](unsigned q) { return x[this->in(q)]; });
  }
  __device__ void keep(const Part& part) const {
    saved(kMean, channel) = part.mean, saved(kInverse, channel) = part.squares;
  }
  __device__ void group(int64_t first, int64_t end, Real*) const {
    Part part{};
    for (int64_t k = first + threadIdx.x % 32; k < end; k += 32)
      part.merge({saved(kMean, k), saved(kInverse, k), this->pixels});
    part = merge_warp(part);
    const Real r = part.inverse_deviation(c.layer.number);
    for (int64_t k = first + threadIdx.x % 32; k < end; k += 32)
      saved(kMean, k) = part.mean, saved(kInverse, k) = r;
  }
  __device__ void take(const Real*) {
    this->take_fwd();
    scale = this->gamma(channel), shift = this->beta(channel);
  }
  __device__ int64_t to(unsigned q) const { return this->out(q); }
  __device__ Real apply(unsigned q) const { return scale * this->xhat(this->in(q)) + shift; }
};

template <class Real>
struct GroupNormBwd : GroupNormSample<Real> {
  using Base = GroupNormSample<Real>;
  using Base::Base, Base::c, Base::channel, Base::kDy, Base::kDyXhat, Base::saved;
  using Part = Sums<Real>;
  Real scale, p, q;

  __device__ Part reduce(unsigned first, unsigned step) {
    this->take_fwd();
    return sums_of<Real>(first, this->pixels, step, [&](unsigned pixel, Part& sums) {
      const Real d = c.dy.of(this->t)[this->out(pixel)];
      sums.a += d;
      sums.b += d * this->xhat(this->in(pixel));
    });
  }
  __device__ void keep(const Part& part) const {
    saved(kDy, channel) = part.a, saved(kDyXhat, channel) = part.b;
  }
  __device__ Sums<Real> pq(int64_t first, int64_t end) const {
    return this->group_means(first, end, [&](int64_t k) {
      return Sums<Real>{this->gamma(k) * saved(kDy, k), this->gamma(k) * saved(kDyXhat, k)};
    });
  }
  __device__ void group(int64_t first, int64_t end, Real* numbers) const {
    const Sums<Real> means = pq(first, end);
    if (threadIdx.x % 32 == 0) numbers[0] = means.a, numbers[1] = means.b;
  }
  __device__ void take(const Real* numbers) {
    this->take_fwd();
    scale = this->gamma(channel), p = numbers[0], q = numbers[1];
  }
  __device__ int64_t to(unsigned pixel) const { return this->in(pixel); }
  __device__ Real apply(unsigned pixel) const {
    return this->r * (scale * c.dy.of(this->t)[this->out(pixel)] - p - this->xhat(this->in(pixel)) * q);
  }
};

template <class Real>
struct GroupNormTfwd : GroupNormSample<Real> {
  using Base = GroupNormSample<Real>;
  using Base::Base, Base::c, Base::channel, Base::kMeanTx, Base::kMeanTxXhat, Base::tsaved;
  using Part = Sums<Real>;
  Real scale, tscale, tshift;

  __device__ Part reduce(unsigned first, unsigned step) {
    this->take_fwd();
    return sums_of<Real>(first, this->pixels, step, [&](unsigned q, Part& sums) {
      const int64_t in = this->in(q);
      const Real tx = c.tx.of(this->t)[in];
      sums.a += tx;
      sums.b += tx * this->xhat(in);
    });
  }
  __device__ void keep(const Part& part) const {
    tsaved(kMeanTx, channel) = part.a, tsaved(kMeanTxXhat, channel) = part.b;
  }
  __device__ void group(int64_t first, int64_t end, Real*) const {
    if (!this->moves) return;
    const Sums<Real> means = this->group_means(
        first, end, [&](int64_t k) { return Sums<Real>{tsaved(kMeanTx, k), tsaved(kMeanTxXhat, k)}; });
    for (int64_t k = first + threadIdx.x % 32; k < end; k += 32)
      tsaved(kMeanTx, k) = means.a, tsaved(kMeanTxXhat, k) = means.b;
  }
  __device__ void take(const Real*) {
    this->take_fwd();
    this->take_tfwd();
    scale = this->gamma(channel), tscale = this->tgamma(channel), tshift = this->tbeta(channel);
  }
  __device__ int64_t to(unsigned q) const { return this->out(q); }
  __device__ Real apply(unsigned q) const {
    const int64_t in = this->in(q);
    const Real xhat = this->xhat(in);
    return tscale * xhat + scale * this->txhat(xhat, in) + tshift;
  }
};

template <class Real>
struct GroupNormTbwd : GroupNormBwd<Real> {
  using Base = GroupNormBwd<Real>;
  using Base::Base, Base::c, Base::channel, Base::kDy, Base::kDyXhat, Base::kTdy, Base::kTdyXhat, Base::saved,
      Base::tsaved;
  using Part = Sums<Real>;
  Real tscale, tp, tq;

  __device__ Part reduce(unsigned first, unsigned step) {
    this->take_fwd();
    this->take_tfwd();
    return sums_of<Real>(first, this->pixels, step, [&](unsigned pixel, Part& sums) {
      const int64_t in = this->in(pixel), out = this->out(pixel);
      const Real td = c.tdy.of(this->t)[out], xhat = this->xhat(in);
      sums.a += td;
      sums.b += td * xhat + c.dy.of(this->t)[out] * this->txhat(xhat, in);
    });
  }
  __device__ void keep(const Part& part) const {
    tsaved(kTdy, channel) = part.a, tsaved(kTdyXhat, channel) = part.b;
  }
  __device__ void group(int64_t first, int64_t end, Real* numbers) const {
    Base::group(first, end, numbers);
    const Sums<Real> means = this->group_means(first, end, [&](int64_t k) {
      const Real gamma = this->gamma(k), tgamma = this->tgamma(k);
      return Sums<Real>{tgamma * saved(kDy, k) + gamma * tsaved(kTdy, k),
                        tgamma * saved(kDyXhat, k) + gamma * tsaved(kTdyXhat, k)};
    });
    if (threadIdx.x % 32 == 0) numbers[2] = means.a, numbers[3] = means.b;
  }
  __device__ void take(const Real* numbers) {
    Base::take(numbers);
    this->take_tfwd();
    tscale = this->tgamma(channel), tp = numbers[2], tq = numbers[3];
  }
  __device__ Real apply(unsigned pixel) const {
    const int64_t in = this->in(pixel), out = this->out(pixel);
    const Real d = c.dy.of(this->t)[out], xhat = this->xhat(in), r = this->r;
    const Real u = this->scale * d - this->p - xhat * this->q;
    const Real tv = tscale * d + this->scale * c.tdy.of(this->t)[out];
    const Real tu = tv - tp - this->txhat(xhat, in) * this->q - xhat * tq;
    return r * (tu - r * this->tc * u);
  }
};

// `results`: y, dx, ty or tdx; null where only the sums are wanted.
template <class Function, class Real>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    group_norm_kernel(const Call<Real> c, const Domain pixels, unsigned groups_of_block, bool reduces,
                      const Batch<Real> results) {
  using Part = typename Function::Part;
  METAFAST_SHARED(Part, shared, [kNormThreads]);
  METAFAST_SHARED(Real, numbers, [kMostGroups][4]);
  const unsigned lane = threadIdx.x % kGroupLanes, row = threadIdx.x / kGroupLanes;
  const int64_t size = c.in.c / c.layer.groups, first_group = int64_t(blockIdx.x) * groups_of_block;
  const int64_t left = c.layer.groups - first_group,
                last_group = left <= groups_of_block ? c.layer.groups : first_group + groups_of_block;
  const int64_t first = first_group * size, last = last_group * size;
  for (int64_t s = blockIdx.y; s < c.tasks * c.samples; s += gridDim.y) {
    Function f(c, pixels, s / c.samples, s % c.samples);
    for (int64_t start = first; reduces && start < last; start += kGroupLanes) {
      f.channel = start + lane;
      Part part{};
      if (f.channel < last) part = f.reduce(row, kGroupRows);
      merge_columns<kGroupLanes>(part, shared);
      if (row == 0 && f.channel < last) f.keep(part);
    }
    if (results.null()) continue;
    __syncthreads();  // what the first row has kept
    for (int64_t g = first_group + row; g < last_group; g += kGroupRows)
      f.group(g * size, (g + 1) * size, numbers[g - first_group]);
    __syncthreads();
    Real* const to = results.of(f.t);
    const int64_t end = last == c.in.c ? c.in.pixel : last;  // the last block's is the padding
    for (f.channel = first + lane; f.channel < end; f.channel += kGroupLanes) {
      const bool inside = f.channel < last;
      if (inside) f.take(numbers[(f.channel - first) / size]);
      for (unsigned q = row; q < f.pixels; q += kGroupRows) to[f.to(q)] = inside ? f.apply(q) : Real(0);
    }
  }
}

// dw or tdw from what is kept of each sample, the second half of saved or of tsaved: a thread a channel.
template <class Real>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    group_norm_gradient_kernel(const Call<Real> c, const Batch<const Real> kept, const Batch<Real> gradient) {
  const int64_t k = int64_t(blockIdx.x) * kNormThreads + threadIdx.x, pixel = c.in.pixel;
  if (k >= pixel) return;
  for (int64_t t = blockIdx.y; t < c.tasks; t += gridDim.y) {
    const Real* const from = kept.of(t) + 2 * pixel + k;
    Sums<Real> all{};
    if (k < c.in.c) {
      all = sums_of<Real>(0, unsigned(c.samples), 1, [&](unsigned n, Sums<Real>& sums) {
        sums.merge({from[4 * n * pixel], from[(4 * n + 1) * pixel]});
      });
    }
    gradient.of(t)[k] = all.b;
    gradient.of(t)[pixel + k] = all.a;
  }
}

}  // namespace metafast::METAFAST_GPU
