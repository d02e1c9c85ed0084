// What the CUDA kernels are given, and who launches them. Raw pointers, no torch.
#pragma once

#include <atomic>
#include <cstdint>

#include "../layout.h"

namespace hyperformer_fast {

// The largest bottleneck that is served. Beyond it R h~ (b^2 per row) is no longer small beside the two projections
// (2 d b).
constexpr int kLargestBottleneck = 128;

// The most shared memory of a block that every architecture gives; 8.6 and 8.9 have the least.
constexpr int kMostSharedBytes = 99 << 10;

struct GenerateParams {
  const float* E;   // [Q, n, k]
  const float* G;   // [Q, P, k]
  const float* g0;  // [Q, P]
  float* packed;    // [Q, n, P]
  int64_t Q, n, P, k;
  bool aligned;  // rows of E and G start at multiples of 16 bytes
};

// Where the parts of an adapter lie in its P packed numbers (csrc/layout.h); 0 for those that it lacks.
struct PackedParts {
  int64_t P, down_bias, up, up_bias, gamma, pre_gamma;
};

struct FoldParams {
  const float* packed;  // [M, P], M adapters
  void* wd;             // [M, b, d]
  void* wg;             // [M, b, d]
  float* vectors;       // [M, V]
  float* scale;         // [M, b]
  float* root;          // [M, b+1, b+1]
  float* mean;          // [M, b+1]
  int64_t M, V;
  PackedParts at;
  int d, b;
  bool pre_norm, post_norm;
};

// Row m of sample s at data + s * stride_sample + m * stride_row; strides in numbers.
struct Rows {
  const void* data;
  int64_t stride_sample, stride_row;
};

struct Tasks {
  const void* index;  // [B] of int32 or int64; null: all rows are task 0's
  bool wide;          // int64
  int64_t B, M, T;    // N = B M rows
};

struct Folded {
  const void *wd, *wg;  // [T, b, d]
  const float *vectors, *scale, *root;
};

struct Adapter {
  int d, b;
  Activation activation;
  bool pre_norm, post_norm;
};

struct ForwardParams : Adapter {
  Rows x;
  Tasks tasks;
  Folded folded;
  void* out;                       // [N, d], as all that follows contiguous
  void* z;                         // [N, b], or null: nothing is saved
  float *r, *pre_mean, *pre_rstd;  // [N], where their norm is on
  bool aligned;                    // every row of x starts at a multiple of 16 bytes, and d fills such pieces
};

struct SiteParams {
  GenerateParams generate;
  FoldParams fold;
  ForwardParams forward;
  bool use_few_rows_kernel = false;  // set by dispatch.cu
};

struct BackwardParams : Adapter {
  Rows g, x;
  Tasks tasks;
  Folded folded;
  const void* z;                         // [N, b]
  const float *r, *pre_mean, *pre_rstd;  // [N]
  const float* packed;                   // [T, P]
  int64_t P, gamma;                      // gamma: where it lies in packed
  void* dx;                              // [N, d], or null
  void* dz;                              // [N, b], or null; with it
  float *m2, *s;                         // [N], with a post-norm: m2 of docs/design.md, and s = g . gamma
  bool aligned;
};

struct WeightGradientParams : Adapter {
  Rows g, x;
  Tasks tasks;
  const void *z, *dz;
  const float *r, *pre_mean, *pre_rstd, *m2, *s;
  float* part;  // [splits, T, partial_sums(d, b)]
  int splits;
  int64_t units_per_split;  // units: 32 rows of one sample
  bool aligned;
};

struct FinishParams : Adapter {
  const float *part, *packed, *mean;
  float* dpacked;  // [T, P]
  int64_t T;
  PackedParts at;
  int splits;
};

constexpr int kUnit = 32;  // rows of one sample that a block takes at a time

// A stretch's sums: dz^T x [b, d], (r h)^T g [b, d], r^T g [d], sum g [d], M [b, b], its border [b], (r h)^T s [b],
// sum dz [b], M's corner, r . s; and up to a multiple of four.
constexpr int64_t partial_sums(int64_t d, int64_t b) { return ((2 * b + 2) * d + b * b + 3 * b + 2 + 3) / 4 * 4; }

// Into how many stretches of rows the weight gradients' sums are cut: a function of sizes alone, so that the order of
// summation is the same on every GPU.
int stretches(const Adapter&, int64_t units, int64_t T, Dtype);

// Up to how many rows a forward takes the kernel that has a block for each; a process may set it (0: never).
extern std::atomic<int64_t> few_rows;

// Each throws std::runtime_error that names what the driver refused.
void generate(const GenerateParams&, void* stream);
void fold(const FoldParams&, Dtype, void* stream);
void forward(const ForwardParams&, Dtype, void* stream);
void site(SiteParams, Dtype, void* stream);
void backward(const BackwardParams&, Dtype, void* stream);
void weight_gradients(const WeightGradientParams&, Dtype, void* stream);
void finish(const FinishParams&, void* stream);

// Shared memory of a block, in bytes.
int generate_shared_bytes();
int fold_shared_bytes(int b);
int forward_shared_bytes(int b, Dtype);
int few_rows_shared_bytes(int d, int b, Dtype);
int site_shared_bytes(int d, int b, Dtype);
int backward_shared_bytes(int b, Dtype);
int weight_gradients_shared_bytes(int b, Dtype);
int finish_shared_bytes(int b);

}  // namespace hyperformer_fast
