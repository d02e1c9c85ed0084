// What all kernels share: number types, 16-byte pieces of rows, activations, tasks and their weights.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace hyperformer_fast {

// The number types of x: how each is stored, and the tensor-core product that takes it. A piece of a row is 16 bytes in
// four 32-bit words. Four lanes hold 64 bytes of a row, in any order as long as both operands of a product share it.
struct BF16 {
  using T = uint16_t;
  static constexpr bool kShortRange = false;
  static __device__ __forceinline__ float wide(T x) { return wide_bf16(x); }
  static __device__ __forceinline__ T narrow(float x) { return narrow_bf16(x); }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_bf16(d, a, b0, b1);
  }
};

struct F16 {
  using T = uint16_t;
  static constexpr bool kShortRange = true;  // has few exponent bits: r h may overflow or underflow
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

// A float32 is split into two tf32 of 11 bits each, large and small, both rounded to nearest, so that a product loses
// 2^-23 of itself. Bits that the tensor core ignores need not be cleared. The product of the two small parts is below
// 2^-22 and is dropped. Tensor cores round their sums toward zero (Fasi et al., PeerJ CS 7:e330), which would add up
// over a long row; so each sum of eight products is added to the others outside the tensor core, rounded to nearest
// (Ootomo and Yokota, arXiv 2203.03341). Infinity times a number whose small part is zero is NaN.
struct F32 {
  using T = float;
  static constexpr bool kShortRange = false;
  static __device__ __forceinline__ float wide(T x) { return x; }
  static __device__ __forceinline__ T narrow(float x) { return x; }
  static __device__ __forceinline__ uint32_t large(uint32_t x) {
    const bool may_round = fabsf(bits<float>(x)) < 0x1.ffep127f;  // beyond, the nearest tf32 is infinity
    return (may_round ? x + 0x1000u : x) & 0xFFFFE000u;
  }
  static __device__ __forceinline__ uint32_t small(uint32_t x) {
    if (!(fabsf(bits<float>(x)) <= 0x1.fffffep127f)) return 0;  // for infinity, x - large(x) would be NaN
    return bits<uint32_t>(bits<float>(x) - bits<float>(large(x))) + 0x1000u;
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t a_large[4] = {large(a[0]), large(a[1]), large(a[2]), large(a[3])};
    const uint32_t a_small[4] = {small(a[0]), small(a[1]), small(a[2]), small(a[3])};
    float sum[4] = {};
    mma_tf32(sum, a_small, large(b0), large(b1));
    mma_tf32(sum, a_large, small(b0), small(b1));
    mma_tf32(sum, a_large, large(b0), large(b1));
    for (int e = 0; e < 4; ++e) d[e] += sum[e];
  }
};

// On architectures from FROM on (as in __CUDA_ARCH__), keeps the compiler from moving loads across this point.
template <int FROM>
__device__ __forceinline__ void keep_order() {
#ifdef __CUDA_ARCH__
  if constexpr (__CUDA_ARCH__ >= FROM) __syncwarp();
#endif
}

// Calls run(S{}) with the number type of `dtype`.
template <class Run>
void by_dtype(Dtype dtype, const Run& run) {
  if (dtype == Dtype::kFloat32) return run(F32{});
  if (dtype == Dtype::kBFloat16) return run(BF16{});
  run(F16{});
}

struct alignas(16) Piece {
  uint32_t word[4];
};

template <class S>
constexpr int kPieceNumbers = 16 / sizeof(typename S::T);

template <class S>
__device__ __forceinline__ float number(const Piece& piece, int i) {
  if constexpr (sizeof(typename S::T) == 4)
    return bits<float>(piece.word[i]);
  else
    return S::wide(uint16_t(piece.word[i / 2] >> 16 * (i % 2)));
}

template <class S>
__device__ __forceinline__ Piece pack(const float (&value)[kPieceNumbers<S>]) {
  Piece piece;
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(typename S::T) == 4)
      piece.word[i] = bits<uint32_t>(value[i]);
    else
      piece.word[i] = S::narrow(value[2 * i]) | uint32_t(S::narrow(value[2 * i + 1])) << 16;
  }
  return piece;
}

// The piece of a row [d] that starts at `column`. It is zero beyond d, and everywhere if the row does not exist.
template <class S, bool ALIGNED>
__device__ __forceinline__ Piece load_piece(const typename S::T* row, int column, int d, bool there) {
  Piece piece = {{0, 0, 0, 0}};
  if (!there || column >= d) return piece;
  if constexpr (ALIGNED) {
    const uint4 all = *reinterpret_cast<const uint4*>(row + column);
    piece = {{all.x, all.y, all.z, all.w}};
  } else {
    typename S::T part[kPieceNumbers<S>] = {};
    for (int i = 0; i < kPieceNumbers<S>; ++i)
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
    typename S::T part[kPieceNumbers<S>];
    memcpy(part, &piece, 16);
    for (int i = 0; i < kPieceNumbers<S>; ++i)
      if (column + i < d) row[column + i] = part[i];
  }
}

// The sum over each group of LANES neighbouring lanes, returned in all of them.
template <int LANES, class F>
__device__ __forceinline__ F lane_sum(F value) {
  for (int lanes = LANES / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
  return value;
}

// sigmoid(u) and its derivative. Both come from exp(-|u|), which is at most 1, so that nothing overflows or cancels.
struct Sigmoid {
  float value, derivative;

  explicit __device__ __forceinline__ Sigmoid(float u) {
    const float e = expf(-fabsf(u)), q = 1.0f / (1.0f + e);
    value = (u < 0.0f ? e : 1.0f) * q;
    derivative = e * q * q;
  }
};

// gelu_new(z) is z sigmoid(u) with u = 1.596 (z + 0.0447 z^3). Beyond z^2 = 200, where the sigmoid's derivative is
// exactly 0, z^2 is limited, so that du/dz stays finite and their product is 0, not NaN.
__device__ __forceinline__ float limited_square(float z) { return fminf(z * z, 200.0f); }
__device__ __forceinline__ float gelu_new_argument(float z) {
  return 1.5957691216057308f * z * (1.0f + 0.044715f * limited_square(z));
}

// act(z). NaN passes through.
__device__ __forceinline__ float activate(float z, Activation activation) {
  if (activation == kGeluNew) return z * Sigmoid(gelu_new_argument(z)).value;
  if (activation == kGelu) return 0.5f * z * (1.0f + erff(z * 0.7071067811865476f));
  if (activation == kRelu) return z <= 0.0f ? 0.0f : z;
  return z * Sigmoid(z).value;
}

// d act(z) / dz
__device__ __forceinline__ float activate_grad(float z, Activation activation) {
  if (activation == kGelu)
    return 0.5f * (1.0f + erff(z * 0.7071067811865476f)) + z * expf(-0.5f * z * z) * 0.3989422804014327f;
  if (activation == kRelu) return z <= 0.0f ? 0.0f : 1.0f;  // NaN has the derivative 1, as in torch
  const Sigmoid sigmoid(activation == kGeluNew ? gelu_new_argument(z) : z);
  const float slope = activation == kGeluNew ? 1.5957691216057308f * (1.0f + 0.134145f * limited_square(z)) : 1.0f;
  return sigmoid.value + z * sigmoid.derivative * slope;
}

// The task of a sample as given: it may be -1, or out of range.
__device__ __forceinline__ int64_t task_of(const Tasks& tasks, int64_t sample) {
  if (tasks.index == nullptr) return 0;
  return tasks.wide ? static_cast<const int64_t*>(tasks.index)[sample]
                    : static_cast<const int32_t*>(tasks.index)[sample];
}

// One task's folded weights.
template <class T>
struct TaskWeights {
  const T *wd, *wg;  // [b, d]
  const float *down_bias, *up_bias, *beta, *scale, *root;

  __device__ __forceinline__ TaskWeights(const Adapter& p, const Folded& folded, int64_t task) {
    const int64_t b = p.b, d = p.d;
    wd = static_cast<const T*>(folded.wd) + task * b * d;
    wg = static_cast<const T*>(folded.wg) + task * b * d;
    down_bias = folded.vectors + task * (b + (p.post_norm ? 2 : 1) * d);
    up_bias = down_bias + b;
    beta = up_bias + d;
    scale = folded.scale + task * b;
    root = folded.root + task * (b + 1) * (b + 1);
  }
};

// (x - mean) * rstd for a piece that starts at `column`. It is zero beyond d, where -mean * rstd could be infinite in
// float16.
template <class S>
__device__ __forceinline__ Piece normalised(const Piece& piece, int column, int d, float mean, float rstd) {
  float value[kPieceNumbers<S>];
  for (int c = 0; c < kPieceNumbers<S>; ++c) value[c] = column + c < d ? (number<S>(piece, c) - mean) * rstd : 0.0f;
  return pack<S>(value);
}

// Entry i < b of R [h ; 1], where R [b+1, b+1] is upper triangular.
__device__ __forceinline__ float root_row(const float* root, int b, int i, const float* h) {
  float q = root[i * (b + 1) + b];
  for (int j = i; j < b; ++j) q += root[i * (b + 1) + j] * h[j];
  return q;
}

// A run of `rows` rows of one sample. It starts at the sample's row `first`, which is row `flat` over all samples.
struct Place {
  int64_t sample, first, flat;
  int rows;
};

__host__ __device__ __forceinline__ int64_t units_of(const Tasks& tasks) {
  return tasks.B * ((tasks.M + kUnit - 1) / kUnit);
}

__device__ __forceinline__ Place place_of(const Tasks& tasks, int64_t unit) {
  const int64_t per_sample = (tasks.M + kUnit - 1) / kUnit, sample = unit / per_sample;
  const int64_t first = (unit - sample * per_sample) * kUnit, left = tasks.M - first;
  return {sample, first, sample * tasks.M + first, left < kUnit ? int(left) : kUnit};
}

template <class T>
__device__ __forceinline__ const T* start_of(const Rows& rows, const Place& place) {
  return static_cast<const T*>(rows.data) + place.sample * rows.stride_sample + place.first * rows.stride_row;
}

}  // namespace hyperformer_fast
