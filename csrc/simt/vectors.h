// CUDA's vector types with their alignment, and dim3.
#pragma once

// clang-format off
#define EMULATOR_VECTORS(Type, name, align2, align4)                                                            \
  struct alignas(align2) name##2 { Type x, y; };                                                                \
  struct name##3 { Type x, y, z; };                                                                             \
  struct alignas(align4) name##4 { Type x, y, z, w; };                                                          \
  inline name##2 make_##name##2(Type x, Type y) { return {x, y}; }                                              \
  inline name##3 make_##name##3(Type x, Type y, Type z) { return {x, y, z}; }                                   \
  inline name##4 make_##name##4(Type x, Type y, Type z, Type w) { return {x, y, z, w}; }
// clang-format on

EMULATOR_VECTORS(float, float, 8, 16)
EMULATOR_VECTORS(double, double, 16, 16)
EMULATOR_VECTORS(int, int, 8, 16)
EMULATOR_VECTORS(unsigned, uint, 8, 16)
EMULATOR_VECTORS(unsigned char, uchar, 2, 4)
EMULATOR_VECTORS(long long, longlong, 16, 16)

#undef EMULATOR_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};
