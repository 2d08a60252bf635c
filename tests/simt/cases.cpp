// The program of tests/simt/test_emulator.py: `cases NAME` runs a case in every order. Exit status 0 and "ok"
// if nothing was found, 1 and what was found.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.h"
#include "../../csrc/simt/orders.h"
#include "kernels.cuh"

namespace metafast::simt {
namespace {

template <class T>
emulator::Buffer buffer(std::vector<T>& out) {
  return {"out", out.data(), out.size() * sizeof(T)};
}

template <class T>
std::vector<T> ramp(size_t count) {
  std::vector<T> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = T(i * 37 % 101);
  return values;
}

void expect(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("wrong: ") + what);
}

// Whether f(i) is true of all i below count.
template <class F>
void expect_all(int count, const char* what, const F& f) {
  for (int i = 0; i < count; ++i) expect(f(i), what);
}

using Case = std::function<void()>;

// A kernel whose only argument is where it writes: a cell a thread.
template <class T>
Case plain(void (*kernel)(T*), const char* name, dim3 grid = 1, dim3 block = 64, size_t shared_bytes = 0) {
  return [=] {
    std::vector<T> out(size_t(grid.x) * block.x);
    emulator::check_orders(name, {buffer(out)},
                           [&] { launch(name, kernel, grid, block, shared_bytes, nullptr, out.data()); });
  };
}

Case shape(dim3 grid, dim3 block, size_t shared_bytes = 0) {
  return [=] { launch("nothing", nothing, grid, block, shared_bytes, nullptr); };
}

void run_block_sum() {
  const auto in = ramp<float>(3 * 96);
  std::vector<float> out(3);
  emulator::check_orders("block_sum", {buffer(out)},
                         [&] { launch("block_sum", block_sum, 3, 96, 0, nullptr, in.data(), out.data()); });
  expect_all(3, "sum", [&](int block) {
    float sum = 0;
    for (int i = 0; i < 96; ++i) sum += in[size_t(block * 96 + i)];
    return out[size_t(block)] == sum;
  });
}

void run_transpose() {
  for (const int n : {1, 7, 8, 9, 17}) {
    const auto in = ramp<float>(size_t(2 * n * n));
    std::vector<float> out(in.size());
    const unsigned tiles = unsigned(n + 7) / 8;
    emulator::check_orders("transpose", {buffer(out)}, [&] {
      launch("transpose", transpose<float>, dim3(tiles, tiles, 2), dim3(8, 8), 0, nullptr, in.data(), n,
             out.data());
    });
    expect_all(2 * n * n, "transposed", [&](int i) {
      const int z = i / (n * n) * n * n, row = i / n % n, column = i % n;
      return out[size_t(i)] == in[size_t(z + column * n + row)];
    });
  }
}

void run_reverse(unsigned count) {
  const auto in = ramp<double>(count);
  std::vector<double> out(count);
  emulator::check_orders("reverse", {buffer(out)}, [&] {
    launch("reverse", reverse, 1, count, count * sizeof(double), nullptr, in.data(), out.data());
  });
  expect_all(int(count), "reversed", [&](int i) { return out[size_t(i)] == in[count - 1 - size_t(i)]; });
}

void run_allowed() {
  const auto in = ramp<double>(64);
  std::vector<double> out(64);
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  expect(cudaFuncSetAttribute(reverse, attribute, 228 << 10) == cudaErrorInvalidValue, "228 KiB are refused");
  expect(cudaFuncSetAttribute(reverse, attribute, 227 << 10) == cudaSuccess, "227 KiB are allowed");
  launch("reverse", reverse, 1, 64, 227 << 10, nullptr, in.data(), out.data());
}

void run_collectives() {
  std::vector<int> out(96 * 16);
  emulator::check_orders("collectives", {buffer(out)},
                         [&] { launch("collectives", collectives, 1, 96, 0, nullptr, out.data()); });
  expect_all(96, "a collective", [&](int thread) {
    const int lane = thread % 32, group = lane / 8 * 8;
    int xors = 0, low = 0;
    unsigned thirds = 0, fives = 0;
    for (int l = 0; l < 32; ++l) {
      xors ^= l * l, low += l < 20 ? l : 0;
      thirds |= unsigned(l % 3 == 0) << l, fives |= unsigned(l / 5 == lane / 5) << l;
    }
    const int wanted[] = {int(thirds),
                          1,
                          0,
                          496,
                          -5,
                          31,
                          xors,
                          int(fives),
                          group + 1,
                          lane - group >= 3 ? lane - 3 : lane,
                          lane - group < 5 ? lane + 3 : lane,
                          (lane ^ 12) < group + 8 ? lane ^ 12 : lane,
                          lane < 20 ? low : 496 - low,
                          40,
                          0,
                          1};
    return std::equal(std::begin(wanted), std::end(wanted), out.begin() + thread * 16);
  });
}

void run_histogram() {
  const auto in = ramp<int>(1000);
  std::vector<int> counts(101);
  emulator::check_orders("histogram", {buffer(counts)}, [&] {
    launch("histogram", histogram, 8, 128, 0, nullptr, in.data(), 1000, counts.data());
  });
  expect_all(101, "count", [&](int v) { return counts[size_t(v)] == std::count(in.begin(), in.end(), v); });
}

void run_atomics() {
  std::vector<unsigned> cells = {0, 1000, 1000, 0, kAll, 0, 0, 0, 0, 1};
  emulator::check_orders("atomics", {buffer(cells)},
                         [&] { launch("atomics", atomics, 1, 32, 0, nullptr, cells.data()); });
  unsigned xors = 0, product = 1;
  for (unsigned i = 0; i < 32; ++i) xors ^= i * 77, product *= 2 * i + 1;
  expect(cells == std::vector<unsigned>{496, 504, 0, 31, 0, kAll, xors, 2, 8, product}, "atomics");
}

void run_neighbours() {
  std::vector<float4> in(64), out(64);
  for (size_t i = 0; i < 64; ++i) in[i] = make_float4(float(i), 1, 2, 3);
  emulator::check_orders("neighbours", {buffer(out)},
                         [&] { launch("neighbours", neighbours, 1, 64, 0, nullptr, in.data(), out.data()); });
  expect_all(64, "neighbour",
             [&](int i) { return out[size_t(i)].w == float(i ^ 1) && out[size_t(i)].x == 3; });
}

void run_sum_in_any_order() {
  std::vector<float> in(64), out(1);
  for (size_t i = 0; i < 64; ++i) in[i] = 1.0f / float(i + 1);
  emulator::check_orders("sum_in_any_order", {buffer(out)}, [&] {
    launch("sum_in_any_order", sum_in_any_order, 1, 64, 0, nullptr, in.data(), out.data());
  });
}

void run_past_global() {
  const std::unique_ptr<float[]> in(new float[64]()), out(new float[64]());
  launch("past_global", past_global, 1, 32, 0, nullptr, in.get() + 32, out.get());
}

// A launch that failed leaves nothing behind.
void run_after_failure() {
  for (int i = 0; i < 3; ++i) {
    bool failed = false;
    try {
      plain(barrier_in_a_branch, "barrier_in_a_branch")();
    } catch (const std::runtime_error&) {
      failed = true;
    }
    expect(failed, "the failure");
    run_block_sum();
  }
}

#define PLAIN(kernel, ...) {#kernel, plain(kernel, #kernel __VA_OPT__(, ) __VA_ARGS__)}

const std::map<std::string, Case> kCases = {
    {"block_sum", run_block_sum},
    {"transpose", run_transpose},
    {"reverse", [] { run_reverse(1024); }},
    {"allowed", run_allowed},
    {"collectives", run_collectives},
    {"histogram", run_histogram},
    {"atomics", run_atomics},
    {"neighbours", run_neighbours},
    {"after_failure", run_after_failure},
    PLAIN(missing_barrier),
    PLAIN(missing_warp_barrier),
    PLAIN(missing_second_barrier),
    PLAIN(barrier_in_a_branch),
    PLAIN(two_barriers),
    PLAIN(barrier_after_return),
    PLAIN(shuffle_without_all),
    PLAIN(shuffle_before_barrier),
    PLAIN(shuffle_from_outside),
    PLAIN(shuffle_of_others),
    PLAIN(two_collectives),
    PLAIN(odd_width),
    {"lanes_without_threads", plain(vote_of_all, "lanes_without_threads", 1, 40)},
    PLAIN(unwritten),
    PLAIN(unwritten_dynamic, 1, 64, 256),
    {"no_dynamic", plain(unwritten_dynamic, "no_dynamic")},
    {"sum_in_any_order", run_sum_in_any_order},
    PLAIN(last_block_wins, 3),
    PLAIN(block_reads_block, 3),
    PLAIN(plain_and_atomic),
    PLAIN(too_much_shared),
    {"static_and_dynamic", plain(static_and_dynamic, "static_and_dynamic", 1, 64, 16385)},
    {"past_global", run_past_global},
    PLAIN(past_shared),
    PLAIN(past_dynamic, 1, 64, 256),
    {"threads", shape(1, 1025)},
    {"threads_in_all", shape(1, dim3(32, 32, 2))},
    {"no_threads", shape(1, 0)},
    {"block_z", shape(1, dim3(1, 1, 65))},
    {"no_blocks", shape(0, 1)},
    {"grid_y", shape(dim3(1, 65536), 1)},
    {"dynamic_shared", shape(1, 1, 49153)},
};

}  // namespace
}  // namespace metafast::simt

int main(int, char** names) {
  try {
    metafast::simt::kCases.at(names[1])();
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
  std::puts("ok");
}
