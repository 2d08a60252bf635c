// Makes Programs and workspace layouts: the part of the engine that allocates. Once a network, not once a
// call.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "job.h"

namespace metafast {

// Owns what a Program points to, and the layouts of its workspaces.
class Plan {
 public:
  // From metafast.engine.lowering's descriptor; `element` is sizeof(Real), `winograd` whether convolutions
  // may go by that algorithm, which only the CPU has. Throws std::invalid_argument where the numbers are no
  // network.
  Plan(const std::vector<int64_t>& ints, const std::vector<double>& numbers, int64_t element,
       bool winograd = true);
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  const Program& program() const { return program_; }
  int64_t element() const { return element_; }
  int64_t constants() const { return user_params_ - program_.adapting; }
  // Multiplications and additions of a sample's forward pass, those of linear and convolution layers.
  double operations() const;

  // Whether a few rows of all parameters stay in a core's first cache.
  bool params_are_short() const { return program_.params * element_ <= int64_t(16) << 10; }

  // For a kind of job on so many support (of a step) and query samples and inner steps, 0 where it has none,
  // with query losses at all steps or not, with so many elements for the update rule, and Job::together. The
  // same arguments give the same object, while they are among the latest kMostLayouts; it lives as long as
  // somebody holds it. Safe from several threads.
  std::shared_ptr<const WorkspaceLayout> layout(What what, bool wants_gradient, int64_t support,
                                                int64_t query, int64_t steps, bool query_losses = false,
                                                int64_t rule = 0, int64_t together = 0);
  // How many are kept.
  int64_t layouts();
  static constexpr size_t kMostLayouts = 64;  // episodes of changing sizes must not add up for ever

 private:
  struct PassStore {
    std::vector<int64_t> value, adjoint, extra, tangent, tadjoint, saved, tsaved;
  };
  struct LayoutStore {
    PassStore support, query;
    WorkspaceLayout layout;
  };
  using Key = std::tuple<int32_t, bool, int64_t, int64_t, int64_t, bool, int64_t, int64_t>;

  void add_layer(const int64_t* d, double number, double number1);
  size_t only_reader(int32_t value) const;
  void fuse();
  void add_parameters();
  void decide_borders();
  void decide_strides();
  void decide_destinations();
  void decide_winograd(Layer& l) const;
  void decide_saved();
  void decide_reads();
  std::optional<MlpShape> find_mlp() const;  // mlp.cpp
  Pass make_pass(PassStore& store, int64_t tasks, int64_t samples, bool adjoints, bool tangents,
                 int64_t steps, int64_t& size, int64_t& kept) const;

  int64_t element_, lanes_, user_params_;
  bool winograd_;
  std::vector<Value> values_;
  std::vector<Layer> layers_;
  std::vector<int64_t> weight_, bias_;  // of each layer, in the user's vector, -1 where none
  std::vector<int64_t> source_, place_;
  std::vector<std::vector<int64_t>> reads_;  // of each layer
  std::vector<int32_t> shared_;              // values that several gradients arrive at
  int64_t scratch_per_call_ = 0;
  std::optional<MlpShape> mlp_;
  Program program_{};
  std::mutex mutex_;
  std::vector<std::pair<Key, std::shared_ptr<LayoutStore>>> layouts_;  // the latest last
};

}  // namespace metafast
