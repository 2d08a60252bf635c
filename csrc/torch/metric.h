// The metrics of prototypes by name.
#pragma once

#include <c10/util/Exception.h>
#include <c10/util/string_view.h>

#include "../prototypes.h"

namespace metafast {

inline Metric metric_of(c10::string_view name) {
  if (name == "sqeuclidean") return Metric::sqeuclidean;
  if (name == "euclidean") return Metric::euclidean;
  TORCH_CHECK_VALUE(name == "cosine", "metric: expected 'sqeuclidean', 'euclidean' or 'cosine', got '", name,
                    "'");
  return Metric::cosine;
}

}  // namespace metafast
