#include "build.h"

namespace metafast {

// A chain of linear layers with biases, one and the same activation between any two of them, and all
// parameters in that order and adapting. What fuse() made of it is undone on the way.
std::optional<MlpShape> Plan::find_mlp() const {
  constexpr int64_t kMostWidth = 4096;  // wider ones fit into no block; sizes are counted in int
  MlpShape shape{};
  shape.cross_entropy = program_.loss == LossKind::cross_entropy;
  bool relu = false, activated = true;
  int32_t value = 0;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& l = layers_[i];
    if (l.in != value || l.in1 != -1) return std::nullopt;
    value = l.out;
    const Value& out = values_[size_t(l.out)];
    if (l.kind == Kind::flatten && l.in == 0) continue;  // the inputs come in that order
    if (l.kind == Kind::tanh || l.kind == Kind::relu) {
      if (activated) return std::nullopt;
      activated = true;
      (l.kind == Kind::tanh ? shape.tanh : relu) = true;
      continue;
    }
    if (l.kind != Kind::linear && l.kind != Kind::linear_narrow) return std::nullopt;
    const int64_t in = values_[size_t(l.in)].c;
    if (!activated || shape.layers == kMostMlpLayers || in > kMostWidth || out.c > kMostWidth)
      return std::nullopt;
    const int at = shape.weights_at(shape.layers);
    shape.widths[shape.layers] = int(in);
    shape.widths[++shape.layers] = int(out.c);
    if (weight_[i] != at || bias_[i] != at + in * out.c) return std::nullopt;
    activated = l.relu != 0;
    relu = relu || activated;
  }
  if (activated || (relu && shape.tanh) || shape.size() != program_.adapting || constants() != 0)
    return std::nullopt;
  return shape;
}

}  // namespace metafast
