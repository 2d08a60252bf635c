// What metafast/engine/guard.py asks at every call, for a few hundred nanoseconds.
#pragma once

#include <pybind11/pybind11.h>

namespace metafast {

// Whether tables[i][keys[i]] is values[i] for all i, `empty` are empty dictionaries, sized[i] has sizes[i]
// entries, and ordered[i] has the keys orders[i], in their order.
bool entries_are(const pybind11::list& tables, const pybind11::list& keys, const pybind11::list& values,
                 const pybind11::list& empty, const pybind11::list& sized, const pybind11::list& sizes,
                 const pybind11::list& ordered, const pybind11::list& orders);

// Whether modules[i] is of types[i], parameters[i], a tensor, requires gradients as requires_grad[i] says,
// and classes[i].forward is forwards[i], for all i.
bool modules_are(const pybind11::list& modules, const pybind11::list& types, const pybind11::list& parameters,
                 const pybind11::list& requires_grad, const pybind11::list& classes,
                 const pybind11::list& forwards);

// Whether one of the tensors has hooks, which only autograd calls.
bool hooked(const pybind11::iterable& tensors);

}  // namespace metafast
