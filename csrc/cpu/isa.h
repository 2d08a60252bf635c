// The instruction set that the CPU kernels run with, chosen at run time.
//
// A kernel is one header, compiled once per set by three small files whose names end in the set
// (x_baseline.cpp, x_avx2.cpp, x_avx512.cpp: setup.py gives each the compiler's flags by that ending). Each
// defines METAFAST_ISA, the namespace of everything in the header, and exports one const table of function
// pointers. Those files include almost nothing: an inline function compiled under different flags is merged
// by the linker, and may then run where it cannot.
//
// The best set that the machine has is taken; METAFAST_CPU_ISA=avx512|avx2|baseline forces one.
// Tested by tests/test_native.py.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

namespace metafast::cpu {

enum class Isa { baseline, avx2, avx512 };  // ascending
constexpr int kIsas = 3;

// Sets that are in this build and that this machine runs, ascending.
std::vector<std::string> supported();

// The set in use. The first call reads METAFAST_CPU_ISA; throws std::invalid_argument, naming the variable,
// where it holds an unknown set or one that does not run here.
Isa current();
std::string current_name();

// Forces a set, for tests. Throws std::invalid_argument for an unknown set or one that does not run here.
void use(const std::string& name);

// One kernel's table for each set: IsaTables<X> kTables = METAFAST_ISA_TABLES(kX) picks among kXBaseline,
// kXAvx2 and kXAvx512, of which the first alone exists where the machine is no x86-64.
template <class Table>
struct IsaTables {
  const Table* of[kIsas];
  const Table& current() const { return *of[static_cast<int>(cpu::current())]; }
};

// The table's functions for float or double.
template <class Real, class Table>
const auto& functions_for(const Table& table) {
  if constexpr (std::is_same_v<Real, float>) {
    return table.float32;
  } else {
    return table.float64;
  }
}

#if defined(__x86_64__)
#define METAFAST_ISA_TABLES(prefix)                     \
  {                                                     \
    {                                                   \
      &prefix##Baseline, &prefix##Avx2, &prefix##Avx512 \
    }                                                   \
  }
#else
#define METAFAST_ISA_TABLES(prefix)       \
  {                                       \
    {                                     \
      &prefix##Baseline, nullptr, nullptr \
    }                                     \
  }
#endif

}  // namespace metafast::cpu
