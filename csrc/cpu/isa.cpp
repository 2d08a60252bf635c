#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace metafast::cpu {
namespace {

constexpr const char* kVariable = "METAFAST_CPU_ISA";
constexpr const char* kNames[kIsas] = {"baseline", "avx2", "avx512"};

bool runs(Isa isa) {
  if (isa == Isa::baseline) return true;
#if defined(__x86_64__)
  // These ask the operating system too: it must save the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

std::string joined(const std::vector<std::string>& names) {
  std::string all;
  for (const auto& name : names) all += (all.empty() ? "" : ", ") + name;
  return all;
}

Isa parse(const std::string& source, const std::string& name) {
  for (int i = 0; i < kIsas; ++i) {
    if (name != kNames[i]) continue;
    if (runs(Isa(i))) return Isa(i);
    throw std::invalid_argument(source + ": this machine does not run '" + name + "', only " +
                                joined(supported()));
  }
  throw std::invalid_argument(source + ": expected one of baseline, avx2, avx512, got '" + name + "'");
}

Isa initial() {
  if (const char* forced = std::getenv(kVariable)) return parse(kVariable, forced);
  for (int i = kIsas - 1; i > 0; --i) {
    if (runs(Isa(i))) return Isa(i);
  }
  return Isa::baseline;
}

std::atomic<Isa>& state() {
  static std::atomic<Isa> isa{initial()};
  return isa;
}

}  // namespace

std::vector<std::string> supported() {
  std::vector<std::string> names;
  for (int i = 0; i < kIsas; ++i) {
    if (runs(Isa(i))) names.push_back(kNames[i]);
  }
  return names;
}

Isa current() { return state().load(std::memory_order_relaxed); }

std::string current_name() { return kNames[static_cast<int>(current())]; }

void use(const std::string& name) { state().store(parse("isa", name), std::memory_order_relaxed); }

}  // namespace metafast::cpu
