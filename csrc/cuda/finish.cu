// dpacked, from the sums of each task's segments, which are added in order: one block per 16 columns of one task of one
// site (docs/design.md has the formulas). The column mean that C subtracts from the up-projection's gradient needs no
// pass over d: Wa is centred, so it is sum_n s_n (r h~)_n / d with s_n = g_n . gamma.
#include "launch.cuh"
#include "schedule.cuh"

namespace hyperformer_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 16;  // per block; more would leave more multiprocessors idle
static_assert(kColumns % 4 == 0 && 8 * kColumns <= kThreads && kThreads % kColumns == 0);

constexpr int shared_floats(int b) { return b * b + 3 * b + 2 + 2 * kColumns * (b + 1) + 5 * kColumns + 2 * kThreads; }

static_assert(shared_floats(kLargestBottleneck) * 4 <= kMostSharedBytes);

// Four blocks a multiprocessor leave 64 registers a thread. Left to itself, ptxas takes 40 and spills on sm_100.
__global__ void __launch_bounds__(kThreads, 4) finish_kernel(const FinishParams p) {
  HFF_SHARED(shared);
  const int d = p.d, b = p.b, thread = threadIdx.x;
  const int64_t matrix = int64_t(b) * d, size = partial_sums(d, b), adapter = blockIdx.y;  // of S T
  const int64_t site = adapter / p.T;
  const Run segments = segments_of(p.schedule, adapter - site * p.T);
  const float* const part = p.part + (site * p.schedule.segments + segments.first) * size;
  float* const M = reinterpret_cast<float*>(shared);  // [b, b]
  float* const border = M + b * b;                    // [b]; from here on the order is that of `part`
  float* const by_s = border + b;                     // [b]
  float* const dz_sum = by_s + b;                     // [b]
  float* const corner = dz_sum + b;                   // the corner of M, and r . s
  float* const wa = corner + 2;                       // [kColumns, b+1]: the centred up-projection and bias
  float* const A = wa + kColumns * (b + 1);           // [kColumns, b+1]: g^T (r h~)
  float* const gamma = A + kColumns * (b + 1);        // [kColumns], as all that follow
  float* const g_sum = gamma + kColumns;
  float* const pre_gamma = g_sum + kColumns;
  float* const pre_beta = pre_gamma + kColumns;
  float* const sums = pre_beta + kColumns;  // two of [kThreads / kColumns, kColumns]
  const float* const packed = p.packed + adapter * p.at.P;
  float* const dpacked = p.dpacked + adapter * p.at.P;
  const int first = blockIdx.x * kColumns;
  const auto sum = [&](int64_t at) {
    float all = 0.0f;
#pragma unroll 8
    for (int s = 0; s < segments.count; ++s) all += part[s * size + at];
    return all;
  };

  const int small = b * b + 3 * b + 2;
  for (int i = thread; i < small; i += kThreads)
    if (p.post_norm || (i >= b * b + 2 * b && i < b * b + 3 * b)) M[i] = sum((2 * int64_t(b) + 2) * d + i);
  for (int i = thread; i < kColumns; i += kThreads) {
    const int column = first + i;
    if (column >= d) continue;
    A[i * (b + 1) + b] = sum(2 * matrix + column);
    g_sum[i] = sum(2 * matrix + d + column);
    if (p.pre_norm) pre_gamma[i] = packed[p.at.pre_gamma + column], pre_beta[i] = packed[p.at.pre_gamma + d + column];
    if (!p.post_norm) continue;
    gamma[i] = packed[p.at.gamma + column];
    wa[i * (b + 1) + b] = packed[p.at.up_bias + column] - p.mean[adapter * (b + 1) + b];
  }
  for (int i = thread; i < kColumns * b; i += kThreads) {
    const int column = i % kColumns, j = i / kColumns;
    if (first + column < d) A[column * (b + 1) + j] = sum(matrix + int64_t(j) * d + first + column);
  }
  if (p.post_norm)
    for (int i = thread; i < kColumns * b; i += kThreads) {
      const int column = i / b, j = i % b;
      if (first + column < d)
        wa[column * (b + 1) + j] = packed[p.at.up + int64_t(first + column) * b + j] - p.mean[adapter * (b + 1) + j];
    }
  __syncthreads();

  // The up-projection. Four columns share each number that is read of M.
  for (int i = thread; i < kColumns / 4 * b; i += kThreads) {
    const int j = i % b, column = i / b * 4;
    float product[4] = {};
    if (p.post_norm)
      for (int e = 0; e <= b; ++e) {
        const float m = e < b ? M[e * b + j] : border[j];
        for (int c = 0; c < 4; ++c) product[c] += wa[(column + c) * (b + 1) + e] * m;
      }
    for (int c = 0; c < 4; ++c) {
      if (first + column + c >= d) continue;
      float up = A[(column + c) * (b + 1) + j];
      if (p.post_norm) up = gamma[column + c] * up - product[c] - by_s[j] / float(d);
      dpacked[p.at.up + int64_t(first + column + c) * b + j] = up;
    }
  }
  // The gradients of each column's bias, gamma and beta, by eight threads per column.
  if (const int column = thread / 8; column < kColumns) {
    const bool there = first + column < d;
    float dgamma = 0.0f, product = 0.0f;
    if (there && p.post_norm)
      for (int j = thread % 8; j <= b; j += 8) {
        const float w = wa[column * (b + 1) + j];
        dgamma += w * A[column * (b + 1) + j];
        product += w * (j < b ? border[j] : corner[0]);
      }
    dgamma = lane_sum<8>(dgamma), product = lane_sum<8>(product);
    if (there && thread % 8 == 0) {
      float bias = A[column * (b + 1) + b];
      if (p.post_norm) {
        bias = gamma[column] * bias - product - corner[1] / float(d);
        dpacked[p.at.gamma + first + column] = dgamma;
        dpacked[p.at.gamma + d + first + column] = g_sum[column];
      }
      dpacked[p.at.up_bias + first + column] = bias;
    }
  }

  const int column = thread % kColumns, group = thread / kColumns;
  float by_weight = 0.0f, by_sum = 0.0f;
  if (first + column < d)
    for (int j = group; j < b; j += kThreads / kColumns) {
      const int64_t at = int64_t(j) * d + first + column;
      float down = sum(at);
      if (p.pre_norm) {
        by_weight += packed[at] * down;
        by_sum += packed[at] * dz_sum[j];
        down = down * pre_gamma[column] + dz_sum[j] * pre_beta[column];
      }
      dpacked[at] = down;
    }
  if (blockIdx.x == 0)
    for (int j = thread; j < b; j += kThreads) dpacked[p.at.down_bias + j] = dz_sum[j];
  if (!p.pre_norm) return;
  sums[thread] = by_weight, sums[kThreads + thread] = by_sum;
  __syncthreads();
  if (group > 0 || first + column >= d) return;
  for (int i = 1; i < kThreads / kColumns; ++i) {
    by_weight += sums[i * kColumns + column];
    by_sum += sums[kThreads + i * kColumns + column];
  }
  dpacked[p.at.pre_gamma + first + column] = by_weight;
  dpacked[p.at.pre_gamma + d + first + column] = by_sum;
}

}  // namespace

void finish(const FinishParams& p, const Stream& stream) {
  if (p.S * p.T > 65535) throw std::runtime_error("adapter_backward: too many tasks for one launch");
  launch<finish_kernel>("adapter_backward (finish)",
                        dim3{unsigned((p.d + kColumns - 1) / kColumns), unsigned(p.S * p.T), 1}, kThreads,
                        finish_shared_bytes(p.b), stream, p);
}

int finish_shared_bytes(int b) { return shared_floats(b) * 4; }

}  // namespace hyperformer_fast
