// What the CUDA kernels are given, and who launches them. Raw pointers, no torch.
#pragma once

#include <cstdint>

namespace hyperformer_fast {

enum class Kind { f32, bf16, f16 };

// Beyond it R h~ (b^2 a row) is no longer small beside the two projections (2 d b).
constexpr int kLargestBottleneck = 128;

struct GenerateParams {
  const float* E;   // [Q, n, k]
  const float* G;   // [Q, P, k]
  const float* g0;  // [Q, P]
  float* packed;    // [Q, n, P]
  int64_t Q, n, P, k;
};

struct FoldParams {
  const float* packed;  // [M, P], M adapters
  void* wd;             // [M, b, d]
  void* wg;             // [M, b, d]
  float* vectors;       // [M, V]
  float* scale;         // [M, b]
  float* root;          // [M, b+1, b+1]
  float* mean;          // [M, b+1]
  int64_t M, P, V;
  int64_t down_bias, up, up_bias, gamma, pre_gamma;  // where these lie in packed
  int d, b;
  bool pre_norm, post_norm;
};

struct ForwardParams {
  const void* x;                      // sample s, row m of it at s * stride_sample + m * stride_row
  int64_t stride_sample, stride_row;  // in numbers
  void* out;                          // [N, d], as all that follows contiguous
  void* z;                            // [N, b], or null: nothing is saved
  float *r, *pre_mean, *pre_rstd;     // [N], where their norm is on
  const void *wd, *wg;                // [T, b, d]
  const float *vectors, *scale, *root;
  const void* task;  // [B] of int32 or int64; null: all rows are task 0's
  bool task_is_64;
  int64_t B, M, T;  // N = B M
  int d, b;
  int activation;  // as hyperformer_fast/activations.py counts them
  bool pre_norm, post_norm;
  bool aligned;  // every row of x starts at a multiple of 16 bytes, and d fills such pieces
};

// Each throws std::runtime_error that names what the driver refused.
void generate(const GenerateParams&, void* stream);
void fold(const FoldParams&, Kind, void* stream);
void forward(const ForwardParams&, Kind, void* stream);

// Shared memory of a block of the forward, in bytes.
int forward_shared_bytes(int b, Kind);

}  // namespace hyperformer_fast
