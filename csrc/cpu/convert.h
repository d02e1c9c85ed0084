// float32 to the 16-bit types, round to nearest even, in integer arithmetic that compilers vectorise without branches.
#pragma once

#include <cstdint>
#include <cstring>

namespace hyperformer_fast {

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

inline uint16_t to_bf16(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  // Rounding up a NaN whose payload is all ones would carry into the sign and give a zero.
  return static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline uint16_t to_f16(float x) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  // Normal results: rebias the exponent by 127 - 15, round to 10 bits of mantissa; 65520 and above become infinite.
  const uint32_t normal = (a - (112u << 23) + 0xfff + ((a >> 13) & 1)) >> 13;
  // Subnormal results: the spacing of floats at 0.5 is 2^-24, float16's smallest step, so that the addition itself
  // rounds.
  const uint32_t subnormal = bits_of(float_of(a) + 0.5f) - bits_of(0.5f);
  uint32_t h = a < 0x38800000 ? subnormal : normal;
  h = a >= 0x477ff000 ? 0x7c00 : h;
  h = a > 0x7f800000 ? 0x7e00 : h;
  return static_cast<uint16_t>(sign | h);
}

}  // namespace hyperformer_fast
