// The arguments of the CUDA kernels, and the functions that launch them. Raw pointers, no torch.
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

// Where a launch goes: a CUDA stream, and the device that it belongs to.
struct Stream {
  void* handle = nullptr;
  int device = 0;
};

struct GenerateParams {
  const float* E;   // [Q, n, k]
  const float* G;   // [Q, P, k]
  const float* g0;  // [Q, P]
  float* packed;    // [Q, n, P]
  int64_t Q, n, P, k;
  bool aligned;  // rows of E and G start at multiples of 16 bytes
};

// Where the parts of an adapter lie in its P packed numbers (csrc/layout.h). Norms that are off have no parts.
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
  bool aligned;  // the rows of packed and their down-projections have whole pieces of 16 bytes, at multiples of that
};

// A run of `count` things from number `first` on.
struct Run {
  int first, count;
};

// Units `first` to `first + count - 1` of those that schedule.cuh groups by task. All belong to `task`.
struct Segment {
  int task, first, count;
};

// How the weight gradients take the rows (schedule.cuh). The pointers are null where all rows are task 0's.
struct Schedule {
  int* samples;      // [B]: the samples that have a task, grouped by it
  Segment* segment;  // [segments]
  Run* of_task;      // [T]: each task's segments
  int segments;
  int64_t share;  // the most units of a segment
};

// Row m of sample s starts at data + s * stride_sample + m * stride_row; strides count numbers, not bytes.
struct Rows {
  const void* data;
  int64_t stride_sample, stride_row;
};

struct Tasks {
  const void* index;  // [B] of int32 or int64; null where all rows are task 0's
  bool wide;          // whether index is int64
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
  void* out;                       // [N, d]; this and all that follows is contiguous
  void* z;                         // [N, b]; null where nothing is saved
  float *r, *pre_mean, *pre_rstd;  // [N]; only where their norm is on
  bool aligned;                    // every row starts at a multiple of 16 bytes, and has whole pieces of 16 bytes
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
  int64_t P, gamma;                      // gamma is its offset in packed
  void* dx;                              // [N, d], or null
  void* records;                         // [N, record_bytes], or null; then there is no schedule either
  Schedule schedule;
  bool aligned;
};

struct WeightGradientParams : Adapter {
  Rows g, x;
  Tasks tasks;
  const void* records;
  const float *pre_mean, *pre_rstd;
  Schedule schedule;
  float* part;  // [schedule.segments, partial_sums(d, b)]
  bool aligned;
};

struct FinishParams : Adapter {
  const float *part, *packed, *mean;  // [S, schedule.segments, partial_sums(d, b)], [S, T, P], [S, T, b+1]
  float* dpacked;                     // [S, T, P]
  int64_t S, T;
  PackedParts at;
  Schedule schedule;  // the same for all S sites
};

// A unit is a run of up to 32 rows of one sample, which a block takes at a time.
constexpr int kUnit = 32;

// How many floats the sums of one segment take, rounded up to a multiple of four: dz^T x [b, d], (r h)^T g [b, d],
// r^T g [d], sum g [d], M [b, b], its border [b], (r h)^T s [b], sum dz [b], the corner of M, and r . s.
constexpr int64_t partial_sums(int64_t d, int64_t b) { return ((2 * b + 2) * d + b * b + 3 * b + 2 + 3) / 4 * 4; }

// The most units of a segment. It depends on sizes alone, so that the order of summation is the same on every GPU.
int64_t segment_share(const Adapter&, int64_t units, Dtype);

// The bytes of a row's record (row_record.cuh).
int record_bytes(int b, Dtype, bool aligned);

// Up to this number of rows, a forward uses the kernel with one block per row. A process may set it; 0 means never.
extern std::atomic<int64_t> few_rows;

// Launchers. Each throws a std::runtime_error that names what the driver refused.
void generate(const GenerateParams&, const Stream& stream);
void fold(const FoldParams&, Dtype, const Stream& stream);
void forward(const ForwardParams&, Dtype, const Stream& stream);
void site(SiteParams, Dtype, const Stream& stream);
void backward(const BackwardParams&, Dtype, const Stream& stream);
void weight_gradients(const WeightGradientParams&, Dtype, const Stream& stream);
void finish(const FinishParams&, const Stream& stream);

// The shared memory of one block, in bytes.
int generate_shared_bytes();
int fold_shared_bytes(int d, int b);
int forward_shared_bytes(int b, Dtype);
int few_rows_shared_bytes(int d, int b, Dtype);
int site_shared_bytes(int d, int b, Dtype);
int backward_shared_bytes(int b, Dtype);
int weight_gradients_shared_bytes(int b, Dtype);
int finish_shared_bytes(int b);

}  // namespace hyperformer_fast
