// A Program on one pass's buffers for all tasks: forward, backward and their tangents, layer by layer, as
// cpu/network.h has them for one. Host code: each function starts kernels and waits for nothing.
#pragma once

#include "layers/elements.h"
#include "layers/loss.h"
#include "layers/table.h"
#include "vectors.cuh"

namespace metafast::METAFAST_GPU {

template <class F>
void for_all(const char* name, int64_t tasks, int64_t count, CUstream_st* stream, const F& f) {
  launch_elements(name, vector_kernel<F>, tasks, count, stream, tasks, count, f);
}

template <class Real>
struct Network {
  using In = Batch<const Real>;
  using Out = Batch<Real>;

  const Program& program;
  const Pass& pass;
  int64_t tasks;
  CUstream_st* stream;
  Out workspace;
  Out kept;      // where what a Hessian-vector product needs from forward and backward lies, as workspace
  Real* losses;  // (T,) a buffer
  BatchedProducts<Real> products;
  In input{};  // value 0
  In w{};      // (params,)

  Out at(int64_t offset) const { return offset < 0 ? Out{} : workspace + offset; }
  Out kept_at(int64_t offset) const { return offset < 0 ? Out{} : kept + offset; }
  In value(int32_t v) const { return v == 0 ? input : In(kept + pass.value[v]); }
  Out adjoint(int32_t v) const { return kept_at(pass.adjoint[v]); }
  Out tangent(int32_t v) const { return at(pass.tangent[v]); }
  Out tadjoint(int32_t v) const { return at(pass.tadjoint[v]); }
  int32_t last() const { return program.value_count - 1; }
  const Value& output() const { return program.values[last()]; }

  // Inputs (T, N, C, H, W) as value 0; where they lie that way already, they are used as they are.
  void set_input(const Real* x) {
    const Value& v = program.values[0];
    input = {x, pass.samples * v.c * v.h * v.w};
    if (pass.value[0] < 0) return;
    const Out to = workspace + pass.value[0];
    METAFAST_GPU::set_input<Real>(v, tasks, pass.samples, x, to, stream);
    input = to;
  }

  Call<Real> call(int32_t index, In tw, Out dw, Out tdw) const {
    const Layer& l = program.layers[index];
    const auto of_layer = [&](auto vector) {
      return l.params > 0 && !vector.null() ? vector + l.param : decltype(vector){};
    };
    Call<Real> c{};
    c.layer = l;
    c.layer.reads = nullptr;  // the host's memory
    c.in = program.values[l.in];
    c.out = program.values[l.out];
    c.tasks = tasks;
    c.samples = pass.samples;
    c.w = of_layer(w);
    c.tw = of_layer(tw);
    c.dw = of_layer(dw);
    c.tdw = of_layer(tdw);
    c.x = value(l.in);
    if (l.in != 0) c.tx = tangent(l.in);
    if (l.in1 >= 0) {
      c.in1 = program.values[l.in1];
      c.x1 = value(l.in1);
      if (l.in1 != 0) c.tx1 = tangent(l.in1);
    }
    c.y = kept + pass.value[l.out];
    c.ty = tangent(l.out);
    c.dy = adjoint(l.out);
    c.tdy = tadjoint(l.out);
    c.saved = kept_at(pass.saved[index]);
    c.tsaved = at(pass.tsaved[index]);
    c.scratch = at(pass.scratch);
    c.products = products;
    return c;
  }

  void forward() const {
    for (int32_t i = 0; i < program.layer_count; ++i)
      functions_of<Real>(program.layers[i].kind).fwd(call(i, {}, {}, {}), stream);
  }

  // From the output's adjoint to those of all values and to dw (params,), which may be null.
  void backward(Out dw) const {
    for (int32_t i = program.layer_count - 1; i >= 0; --i) {
      const Layer& l = program.layers[i];
      if (!l.live) continue;
      Call<Real> c = call(i, {}, dw, {});
      c.dx = target(l.dx, l.in, adjoint(l.in));
      if (l.in1 >= 0) c.dx1 = target(l.dx1, l.in1, adjoint(l.in1));
      functions_of<Real>(l.kind).bwd(c, stream);
      arrive(l.dx, l.in, c.dx, adjoint(l.in));
      if (l.in1 >= 0) arrive(l.dx1, l.in1, c.dx1, adjoint(l.in1));
    }
  }

  // Tangents of all values along tw (params,), the input's being zero.
  void forward_tangent(In tw) const {
    for (int32_t i = 0; i < program.layer_count; ++i) {
      const Layer& l = program.layers[i];
      if (l.live) functions_of<Real>(l.kind).tfwd(call(i, tw, {}, {}), stream);
    }
  }

  void backward_tangent(In tw, Out tdw) const {
    for (int32_t i = program.layer_count - 1; i >= 0; --i) {
      const Layer& l = program.layers[i];
      if (!l.live) continue;
      Call<Real> c = call(i, tw, {}, tdw);
      c.tdx = target(l.dx, l.in, tadjoint(l.in));
      if (l.in1 >= 0) c.tdx1 = target(l.dx1, l.in1, tadjoint(l.in1));
      functions_of<Real>(l.kind).tbwd(c, stream);
      arrive(l.dx, l.in, c.tdx, tadjoint(l.in));
      if (l.in1 >= 0) arrive(l.dx1, l.in1, c.tdx1, tadjoint(l.in1));
    }
  }

  // The losses (T,) of the outputs, in the buffer; their adjoint where `wants_adjoint`.
  const Real* loss(Targets<Real> y, bool wants_adjoint) const {
    loss_gradient<Real>(program.loss, output(), tasks, pass.samples, value(last()), y,
                        wants_adjoint ? adjoint(last()) : Out{}, losses, stream);
    return losses;
  }

  // product = H direction, after forward, loss and backward.
  void hessian_vector(In direction, Out product) const {
    forward_tangent(direction);
    loss_gradient_tangent<Real>(program.loss, output(), tasks, pass.samples, value(last()), tangent(last()),
                                tadjoint(last()), stream);
    backward_tangent(direction, product);
  }

  void set_adjoint(const Real* cotangent) const {
    METAFAST_GPU::set_adjoint<Real>(output(), tasks, pass.samples, cotangent, adjoint(last()), stream);
  }
  void copy_outputs(Real* logits) const {
    METAFAST_GPU::copy_outputs<Real>(output(), tasks, pass.samples, value(last()), logits, stream);
  }
  void accuracy(const int64_t* labels, Real* share) const {
    METAFAST_GPU::accuracy<Real>(output(), tasks, pass.samples, value(last()), labels, share, stream);
  }

 private:
  Out target(Destination destination, int32_t v, Out sum) const {
    if (destination == Destination::none) return {};
    return destination == Destination::overwrite ? sum : workspace + pass.extra[v];
  }
  void arrive(Destination destination, int32_t v, Out extra, Out to) const {
    if (destination != Destination::add) return;
    for_all("arrive", tasks, pass.samples * program.values[v].sample, stream,
            AddScaled<Real>{to, extra, Real(1), to});
  }
};

}  // namespace metafast::METAFAST_GPU
