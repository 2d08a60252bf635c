// The program of tests/simt/test_kernels.py: `layers NAME DTYPE` calls the functions of linear and
// convolution layers, and those of the losses, on the emulator, in every order, at odd sizes, and compares
// all that they write, and that they write nothing else, with the equations in long double. Where values and
// parameters lie is the engine's word.
#include <cstdio>
#include <functional>
#include <map>
#include <vector>

#include "../../csrc/cuda/layers/loss.h"
#include "../../csrc/cuda/layers/table.h"
#include "../../csrc/engine/build.h"
#include "arrays.h"

namespace metafast {
namespace {

using simt::Batch;

// Sums, and how large their terms are, where a function is to write; NaN elsewhere.
struct Wanted {
  explicit Wanted(int64_t count)
      : sum(size_t(count), std::numeric_limits<long double>::quiet_NaN()), scale(size_t(count)) {}
  void zero(int64_t at) { sum[size_t(at)] = scale[size_t(at)] = 0; }
  void add(int64_t at, long double x, long double y) {
    sum[size_t(at)] += x * y, scale[size_t(at)] += std::fabs(x * y);
  }
  template <class Real>
  void compare(const Array<Real>& got, int64_t roundings) const {
    for (size_t i = 0; i < sum.size(); ++i) {
      if (!std::isnan(sum[i])) {
        check(got.data[i], sum[i], scale[i], roundings);
      } else if (!std::isnan(got.data[i])) {
        throw std::runtime_error("a border is written");
      }
    }
  }
  std::vector<long double> sum, scale;
};

// visit(offset) for all lanes of all pixels of a task's value.
template <class Visit>
void for_lanes(const Value& v, int64_t samples, const Visit& visit) {
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t i = 0; i < v.h; ++i) {
      for (int64_t j = 0; j < v.w; ++j) {
        for (int64_t c = 0; c < v.pixel; ++c)
          visit(v.origin + n * v.sample + i * v.row + j * v.pixel + c, c < v.c);
      }
    }
  }
}

// Numbers as a value holds them: borders of zeros, lanes beyond the channels with anything or zeros.
template <class Real>
Array<Real> value_of(const Value& v, int64_t tasks, int64_t samples, bool adjoint) {
  Array<Real> values(tasks * samples * v.sample, Real(0));
  for (int64_t t = 0; t < tasks; ++t) {
    for_lanes(v, samples, [&](int64_t at, bool channel) {
      values[t * samples * v.sample + at] = channel || !adjoint ? Real(normal()) : Real(0);
    });
  }
  return values;
}

Wanted zeros_of(const Value& v, int64_t tasks, int64_t samples) {
  Wanted wanted(tasks * samples * v.sample);
  for (int64_t t = 0; t < tasks; ++t)
    for_lanes(v, samples, [&](int64_t at, bool) { wanted.zero(t * samples * v.sample + at); });
  return wanted;
}

// A library's product, as plain as can be: sums from whatever the factors hold, nothing but `out` written.
int64_t library_products = 0;

template <class Real>
void library_product(const BatchedProduct<Real>& p, CUstream_st*) {
  ++library_products;
  for (int64_t t = 0; t < p.tasks; ++t) {
    for (int64_t i = 0; i < p.rows; ++i) {
      for (int64_t j = 0; j < p.columns; ++j) {
        Real& to = p.out.first[t * p.out.task + i * p.out.row + j * p.out.column];
        Real sum = p.accumulate ? to : Real(0);
        for (int64_t k = 0; k < p.depth; ++k) {
          sum += p.a.first[t * p.a.task + i * p.a.row + k * p.a.column] *
                 p.b.first[t * p.b.task + k * p.b.row + j * p.b.column];
        }
        to = sum;
      }
    }
  }
}

// One layer's four functions.
template <class Real>
struct LayerCheck {
  LayerCheck(const Program& program, const Layer& layer, int64_t t, int64_t n)
      : l(layer), in(program.values[l.in]), out(program.values[l.out]), tasks(t), samples(n) {}

  // visit(x, w, y): y = sum of x w over all such offsets within a task; x is -1 for the biases.
  template <class Visit>
  void for_products(const Visit& visit) const {
    const bool narrow = l.kind == Kind::linear_narrow;
    const int64_t taps = l.kernel_h * l.kernel_w;
    const int64_t bias = narrow ? out.c * in.pixel : taps * in.c * out.pixel;
    for_lanes(out, samples, [&](int64_t y, bool channel) {
      if (!channel) return;
      const int64_t from = y - out.origin, n = from / out.sample, i = from % out.sample / out.row,
                    j = from % out.row / out.pixel, o = from % out.pixel;
      if (l.bias) visit(-1, bias + o, y);
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t row = i * l.stride_h + t / l.kernel_w - l.pad_h,
                      column = j * l.stride_w + t % l.kernel_w - l.pad_w;
        if (row < 0 || row >= in.h || column < 0 || column >= in.w) continue;
        const int64_t x = in.origin + n * in.sample + row * in.row + column * in.pixel;
        for (int64_t c = 0; c < in.c; ++c)
          visit(x + c, narrow ? o * in.pixel + c : (t * in.c + c) * out.pixel + o, y);
      }
    });
  }

  // Of a layer that is first x has no tangent and is not asked for.
  void run(bool first, bool wants_dw, bool shared, bool library = false) const {
    const int64_t x_size = samples * in.sample, y_size = samples * out.sample,
                  depth = l.kernel_h * l.kernel_w;
    const Array<Real> x = value_of<Real>(in, tasks, samples, false),
                      tx = value_of<Real>(in, tasks, samples, false),
                      dy = value_of<Real>(out, tasks, samples, true),
                      tdy = value_of<Real>(out, tasks, samples, true), w = weights(), tw = weights();
    const Array<Real> y(tasks * y_size), ty(tasks * y_size), dx(tasks * x_size), tdx(tasks * x_size),
        dw(tasks * l.params), tdw(tasks * l.params);
    if (l.gated) {
      for (size_t i = 0; i < x.size; ++i) x.data[i] = std::max(x.data[i], Real(0));
    }
    simt::Call<Real> call{};
    call.layer = l, call.in = in, call.out = out, call.tasks = tasks, call.samples = samples;
    const int64_t w_task = shared ? 0 : l.params;
    call.w = {w.get(), w_task}, call.tw = {tw.get(), l.params};
    call.x = {x.get(), x_size}, call.dy = {dy.get(), y_size}, call.tdy = {tdy.get(), y_size};
    if (library) call.products = {library_product<Real>, 1};
    call.y = {y.get(), y_size}, call.ty = {ty.get(), y_size}, call.tdw = {tdw.get(), l.params};
    if (wants_dw) call.dw = {dw.get(), l.params};
    if (!first) call.tx = {tx.get(), x_size}, call.dx = {dx.get(), x_size}, call.tdx = {tdx.get(), x_size};
    const simt::LayerFunctions<Real> functions = l.kind == Kind::linear ? simt::layers::linear<Real>()
                                                 : l.kind == Kind::conv2d
                                                     ? simt::layers::conv2d<Real>()
                                                     : simt::layers::linear_narrow<Real>();
    emulator::check_orders("a layer",
                           {y.buffer("y"), ty.buffer("ty"), dx.buffer("dx"), tdx.buffer("tdx"),
                            dw.buffer("dw"), tdw.buffer("tdw")},
                           [&] {
                             functions.fwd(call, nullptr), functions.bwd(call, nullptr),
                                 functions.tfwd(call, nullptr), functions.tbwd(call, nullptr);
                           });

    Wanted y_is = zeros_of(out, tasks, samples), ty_is = y_is, dx_is = zeros_of(in, tasks, samples),
           tdx_is = dx_is, dw_is(tasks * l.params), tdw_is(tasks * l.params);
    for (int64_t p = 0; p < tasks * l.params; ++p) dw_is.zero(p), tdw_is.zero(p);
    for (int64_t t = 0; t < tasks; ++t) {
      for_products([&](int64_t xi, int64_t wi, int64_t yi) {
        const bool bias = xi < 0;
        xi += t * x_size, yi += t * y_size;
        const int64_t at = t * w_task + wi, p = t * l.params + wi;
        const Real x_here = bias ? Real(1) : x[xi], tx_here = bias || first ? Real(0) : tx[xi];
        y_is.add(yi, x_here, w[at]);
        ty_is.add(yi, x_here, tw[p]), ty_is.add(yi, tx_here, w[at]);
        if (!bias)
          dx_is.add(xi, dy[yi], w[at]), tdx_is.add(xi, tdy[yi], w[at]), tdx_is.add(xi, dy[yi], tw[p]);
        if (bias && l.bias_cancels) return;
        dw_is.add(p, x_here, dy[yi]), tdw_is.add(p, x_here, tdy[yi]), tdw_is.add(p, tx_here, dy[yi]);
      });
    }
    for (size_t i = 0; i < y.size; ++i) {
      if (!l.relu) break;
      y_is.sum[i] = y_is.sum[i] < 0 ? 0 : y_is.sum[i];
      if (y.data[i] <= 0) ty_is.sum[i] = 0;
    }
    for (size_t i = 0; i < x.size; ++i) {
      if (l.gated && x.data[i] <= 0 && !std::isnan(dx_is.sum[i])) dx_is.sum[i] = tdx_is.sum[i] = 0;
    }
    const int64_t forward = 2 * depth * in.c + 4, back = 2 * depth * out.c + 4,
                  across = 2 * samples * out.h * out.w + 4;
    y_is.compare(y, forward), ty_is.compare(ty, forward), tdw_is.compare(tdw, across);
    if (wants_dw) dw_is.compare(dw, across);
    if (!first) dx_is.compare(dx, back), tdx_is.compare(tdx, back);
  }

 private:
  // Zeros where the engine has padding, which is where no product goes.
  Array<Real> weights() const {
    Array<Real> w(tasks * l.params, Real(0));
    for (int64_t t = 0; t < tasks; ++t)
      for_products([&](int64_t, int64_t p, int64_t) { w[t * l.params + p] = Real(normal()); });
    return w;
  }

  const Layer& l;
  const Value &in, &out;
  int64_t tasks, samples;
};

struct LayerOf {
  Kind kind;
  int64_t channels = 0;
  std::vector<int64_t> window{1, 1, 1, 1, 0, 0};  // kernel, stride, padding
  bool bias = true;
};

template <class Real>
void check_net(std::vector<int64_t> input, const std::vector<LayerOf>& net, int64_t tasks, int64_t samples) {
  std::vector<int64_t> ints;
  int64_t params = 0, c = input[0], h = input[1], w = input[2];
  for (size_t i = 0; i < net.size(); ++i) {
    const LayerOf& l = net[i];
    const auto& k = l.window;
    const bool product = l.kind == Kind::linear || l.kind == Kind::conv2d, norm = l.kind == Kind::batch_norm;
    const int64_t to = product ? l.channels : c, weights = product ? to * c * k[0] * k[1] : to;
    const bool bias = (product && l.bias) || norm;
    ints.insert(ints.end(), {int64_t(l.kind), int64_t(i), -1, to, k[0], k[1], k[2], k[3], k[4], k[5], 1, bias,
                             product || norm ? params : -1, bias ? params + weights : -1, 0, 0});
    if (product || norm) params += weights + (bias ? to : 0);
    h = (h + 2 * k[4] - k[0]) / k[2] + 1, w = (w + 2 * k[5] - k[1]) / k[3] + 1, c = to;
  }
  ints.insert(ints.begin(),
              {int64_t(LossKind::mse), input[0], input[1], input[2], params, 0, int64_t(net.size())});
  const Plan plan(ints, std::vector<double>(2 * net.size(), 1e-5), sizeof(Real));
  const Program& program = plan.program();
  for (int32_t i = 0; i < program.layer_count; ++i) {
    const Layer& l = program.layers[i];
    if (l.kind != Kind::linear && l.kind != Kind::linear_narrow && l.kind != Kind::conv2d) continue;
    const LayerCheck<Real> layer(program, l, tasks, samples);
    layer.run(i == 0, tasks > 1, tasks == 2);
    if (l.kind == Kind::conv2d) continue;
    const int64_t before = library_products;
    layer.run(i == 0, tasks > 1, tasks == 2, true);
    if (library_products == before) throw std::runtime_error("a linear layer went not by the library");
  }
}

// With relus between the layers, and without: what few outputs make of a layer hangs on that.
template <class Real>
void linear() {
  const std::vector<int64_t> sizes[] = {{1, 1, 1, 1}, {3, 17, 16, 1}, {13, 65, 33, 5}, {40, 31, 2, 2}};
  for (const auto& s : sizes) {
    for (const bool relu : {false, true}) {
      std::vector<LayerOf> net;
      for (size_t i = 1; i < s.size(); ++i) {
        net.push_back({Kind::linear, s[i], {1, 1, 1, 1, 0, 0}, i != 2});
        if (relu && i + 1 < s.size()) net.push_back({Kind::relu});
      }
      for (const int64_t tasks : {1, 2, 3}) check_net<Real>({s[0], 1, 1}, net, tasks, 6 * tasks - 5);
    }
  }
}

template <class Real>
void conv2d() {
  const LayerOf layers[] = {
      {Kind::conv2d, 9, {3, 3, 1, 1, 1, 1}},         {Kind::conv2d, 17, {2, 3, 1, 1, 0, 0}, false},
      {Kind::conv2d, 5, {3, 5, 2, 3, 1, 2}},         {Kind::conv2d, 3, {1, 1, 2, 3, 0, 0}},
      {Kind::conv2d, 33, {2, 2, 1, 1, 3, 3}, false}, {Kind::conv2d, 65, {1, 2, 3, 1, 2, 0}},
  };
  for (const LayerOf& l : layers) {
    check_net<Real>({1, 7, 6}, {l, {Kind::flatten}}, 1, 1);
    check_net<Real>({3, 5, 6}, {{Kind::conv2d, 17}, l, {Kind::flatten}}, 2, 3);
    check_net<Real>({2, 4, 5}, {{Kind::conv2d, 4}, l, {Kind::batch_norm}, {Kind::flatten}}, 3, 2);
  }
}

template <class Real>
void loss() {
  for (const int64_t classes : {1, 2, 5, 33}) {
    for (const int64_t border : {0, 1}) {
      const int64_t pixel = (classes + 15) / 16 * 16, row = (1 + 2 * border) * pixel;
      const Value v{classes, 1, 1, border, pixel, row, (1 + 2 * border) * row, border * (row + pixel)};
      const int64_t tasks = 3, samples = 11, size = samples * v.sample, all = tasks * samples * classes;
      const Array<Real> y = value_of<Real>(v, tasks, samples, false),
                        ty = value_of<Real>(v, tasks, samples, false), targets = random<Real>(all);
      const Array<int64_t> labels(tasks * samples, 0);
      for (int64_t n = 0; n < tasks * samples; ++n) labels[n] = n * 7 % classes;
      const auto at = [&](int64_t n, int64_t c) {
        return n / samples * size + v.origin + n % samples * v.sample + c;
      };
      for (int64_t n = 0; n < tasks * samples; n += 4)  // two are the largest
        y[at(n, classes / 2)] = y[at(n, classes - 1)] = Real(9);
      for (int64_t c = 0; c < classes; ++c) y[at(1, c)] *= 200;  // beyond exp's range

      for (const LossKind kind : {LossKind::cross_entropy, LossKind::mse}) {
        const Array<Real> dy(tasks * size), tdy(tasks * size), losses(tasks), share(tasks);
        const Batch<const Real> f{y.get(), size}, tf{ty.get(), size};
        emulator::check_orders(
            "a loss", {dy.buffer("dy"), tdy.buffer("tdy"), losses.buffer("losses"), share.buffer("share")},
            [&] {
              simt::loss_gradient<Real>(kind, v, tasks, samples, f, {labels.get(), targets.get()},
                                        {dy.get(), size}, losses.get(), nullptr);
              simt::loss_gradient_tangent<Real>(kind, v, tasks, samples, f, tf, {tdy.get(), size}, nullptr);
              simt::accuracy<Real>(v, tasks, samples, f, labels.get(), share.get(), nullptr);
            });
        Wanted dy_is = zeros_of(v, tasks, samples), tdy_is = dy_is, losses_are(tasks), share_is(tasks);
        for (int64_t t = 0; t < tasks; ++t) losses_are.zero(t), share_is.zero(t);
        for (int64_t n = 0; n < tasks * samples; ++n) {
          const int64_t t = n / samples, label = labels[n];
          int64_t best = 0;
          for (int64_t c = 1; c < classes; ++c) best = y[at(n, c)] > y[at(n, best)] ? c : best;
          share_is.add(t, best == label, 1.0L / samples);
          if (kind == LossKind::mse) {
            const long double by = 1.0L / (samples * classes);
            for (int64_t c = 0; c < classes; ++c) {
              const long double apart = (long double)(y[at(n, c)]) - targets[n * classes + c];
              losses_are.add(t, apart, apart * by);
              dy_is.add(at(n, c), y[at(n, c)], 2 * by),
                  dy_is.add(at(n, c), targets[n * classes + c], -2 * by);
              tdy_is.add(at(n, c), ty[at(n, c)], 2 * by);
            }
            continue;
          }
          const long double by = 1.0L / samples, top = y[at(n, best)];
          long double sum = 0, mean = 0;
          for (int64_t c = 0; c < classes; ++c) sum += std::exp(y[at(n, c)] - top);
          const auto softmax = [&](int64_t c) { return std::exp(y[at(n, c)] - top) / sum; };
          for (int64_t c = 0; c < classes; ++c) mean += softmax(c) * ty[at(n, c)];
          losses_are.add(t, std::log(sum), by), losses_are.add(t, top, by),
              losses_are.add(t, y[at(n, label)], -by);
          for (int64_t c = 0; c < classes; ++c) {
            // The exponent's rounding is a rounding of the power for each unit of it; powers below the
            // smallest number may be zero.
            constexpr long double kLeast =
                std::numeric_limits<Real>::min() / std::numeric_limits<Real>::epsilon();
            const long double s = softmax(c), size_of = s * (2 + top - y[at(n, c)]) + kLeast;
            dy_is.add(at(n, c), s, by), dy_is.add(at(n, c), c == label, -by);
            tdy_is.add(at(n, c), s * (ty[at(n, c)] - mean), by);
            dy_is.scale[size_t(at(n, c))] += size_of * by;
            for (int64_t k = 0; k < classes; ++k)
              tdy_is.scale[size_t(at(n, c))] +=
                  (size_of + s) * (std::fabs(ty[at(n, c)]) + std::fabs(ty[at(n, k)])) * by;
          }
        }
        losses_are.compare(losses, 8), share_is.compare(share, 2);
        dy_is.compare(dy, 8), tdy_is.compare(tdy, 8);
        const auto only_loss = losses[tasks - 1];
        simt::loss_gradient<Real>(kind, v, tasks, samples, f, {labels.get(), targets.get()}, {}, losses.get(),
                                  nullptr);
        simt::loss_gradient<Real>(kind, v, tasks, samples, f, {labels.get(), targets.get()}, {dy.get(), size},
                                  nullptr, nullptr);
        check(losses[tasks - 1], only_loss, 0, 0);
        dy_is.compare(dy, 8);
      }

      const Array<Real> outputs(all), dy(tasks * size);
      emulator::check_orders("copies", {outputs.buffer("outputs"), dy.buffer("dy")}, [&] {
        simt::copy_outputs<Real>(v, tasks, samples, {y.get(), size}, outputs.get(), nullptr);
        simt::set_adjoint<Real>(v, tasks, samples, outputs.get(), {dy.get(), size}, nullptr);
      });
      Wanted dy_is = zeros_of(v, tasks, samples);
      for (int64_t e = 0; e < all; ++e) {
        check(outputs[e], y[at(e / classes, e % classes)], 0, 0);
        dy_is.add(at(e / classes, e % classes), outputs[e], 1);
      }
      dy_is.compare(dy, 0);
    }
  }
}

// Borders and lanes beyond the channels are not written.
template <class Real>
void input() {
  const int64_t tasks = 2, samples = 3, c = 3, h = 4, w = 5;
  for (const int64_t border : {0, 2}) {
    for (const int64_t pixel : {3, 16}) {
      const int64_t row = (w + 2 * border) * pixel;
      const Value v{c, h, w, border, pixel, row, (h + 2 * border) * row, border * (row + pixel)};
      const Array<Real> inputs = random<Real>(tasks * samples * c * h * w), x(tasks * samples * v.sample);
      emulator::check_orders("set_input", {x.buffer("x")}, [&] {
        simt::set_input<Real>(v, tasks, samples, inputs.get(), {x.get(), samples * v.sample}, nullptr);
      });
      Wanted x_is(int64_t(x.size));
      for (int64_t e = 0; e < int64_t(inputs.size); ++e) {
        const int64_t n = e / (c * h * w), k = e / (h * w) % c, i = e / w % h, j = e % w;
        const int64_t at = v.origin + n * v.sample + i * v.row + j * v.pixel + k;
        x_is.zero(at), x_is.add(at, inputs[e], 1);
      }
      x_is.compare(x, 0);
    }
  }
}

}  // namespace
}  // namespace metafast

int main(int, char** names) {
  using namespace metafast;
  const std::map<std::string, std::function<void()>> checks = {
      {"linear float32", linear<float>}, {"linear float64", linear<double>},
      {"conv2d float32", conv2d<float>}, {"conv2d float64", conv2d<double>},
      {"loss float32", loss<float>},     {"loss float64", loss<double>},
      {"input float32", input<float>},   {"input float64", input<double>},
  };
  try {
    checks.at(names[1])();
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
  std::puts("ok");
}
