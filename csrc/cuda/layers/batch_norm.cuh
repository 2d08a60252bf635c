// Batch normalisation on CUDA: the equations and what is saved are those of cpu/layers/batch_norm.h; tsaved
// has tdb / M and tdg / M where that leaves room. All four overwrite, y and ty with zeros beyond C.
//
// A block has a vector of channels, 64 bytes of each pixel, of a task. Where the pixels are few it takes
// their statistics and goes on with its channels' elements. Where they are many these are three launches: of
// parts of the pixels, which leave what they found in `scratch`; of what puts that together; of parts of the
// pixels again. Which it is, and the parts, hang on the pixels of a task alone, and so do the bits.
// Tested by tests/engine/test_layers.py.
#pragma once

#include "statistics.cuh"

namespace metafast::METAFAST_GPU {

template <class Real>
constexpr int kNormLanes = kVectorBytes / int(sizeof(Real));
template <class Real>
constexpr int kNormRows = kNormThreads / kNormLanes<Real>;

// What a launch does.
enum NormPhase : int { kReduces = 1, kFinishes = 2, kApplies = 4 };

struct NormLaunch {
  Domain reduced, applied;
  unsigned parts, reduced_of_part;  // of `reduced`
  unsigned applied_of_block;
  int phases;
};

// Numbers of a task's channels, [pixel] each.
enum NormSaved : int { kMean, kInverse, kMeanDy, kMeanDyXhat };
enum NormTsaved : int { kMeanTx, kMeanTxXhat, kMeanTdy, kMeanTdyXhat };

// One channel of one task: what a thread has of it. Others build on it.
// x and tx are read by __ldg where a store before would hold them up.
template <class Real>
struct NormChannel {
  const Call<Real>& c;
  int64_t t, channel;
  bool inside;  // else it is padding

  __device__ NormChannel(const Call<Real>& call, int64_t task, int64_t k)
      : c(call), t(task), channel(k), inside(k < call.in.c) {}

  __device__ Real& saved(NormSaved what) const { return c.saved.of(t)[what * c.in.pixel + channel]; }
  __device__ Real& tsaved(NormTsaved what) const { return c.tsaved.of(t)[what * c.in.pixel + channel]; }
  __device__ Real gamma() const { return c.layer.bias ? c.w.of(t)[channel] : Real(1); }
  __device__ Real beta() const { return c.layer.bias ? c.w.of(t)[c.in.pixel + channel] : Real(0); }
  __device__ Real tgamma() const { return c.layer.bias ? c.tw.of(t)[channel] : Real(0); }
  __device__ Real tbeta() const { return c.layer.bias ? c.tw.of(t)[c.in.pixel + channel] : Real(0); }
  __device__ Real per_pixel() const { return Real(1) / Real(c.samples * c.in.h * c.in.w); }

  // Sums of padding are zeros.
  __device__ void put_gradient(const Batch<Real>& dw, const Sums<Real>& sums) const {
    if (!c.layer.bias || dw.null()) return;
    dw.of(t)[channel] = sums.b;
    dw.of(t)[c.in.pixel + channel] = sums.a;
  }
};

// The four functions: what is reduced over the pixels, what becomes of it, what is done with each pixel.
// take(): from what is saved, before the last; reduce() finds what it needs itself.
template <class Real>
struct BatchNormFwd : NormChannel<Real> {
  using NormChannel<Real>::NormChannel, NormChannel<Real>::c, NormChannel<Real>::t;
  using Part = Moments<Real>;
  Real mean, r, gamma, beta;

  __device__ Part reduce(const Domain& pixels, unsigned first, unsigned end, unsigned step) const {
    const Real* const x = c.x.of(t);
    return moments_of<Real>(first, end, step,
                            [&](unsigned q) { return x[offset(c.in, Place(pixels, q), this->channel)]; });
  }
  __device__ void finish(const Part& all) const {
    this->saved(kMean) = all.mean;
    this->saved(kInverse) = this->inside ? all.inverse_deviation(c.layer.number) : Real(0);
  }
  __device__ void take() {
    mean = this->saved(kMean), r = this->saved(kInverse);
    gamma = NormChannel<Real>::gamma(), beta = NormChannel<Real>::beta();
  }
  __device__ void apply(const Place& at) const {
    const Real xhat = (c.x.of(t)[offset(c.in, at, this->channel)] - mean) * r;
    c.y.of(t)[offset(c.out, at, this->channel)] = this->inside ? gamma * xhat + beta : Real(0);
  }
};

template <class Real>
struct BatchNormBwd : NormChannel<Real> {
  using NormChannel<Real>::NormChannel, NormChannel<Real>::c, NormChannel<Real>::t;
  using Part = Sums<Real>;
  Real mean, r, scale, db, dg;

  __device__ Part reduce(const Domain& pixels, unsigned first, unsigned end, unsigned step) const {
    const Real *const x = c.x.of(t), *const dy = c.dy.of(t);
    const Real m = this->saved(kMean), inverse = this->saved(kInverse);
    return sums_of<Real>(first, end, step, [&](unsigned q, Part& sums) {
      const Place at(pixels, q);
      const Real d = dy[offset(c.out, at, this->channel)];
      sums.a += d;
      sums.b += d * ((x[offset(c.in, at, this->channel)] - m) * inverse);
    });
  }
  __device__ void finish(const Part& all) const {
    this->saved(kMeanDy) = all.a * this->per_pixel();
    this->saved(kMeanDyXhat) = all.b * this->per_pixel();
    this->put_gradient(c.dw, all);
  }
  __device__ void take() {
    mean = this->saved(kMean), r = this->saved(kInverse), scale = this->gamma() * r;
    db = this->saved(kMeanDy), dg = this->saved(kMeanDyXhat);
  }
  // dx of the element at `in`, on whose normalised value dh arrives.
  __device__ void put(int64_t in, Real dh) const {
    const Real u = dh - db - (__ldg(c.x.of(t) + in) - mean) * r * dg;
    c.dx.of(t)[in] = this->inside ? scale * u : Real(0);
  }
  __device__ void apply(const Place& at) const {
    put(offset(c.in, at, this->channel), c.dy.of(t)[offset(c.out, at, this->channel)]);
  }
};

// mean tx and c, after fwd.
template <class Real>
struct NormTangent : NormChannel<Real> {
  using NormChannel<Real>::NormChannel, NormChannel<Real>::c, NormChannel<Real>::t;
  using Part = Sums<Real>;

  __device__ Part reduce(const Domain& pixels, unsigned first, unsigned end, unsigned step) const {
    const Real *const x = c.x.of(t), *const tx = c.tx.of(t);
    const Real m = this->saved(kMean), inverse = this->saved(kInverse);
    return sums_of<Real>(first, end, step, [&](unsigned q, Part& sums) {
      const int64_t in = offset(c.in, Place(pixels, q), this->channel);
      sums.a += tx[in];
      sums.b += tx[in] * ((x[in] - m) * inverse);
    });
  }
  __device__ void finish(const Part& all) const {
    this->tsaved(kMeanTx) = all.a * this->per_pixel();
    this->tsaved(kMeanTxXhat) = all.b * this->per_pixel();
  }
};

template <class Real>
struct BatchNormTfwd : NormTangent<Real> {
  using NormTangent<Real>::NormTangent, NormTangent<Real>::c, NormTangent<Real>::t;
  bool moves;
  Real mean, r, gamma, tgamma, tbeta, tmean, tc;

  __device__ Real txhat(Real xhat, int64_t in) const {
    return moves ? r * (__ldg(c.tx.of(t) + in) - tmean - xhat * tc) : Real(0);
  }
  __device__ void take() {
    moves = !c.tx.null();
    mean = this->saved(kMean), r = this->saved(kInverse), gamma = NormChannel<Real>::gamma();
    tgamma = NormChannel<Real>::tgamma(), tbeta = NormChannel<Real>::tbeta();
    tmean = moves ? this->tsaved(kMeanTx) : Real(0), tc = moves ? this->tsaved(kMeanTxXhat) : Real(0);
  }
  __device__ void apply(const Place& at) const {
    const int64_t in = offset(c.in, at, this->channel);
    const Real xhat = (c.x.of(t)[in] - mean) * r;
    const Real ty = tgamma * xhat + gamma * txhat(xhat, in) + tbeta;
    c.ty.of(t)[offset(c.out, at, this->channel)] = this->inside ? ty : Real(0);
  }
};

// What tbwd needs to know of a channel after its sums, here and in batch_norm_relu_pool.
template <class Real>
struct NormTbwd : NormChannel<Real> {
  using NormChannel<Real>::NormChannel, NormChannel<Real>::c, NormChannel<Real>::t;
  using Part = Sums<Real>;
  bool moves;
  Real mean, r, scale, tscale, db, dg, tdb, tdg, tmean, tc;

  __device__ void finish(const Part& all) const {
    this->tsaved(kMeanTdy) = all.a * this->per_pixel();
    this->tsaved(kMeanTdyXhat) = all.b * this->per_pixel();
    this->put_gradient(c.tdw, all);
  }
  __device__ void take() {
    take_before();
    scale = this->gamma() * r;
    tscale = (this->tgamma() - scale * tc) * r;
    db = this->saved(kMeanDy), dg = this->saved(kMeanDyXhat);
    tdb = this->tsaved(kMeanTdy), tdg = this->tsaved(kMeanTdyXhat);
  }
  // What is known before the sums.
  __device__ void take_before() {
    moves = !c.tx.null();
    mean = this->saved(kMean), r = this->saved(kInverse);
    tmean = moves ? this->tsaved(kMeanTx) : Real(0), tc = moves ? this->tsaved(kMeanTxXhat) : Real(0);
  }
  __device__ Real txhat(Real xhat, int64_t in) const {
    return moves ? r * (__ldg(c.tx.of(t) + in) - tmean - xhat * tc) : Real(0);
  }
  // tdx of the element at `in`, on whose normalised value dh and tdh arrive.
  __device__ void put(int64_t in, Real dh, Real tdh) const {
    const Real xhat = (__ldg(c.x.of(t) + in) - mean) * r;
    const Real u = dh - db - xhat * dg;
    const Real tu = tdh - tdb - xhat * tdg - txhat(xhat, in) * dg;
    c.tdx.of(t)[in] = this->inside ? scale * tu + tscale * u : Real(0);
  }
};

template <class Real>
struct BatchNormTbwd : NormTbwd<Real> {
  using NormTbwd<Real>::NormTbwd, NormTbwd<Real>::c, NormTbwd<Real>::t;
  using Part = Sums<Real>;

  __device__ Part reduce(const Domain& pixels, unsigned first, unsigned end, unsigned step) {
    this->take_before();
    return sums_of<Real>(first, end, step, [&](unsigned q, Part& sums) {
      const Place at(pixels, q);
      const int64_t in = offset(c.in, at, this->channel), out = offset(c.out, at, this->channel);
      const Real xhat = (c.x.of(t)[in] - this->mean) * this->r, tdy = c.tdy.of(t)[out];
      sums.a += tdy;
      sums.b += tdy * xhat + c.dy.of(t)[out] * this->txhat(xhat, in);
    });
  }
  __device__ void apply(const Place& at) const {
    const int64_t out = offset(c.out, at, this->channel);
    this->put(offset(c.in, at, this->channel), c.dy.of(t)[out], c.tdy.of(t)[out]);
  }
};

// What a part of the pixels left in `scratch` for the channel, [parts][2][pixel].
template <class Real>
__device__ void put_part(const NormChannel<Real>& of, unsigned part, Real a, Real b) {
  Real* const to = of.c.scratch.of(of.t) + 2 * part * of.c.in.pixel + of.channel;
  to[0] = a;
  to[of.c.in.pixel] = b;
}
template <class Real>
__device__ void put_part(const NormChannel<Real>& of, const NormLaunch&, unsigned part, const Sums<Real>& s) {
  put_part(of, part, s.a, s.b);
}
template <class Real>
__device__ void put_part(const NormChannel<Real>& of, const NormLaunch&, unsigned part,
                         const Moments<Real>& m) {
  put_part(of, part, m.mean, m.squares);
}
template <class Real>
__device__ void get_part(const NormChannel<Real>& of, const NormLaunch&, unsigned part, Sums<Real>& s) {
  const Real* const from = of.c.scratch.of(of.t) + 2 * part * of.c.in.pixel + of.channel;
  s = {from[0], from[of.c.in.pixel]};
}
template <class Real>
__device__ void get_part(const NormChannel<Real>& of, const NormLaunch& l, unsigned part, Moments<Real>& m) {
  const Real* const from = of.c.scratch.of(of.t) + 2 * part * of.c.in.pixel + of.channel;
  const unsigned left = l.reduced.count - part * l.reduced_of_part;
  m = {from[0], from[of.c.in.pixel], left < l.reduced_of_part ? left : l.reduced_of_part};
}

template <class Function, class Real>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    norm_kernel(const Call<Real> c, const NormLaunch l) {
  constexpr int kLanes = kNormLanes<Real>, kRows = kNormRows<Real>;
  using Part = typename Function::Part;
  METAFAST_SHARED(Part, shared, [kNormThreads]);
  const unsigned vectors = unsigned(c.in.pixel / kLanes), share = blockIdx.x / vectors;
  const unsigned row = threadIdx.x / kLanes;
  const int64_t channel = (blockIdx.x - share * vectors) * kLanes + threadIdx.x % kLanes;
  for (int64_t t = blockIdx.y; t < c.tasks; t += gridDim.y) {
    Function f(c, t, channel);
    if (l.phases & (kReduces | kFinishes)) {
      Part part{};
      if (f.inside && (l.phases & kReduces)) {
        const unsigned first = share * l.reduced_of_part, left = l.reduced.count - first;
        const unsigned end = first + (left < l.reduced_of_part ? left : l.reduced_of_part);
        part = f.reduce(l.reduced, first + row, end, kRows);
      } else if (f.inside) {
        for (unsigned from = row; from < l.parts; from += kRows) {
          Part other;
          get_part(f, l, from, other);
          part.merge(other);
        }
      }
      merge_columns<kLanes>(part, shared);
      if (row == 0 && (l.phases & kFinishes)) f.finish(part);
      if (row == 0 && !(l.phases & kFinishes)) put_part(f, l, share, part);
    }
    if (!(l.phases & kApplies)) continue;
    if (l.phases & kFinishes) __syncthreads();  // what the first row has saved
    f.take();
    const unsigned first = share * l.applied_of_block, left = l.applied.count - first;
    const unsigned end = first + (left < l.applied_of_block ? left : l.applied_of_block);
    for (unsigned q = first + row; q < end; q += kRows) f.apply(Place(l.applied, q));
  }
}

}  // namespace metafast::METAFAST_GPU
