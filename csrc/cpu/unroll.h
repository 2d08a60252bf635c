// A task from its first inner step to its meta-gradient: forward and backward through a Program, the inner
// loop, and the adjoint recursion
//
//   lam = grad L_query(phi_K);   for k = K-1..0:  lam += H_support(phi_k) lam_g
//
// where lam_g, and what the update rule's own parameters get, is the rule's (rules.h); with query losses at
// earlier steps, v_k L_query(phi_k), their gradients join lam on its way. A Hessian-vector product is
// forward, backward, forward tangent, backward tangent at phi_k. The activations of the last inner step are
// still there when the recursion begins; those of the others are computed again from phi_k, so memory does
// not grow with the steps but by the parameters themselves - unless those of all steps fit in a core's cache,
// when they are kept (engine/build.cpp decides). Compiled once per instruction set; calls nothing outside of
// it, allocates nothing, starts no thread. Tested by tests/engine/ and tests/test_inner_options.py.
#pragma once

#include "job.h"
#include "layers/activation.h"
#include "layers/add.h"
#include "layers/avg_pool.h"
#include "layers/batch_norm.h"
#include "layers/batch_norm_relu_pool.h"
#include "layers/conv.h"
#include "layers/flatten.h"
#include "layers/group_norm.h"
#include "layers/layer_norm.h"
#include "layers/linear_narrow.h"
#include "layers/loss.h"
#include "layers/max_pool.h"
#include "rules.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

template <class Real>
inline const LayerFunctions<Real>& functions_of(Kind kind) {
  switch (kind) {
    case Kind::linear:
    case Kind::conv2d:
      return kConv<Real>;
    case Kind::batch_norm:
      return kBatchNorm<Real>;
    case Kind::layer_norm:
      return kLayerNorm<Real>;
    case Kind::group_norm:
      return kGroupNorm<Real>;
    case Kind::relu:
      return kActivation<Real, Relu>;
    case Kind::leaky_relu:
      return kActivation<Real, LeakyRelu>;
    case Kind::elu:
      return kActivation<Real, Elu>;
    case Kind::tanh:
      return kActivation<Real, Tanh>;
    case Kind::sigmoid:
      return kActivation<Real, Sigmoid>;
    case Kind::gelu:
      return kActivation<Real, Gelu>;
    case Kind::gelu_tanh:
      return kActivation<Real, GeluTanh>;
    case Kind::silu:
      return kActivation<Real, Silu>;
    case Kind::softplus:
      return kActivation<Real, Softplus>;
    case Kind::max_pool:
      return kMaxPool<Real>;
    case Kind::avg_pool:
      return kAvgPool<Real>;
    case Kind::flatten:
      return kFlatten<Real>;
    case Kind::add:
      return kAdd<Real>;
    case Kind::batch_norm_relu_pool:
      return kBatchNormReluPool<Real>;
    case Kind::linear_narrow:
      return kLinearNarrow<Real>;
  }
  __builtin_unreachable();
}

// A Program on one pass's buffers: one task's samples at one set of parameters.
template <class Real>
struct Network {
  const Program& program;
  const Pass& pass;
  const Team* team;
  Real* workspace;
  Real* kept;  // where what a Hessian-vector product needs from forward and backward lies, as workspace
  const Real* input;  // value 0
  const Real* w;      // (params,)

  Real* at(int64_t offset) const { return offset < 0 ? nullptr : workspace + offset; }
  Real* kept_at(int64_t offset) const { return offset < 0 ? nullptr : kept + offset; }
  const Real* value(int32_t v) const { return v == 0 ? input : kept + pass.value[v]; }
  Real* adjoint(int32_t v) const { return kept_at(pass.adjoint[v]); }
  Real* tangent(int32_t v) const { return at(pass.tangent[v]); }
  Real* tadjoint(int32_t v) const { return at(pass.tadjoint[v]); }
  int32_t last() const { return program.value_count - 1; }
  const Value& output() const { return program.values[last()]; }

  // The task's inputs (N, C, H, W) as value 0; where they lie that way already, they are used as they are.
  void set_input(const Real* x) {
    const Value& v = program.values[0];
    if (pass.value[0] < 0) {
      input = x;
      return;
    }
    Real* to = workspace + pass.value[0];
    for (int64_t n = 0; n < pass.samples; ++n) {
      for (int64_t c = 0; c < v.c; ++c) {
        for (int64_t i = 0; i < v.h; ++i) {
          Real* row = to + v.origin + n * v.sample + i * v.row + c;
          for (int64_t j = 0; j < v.w; ++j) row[j * v.pixel] = *x++;
        }
      }
    }
    input = to;
  }

  Call<Real> call(int32_t index, const Real* tw, Real* dw, Real* tdw) const {
    const Layer& l = program.layers[index];
    const bool has = l.params > 0;
    Call<Real> c{};
    c.layer = &l;
    c.in = &program.values[l.in];
    c.in1 = l.in1 < 0 ? nullptr : &program.values[l.in1];
    c.out = &program.values[l.out];
    c.samples = pass.samples;
    c.w = has ? w + l.param : nullptr;
    c.tw = has && tw != nullptr ? tw + l.param : nullptr;
    c.dw = has && dw != nullptr ? dw + l.param : nullptr;
    c.tdw = has && tdw != nullptr ? tdw + l.param : nullptr;
    c.x = value(l.in);
    c.tx = l.in == 0 ? nullptr : tangent(l.in);
    if (l.in1 >= 0) {
      c.x1 = value(l.in1);
      c.tx1 = l.in1 == 0 ? nullptr : tangent(l.in1);
    }
    c.y = kept + pass.value[l.out];
    c.ty = tangent(l.out);
    c.dy = adjoint(l.out);
    c.tdy = tadjoint(l.out);
    c.saved = kept_at(pass.saved[index]);
    c.tsaved = at(pass.tsaved[index]);
    c.scratch = at(pass.scratch);
    c.team = team;
    c.last_lane = c.out->pixel;
    return c;
  }

  // One of a layer's functions, by the team where it is one that the team shares.
  void run(const LayerFunctions<Real>& functions,
           typename LayerFunctions<Real>::Function LayerFunctions<Real>::* which, const Call<Real>& c) const {
    const auto function = functions.*which;
    constexpr double kEach = 10;  // operations for an element, roughly
    const double work = kEach * double(c.samples * c.in->h * c.in->w * c.in->pixel);
    if (team == nullptr || functions.split == Split::none || functions.split == Split::inside) {
      function(c);
    } else if (functions.split == Split::lanes) {
      in_parts(team, c.last_lane / kLanes<Real>, work, [&](int64_t begin, int64_t end) {
        Call<Real> part = c;
        part.first_lane = begin * kLanes<Real>;
        part.last_lane = end * kLanes<Real>;
        function(part);
      });
    } else {
      in_parts(team, c.samples, work, [&](int64_t begin, int64_t end) { function(c.part(begin, end)); });
    }
  }

  void forward() const {
    for (int32_t i = 0; i < program.layer_count; ++i) {
      run(functions_of<Real>(program.layers[i].kind), &LayerFunctions<Real>::fwd,
          call(i, nullptr, nullptr, nullptr));
    }
  }

  // From the output's adjoint to those of all values and to dw (params,), which may be null.
  void backward(Real* dw) const {
    for (int32_t i = program.layer_count - 1; i >= 0; --i) {
      const Layer& l = program.layers[i];
      if (!l.live) continue;
      Call<Real> c = call(i, nullptr, dw, nullptr);
      c.dx = target(l.dx, l.in, adjoint(l.in));
      c.dx1 = l.in1 < 0 ? nullptr : target(l.dx1, l.in1, adjoint(l.in1));
      run(functions_of<Real>(l.kind), &LayerFunctions<Real>::bwd, c);
      arrive(l.dx, l.in, c.dx, adjoint(l.in));
      if (l.in1 >= 0) arrive(l.dx1, l.in1, c.dx1, adjoint(l.in1));
    }
  }

  // Tangents of all values along tw (params,), the input's being zero.
  void forward_tangent(const Real* tw) const {
    for (int32_t i = 0; i < program.layer_count; ++i) {
      const Layer& l = program.layers[i];
      if (l.live) run(functions_of<Real>(l.kind), &LayerFunctions<Real>::tfwd, call(i, tw, nullptr, nullptr));
    }
  }

  void backward_tangent(const Real* tw, Real* tdw) const {
    for (int32_t i = program.layer_count - 1; i >= 0; --i) {
      const Layer& l = program.layers[i];
      if (!l.live) continue;
      Call<Real> c = call(i, tw, nullptr, tdw);
      c.tdx = target(l.dx, l.in, tadjoint(l.in));
      c.tdx1 = l.in1 < 0 ? nullptr : target(l.dx1, l.in1, tadjoint(l.in1));
      run(functions_of<Real>(l.kind), &LayerFunctions<Real>::tbwd, c);
      arrive(l.dx, l.in, c.tdx, tadjoint(l.in));
      if (l.in1 >= 0) arrive(l.dx1, l.in1, c.tdx1, tadjoint(l.in1));
    }
  }

  // The loss of the outputs; their adjoint where `wants_adjoint`.
  Real loss(Targets<Real> y, bool wants_adjoint) const {
    return loss_gradient<Real>(program.loss, output(), pass.samples, value(last()), y,
                               wants_adjoint ? adjoint(last()) : nullptr, at(pass.scratch));
  }

  // product = H direction, after forward, loss and backward.
  void hessian_vector(const Real* direction, Real* product) const {
    forward_tangent(direction);
    loss_gradient_tangent<Real>(program.loss, output(), pass.samples, value(last()), tangent(last()),
                                tadjoint(last()));
    backward_tangent(direction, product);
  }

  void set_adjoint(const Real* cotangent) const {
    const Value& v = output();
    for (int64_t n = 0; n < pass.samples; ++n) {
      Real* to = adjoint(last()) + v.origin + n * v.sample;
      for (int64_t c = 0; c < v.pixel; ++c) to[c] = c < v.c ? cotangent[n * v.c + c] : Real(0);
    }
  }

  void copy_outputs(Real* logits) const {
    const Value& v = output();
    for (int64_t n = 0; n < pass.samples; ++n) {
      const Real* from = value(last()) + v.origin + n * v.sample;
      for (int64_t c = 0; c < v.c; ++c) logits[n * v.c + c] = from[c];
    }
  }

  // Share of samples whose largest output is their label's; the first of equals counts, as torch.argmax has
  // it.
  Real accuracy(const int64_t* labels) const {
    const Value& v = output();
    int64_t right = 0;
    for (int64_t n = 0; n < pass.samples; ++n) {
      const Real* f = value(last()) + v.origin + n * v.sample;
      int64_t best = 0;
      for (int64_t c = 1; c < v.c; ++c) best = f[c] > f[best] ? c : best;
      right += best == labels[n];
    }
    return Real(right) / Real(pass.samples);
  }

 private:
  Real* target(Destination destination, int32_t v, Real* sum) const {
    if (destination == Destination::none) return nullptr;
    return destination == Destination::overwrite ? sum : workspace + pass.extra[v];
  }
  void arrive(Destination destination, int32_t v, const Real* extra, Real* to) const {
    if (destination != Destination::add) return;
    const int64_t count = pass.samples * program.values[v].sample;
    for (int64_t i = 0; i < count; i += kLanes<Real>) store(to + i, load(to + i) + load(extra + i));
  }
};

// The targets from a sample on, counted through all tasks.
template <class Real>
inline Targets<Real> targets_of(const Data<Real>& data, int64_t sample, int64_t outputs) {
  return {data.labels == nullptr ? nullptr : data.labels + sample,
          data.values == nullptr ? nullptr : data.values + sample * outputs};
}

// to += factor * from.
template <class Real>
inline void add_scaled(int64_t count, Real factor, const Real* from, Real* to) {
  const Vec<Real> by = splat(factor);
  for (int64_t i = 0; i < count; i += kLanes<Real>) store(to + i, load(to + i) + by * load(from + i));
}

template <class Real, template <class> class Rule>
void meta_step(const Job<Real>& job, int64_t task, Real* workspace) {
  const Program& program = *job.program;
  const WorkspaceLayout& layout = *job.layout;
  const Value &in = program.values[0], &out = program.values[program.value_count - 1];
  const int64_t pixels = in.c * in.h * in.w, params = program.params, steps = job.steps;
  Network<Real> support{program, layout.support, job.team, workspace, workspace, nullptr, job.theta};
  Network<Real> query{program, layout.query, job.team, workspace, workspace, nullptr, job.theta};
  Real *const product = workspace + layout.product, *const direction = workspace + layout.direction;
  const auto phi = [&](int64_t k) { return k == 0 ? job.theta : workspace + layout.tape + (k - 1) * params; };
  const bool wants_gradient = job.gradient != nullptr;
  Rule<Real> rule(job, task, workspace + layout.rule);

  Targets<Real> support_y{};
  const auto go_to = [&](int64_t k) {  // the parameters, the batch and the place of step k
    if (k == 0 || job.batches > 1) {
      const int64_t first = (task * job.batches + k % job.batches) * layout.support.samples;
      support.set_input(job.support.x + first * pixels);
      support_y = targets_of(job.support, first, out.c);
    }
    support.w = phi(k);
    support.kept = workspace + k * layout.kept;
  };
  const int64_t first = task * layout.query.samples;
  const Targets<Real> query_y = targets_of(job.query, first, out.c);
  query.set_input(job.query.x + first * pixels);

  // With a cotangent of the outputs, which are the last step's, losses do not matter.
  const Real* const v = job.cotangent == nullptr ? job.query_weights : nullptr;
  Real* const query_tape = workspace + layout.query_tape;
  Real loss = 0;
  for (int64_t k = 0; k < steps; ++k) {
    go_to(k);
    support.forward();
    support.loss(support_y, true);
    support.backward(product);
    rule.step(k, support.w, product, workspace + layout.tape + k * params);
    if (v == nullptr || k + 1 == steps || v[k] == 0) continue;
    query.w = phi(k + 1);
    query.forward();
    loss += v[k] * query.loss(query_y, wants_gradient);
    if (wants_gradient) query.backward(query_tape + k * params);
  }

  query.w = phi(steps);
  query.forward();
  if (job.logits != nullptr) query.copy_outputs(job.logits + first * out.c);
  const Real last = v == nullptr ? Real(1) : v[steps - 1];
  loss += last * query.loss(query_y, wants_gradient);
  if (job.losses != nullptr) job.losses[task] = loss;
  if (job.accuracy != nullptr) job.accuracy[task] = query.accuracy(query_y.labels);
  if (!wants_gradient) return;
  if (job.cotangent != nullptr) query.set_adjoint(job.cotangent + first * out.c);

  // lam stays in the workspace, where the lanes that nobody writes are zero.
  Real *const lam = workspace + layout.w, *const gradient = job.gradient + task * params;
  query.backward(lam);
  if (last != 1) {
    for (int64_t i = 0; i < params; i += kLanes<Real>) store(lam + i, last * load(lam + i));
  }
  Real* sum = lam;  // where lam goes next
  for (int64_t k = steps - 1; k >= 0; --k) {
    const bool there = k == steps - 1 || layout.kept > 0;
    if (rule.wants_g() || !job.first_order) {
      go_to(k);
      if (!there) {
        support.forward();
        support.loss(support_y, true);
      }
    }
    if (rule.wants_g()) {
      if (k != steps - 1) support.backward(product);  // the last step's g is there still
    } else if (!job.first_order && !there) {
      support.backward(nullptr);
    }
    const Pull<Real> pull = rule.pull(k, lam, product, direction);
    if (job.truncate > 0 && k > 0 && k % job.truncate == 0) {
      std::fill_n(lam, params, Real(0));
      rule.cut();
    } else if (!job.first_order) {
      sum = k == 0 ? gradient : lam;
      support.hessian_vector(pull.along, product);
      const Vec<Real> factor = splat(pull.factor);
      for (int64_t i = 0; i < params; i += kLanes<Real>)
        store(sum + i, load(lam + i) + factor * load(product + i));
    }
    if (v != nullptr && k > 0 && v[k - 1] != 0)
      add_scaled(params, v[k - 1], query_tape + (k - 1) * params, lam);
  }
  rule.end();
  if (sum == gradient) return;
  for (int64_t i = 0; i < params; i += kLanes<Real>) store(gradient + i, load(lam + i));
}

// All but meta_step: one network at the task's own parameters.
template <class Real>
void single(const Job<Real>& job, int64_t task, Real* workspace) {
  const Program& program = *job.program;
  const WorkspaceLayout& layout = *job.layout;
  const bool on_support = job.what == What::gradient || job.what == What::hvp;
  const Pass& pass = on_support ? layout.support : layout.query;
  const Data<Real>& data = on_support ? job.support : job.query;
  const Value &in = program.values[0], &out = program.values[program.value_count - 1];
  Real *const w = workspace + layout.w, *const product = workspace + layout.product;
  to_engine(program, job.phi + task * job.phi_stride, job.constants, w);
  Network<Real> network{program, pass, job.team, workspace, workspace, nullptr, w};
  network.set_input(data.x + task * pass.samples * in.c * in.h * in.w);
  network.forward();
  switch (job.what) {
    case What::outputs:
      network.copy_outputs(job.logits + task * pass.samples * out.c);
      return;
    case What::pullback:
      network.set_adjoint(job.cotangent + task * pass.samples * out.c);
      network.backward(product);
      break;
    case What::gradient: {
      const Real loss = network.loss(targets_of(data, task * pass.samples, out.c), true);
      if (job.losses != nullptr) job.losses[task] = loss;
      network.backward(product);
      break;
    }
    default: {  // hvp
      network.loss(targets_of(data, task * pass.samples, out.c), true);
      network.backward(nullptr);
      Real* const direction = workspace + layout.direction;
      to_engine<Real>(program, job.vector + task * program.adapting, nullptr, direction);
      network.hessian_vector(direction, product);
    }
  }
  to_user(program, product, job.gradient + task * program.adapting);
}

template <class Real>
void weighted_sum(const Real* rows, int64_t tasks, int64_t size, const Real* weights, int64_t begin,
                  int64_t end, Real* sums) {
  int64_t i = begin;
  constexpr int kL = kLanes<Real>;
  for (; i + kL <= end; i += kL) {
    Vec<Real> sum{};
    for (int64_t t = 0; t < tasks; ++t) sum += weights[t] * load(rows + t * size + i);
    store(sums + i, sum);
  }
  for (; i < end; ++i) {
    Real sum = 0;
    for (int64_t t = 0; t < tasks; ++t) sum += weights[t] * rows[t * size + i];
    sums[i] = sum;
  }
}

template <class Real>
void run_task(const Job<Real>& job, int64_t task, Real* workspace) {
  if (job.what == What::meta_step) {
    job.learned == nullptr ? meta_step<Real, PlainRule>(job, task, workspace)
                           : meta_step<Real, LearnedRule>(job, task, workspace);
  } else {
    single(job, task, workspace);
  }
}

template <class Real>
constexpr EngineFunctions<Real> kEngineFunctions{to_engine<Real>, to_user<Real>, rule_workspace<Real>,
                                                 run_task<Real>, weighted_sum<Real>};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
