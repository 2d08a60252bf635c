// A meta-step like one before, for small networks, whose checks in Python take a tenth of the time.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "engine.h"

namespace metafast {

// The outcome of an Episodes by the owner's inner loop and the engine of a network that fits its signature,
// as long as `watched` (metafast/engine/guard.py) is unchanged; None, before any work, where it is not, where
// these episodes want another look, and for another learner than the owner: a shallow copy shares its model.
// With `accumulate` as Engine::accumulate, else as Engine::meta_step.
pybind11::object again(const pybind11::handle& owner, const std::shared_ptr<Engine>& engine,
                       const Inner& inner, const pybind11::tuple& watched, const pybind11::object& signature,
                       const pybind11::type& episodes_type, const pybind11::type& outcome_type,
                       const pybind11::handle& learner, const pybind11::handle& episodes, bool accumulate);

}  // namespace metafast
