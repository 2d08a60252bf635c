// Meta-steps of one inner step at one rate, without wide linear layers' weights, gradients or directions of
// tasks' own. With N support samples these are thin: where h (N, C) goes into a layer and d (N, D) is -rate
// times the gradient of what comes out,
//
//   W_t = W + h^T d           x W_t = x W + A d,  A = x h^T       e W_t^T = e W^T + B h,  B = e d^T
//
// so that all tasks share the matrices of large products, W and W^T; and with x and e the same of the
// queries, whose gradient x^T e is the direction of the Hessian-vector product, of tangents th and td,
//
//   ty = th W + A^T e         tdx = td W^T + B^T x                meta-gradient = x^T e + h^T td + th^T d
//
// where a bias is one more input that is 1. With e times the task's weight, sums over tasks are sums over
// more samples. All other layers do as engine/unroll.h has it, by their four functions: for one task after
// the other where they have parameters or a task's statistics, else for several at once. Tested by
// tests/engine/test_one_step.py.
#pragma once

#include "../engine/carver.h"
#include "../engine/one_step.h"
#include "job.h"
#include "network.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// (params,) where gradients go: added to what is there, or in its place.
template <class Real>
struct GradientRow {
  Real* at;
  bool adds;
};

template <class Real>
class OneStep {
 public:
  // `count` tasks from `first` on, of `supports` and `queries` samples each. `known` as Network has it. With
  // no workspace it only tells the size.
  OneStep(const Job<Real>& job, int64_t first, int64_t count, int64_t supports, int64_t queries,
          Real* workspace, const Real* known, GradientRow<Real> row)
      : job_(job),
        program_(*job.program),
        row_(row),
        first_(first),
        tasks_(count),
        support_n_(supports),
        query_n_(queries),
        support_pass_(pass_of(workspace == nullptr ? nullptr : &job.layout->support, supports * count)),
        query_pass_(pass_of(workspace == nullptr ? nullptr : &job.layout->query, queries * count)),
        support_{program_, support_pass_, job.team, workspace, workspace, known, nullptr, job.theta},
        query_{program_, query_pass_, job.team, workspace, workspace, nullptr, nullptr, job.theta} {
    using C = Carver<Real>;
    C carver(workspace == nullptr ? nullptr : workspace + job.layout->rule);
    int64_t widest = 0;
    for (int32_t v = 0; v < program_.value_count; ++v) widest = std::max(widest, program_.values[v].c);
    support_row_ = C::whole(supports), query_row_ = C::whole(queries);
    const int64_t products = program_.layer_count * job.together * queries * support_row_;
    forth_ = carver.take(products);
    back_ = carver.take(products);
    transposed_ = carver.take(std::max(widest * support_row_, supports * query_row_));
    ones_ = carver.take(support_row_);
    own_ = carver.take(job.together * program_.params);
    along_ = carver.take(job.together * program_.params);
    size_ = carver.size();
  }
  int64_t size() const { return size_; }

  void run() {
    const int64_t pixels = program_.values[0].c * program_.values[0].h * program_.values[0].w;
    support_.set_input(job_.support.x + first_ * support_n_ * pixels);
    query_.set_input(job_.query.x + first_ * query_n_ * pixels);
    std::fill_n(ones_, support_n_, Real(1));
    support_forward();
    support_backward();
    query_forward();
    query_losses();
    if (job_.gradient == nullptr) return;
    query_backward();
    if (!job_.first_order) {
      support_forward_tangent();
      support_backward_tangent();
    }
    add_gradient();
  }

 private:
  using Functions = LayerFunctions<Real>;
  using Function = typename Functions::Function Functions::*;

  // A wide layer's factors in the products above, of the first task; rows of x, h, th lie `from` apart, those
  // of the others `to`.
  struct Wide {
    int64_t inputs, outputs, from, to, lanes_in, lanes_out;
    const Real *w, *transposed, *bias;  // theta's
    const Real *h, *x, *th, *d, *e, *td;
    bool relu, gated, has_bias;
  };
  Wide wide(int32_t i) const {
    const Layer& l = program_.layers[i];
    const Value &in = program_.values[l.in], &out = program_.values[l.out];
    Wide s;
    s.inputs = in.c, s.outputs = out.c, s.from = in.sample, s.to = out.sample;
    s.lanes_in = lanes_of<Real>(in.c), s.lanes_out = lanes_of<Real>(out.c);
    s.w = job_.theta + l.param, s.transposed = support_.kept_at(support_pass_.saved[i]);
    s.bias = l.bias ? s.w + in.c * out.pixel : nullptr;
    s.h = support_.value(l.in), s.x = query_.value(l.in);
    s.th = l.in == 0 ? nullptr : support_.tangent(l.in);
    s.d = support_.adjoint(l.out), s.e = query_.adjoint(l.out), s.td = support_.tadjoint(l.out);
    s.relu = l.relu != 0, s.gated = l.gated != 0, s.has_bias = l.bias != 0 && l.bias_cancels == 0;
    return s;
  }
  bool is_wide(const Layer& l) const { return metafast::is_wide(program_, l, support_n_, query_n_); }
  static bool is_norm(const Layer& l) {
    return l.kind == Kind::batch_norm || l.kind == Kind::batch_norm_relu_pool || l.kind == Kind::layer_norm ||
           l.kind == Kind::group_norm;
  }

  static Pass pass_of(const Pass* whole, int64_t samples) {
    Pass pass = whole == nullptr ? Pass{} : *whole;
    pass.samples = samples;
    return pass;
  }
  // Of tasks: parameters after the step, and later the Hessian-vector product; the query's gradient. Only
  // those of layers that are not wide are there.
  Real* own(int64_t t) const { return own_ + t * program_.params; }
  Real* along(int64_t t) const { return along_ + t * program_.params; }
  Real* forth(int32_t layer, int64_t t) const { return forth_ + product_at(layer, t); }
  Real* back(int32_t layer, int64_t t) const { return back_ + product_at(layer, t); }
  int64_t product_at(int32_t layer, int64_t t) const {
    return (int64_t(layer) * job_.together + t) * query_n_ * support_row_;
  }

  // A layer that is not wide: prepare(call, task) where it is called for each task, after which comes
  // finish(call).
  template <class Prepare, class Finish>
  void run_other(const Network<Real>& network, Function which, const Call<Real>& whole,
                 const Prepare& prepare, const Finish& finish) const {
    const Layer& l = *whole.layer;
    const Functions& functions = functions_of<Real>(l.kind);
    if (l.params == 0 && !is_norm(l)) return network.run(functions, which, whole);
    const int64_t samples = whole.samples / tasks_;
    // What norms save is a task's; what linear layers save are their weights transposed, once for all tasks
    // or written for each.
    const int64_t saved =
        is_norm(l) ? Carver<Real>::whole(l.saved_per_sample * samples + l.saved_per_layer) : 0;
    for (int64_t t = 0; t < tasks_; ++t) {
      Call<Real> c = whole.part(t * samples, (t + 1) * samples);
      c.saved += t * saved;
      if (c.tsaved != nullptr) c.tsaved += t * saved;
      if (l.params > 0) prepare(c, t);
      network.run(functions, which, c);
      if (l.params > 0) finish(c);
    }
  }
  template <class Prepare>
  void run_other(const Network<Real>& network, Function which, const Call<Real>& whole,
                 const Prepare& prepare) const {
    run_other(network, which, whole, prepare, [](const Call<Real>&) {});
  }

  void support_forward() const {
    for (int32_t i = 0; i < program_.layer_count; ++i) {
      const Call<Real> whole = support_.call(i, nullptr, nullptr, nullptr);
      if (is_norm(*whole.layer)) {
        run_other(support_, &Functions::fwd, whole, [](const Call<Real>&, int64_t) {});
      } else {
        support_.run(functions_of<Real>(whole.layer->kind), &Functions::fwd, whole);
      }
    }
  }

  // All adjoints times -rate, and theta plus what they give.
  void support_backward() const {
    const Value& v = support_.output();
    const int32_t last = support_.last();
    for (int64_t t = 0; t < tasks_; ++t) {
      const int64_t at = t * support_n_ * v.sample;
      loss_gradient<Real>(program_.loss, v, support_n_, support_.value(last) + at,
                          targets_of(job_.support, (first_ + t) * support_n_, v.c),
                          support_.adjoint(last) + at, support_.at(support_pass_.scratch));
    }
    scale(-job_.rate, support_.adjoint(last), tasks_ * support_n_ * v.sample);
    support_.template each_backward<false>(nullptr, nullptr, nullptr, [&](int32_t, const Call<Real>& whole) {
      const Layer& l = *whole.layer;
      if (is_wide(l)) return linear_bwd(whole);  // dx, not dw
      run_other(
          support_, &Functions::bwd, whole,
          [&](Call<Real>& c, int64_t t) {
            c.dw = own(t) + l.param;
            c.w_is_known |= t > 0;
          },
          [&](const Call<Real>& c) {
            for (int64_t i = 0; i < l.params; i += kLanes<Real>)
              store(c.dw + i, load(c.w + i) + load(c.dw + i));
          });
    });
  }

  void query_forward() const {
    for (int32_t i = 0; i < program_.layer_count; ++i) {
      const Call<Real> whole = query_.call(i, nullptr, nullptr, nullptr);
      const Layer& l = *whole.layer;
      if (!is_wide(l)) {
        run_other(query_, &Functions::fwd, whole, [&](Call<Real>& c, int64_t t) { c.w = own(t) + l.param; });
        continue;
      }
      const Wide s = wide(i);
      Real* const y = whole.y;
      multiply_rows({s.x, s.w, s.from, whole.out->pixel, s.inputs}, s.bias, query_n_ * tasks_, s.lanes_out, y,
                    s.to);
      for (int64_t t = 0; t < tasks_; ++t) {
        const int64_t n = t * support_n_, q = t * query_n_;
        transpose_inputs(l, s, s.h + n * s.from);
        multiply_rows({s.x + q * s.from, transposed_, s.from, support_row_, s.inputs},
                      s.has_bias ? ones_ : nullptr, query_n_, lanes_of<Real>(support_n_), forth(i, t),
                      support_row_);
        add_rows({forth(i, t), s.d + n * s.to, support_row_, s.to, support_n_}, query_n_, s.lanes_out, s.relu,
                 nullptr, y + q * s.to, s.to);
      }
    }
  }

  // Losses, logits, accuracy, and the output's adjoint times the task's weight.
  void query_losses() const {
    const Value& v = query_.output();
    const int32_t last = query_.last();
    const bool wants_adjoint = job_.gradient != nullptr;
    if (job_.logits != nullptr) query_.copy_outputs(job_.logits + first_ * query_n_ * v.c);
    for (int64_t t = 0; t < tasks_; ++t) {
      const int64_t at = t * query_n_ * v.sample, task = first_ + t;
      const Targets<Real> y = targets_of(job_.query, task * query_n_, v.c);
      const Real* const outputs = query_.value(last) + at;
      const Real loss = loss_gradient<Real>(program_.loss, v, query_n_, outputs, y,
                                            wants_adjoint ? query_.adjoint(last) + at : nullptr,
                                            query_.at(query_pass_.scratch));
      if (job_.losses != nullptr) job_.losses[task] = loss;
      if (job_.accuracy != nullptr)
        job_.accuracy[task] = accuracy_of(outputs + v.origin, query_n_, v.c, v.sample, y.labels);
    }
    if (!wants_adjoint) return;
    if (job_.cotangent != nullptr) query_.set_adjoint(job_.cotangent + first_ * query_n_ * v.c);
    for (int64_t t = 0; job_.weights != nullptr && t < tasks_; ++t)
      scale(job_.weights[first_ + t], query_.adjoint(last) + t * query_n_ * v.sample, query_n_ * v.sample);
  }

  void query_backward() const {
    query_.template each_backward<false>(nullptr, nullptr, nullptr, [&](int32_t i, const Call<Real>& whole) {
      const Layer& l = *whole.layer;
      if (!is_wide(l)) {
        return run_other(query_, &Functions::bwd, whole, [&](Call<Real>& c, int64_t t) {
          c.w = own(t) + l.param;
          c.dw = along(t) + l.param;
        });
      }
      if (whole.dx == nullptr) return;
      const Wide s = wide(i);
      multiply_rows({s.e, s.transposed, s.to, whole.in->pixel, s.outputs}, nullptr, query_n_ * tasks_,
                    s.lanes_in, whole.dx, s.from);
      for (int64_t t = 0; t < tasks_; ++t) {
        const int64_t n = t * support_n_, q = t * query_n_;
        transpose(s.d + n * s.to, support_n_, s.outputs, s.to, transposed_, support_row_);
        multiply_rows({s.e + q * s.to, transposed_, s.to, support_row_, s.outputs}, nullptr, query_n_,
                      lanes_of<Real>(support_n_), back(i, t), support_row_);
        add_rows({back(i, t), s.h + n * s.from, support_row_, s.from, support_n_}, query_n_, s.lanes_in,
                 false, s.gated ? s.x + q * s.from : nullptr, whole.dx + q * s.from, s.from);
      }
      clear_padding(whole, whole.dx);
    });
  }

  // Along the query's gradient.
  void support_forward_tangent() const {
    for (int32_t i = 0; i < program_.layer_count; ++i) {
      const Layer& l = program_.layers[i];
      if (!l.live) continue;
      const Call<Real> whole = support_.call(i, nullptr, nullptr, nullptr);
      if (!is_wide(l)) {
        run_other(support_, &Functions::tfwd, whole,
                  [&](Call<Real>& c, int64_t t) { c.tw = along(t) + l.param; });
        continue;
      }
      const Wide s = wide(i);
      if (s.th != nullptr) {
        multiply_rows({s.th, s.w, s.from, whole.out->pixel, s.inputs}, nullptr, support_n_ * tasks_,
                      s.lanes_out, whole.ty, s.to);
      } else {
        std::fill_n(whole.ty, support_n_ * tasks_ * s.to, Real(0));
      }
      for (int64_t t = 0; t < tasks_; ++t) {
        const int64_t n = t * support_n_ * s.to;
        add_rows(transposed(forth(i, t), s.e + t * query_n_ * s.to, s.to), support_n_, s.lanes_out, false,
                 s.relu ? whole.y + n : nullptr, whole.ty + n, s.to);
      }
    }
  }

  void support_backward_tangent() const {
    const Value& v = support_.output();
    const int32_t last = support_.last();
    for (int64_t t = 0; t < tasks_; ++t) {
      const int64_t at = t * support_n_ * v.sample;
      loss_gradient_tangent<Real>(program_.loss, v, support_n_, support_.value(last) + at,
                                  support_.tangent(last) + at, support_.tadjoint(last) + at);
    }
    scale(-job_.rate, support_.tadjoint(last), tasks_ * support_n_ * v.sample);
    support_.template each_backward<true>(nullptr, nullptr, nullptr, [&](int32_t i, const Call<Real>& whole) {
      const Layer& l = *whole.layer;
      if (!is_wide(l)) {
        return run_other(support_, &Functions::tbwd, whole, [&](Call<Real>& c, int64_t t) {
          c.tw = along(t) + l.param;
          c.tdw = own(t) + l.param;
        });
      }
      if (whole.tdx == nullptr) return;
      const Wide s = wide(i);
      multiply_rows({s.td, s.transposed, s.to, whole.in->pixel, s.outputs}, nullptr, support_n_ * tasks_,
                    s.lanes_in, whole.tdx, s.from);
      for (int64_t t = 0; t < tasks_; ++t) {
        const int64_t n = t * support_n_ * s.from;
        add_rows(transposed(back(i, t), s.x + t * query_n_ * s.from, s.from), support_n_, s.lanes_in, false,
                 s.gated ? s.h + n : nullptr, whole.tdx + n, s.from);
      }
      clear_padding(whole, whole.tdx);
    });
  }

  void add_gradient() const {
    const auto [row, adds] = row_;
    for (int32_t i = 0; i < program_.layer_count; ++i) {
      const Layer& l = program_.layers[i];
      if (l.params == 0) continue;
      if (is_wide(l)) {
        add_wide(i, adds, row + l.param);
        continue;
      }
      for (int64_t k = l.param; k < l.param + l.params; k += kLanes<Real>) {
        Vec<Real> sum = adds ? load(row + k) : Vec<Real>{};
        for (int64_t t = 0; t < tasks_; ++t) {
          sum += load(along(t) + k);
          if (!job_.first_order) sum += load(own(t) + k);
        }
        store(row + k, sum);
      }
    }
  }
  void add_wide(int32_t i, bool adds, Real* to) const {
    const Wide s = wide(i);
    const int64_t lanes = program_.values[program_.layers[i].out].pixel;
    Real* const bias = s.bias == nullptr ? nullptr : to + s.inputs * lanes;
    // x^T g (+ x1^T g1) and the sum of g, added to what is there or in its place.
    const auto add = [&](const Real* x, const Real* g, const Real* x1, const Real* g1, int64_t samples,
                         bool onto) {
      run_outer_product<Real>(job_.team,
                              {.x = x,
                               .g = g,
                               .x_row = s.from,
                               .g_row = s.to,
                               .samples = samples,
                               .d = to,
                               .d_row = lanes,
                               .x1 = x1,
                               .g1 = g1,
                               .onto = {onto ? to : nullptr}},
                              s.inputs, s.lanes_out);
      if (bias == nullptr) return;
      sum_rows(g, s.has_bias ? samples : 0, s.to, lanes, Onto<Real>{onto ? bias : nullptr}, bias);
    };
    add(s.x, s.e, nullptr, nullptr, query_n_ * tasks_, adds);
    if (!job_.first_order) add(s.h, s.td, s.th, s.d, support_n_ * tasks_, true);
    for (int64_t k = 0; !adds && s.lanes_out < lanes && k < s.inputs; ++k)
      std::fill_n(to + k * lanes + s.lanes_out, lanes - s.lanes_out, Real(0));
  }

  // to[n, :] = bias + factors.
  void multiply_rows(const Factors<Real>& factors, const Real* bias, int64_t rows, int64_t columns, Real* to,
                     int64_t to_row) const {
    run_row_product<Real>(job_.team, {.first = factors, .c = to, .c_row = to_row, .bias = bias}, rows,
                          columns);
  }
  // to[n, :] += factors, then what a ReLU does to values, or to gradients.
  void add_rows(const Factors<Real>& factors, int64_t rows, int64_t columns, bool relu, const Real* gate,
                Real* to, int64_t to_row) const {
    run_row_product<Real>(
        job_.team, {.first = factors, .c = to, .c_row = to_row, .add = true, .relu = relu, .gate = gate},
        rows, columns);
  }
  // A^T or B^T, which are transposed for the purpose, times the query's rows.
  Factors<Real> transposed(const Real* matrix, const Real* rows, int64_t row) const {
    transpose(matrix, query_n_, support_n_, support_row_, transposed_, query_row_);
    return {transposed_, rows, query_row_, row, query_n_};
  }
  // h^T. The network's own inputs are no whole vectors.
  void transpose_inputs(const Layer& l, const Wide& s, const Real* h) const {
    if (l.in != 0) return transpose(h, support_n_, s.inputs, s.from, transposed_, support_row_);
    for (int64_t k = 0; k < s.inputs; ++k) {
      Real* const row = transposed_ + k * support_row_;
      for (int64_t n = 0; n < support_row_; ++n) row[n] = n < support_n_ ? h[n * s.from + k] : Real(0);
    }
  }
  // Values hold anything in lanes that are padding, and those of whole vectors were added; gradients hold
  // zeros.
  static void clear_padding(const Call<Real>& c, Real* dx) {
    const int64_t begin = c.in->c, end = lanes_of<Real>(begin);
    for (int64_t n = 0; begin < end && n < c.samples; ++n) {
      for (int64_t k = begin; k < end; ++k) dx[n * c.in->sample + k] = 0;
    }
  }
  static void scale(Real factor, Real* rows, int64_t size) {
    const Vec<Real> by = splat(factor);
    for (int64_t i = 0; i < size; i += kLanes<Real>) store(rows + i, by * load(rows + i));
  }

  const Job<Real>& job_;
  const Program& program_;
  const GradientRow<Real> row_;
  const int64_t first_, tasks_, support_n_, query_n_;
  const Pass support_pass_, query_pass_;  // of the tasks alone
  Network<Real> support_, query_;
  int64_t support_row_, query_row_, size_;
  Real *forth_, *back_;  // of each layer and task (Nq, Ns) in rows of support_row_: A, B
  Real *transposed_, *ones_, *own_, *along_;
};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
