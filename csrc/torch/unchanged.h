// What metafast/engine/guard.py asks at every call, for a few hundred nanoseconds.
#pragma once

#include <pybind11/pybind11.h>

namespace metafast {

// Whether all that a guard.py's Watched names is as it was. The lists must stand still meanwhile.
bool unchanged(const pybind11::tuple& watched);

// The parameters in it, a borrowed reference.
pybind11::handle watched_parameters(const pybind11::tuple& watched);

// Whether one of the tensors has hooks, which only autograd calls.
bool hooked(const pybind11::handle& tensors);

}  // namespace metafast
