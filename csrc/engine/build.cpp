#include "build.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace metafast {
namespace {

constexpr int kHeader = 7, kLayerInts = 16;
constexpr int64_t kMostTaps = 169;      // cpu/layers/conv.h
constexpr int64_t kWinogradParts = 36;  // cpu/layers/winograd.h
constexpr int64_t kNormParts = 32;      // cuda/layers/norm_launch.h

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("metafast: descriptor: ") + what);
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0) ? 1 : 0); }
bool is_conv(Kind kind) { return kind == Kind::linear || kind == Kind::conv2d; }
bool is_pool(Kind kind) { return kind == Kind::max_pool || kind == Kind::avg_pool; }

}  // namespace

Plan::Plan(const std::vector<int64_t>& ints, const std::vector<double>& numbers, int64_t element,
           bool winograd)
    : element_(element), lanes_(kVectorBytes / element), winograd_(winograd) {
  require(ints.size() >= kHeader, "too short");
  const int64_t count = ints[6];
  require(count >= 1 && int64_t(ints.size()) == kHeader + count * kLayerInts, "length");
  require(int64_t(numbers.size()) == 2 * count, "numbers");
  program_.loss = LossKind(ints[0]);
  require(program_.loss == LossKind::cross_entropy || program_.loss == LossKind::mse, "loss");
  require(ints[1] >= 1 && ints[2] >= 1 && ints[3] >= 1, "input shape");
  require(ints[4] >= 1 && ints[5] >= 0, "number of parameters");
  program_.adapting = ints[4];
  user_params_ = ints[4] + ints[5];
  values_.push_back(Value{ints[1], ints[2], ints[3], 0, 0, 0, 0, 0});
  for (int64_t i = 0; i < count; ++i) {
    add_layer(&ints[kHeader + i * kLayerInts], numbers[2 * i], numbers[2 * i + 1]);
  }
  require(values_.back().h == 1 && values_.back().w == 1, "the output is no vector of features");
  fuse();
  decide_destinations();
  decide_borders();
  decide_strides();
  add_parameters();
  decide_saved();
  decide_reads();
  program_.values = values_.data();
  program_.value_count = int32_t(values_.size());
  program_.layers = layers_.data();
  program_.layer_count = int32_t(layers_.size());
  program_.params = int64_t(source_.size());
  program_.source = source_.data();
  place_.assign(size_t(program_.adapting), -1);
  for (size_t i = 0; i < source_.size(); ++i) {
    if (source_[i] >= 0 && source_[i] < program_.adapting) place_[size_t(source_[i])] = int64_t(i);
  }
  program_.place = place_.data();
  mlp_ = find_mlp();
  program_.mlp = mlp_ ? &*mlp_ : nullptr;
}

double Plan::operations() const {
  double sum = 0;
  for (const Layer& l : layers_) {
    if (!is_conv(l.kind)) continue;
    const Value &in = values_[size_t(l.in)], &out = values_[size_t(l.out)];
    sum += 2.0 * double(l.kernel_h * l.kernel_w * in.c) * double(out.h * out.w * out.c);
  }
  return sum;
}

void Plan::add_layer(const int64_t* d, double number, double number1) {
  Layer l{};
  l.kind = Kind(d[0]);
  require(d[0] >= int64_t(Kind::linear) && d[0] <= int64_t(Kind::add), "kind");
  l.in = int32_t(d[1]);
  l.in1 = int32_t(d[2]);
  l.out = int32_t(values_.size());
  require(l.in >= 0 && l.in < l.out, "input of a layer");
  require(l.kind == Kind::add ? l.in1 >= 0 && l.in1 < l.out : l.in1 == -1, "second input of a layer");
  l.kernel_h = d[4], l.kernel_w = d[5], l.stride_h = d[6], l.stride_w = d[7], l.pad_h = d[8], l.pad_w = d[9];
  l.groups = d[10];
  l.bias = int32_t(d[11]);
  l.number = number, l.number1 = number1;
  weight_.push_back(d[12]);
  bias_.push_back(d[13]);

  const Value in = values_[l.in];
  Value out = in;
  if (is_conv(l.kind)) {
    out.c = d[3];
    require(out.c >= 1, "channels");
  }
  if (l.kind == Kind::linear) {
    require(in.h == 1 && in.w == 1, "linear on an image");
    l.kernel_h = l.kernel_w = l.stride_h = l.stride_w = 1;
    l.pad_h = l.pad_w = 0;
  }
  if (l.kind == Kind::conv2d || is_pool(l.kind)) {
    require(l.kernel_h >= 1 && l.kernel_w >= 1 && l.stride_h >= 1 && l.stride_w >= 1, "kernel or stride");
    require(l.pad_h >= 0 && l.pad_w >= 0, "padding");
    require(l.kind != Kind::conv2d || l.kernel_h * l.kernel_w <= kMostTaps, "a kernel of more than 169 taps");
    out.h = floor_div(in.h + 2 * l.pad_h - l.kernel_h, l.stride_h) + 1;
    out.w = floor_div(in.w + 2 * l.pad_w - l.kernel_w, l.stride_w) + 1;
    require(out.h >= 1 && out.w >= 1, "an output without pixels");
  }
  if (l.kind == Kind::flatten) out = Value{in.c * in.h * in.w, 1, 1, 0, 0, 0, 0, 0};
  if (l.kind == Kind::group_norm) require(l.groups >= 1 && in.c % l.groups == 0, "groups");
  if (l.kind == Kind::add) {
    const Value& other = values_[l.in1];
    require(other.c == in.c && other.h == in.h && other.w == in.w, "shapes of an add");
  }
  layers_.push_back(l);
  values_.push_back(out);
}

// The one layer that reads a value, or the number of layers where there are more or fewer.
size_t Plan::only_reader(int32_t value) const {
  size_t reader = layers_.size();
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (layers_[i].in != value && layers_[i].in1 != value) continue;
    if (reader != layers_.size() || layers_[i].in == layers_[i].in1) return layers_.size();
    reader = i;
  }
  return reader;
}

// Puts batch_norm_relu_pool in the place of batch_norm, relu and a max_pool without overlap or padding, where
// nothing else reads the values between them; linear_narrow in that of a linear of few outputs. Makes a relu
// between two linear layers part of these.
void Plan::fuse() {
  std::vector<bool> gone(layers_.size(), false);
  for (size_t i = 0; i < layers_.size(); ++i) {
    Layer& norm = layers_[i];
    if (norm.kind != Kind::batch_norm || norm.bias == 0) continue;
    const size_t relu = only_reader(norm.out);
    if (relu == layers_.size() || layers_[relu].kind != Kind::relu) continue;
    norm.kind = Kind::batch_norm_relu_pool;
    norm.out = layers_[relu].out;
    norm.kernel_h = norm.kernel_w = 1;
    gone[relu] = true;
    const size_t pool = only_reader(norm.out);
    if (pool == layers_.size()) continue;
    const Layer& p = layers_[pool];
    const int64_t k = p.kernel_h;
    if (p.kind != Kind::max_pool || p.kernel_w != k || p.stride_h != k || p.stride_w != k ||
        p.pad_h + p.pad_w != 0) {
      continue;
    }
    norm.out = p.out;
    norm.kernel_h = norm.kernel_w = k;
    gone[pool] = true;
  }
  for (Layer& l : layers_) {
    const size_t reader = only_reader(l.out);
    l.bias_cancels =
        is_conv(l.kind) && reader != layers_.size() &&
        (layers_[reader].kind == Kind::batch_norm || layers_[reader].kind == Kind::batch_norm_relu_pool);
  }
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (layers_[i].kind != Kind::linear) continue;
    const size_t relu = only_reader(layers_[i].out);
    if (relu == layers_.size() || layers_[relu].kind != Kind::relu) continue;
    const size_t next = only_reader(layers_[relu].out);
    if (next == layers_.size() || layers_[next].kind != Kind::linear) continue;
    layers_[i].out = layers_[relu].out;
    layers_[i].relu = layers_[next].gated = 1;
    gone[relu] = true;
  }
  for (Layer& l : layers_) {
    // Of the network's own input lanes are not whole vectors.
    if (l.kind == Kind::linear && l.relu == 0 && l.in != 0 && 4 * values_[l.out].c <= lanes_)
      l.kind = Kind::linear_narrow;
  }
  size_t kept = 0;
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (gone[i]) continue;
    layers_[kept] = layers_[i];
    weight_[kept] = weight_[i];
    bias_[kept++] = bias_[i];
  }
  layers_.resize(kept);
  weight_.resize(kept);
  bias_.resize(kept);
}

// A value is live if something at or before it has parameters; gradients flow to live values only, and the
// last of its consumers, which comes first on the way back, overwrites.
void Plan::decide_destinations() {
  std::vector<bool> live(values_.size(), false), reached(values_.size(), false);
  for (size_t i = 0; i < layers_.size(); ++i) {
    Layer& l = layers_[i];
    l.live = weight_[i] >= 0 || bias_[i] >= 0 || live[l.in] || (l.in1 >= 0 && live[l.in1]);
    live[l.out] = l.live;
  }
  require(live.back(), "no parameters");
  const auto arrive = [&](int32_t v) {
    if (!live[v]) return Destination::none;
    if (reached[v]) {
      if (std::find(shared_.begin(), shared_.end(), v) == shared_.end()) shared_.push_back(v);
      return Destination::add;
    }
    reached[v] = true;
    return Destination::overwrite;
  };
  for (size_t i = layers_.size(); i-- > 0;) {
    Layer& l = layers_[i];
    require(l.out == int32_t(values_.size()) - 1 || reached[l.out] || !l.live, "a value that nobody uses");
    l.dx = arrive(l.in);
    l.dx1 = l.in1 < 0 ? Destination::none : arrive(l.in1);
  }
}

// As wide as what reads beyond the edges needs: a convolution beyond its input's, its input gradient beyond
// its output's.
void Plan::decide_borders() {
  for (const Layer& l : layers_) {
    if (!is_conv(l.kind)) continue;
    Value &in = values_[l.in], &out = values_[l.out];
    in.border = std::max({in.border, l.pad_h, l.pad_w});
    if (l.dx == Destination::none) continue;
    const auto reach = [](int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t outputs) {
      const int64_t before = -floor_div(pad - (kernel - 1), stride);
      const int64_t after = floor_div(size - 1 + pad, stride) - (outputs - 1);
      return std::max<int64_t>({before, after, 0});
    };
    out.border = std::max({out.border, reach(in.h, l.kernel_h, l.stride_h, l.pad_h, out.h),
                           reach(in.w, l.kernel_w, l.stride_w, l.pad_w, out.w)});
  }
}

void Plan::decide_strides() {
  for (size_t v = 0; v < values_.size(); ++v) {
    Value& value = values_[v];
    // Convolutions read single channels of their input: the network's own input needs no whole vectors for
    // them.
    const bool exact = v == 0 && std::all_of(layers_.begin(), layers_.end(), [](const Layer& l) {
                         return (l.in != 0 && l.in1 != 0) || is_conv(l.kind);
                       });
    value.pixel = exact ? value.c : round_up(value.c, lanes_);
    value.row = (value.w + 2 * value.border) * value.pixel;
    value.sample = (value.h + 2 * value.border) * value.row;
    value.origin = value.border * (value.row + value.pixel);
  }
}

void Plan::add_parameters() {
  for (size_t i = 0; i < layers_.size(); ++i) {
    Layer& l = layers_[i];
    const Value &in = values_[l.in], &out = values_[l.out];
    const int64_t weight = weight_[i], bias = bias_[i];
    l.param = int64_t(source_.size());
    const auto vector = [&](int64_t first, int64_t stride, int64_t count, int64_t padded) {
      require(first >= 0 && first + (count - 1) * stride < user_params_, "offset of a parameter");
      for (int64_t c = 0; c < padded; ++c) source_.push_back(c < count ? first + c * stride : -1);
    };
    if (is_conv(l.kind)) {
      require(weight >= 0 && (bias >= 0) == (l.bias != 0), "parameters of a linear or convolution layer");
      const int64_t taps = l.kernel_h * l.kernel_w;
      for (int64_t t = 0; t < taps; ++t) {
        for (int64_t c = 0; c < in.c; ++c) vector(weight + c * taps + t, in.c * taps, out.c, out.pixel);
      }
      if (l.bias) vector(bias, 1, out.c, out.pixel);
    } else if (l.kind == Kind::linear_narrow) {
      require(weight >= 0 && (bias >= 0) == (l.bias != 0), "parameters of a linear layer");
      for (int64_t o = 0; o < out.c; ++o) vector(weight + o * in.c, 1, in.c, in.pixel);
      if (l.bias) vector(bias, 1, out.c, out.pixel);
    } else if (l.kind == Kind::batch_norm || l.kind == Kind::batch_norm_relu_pool ||
               l.kind == Kind::group_norm) {
      require((weight >= 0) == (l.bias != 0) && (bias >= 0) == (l.bias != 0), "parameters of a norm");
      if (l.bias) vector(weight, 1, in.c, in.pixel), vector(bias, 1, in.c, in.pixel);
    } else if (l.kind == Kind::layer_norm) {
      require((weight >= 0) == (l.bias != 0) && (bias >= 0) == (l.bias != 0), "parameters of a norm");
      for (const int64_t first : {weight, bias}) {
        if (!l.bias) break;
        for (int64_t pixel = 0; pixel < in.h * in.w; ++pixel)
          vector(first + pixel, in.h * in.w, in.c, in.pixel);
      }
    } else {
      require(weight < 0 && bias < 0, "a layer that has no parameters was given some");
    }
    l.params = int64_t(source_.size()) - l.param;
  }
}

// Whether a convolution goes by Winograd's algorithm depends on its samples: with few, the transform of the
// weights costs more than it saves. Counted in products of vectors; a transform takes as long as 300 of them
// (measured with AVX-512; every instruction set decides alike).
void Plan::decide_winograd(Layer& l) const {
  l.winograd_from = std::numeric_limits<int64_t>::max();
  const Value &in = values_[l.in], &out = values_[l.out];
  if (!winograd_ || l.kind != Kind::conv2d || l.kernel_h != 3 || l.kernel_w != 3 || l.stride_h != 1 ||
      l.stride_w != 1)
    return;
  if (in.pixel % lanes_ != 0) return;  // the network's own input, as it came
  constexpr int64_t kTransform = 300;
  const int64_t from = in.pixel / lanes_, to = out.pixel / lanes_;
  const int64_t direct = out.h * out.w * 9 * in.c * to;
  const int64_t tiles = ((out.h + 3) / 4) * ((out.w + 3) / 4);
  const int64_t saves = direct - tiles * (kWinogradParts * in.c * to + kTransform * (from + to));
  if (saves <= 0) return;
  l.winograd_from = kTransform * in.c * to / saves + 1;
  // Transformed tiles of x, tx, y and ty fill most of a core's second cache.
  constexpr int64_t kCacheBytes = 768 * 1024, kFewest = 12;
  l.block = std::max(kFewest, kCacheBytes / (2 * kWinogradParts * (in.pixel + out.pixel) * element_));
}

// The formulas stand in the layers' files.
void Plan::decide_saved() {
  for (Layer& l : layers_) {
    const Value &in = values_[l.in], &out = values_[l.out];
    scratch_per_call_ = std::max(scratch_per_call_, 4 * std::max(in.pixel, out.pixel));
    if (is_conv(l.kind)) {
      const bool wants_dx = l.dx != Destination::none;
      if (wants_dx) l.saved_per_layer = l.kernel_h * l.kernel_w * out.c * in.pixel;
      decide_winograd(l);
      if (l.block == 0) continue;
      const int64_t w = in.c * out.pixel + lanes_, wt = wants_dx ? out.c * in.pixel + lanes_ : 0;
      l.saved_per_layer = kWinogradParts * (w + wt);
      const int64_t blocks = 2 * (l.block * (in.pixel + out.pixel) + 2 * lanes_);
      const int64_t d = std::max(kWinogradParts * w, 9 * out.c * in.pixel);
      scratch_per_call_ = std::max(scratch_per_call_, kWinogradParts * blocks + d);
    } else if (l.kind == Kind::batch_norm) {
      l.saved_per_layer = 4 * in.pixel;
      scratch_per_call_ = std::max(scratch_per_call_, 2 * kNormParts * in.pixel);
    } else if (l.kind == Kind::batch_norm_relu_pool) {
      l.saved_per_layer = 4 * in.pixel;
      scratch_per_call_ = std::max(scratch_per_call_, 2 * kNormParts * in.pixel);
      l.saved_per_sample = 2 * out.h * out.w * in.pixel;
    } else if (l.kind == Kind::layer_norm) {
      l.saved_per_sample = 4;
    } else if (l.kind == Kind::group_norm) {
      l.saved_per_sample = 4 * in.pixel;
    } else if (l.kind == Kind::max_pool) {
      l.saved_per_sample = out.h * out.w * out.pixel / (l.kernel_h * l.kernel_w <= 256 ? 4 : 1);
    }
  }
}

void Plan::decide_reads() {
  reads_.resize(layers_.size());
  for (size_t i = 0; i < layers_.size(); ++i) {
    Layer& l = layers_[i];
    if (!is_conv(l.kind)) continue;
    const Value& in = values_[l.in];
    for (int64_t u = 0; u < l.kernel_h; ++u) {
      for (int64_t v = 0; v < l.kernel_w; ++v) {
        for (int64_t c = 0; c < in.c; ++c) reads_[i].push_back(u * in.row + v * in.pixel + c);
      }
    }
    l.reads = reads_[i].data();
  }
}

// `steps` are those that the pass is run for; where what all of them leave fits in a core's cache, each has
// its own place, `kept` elements apart; else `kept` is 0.
Pass Plan::make_pass(PassStore& store, int64_t tasks, int64_t of_task, bool adjoints, bool tangents,
                     int64_t steps, int64_t& size, int64_t& kept) const {
  constexpr int64_t kKeptBytes = 512 * 1024;
  const auto take = [&](int64_t count) {
    const int64_t at = size;
    size += round_up(count, lanes_);
    return at;
  };
  const size_t values = values_.size(), layers = layers_.size();
  const int64_t samples = tasks * of_task;
  const auto saved = [&](const Layer& l) {
    return tasks * round_up(l.saved_per_sample * of_task + l.saved_per_layer, lanes_);
  };
  for (auto* offsets : {&store.value, &store.adjoint, &store.extra, &store.tangent, &store.tadjoint}) {
    offsets->assign(values, -1);
  }
  for (auto* offsets : {&store.saved, &store.tsaved}) offsets->assign(layers, -1);
  const int64_t begin = size;
  for (size_t i = 0; i < layers && samples > 0; ++i) {
    const Layer& l = layers_[i];
    const int64_t out = samples * values_[l.out].sample;
    store.value[l.out] = take(out);
    store.saved[i] = take(saved(l));
    if (l.live && adjoints) store.adjoint[l.out] = take(out);
  }
  const int64_t step = size - begin;
  kept = tangents && steps > 1 && steps * step * element_ <= kKeptBytes ? step : 0;
  if (kept > 0) size += (steps - 1) * kept;
  if (samples > 0) {
    const Value& input = values_[0];
    const bool as_it_is = input.sample == input.c;  // features, without a border
    if (!as_it_is) store.value[0] = take(samples * input.sample);
    for (size_t i = 0; i < layers; ++i) {
      const Layer& l = layers_[i];
      if (!l.live || !tangents) continue;
      store.tangent[l.out] = take(samples * values_[l.out].sample);
      store.tadjoint[l.out] = take(samples * values_[l.out].sample);
      store.tsaved[i] = take(saved(l));
    }
    for (const int32_t v : shared_) {
      if (adjoints) store.extra[v] = take(samples * values_[v].sample);
    }
  }
  Pass pass{};
  pass.samples = samples;
  pass.scratch = take(scratch_per_call_);
  pass.value = store.value.data();
  pass.adjoint = store.adjoint.data();
  pass.extra = store.extra.data();
  pass.tangent = store.tangent.data();
  pass.tadjoint = store.tadjoint.data();
  pass.saved = store.saved.data();
  pass.tsaved = store.tsaved.data();
  return pass;
}

int64_t Plan::layouts() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return int64_t(layouts_.size());
}

std::shared_ptr<const WorkspaceLayout> Plan::layout(What what, bool wants_gradient, int64_t support,
                                                    int64_t query, int64_t steps, bool query_losses,
                                                    int64_t rule, int64_t together) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Key key{int32_t(what), wants_gradient, support, query, steps, query_losses, rule, together};
  const auto share = [](const std::shared_ptr<LayoutStore>& store) {
    return std::shared_ptr<const WorkspaceLayout>(store, &store->layout);
  };
  const auto found =
      std::find_if(layouts_.rbegin(), layouts_.rend(), [&](const auto& kept) { return kept.first == key; });
  if (found != layouts_.rend()) {
    std::rotate(found.base() - 1, found.base(), layouts_.end());
    return share(layouts_.back().second);
  }
  const auto made = std::make_shared<LayoutStore>();
  LayoutStore& store = *made;
  WorkspaceLayout& layout = store.layout;
  layout.size = 0;
  const bool tangents = what == What::hvp || (what == What::meta_step && wants_gradient);
  const int64_t at_once = std::max<int64_t>(together, 1);
  int64_t none = 0;
  layout.support =
      make_pass(store.support, at_once, support, true, tangents, steps, layout.size, layout.kept);
  layout.query = make_pass(store.query, at_once, query, wants_gradient, false, 1, layout.size, none);
  const auto take = [&](int64_t count) {
    const int64_t at = layout.size;
    layout.size += together > 0 ? 0 : count * program_.params;  // of tasks that share theta, none
    return at;
  };
  layout.w = take(1);
  layout.direction = take(1);
  layout.product = take(1);
  layout.tape = take(steps);
  layout.query_tape = take(query_losses && wants_gradient ? std::max<int64_t>(steps - 1, 0) : 0);
  layout.sum = take(wants_gradient && params_are_short() ? 1 : 0);
  layout.stamp = layout.size;
  layout.size += lanes_;
  layout.rule = layout.size;
  layout.size += rule;
  if (layouts_.size() == kMostLayouts) layouts_.erase(layouts_.begin());
  layouts_.emplace_back(key, made);
  return share(made);
}

}  // namespace metafast
