// Conversions between float32 and the 16-bit types, to nearest even, in integer arithmetic that compilers vectorise
// without branches.
#pragma once

#include <cstdint>
#include <cstring>

namespace hyperformer_fast {

#include "bf16-inl.h"

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

inline float from_bf16(uint16_t h) { return float_of(uint32_t(h) << 16); }

inline uint16_t to_bf16(float x) {
  uint32_t u = bits_of(x);
  round_to_bf16<uint32_t>(u, (u & 0x7fffffff) > 0x7f800000 ? ~0u : 0u);
  return static_cast<uint16_t>(u);
}

inline float from_f16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  if (exponent == 0) return float_of(sign | bits_of(float(mantissa) * 0x1p-24f));
  if (exponent == 31) return float_of(sign | 0x7f800000 | (mantissa << 13));
  return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline uint16_t to_f16(float x) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  // Normal results: rebias the exponent by 127 - 15 and round to 10 bits of mantissa. 65520 and above become infinite.
  const uint32_t normal = (a - (112u << 23) + 0xfff + ((a >> 13) & 1)) >> 13;
  // Subnormal results: floats at 0.5 are 2^-24 apart, which is float16's smallest step, so the addition itself rounds.
  const uint32_t subnormal = bits_of(float_of(a) + 0.5f) - bits_of(0.5f);
  uint32_t h = a < 0x38800000 ? subnormal : normal;
  h = a >= 0x477ff000 ? 0x7c00 : h;
  h = a > 0x7f800000 ? 0x7e00 : h;
  return static_cast<uint16_t>(sign | h);
}

}  // namespace hyperformer_fast
