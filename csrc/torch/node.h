// Nodes of autograd's graph by hand, as torch's own operators have them: torch::autograd::Function takes
// longer for its generality than a small net's inner loop does for its work.
#pragma once

#include <ATen/FuncTorchTLS.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <initializer_list>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

namespace metafast {

// Keeps tensors, whose versions are checked when they are asked for again; an undefined one stays so.
class SavingNode : public torch::autograd::Node {
 public:
  void save(std::initializer_list<at::Tensor> tensors, const std::vector<at::Tensor>& more = {}) {
    saved_.reserve(tensors.size() + more.size());
    for (const at::Tensor& t : tensors) saved_.emplace_back(t, false);
    for (const at::Tensor& t : more) saved_.emplace_back(t, false);
  }
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& s : saved_) s.reset_data();
  }

 protected:
  // Raises where one was changed in place since, or where the graph has been freed.
  torch::autograd::variable_list saved() {
    const std::lock_guard<std::mutex> lock(mutex_);
    torch::autograd::variable_list tensors;
    tensors.reserve(saved_.size());
    for (const auto& s : saved_) tensors.push_back(s.unpack());
    return tensors;
  }

 private:
  std::vector<torch::autograd::SavedVariable> saved_;
};

// torch has made its counted pointers intrusive.
template <class N, class... Arguments>
auto make_node(Arguments&&... arguments) {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, N>) {
    return c10::make_intrusive<N>(std::forward<Arguments>(arguments)...);
  } else {
    N* const node = new N(std::forward<Arguments>(arguments)...);
    return std::shared_ptr<N>(node, [](auto* n) { deleteNode(n); });
  }
}

// What torch::autograd::Function refuses: transforms of functorch and tangents of forward mode, which would
// be lost.
inline void check_plain_autograd(const char* name, at::TensorList inputs) {
  if (const auto& functorch = at::functorch::functorchTLSAccessor())
    functorch->checkSupportsCppAutogradFunction();
  for (const at::Tensor& t : inputs) {
    TORCH_CHECK_NOT_IMPLEMENTED(!torch::autograd::isFwGradDefined(t), name,
                                " has no derivative in forward mode");
  }
}

}  // namespace metafast
