// A Program on one pass's buffers: forward, backward and their tangents, layer by layer.
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
#include "layers/linear.h"
#include "layers/linear_narrow.h"
#include "layers/loss.h"
#include "layers/max_pool.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

template <class Real>
inline const LayerFunctions<Real>& functions_of(Kind kind) {
  switch (kind) {
    case Kind::linear:
      return kLinear<Real>;
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

// Share of samples whose largest output is their label's; the first of equals counts, and NaN is above
// all, as torch.argmax has it. Rows of outputs lie `stride` apart.
template <class Real>
Real accuracy_of(const Real* rows, int64_t samples, int64_t outputs, int64_t stride, const int64_t* labels) {
  int64_t right = 0;
  for (int64_t n = 0; n < samples; ++n, rows += stride) {
    int64_t best = 0;
    for (int64_t c = 1; c < outputs; ++c)
      best = rows[best] == rows[best] && !(rows[c] <= rows[best]) ? c : best;
    right += best == labels[n];
  }
  return Real(right) / Real(samples);
}

// to = base + factor * a gradient, all (params,), as `buffer` is, which a layer may leave its gradient in.
template <class Real>
struct Update {
  const Real* base;
  Real factor;
  Real *to, *buffer;
};

// A Program on one pass's buffers: one task's samples at one set of parameters.
template <class Real>
struct Network {
  const Program& program;
  const Pass& pass;
  const Team* team;
  Real* workspace;
  Real* kept;  // where what a Hessian-vector product needs from forward and backward lies, as workspace
  const Real* known;  // at these parameters, on this workspace, backward has run before; null: at none
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
    const auto weights = [&](auto* all) { return has && all != nullptr ? all + l.param : nullptr; };
    const Value *const in = &program.values[l.in], *const out = &program.values[l.out];
    const Value* const in1 = l.in1 < 0 ? nullptr : &program.values[l.in1];
    const auto tangent_of_input = [&](int32_t v) { return v == 0 ? nullptr : tangent(v); };
    // Each field for itself: to clear a call first takes as long as a narrow layer's function.
    return {.layer = &l,
            .in = in,
            .in1 = in1,
            .out = out,
            .samples = pass.samples,
            .w = weights(w),
            .tw = weights(tw),
            .dw = weights(dw),
            .tdw = weights(tdw),
            .x = value(l.in),
            .x1 = in1 == nullptr ? nullptr : value(l.in1),
            .tx = tangent_of_input(l.in),
            .tx1 = in1 == nullptr ? nullptr : tangent_of_input(l.in1),
            .y = kept + pass.value[l.out],
            .ty = tangent(l.out),
            .dy = adjoint(l.out),
            .tdy = tadjoint(l.out),
            .dx = nullptr,
            .dx1 = nullptr,
            .tdx = nullptr,
            .tdx1 = nullptr,
            .saved = kept_at(pass.saved[index]),
            .tsaved = at(pass.tsaved[index]),
            .scratch = at(pass.scratch),
            .onto = {},
            .w_is_known = w == known,
            .team = team,
            .first_lane = 0,
            .last_lane = out->pixel};
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
    each_backward<false>(nullptr, dw, nullptr, [&](int32_t, const Call<Real>& c) {
      run(functions_of<Real>(c.layer->kind), &LayerFunctions<Real>::bwd, c);
    });
  }

  void backward(const Update<Real>& update) const {
    each_backward<false>(nullptr, update.buffer, nullptr, [&](int32_t, Call<Real>& c) {
      run(&LayerFunctions<Real>::bwd, &Call<Real>::dw, update, c);
    });
  }

  // Layers on the way back, and what arrives at their inputs: run(layer's number, call with dx and dx1, or
  // with tdx and tdx1).
  template <bool kTangents, class Run>
  void each_backward(const Real* tw, Real* dw, Real* tdw, const Run& run) const {
    constexpr auto dx = kTangents ? &Call<Real>::tdx : &Call<Real>::dx;
    constexpr auto dx1 = kTangents ? &Call<Real>::tdx1 : &Call<Real>::dx1;
    const auto sum = [&](int32_t v) { return kTangents ? tadjoint(v) : adjoint(v); };
    for (int32_t i = program.layer_count - 1; i >= 0; --i) {
      const Layer& l = program.layers[i];
      if (!l.live) continue;
      Call<Real> c = call(i, tw, dw, tdw);
      c.*dx = target(l.dx, l.in, sum(l.in));
      c.*dx1 = l.in1 < 0 ? nullptr : target(l.dx1, l.in1, sum(l.in1));
      run(i, c);
      arrive(l.dx, l.in, c.*dx, sum(l.in));
      if (l.in1 >= 0) arrive(l.dx1, l.in1, c.*dx1, sum(l.in1));
    }
  }

  // Tangents of all values along tw (params,), the input's being zero.
  void forward_tangent(const Real* tw) const {
    for (int32_t i = 0; i < program.layer_count; ++i) {
      const Layer& l = program.layers[i];
      if (l.live) run(functions_of<Real>(l.kind), &LayerFunctions<Real>::tfwd, call(i, tw, nullptr, nullptr));
    }
  }

  // The loss of the outputs; their adjoint where `wants_adjoint`.
  Real loss(Targets<Real> y, bool wants_adjoint) const {
    return loss_gradient<Real>(program.loss, output(), pass.samples, value(last()), y,
                               wants_adjoint ? adjoint(last()) : nullptr, at(pass.scratch));
  }

  // product = H direction, after forward, loss and backward.
  void hessian_vector(const Real* direction, Real* product) const {
    output_tangents(direction);
    each_backward<true>(direction, nullptr, product, [&](int32_t, const Call<Real>& c) {
      run(functions_of<Real>(c.layer->kind), &LayerFunctions<Real>::tbwd, c);
    });
  }
  // `to` may be where `direction` is.
  void hessian_vector(const Real* direction, const Update<Real>& update) const {
    output_tangents(direction);
    each_backward<true>(direction, nullptr, update.buffer, [&](int32_t, Call<Real>& c) {
      run(&LayerFunctions<Real>::tbwd, &Call<Real>::tdw, update, c);
    });
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

  Real accuracy(const int64_t* labels) const {
    const Value& v = output();
    return accuracy_of(value(last()) + v.origin, pass.samples, v.c, v.sample, labels);
  }

 private:
  using Functions = LayerFunctions<Real>;
  using Gradient = Real* Call<Real>::*;

  void output_tangents(const Real* direction) const {
    forward_tangent(direction);
    loss_gradient_tangent<Real>(program.loss, output(), pass.samples, value(last()), tangent(last()),
                                tadjoint(last()));
  }
  // bwd or tbwd, and what the weights' gradient is for: at once where the layer can, else while both are
  // near.
  void run(typename Functions::Function Functions::* which, Gradient gradient, const Update<Real>& update,
           Call<Real>& c) const {
    const Layer& l = *c.layer;
    const Functions& functions = functions_of<Real>(l.kind);
    const bool at_once = functions.onto && l.params > 0;
    const Onto<Real> onto = Onto<Real>{update.base, update.factor}.from(l.param);
    if (at_once) c.*gradient = update.to + l.param, c.onto = onto;
    run(functions, which, c);
    if (at_once) return;
    for (int64_t i = 0; i < l.params; i += kLanes<Real>)
      store(update.to + l.param + i, onto.at(i, load(c.*gradient + i)));
  }
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

// In the task's turn.
template <class Real>
void add_gradient(const Job<Real>& job, int64_t task, const Real* own) {
  const Real weight = job.weights[task];
  for (int64_t i = 0; i < job.program->params; i += kLanes<Real>) {
    const Vec<Real> before = task == 0 ? Vec<Real>{} : load(job.gradient + i);
    store(job.gradient + i, before + weight * load(own + i));
  }
}

// To the sum of the task's group, which stays in the thread's workspace up to the group's end.
template <class Real>
void add_to_group(const Job<Real>& job, int64_t task, const Real* own, Real* sum) {
  const int64_t params = job.program->params;
  const bool first = task % job.group == 0, last = (task + 1) % job.group == 0 || task + 1 == job.tasks;
  Real* const to = last ? job.gradient + task / job.group * params : sum;
  const Real weight = job.weights[task];
  for (int64_t i = 0; i < params; i += kLanes<Real>)
    store(to + i, (first ? Vec<Real>{} : load(sum + i)) + weight * load(own + i));
}

// The gradient to where the job wants it. Nobody waits.
template <class Real>
void deliver(const Job<Real>& job, int64_t task, const Real* own, Real* sum) {
  const int64_t params = job.program->params;
  if (job.group > 0) return add_to_group(job, task, own, sum);
  const auto write = [&](Real* rows) { std::copy_n(own, params, rows + task * params); };
  if (job.weights == nullptr) return write(job.gradient);
  constexpr int32_t kThere = 1, kTaken = 2;
  const auto take = [&](int64_t t) {  // one thread alone gets what is there
    return __atomic_exchange_n(job.ready + t, kTaken, __ATOMIC_SEQ_CST) == kThere;
  };
  const auto left = [&](int64_t t) -> const Real* { return job.rows + t * params; };
  if (__atomic_load_n(job.turn, __ATOMIC_SEQ_CST) == task) {
    add_gradient(job, task, own);
  } else {
    write(job.rows);
    __atomic_store_n(job.ready + task, kThere, __ATOMIC_SEQ_CST);
    // The turn may have come meanwhile, and who gave it gone on before it saw this.
    if (__atomic_load_n(job.turn, __ATOMIC_SEQ_CST) != task || !take(task)) return;
    add_gradient(job, task, left(task));
  }
  for (int64_t next = task + 1;; ++next) {
    __atomic_store_n(job.turn, next, __ATOMIC_SEQ_CST);
    if (next == job.tasks || !take(next)) return;
    add_gradient(job, next, left(next));
  }
}

// The targets from a sample on, counted through all tasks.
template <class Real>
inline Targets<Real> targets_of(const Data<Real>& data, int64_t sample, int64_t outputs) {
  return {data.labels == nullptr ? nullptr : data.labels + sample,
          data.values == nullptr ? nullptr : data.values + sample * outputs};
}

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
