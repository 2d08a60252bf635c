// What the prototype head's operators share: their arguments, checked, contiguous, and as the kernels want
// them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/prototypes.h"
#include "checks.h"
#include "items.h"
#include "metric.h"
#include "uninitialized.h"

namespace metafast::prototypes {

using at::Tensor;
using Maybe = std::optional<Tensor>;

// As autograd saves what may be missing, and back.
inline Tensor or_none(const Maybe& t) { return t.value_or(Tensor()); }
inline Maybe maybe(const Tensor& t) { return t.defined() ? Maybe(t) : std::nullopt; }

// An operator by its name, for a call through the dispatcher.
template <class Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

template <class Real>
const cpu::PrototypeFunctions<Real>& functions() {
  static constexpr cpu::IsaTables<cpu::PrototypeTable> kTables = METAFAST_ISA_TABLES(cpu::kPrototypes);
  return cpu::functions_for<Real>(kTables.current());
}

struct Arguments {
  Tensor support, support_labels, query, query_labels, support_mask, query_mask, class_mask;
  at::Device device;
  int64_t tasks, supports, queries, features, ways;
  Metric metric;
  std::vector<int64_t> there;  // queries of each task

  Arguments(const Tensor& s, const Tensor& s_labels, const Tensor& q, const Maybe& q_labels, int64_t classes,
            c10::string_view name, const Maybe& s_mask, const Maybe& q_mask, const Maybe& c_mask)
      : device(s.device()), ways(classes), metric(metric_of(name)) {
    check_real("support", s);
    TORCH_CHECK_VALUE(s.dim() == 3 && s.numel() > 0, "support: expected (T, Ns, D), none of them 0, got ",
                      s.sizes());
    TORCH_CHECK_VALUE(q.dim() == 3 && q.numel() > 0, "query: expected (T, Nq, D), none of them 0, got ",
                      q.sizes());
    TORCH_CHECK_VALUE(ways >= 1, "ways: expected at least 1, got ", ways);
    tasks = s.size(0), supports = s.size(1), features = s.size(2), queries = q.size(1);
    support = taken("support", s, {tasks, supports, features}, s.scalar_type());
    query = taken("query", q, {tasks, queries, features}, s.scalar_type());
    support_labels = taken("support_labels", s_labels, {tasks, supports}, at::kLong);
    query_labels = taken("query_labels", q_labels, {tasks, queries}, at::kLong);
    support_mask = taken("support_mask", s_mask, {tasks, supports}, at::kBool);
    query_mask = taken("query_mask", q_mask, {tasks, queries}, at::kBool);
    class_mask = taken("ways_mask", c_mask, {tasks, ways}, at::kBool);
    check_contents();
  }

  Tensor taken(const char* name, const Maybe& t, at::IntArrayRef sizes, at::ScalarType dtype) const {
    if (!t) return {};
    check_tensor(name, *t, sizes, dtype, device);
    return t->contiguous();
  }
  template <class Element>
  static const Element* memory(const Tensor& t) {
    return t.defined() ? t.const_data_ptr<Element>() : nullptr;
  }

  // Labels are in range and of classes that are there; every class that is there has support, and every task
  // a query. A GPU's are copied for that, which waits for it.
  void check_contents() {
    std::vector<Tensor> copies;
    const auto on_host = [&](const Tensor& t) -> const Tensor& {
      if (!t.defined() || t.is_cpu()) return t;
      copies.push_back(t.cpu());
      return copies.back();
    };
    copies.reserve(5);
    const int64_t* const s_labels = memory<int64_t>(on_host(support_labels));
    const int64_t* const q_labels = memory<int64_t>(on_host(query_labels));
    const bool* const s_mask = memory<bool>(on_host(support_mask));
    const bool* const q_mask = memory<bool>(on_host(query_mask));
    const bool* const c_mask = memory<bool>(on_host(class_mask));
    check_range("support_labels", s_labels, s_mask, tasks * supports);
    if (q_labels != nullptr) check_range("query_labels", q_labels, q_mask, tasks * queries);
    std::vector<uint8_t> has(size_t(ways), 0);
    there.assign(size_t(tasks), queries);
    for (int64_t t = 0; t < tasks; ++t) {
      std::fill(has.begin(), has.end(), uint8_t(0));
      for (int64_t n = t * supports; n < (t + 1) * supports; ++n) {
        if (s_mask != nullptr && !s_mask[n]) continue;
        has[size_t(s_labels[n])] = 1;
        check_class("support_labels", c_mask, t, s_labels[n]);
      }
      for (int64_t c = 0; c < ways; ++c) {
        TORCH_CHECK_VALUE(has[size_t(c)] || (c_mask != nullptr && !c_mask[t * ways + c]),
                          "support_labels: every class 0..", ways - 1, " needs support, task ", t,
                          " has none of ", c);
      }
      if (q_mask != nullptr) {
        there[size_t(t)] = std::count(q_mask + t * queries, q_mask + (t + 1) * queries, true);
        TORCH_CHECK_VALUE(there[size_t(t)] > 0, "query_mask: every task needs a query, task ", t,
                          " has none");
      }
      for (int64_t n = t * queries; c_mask != nullptr && q_labels != nullptr && n < (t + 1) * queries; ++n) {
        if (q_mask == nullptr || q_mask[n]) check_class("query_labels", c_mask, t, q_labels[n]);
      }
    }
  }
  void check_range(const char* name, const int64_t* labels, const bool* mask, int64_t count) const {
    if (mask == nullptr) {
      // Signs of labels and of what is left above them: several at once, and without a branch.
      uint64_t outside = 0;
      for (int64_t n = 0; n < count; ++n)
        outside |= uint64_t(labels[n]) | (uint64_t(ways - 1) - uint64_t(labels[n]));
      if (int64_t(outside) >= 0) return;
    }
    int64_t least = ways, most = -1;
    for (int64_t n = 0; n < count; ++n) {
      if (mask != nullptr && !mask[n]) continue;
      least = std::min(least, labels[n]), most = std::max(most, labels[n]);
    }
    TORCH_CHECK_VALUE(least >= 0 && most < ways, name, ": expected labels 0..", ways - 1, ", got ", least,
                      "..", most);
  }
  void check_class(const char* name, const bool* mask, int64_t task, int64_t label) const {
    TORCH_CHECK_VALUE(mask == nullptr || mask[task * ways + label], name,
                      ": expected classes of ways_mask, task ", task, " does not have ", label);
  }

  // As the kernels want them: a task's queries in one part, or with few tasks in several, so that there is
  // work for many threads. Not a matter of their number, for the same bits with any.
  template <class Real>
  PrototypeHead<Real> head() const {
    constexpr int64_t kItems = 8, kLeastGroups = 3;
    const int64_t groups = whole_groups(queries) / kQueryGroup;
    PrototypeHead<Real> h{};
    h.tasks = tasks, h.supports = supports, h.queries = queries, h.ways = ways, h.features = features;
    h.parts = std::clamp<int64_t>(kItems / tasks, 1, std::max<int64_t>(groups / kLeastGroups, 1));
    h.metric = metric;
    h.support = memory<Real>(support), h.query = memory<Real>(query);
    h.support_labels = memory<int64_t>(support_labels), h.query_labels = memory<int64_t>(query_labels);
    h.support_mask = memory<bool>(support_mask), h.query_mask = memory<bool>(query_mask);
    h.class_mask = memory<bool>(class_mask);
    return h;
  }

  // run(task, part, workspace) for all parts of all tasks; the workspace is for gradients if `at_once`.
  template <class Real, class Run>
  void for_each(const PrototypeHead<Real>& h, int64_t parts, bool at_once, const Run& run) const {
    constexpr int64_t kGrain =
        1 << 16;  // multiply-adds below which a second thread costs more than it brings
    const int64_t items = tasks * parts, work = tasks * (queries * ways + supports) * features;
    const int64_t most = std::min<int64_t>(at::get_num_threads(), items);
    const int64_t threads = std::clamp<int64_t>(work / kGrain, 1, most);
    const int64_t size = functions<Real>().workspace(h, at_once);
    const Tensor workspaces = uninitialized({threads, size}, support.options());
    Real* const memory = workspaces.mutable_data_ptr<Real>();
    for_each_item(items, threads, [&](int64_t item, int64_t worker) {
      run(item / parts, item % parts, memory + worker * size);
    });
  }
};

// Of the parts' sums, (T, parts).
template <class Real>
void write_losses(const Arguments& a, const std::vector<double>& sums, int64_t parts, const Tensor& losses) {
  Real* const to = losses.mutable_data_ptr<Real>();
  for (int64_t t = 0; t < losses.numel(); ++t) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += sums[size_t(t * parts + part)];
    to[t] = Real(sum / double(a.there[size_t(t)]));
  }
}

// Room for what the parts add to the means' cotangents, where there are several: held as long as h is used.
template <class Real>
Tensor d_means_of_parts(const Arguments& a, PrototypeHead<Real>& h) {
  if (h.parts == 1) return {};
  const Tensor rows = uninitialized({a.tasks, h.parts, functions<Real>().d_means(h)}, a.support.options());
  h.d_means = rows.mutable_data_ptr<Real>();
  return rows;
}

// d_support from what the parts add to the means' cotangents.
template <class Real>
void finish_on_cpu(const Arguments& a, const PrototypeHead<Real>& h) {
  if (h.parts == 1) return;
  a.for_each(h, 1, false,
             [&](int64_t task, int64_t, Real* workspace) { functions<Real>().finish(h, task, workspace); });
}

}  // namespace metafast::prototypes
