// The adapter's forward for few rows, as in decoding: one block per row, and each row may have another task. Waiting
// for the 2 d b weights takes most of the time, so all of them are requested at once. The products are plain float32
// multiply-adds.
#pragma once

#include "adapter_forward.cuh"

namespace hyperformer_fast {

constexpr int kFewThreads = 256;
constexpr int kFewStage = 88 << 10;  // bytes of shared memory for W_g; leaves room for the rest within kMostSharedBytes

// How many rows of W_g fit into kFewStage bytes.
template <class S>
__host__ __device__ __forceinline__ int staged_lines(int d, int b, bool aligned) {
  const int64_t fit = kFewStage / (int64_t(d) * int64_t(sizeof(typename S::T)));
  return !aligned ? 0 : fit < b ? int(fit) : b;
}

template <class S, int BB, bool ALIGNED>
struct FewRowsTraits {
  static constexpr int kWarps = kFewThreads / 32, kLines = BB / kWarps;  // bottleneck numbers of a warp
  // Pieces of the row that a lane holds in registers at once. More kLines need more registers for weights, and would
  // spill.
  static constexpr int kAtOnce = BB <= 64 ? 4 : sizeof(typename S::T) == 4 ? 1 : 2;
  static constexpr int kAtSums = 2 * BB * 4, kAtStage = kAtSums + 128;
  static_assert(BB % kWarps == 0 && kLines <= 32, "each lane keeps the sum of one line of its warp");
  static_assert(kAtStage % 16 == 0 && kAtStage - kAtSums >= kWarps * 4 && kAtStage + kFewStage <= kMostSharedBytes);

  static int bytes(int d, int b) { return kAtStage + staged_lines<S>(d, b, ALIGNED) * d * int(sizeof(typename S::T)); }
};

// Computes row `flat`, counted over all samples.
template <class S, int BB, bool ALIGNED>
__device__ __forceinline__ void forward_row(const ForwardParams& p, int64_t flat, unsigned char* shared) {
  using Traits = FewRowsTraits<S, BB, ALIGNED>;
  using T = typename S::T;
  constexpr int kPiece = kPieceNumbers<S>, kLines = Traits::kLines, kWarps = Traits::kWarps, kAtOnce = Traits::kAtOnce;
  float* const h = reinterpret_cast<float*>(shared);  // [BB]
  float* const scaled = h + BB;                       // [BB]: h s, the operand of W_g / s
  float* const sums = reinterpret_cast<float*>(shared + Traits::kAtSums);
  unsigned char* const stage = shared + Traits::kAtStage;
  const int d = p.d, b = p.b, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int pieces = (d + kPiece - 1) / kPiece, staged = staged_lines<S>(d, b, ALIGNED);
  const int64_t sample = flat / p.tasks.M, task = task_of(p.tasks, sample);
  const Place place{sample, flat - sample * p.tasks.M, flat, 1};
  if (task < 0 || task >= p.tasks.T) return pass_forward<S, ALIGNED>(p, place, task == -1);
  const TaskWeights<T> weights(p, p.folded, task);
  const T* const x = start_of<T>(p.x, place);

  if constexpr (ALIGNED) {
    for (int i = thread; i < staged * pieces; i += kFewThreads)
      copy_async<16>(stage + i * 16, weights.wg + int64_t(i) * kPiece, true);
    copy_commit();
  }
  float mean = 0.0f, rstd = 0.0f;
  if (p.pre_norm) {  // every warp computes the statistics for itself, which is cheaper than a barrier
    for (int i = lane; i < pieces; i += 32) {
      const Piece piece = load_piece<S, ALIGNED>(x, i * kPiece, d, true);
      for (int c = 0; c < kPiece; ++c) mean += number<S>(piece, c);
    }
    mean = lane_sum<32>(mean) / float(d);
    for (int i = lane; i < pieces; i += 32) {
      const Piece piece = load_piece<S, ALIGNED>(x, i * kPiece, d, true);
      for (int c = 0; c < kPiece; ++c) {
        const float u = i * kPiece + c < d ? number<S>(piece, c) - mean : 0.0f;
        rstd += u * u;
      }
    }
    rstd = rsqrtf(lane_sum<32>(rstd) / float(d) + kEps);
    if (p.z != nullptr && thread == 0) p.pre_mean[flat] = mean, p.pre_rstd[flat] = rstd;
  }

  float z[kLines] = {};
  for (int first = lane; first < pieces; first += 32 * kAtOnce) {
    Piece mine[kAtOnce];
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c) {
      const int column = (first + 32 * c) * kPiece;
      mine[c] = load_piece<S, ALIGNED>(x, column, d, true);
      if (p.pre_norm) mine[c] = normalised<S>(mine[c], column, d, mean, rstd);
    }
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      const int line = warp + kWarps * i;
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c) {
        const Piece w = load_piece<S, ALIGNED>(weights.wd + int64_t(line) * d, (first + 32 * c) * kPiece, d, line < b);
        for (int e = 0; e < kPiece; ++e) z[i] += number<S>(mine[c], e) * number<S>(w, e);
      }
    }
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kLines; ++i) {
    const float all = lane_sum<32>(z[i]);
    if (lane == i) sum = all;
  }
  if (lane < kLines) {
    const int j = warp + kWarps * lane;
    float value = 0.0f, operand = 0.0f;
    if (j < b) {
      const T rounded = S::narrow(sum + weights.down_bias[j]);  // the backward has only the rounded z
      value = activate(S::wide(rounded), p.activation);
      operand = p.post_norm ? value * weights.scale[j] : value;
      if (p.z != nullptr) static_cast<T*>(p.z)[flat * b + j] = rounded;
    }
    h[j] = value;
    scaled[j] = operand;
  }
  copy_wait<0>();  // does not wait long: W_g was requested before W_d
  __syncthreads();

  float r = 1.0f;
  if (p.post_norm) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      const int line = warp + kWarps * i;
      float q = 0.0f;
      if (line < b)
        for (int j = lane; j < b; j += 32) q += weights.root[line * (b + 1) + j] * h[j];
      q = lane_sum<32>(q);
      if (line < b) q += weights.root[line * (b + 1) + b];
      squares += q * q;
    }
    if (lane == 0) sums[warp] = squares;
    __syncthreads();
    const float last = weights.root[b * (b + 1) + b];
    squares = last * last;
    for (int i = 0; i < kWarps; ++i) squares += sums[i];
    r = rsqrtf(squares + kEps);
    if (p.z != nullptr && thread == 0) p.r[flat] = r;
  }

  T* const out = static_cast<T*>(p.out) + flat * d;
  for (int i = thread; i < pieces; i += kFewThreads) {
    const int column = i * kPiece;
    const Piece from = load_piece<S, ALIGNED>(x, column, d, true);
    float y[kPiece] = {};
    const auto add = [&](int j, const Piece& w) {
      for (int c = 0; c < kPiece; ++c) y[c] += scaled[j] * number<S>(w, c);
    };
#pragma unroll 4
    for (int j = 0; j < staged; ++j) add(j, *reinterpret_cast<const Piece*>(stage + (j * pieces + i) * 16));
#pragma unroll 4
    for (int j = staged; j < b; ++j) add(j, load_piece<S, ALIGNED>(weights.wg + int64_t(j) * d, column, d, true));
    float value[kPiece];
    for (int c = 0; c < kPiece; ++c) {
      float branch = r * y[c];
      if (column + c < d) {
        branch += r * weights.up_bias[column + c];
        if (p.post_norm) branch += weights.beta[column + c];
      }
      value[c] = number<S>(from, c) + branch;
    }
    store_piece<S, ALIGNED>(out, column, d, true, pack<S>(value));
  }
}

template <class S, int BB, bool ALIGNED>
__global__ void __launch_bounds__(kFewThreads, 1) few_rows_kernel(const ForwardParams p) {
  HFF_SHARED(shared);
  forward_row<S, BB, ALIGNED>(p, blockIdx.x, shared);
}

template <class S>
struct LaunchFewRows {
  const ForwardParams& p;
  const Stream& stream;

  template <int BB, int, bool ALIGNED>
  void at() const {
    launch<few_rows_kernel<S, BB, ALIGNED>>("adapter_forward", dim3{unsigned(p.tasks.B * p.tasks.M), 1, 1}, kFewThreads,
                                            FewRowsTraits<S, BB, ALIGNED>::bytes(p.d, p.b), stream, p);
  }
};

template <class S>
void few_rows_of(const ForwardParams& p, const Stream& stream) {
  choose_tile<S, false>(p.d, p.b, p.aligned, LaunchFewRows<S>{p, stream});
}

}  // namespace hyperformer_fast
