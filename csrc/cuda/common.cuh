// What the kernels share: number types, 16-byte pieces of rows, activations.
#pragma once

#include "params.h"
#include "portable.cuh"

namespace hyperformer_fast {

// A number type of x: how it is stored, and the product of tensor cores that takes it. A piece of a row is 16 bytes in
// four 32-bit words; four lanes hold 64 bytes of a row, in any order that both operands of a product share.
struct BF16 {
  using T = uint16_t;
  static __device__ __forceinline__ float wide(T x) { return wide_bf16(x); }
  static __device__ __forceinline__ T narrow(float x) { return narrow_bf16(x); }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_bf16(d, a, b0, b1);
  }
};

struct F16 {
  using T = uint16_t;
  static __device__ __forceinline__ float wide(T x) { return wide_f16(x); }
  static __device__ __forceinline__ T narrow(float x) { return narrow_f16(x); }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_f16(d, a, b0, b1);
  }
};

template <class To, class From>
__device__ __forceinline__ To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof x);
  return y;
}

// A float32 is the sum of two tf32, of 11 bits each, to 2^-23: the large one rounded to nearest, what is left of the
// other cut off by the tensor core. The product of the two small parts, below 2^-22, is dropped.
struct F32 {
  using T = float;
  static __device__ __forceinline__ float wide(T x) { return x; }
  static __device__ __forceinline__ T narrow(float x) { return x; }
  static __device__ __forceinline__ bool finite(uint32_t x) { return (x & 0x7F800000u) != 0x7F800000u; }
  static __device__ __forceinline__ uint32_t large(uint32_t x) { return (finite(x) ? x + 0x1000u : x) & 0xFFFFE000u; }
  static __device__ __forceinline__ uint32_t small(uint32_t x) {
    if (!finite(x)) return 0;  // inf - inf would make it NaN
    return bits<uint32_t>(bits<float>(x) - bits<float>(large(x)));
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t a_large[4] = {large(a[0]), large(a[1]), large(a[2]), large(a[3])};
    const uint32_t a_small[4] = {small(a[0]), small(a[1]), small(a[2]), small(a[3])};
    mma_tf32(d, a_small, large(b0), large(b1));
    mma_tf32(d, a_large, small(b0), small(b1));
    mma_tf32(d, a_large, large(b0), large(b1));
  }
};

struct Piece {
  uint32_t word[4];
};

template <class S>
constexpr int kPiece = 16 / sizeof(typename S::T);

template <class S>
__device__ __forceinline__ float number(const Piece& piece, int i) {
  if constexpr (sizeof(typename S::T) == 4)
    return bits<float>(piece.word[i]);
  else
    return S::wide(uint16_t(piece.word[i / 2] >> 16 * (i % 2)));
}

template <class S>
__device__ __forceinline__ Piece pack(const float (&value)[kPiece<S>]) {
  Piece piece;
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(typename S::T) == 4)
      piece.word[i] = bits<uint32_t>(value[i]);
    else
      piece.word[i] = S::narrow(value[2 * i]) | uint32_t(S::narrow(value[2 * i + 1])) << 16;
  }
  return piece;
}

// Numbers column .. of a row of d; zeros beyond it, or where the row is not there.
template <class S, bool ALIGNED>
__device__ __forceinline__ Piece load_piece(const typename S::T* row, int column, int d, bool there) {
  Piece piece = {{0, 0, 0, 0}};
  if (!there || column >= d) return piece;
  if constexpr (ALIGNED) {
    const uint4 all = *reinterpret_cast<const uint4*>(row + column);
    piece = {{all.x, all.y, all.z, all.w}};
  } else {
    typename S::T part[kPiece<S>] = {};
    for (int i = 0; i < kPiece<S>; ++i)
      if (column + i < d) part[i] = row[column + i];
    memcpy(&piece, part, 16);
  }
  return piece;
}

template <class S, bool ALIGNED>
__device__ __forceinline__ void store_piece(typename S::T* row, int column, int d, bool there, const Piece& piece) {
  if (!there || column >= d) return;
  if constexpr (ALIGNED) {
    *reinterpret_cast<uint4*>(row + column) = uint4{piece.word[0], piece.word[1], piece.word[2], piece.word[3]};
  } else {
    typename S::T part[kPiece<S>];
    memcpy(part, &piece, 16);
    for (int i = 0; i < kPiece<S>; ++i)
      if (column + i < d) row[column + i] = part[i];
  }
}

// Sum over groups of LANES neighbouring lanes, in every one of them.
template <int LANES, class F>
__device__ __forceinline__ F lane_sum(F value) {
  for (int lanes = LANES / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
  return value;
}

__device__ __forceinline__ float sigmoid(float u) { return 1.0f / (1.0f + expf(u < -80.0f ? 80.0f : -u)); }

// Of the index in hyperformer_fast/activations.py: gelu_new, gelu, relu, silu. A NaN passes through each.
__device__ __forceinline__ float activate(float z, int activation) {
  if (activation == 0) return z * sigmoid(1.5957691216057308f * (z + 0.044715f * z * z * z));
  if (activation == 1) return 0.5f * z * (1.0f + erff(z * 0.7071067811865476f));
  if (activation == 2) return z <= 0.0f ? 0.0f : z;
  return z * sigmoid(z);
}

}  // namespace hyperformer_fast
