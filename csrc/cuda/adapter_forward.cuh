// The adapter's forward: one block of eight warps for 32 rows of one sample (docs/design.md).
//
// A warp has 16 rows and a quarter of their columns. The down-projection's operands go from global memory to tensor
// cores in 16-byte pieces: the sum over d may run in any order, so a lane's piece needs no rearrangement. The same lane
// finishes the same piece of the output, for which the columns of Wg are permuted on their way to shared memory; where
// its registers suffice (KEPT) a lane holds its pieces of x from the one to the other.
#pragma once

#include "common.cuh"

namespace hyperformer_fast {

constexpr float kEps = 1e-5f;

template <class S, int BB>
struct ForwardTraits {
  using T = typename S::T;
  static constexpr int ROWS = 32, PARTS = 4, WARPS = 8, THREADS = 32 * WARPS;
  static constexpr int PIECE = kPiece<S>;
  static constexpr int CHUNK = 4 * PIECE;            // columns that a warp takes at a time: 64 bytes of a row
  static constexpr int TILES = CHUNK / 8;            // products of 8 columns therein
  static constexpr int K = sizeof(T) == 2 ? 16 : 8;  // depth of a product
  static constexpr int BUFFERS = BB > 64 ? 1 : 2;
  static constexpr int STAGE_ROW = PARTS * 64 + 16;  // bytes; 16 more than 256 keep ldmatrix's rows in different banks
  static constexpr int W_ROW = BB * int(sizeof(T)) + 16;
  static constexpr int H_ROW = BB + 1;
  static constexpr int PARTIAL = PARTS * ROWS * BB * 4, STAGE = BUFFERS * BB * STAGE_ROW;
  // partial sums of z, and after them the staged pieces of Wg
  static constexpr int AT_H = PARTIAL > STAGE ? PARTIAL : STAGE;
  static constexpr int AT_W = AT_H + ROWS * H_ROW * 4;
  static constexpr int AT_R = AT_W + ROWS * W_ROW;
  static constexpr int AT_SUMS = AT_R + ROWS * 4;  // [PARTS, ROWS]
  static constexpr int BYTES = AT_SUMS + PARTS * ROWS * 4;
};

// Rows of a sample without a task leave as they came; those of one that is not there become NaN.
template <class S, bool ALIGNED>
__device__ void pass(const ForwardParams& p, const typename S::T* x, int64_t flat, int rows, bool none) {
  using T = typename S::T;
  const float nan = bits<float>(0x7FC00000u), saved = none ? 0.0f : nan;
  const int pieces = (p.d + kPiece<S> - 1) / kPiece<S>;
  float nans[kPiece<S>];
  for (float& n : nans) n = nan;
  for (int i = threadIdx.x; i < rows * pieces; i += blockDim.x) {
    const int row = i / pieces, column = i % pieces * kPiece<S>;
    const Piece piece = none ? load_piece<S, ALIGNED>(x + row * p.stride_row, column, p.d, true) : pack<S>(nans);
    store_piece<S, ALIGNED>(static_cast<T*>(p.out) + (flat + row) * p.d, column, p.d, true, piece);
  }
  if (p.z == nullptr) return;
  for (int i = threadIdx.x; i < rows * p.b; i += blockDim.x) static_cast<T*>(p.z)[flat * p.b + i] = S::narrow(saved);
  for (int i = threadIdx.x; i < rows; i += blockDim.x) {
    if (p.post_norm) p.r[flat + i] = saved;
    if (p.pre_norm) p.pre_mean[flat + i] = p.pre_rstd[flat + i] = saved;
  }
}

template <class S, int BB, int KEPT, bool ALIGNED>
__global__ void __launch_bounds__(256, 1) forward_kernel(const ForwardParams p) {
  using Traits = ForwardTraits<S, BB>;
  using T = typename S::T;
  constexpr int PIECE = Traits::PIECE, CHUNK = Traits::CHUNK, ROWS = Traits::ROWS, PARTS = Traits::PARTS;
  HF_SHARED(shared);
  float* const partial = reinterpret_cast<float*>(shared);
  float* const H = reinterpret_cast<float*>(shared + Traits::AT_H);
  unsigned char* const W = shared + Traits::AT_W;
  float* const R = reinterpret_cast<float*>(shared + Traits::AT_R);
  float* const sums = reinterpret_cast<float*>(shared + Traits::AT_SUMS);

  const int d = p.d, b = p.b, thread = threadIdx.x, lane = thread % 32;
  const int group = thread / 32 / PARTS, part = thread / 32 % PARTS, quad = lane / 4, t = lane % 4;
  const int64_t per_sample = (p.M + ROWS - 1) / ROWS, sample = blockIdx.x / per_sample;
  const int64_t first = (blockIdx.x - sample * per_sample) * ROWS, flat = sample * p.M + first;
  const int rows = p.M - first < ROWS ? int(p.M - first) : ROWS;
  const T* const x = static_cast<const T*>(p.x) + sample * p.stride_sample + first * p.stride_row;
  int64_t task = 0;
  if (p.task != nullptr)
    task = p.task_is_64 ? static_cast<const int64_t*>(p.task)[sample] : static_cast<const int32_t*>(p.task)[sample];
  if (task < 0 || task >= p.T) return pass<S, ALIGNED>(p, x, flat, rows, task == -1);

  const T* const wd = static_cast<const T*>(p.wd) + task * b * d;
  const T* const wg = static_cast<const T*>(p.wg) + task * b * d;
  const float* const down_bias = p.vectors + task * (b + (p.post_norm ? 2 : 1) * int64_t(d));
  const float* const up_bias = down_bias + b;
  const float* const scale = p.scale + task * b;
  const float* const root = p.root + task * (b + 1) * (b + 1);

  const int chunks = KEPT ? KEPT : (d + PARTS * CHUNK - 1) / (PARTS * CHUNK);
  const int stretch = chunks * CHUNK, mine = part * stretch + t * PIECE;  // columns: of a warp, and a lane's first
  const int row[2] = {group * 16 + quad, group * 16 + quad + 8};
  Piece kept[KEPT ? KEPT : 1][2];
  const auto piece_of = [&](int chunk, int i) {
    return load_piece<S, ALIGNED>(x + row[i] * p.stride_row, mine + chunk * CHUNK, d, row[i] < rows);
  };
  if constexpr (KEPT > 0) {
#pragma unroll
    for (int chunk = 0; chunk < KEPT; ++chunk)
      for (int i = 0; i < 2; ++i) kept[chunk][i] = piece_of(chunk, i);
  }
  // Calls body(chunk, x's pieces of the two rows): unrolled where they are in registers.
  const auto each_chunk = [&](auto body) {
    if constexpr (KEPT > 0) {
#pragma unroll
      for (int chunk = 0; chunk < KEPT; ++chunk) body(chunk, kept[chunk][0], kept[chunk][1]);
    } else {
      for (int chunk = 0; chunk < chunks; ++chunk) body(chunk, piece_of(chunk, 0), piece_of(chunk, 1));
    }
  };

  float mean[2] = {0, 0}, rstd[2] = {0, 0};
  if (p.pre_norm) {
    // Sums of the two rows over all four parts, in a fixed order.
    const auto whole = [&](float (&sum)[2]) {
      for (int i = 0; i < 2; ++i) {
        sum[i] = lane_sum<4>(sum[i]);
        if (t == 0) sums[part * ROWS + row[i]] = sum[i];
      }
      __syncthreads();
      for (int i = 0; i < 2; ++i)
        sum[i] = sums[row[i]] + sums[ROWS + row[i]] + sums[2 * ROWS + row[i]] + sums[3 * ROWS + row[i]];
      __syncthreads();
    };
    each_chunk([&](int, const Piece& above, const Piece& below) {
      for (int i = 0; i < PIECE; ++i) mean[0] += number<S>(above, i), mean[1] += number<S>(below, i);
    });
    whole(mean);
    for (float& m : mean) m /= float(d);
    each_chunk([&](int chunk, const Piece& above, const Piece& below) {
      for (int i = 0; i < PIECE; ++i) {
        if (mine + chunk * CHUNK + i >= d) continue;
        const float u = number<S>(above, i) - mean[0], v = number<S>(below, i) - mean[1];
        rstd[0] += u * u, rstd[1] += v * v;
      }
    });
    whole(rstd);
    for (int i = 0; i < 2; ++i) {
      rstd[i] = rsqrtf(rstd[i] / float(d) + kEps);
      if (p.z == nullptr || part != 0 || t != 0 || row[i] >= rows) continue;
      p.pre_mean[flat + row[i]] = mean[i];
      p.pre_rstd[flat + row[i]] = rstd[i];
    }
  }
  const auto normalised = [&](const Piece& piece, int chunk, int i) {
    if (!p.pre_norm) return piece;
    float value[PIECE];
    for (int c = 0; c < PIECE; ++c)
      value[c] = mine + chunk * CHUNK + c < d ? (number<S>(piece, c) - mean[i]) * rstd[i] : 0.0f;
    return pack<S>(value);
  };

  float z[BB / 8][4] = {};
  each_chunk([&](int chunk, const Piece& above, const Piece& below) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    if (BB * sizeof(T) > 32) __syncwarp();  // ptxas would start the loads of all chunks at once here, and spill
#endif
    const Piece u = normalised(above, chunk, 0), v = normalised(below, chunk, 1);
#pragma unroll
    for (int j = 0; j < BB / 8; ++j) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
      if (BB * sizeof(T) > 256 && j % 4 == 0) __syncwarp();
#endif
      const int line = j * 8 + quad;
      const Piece w = load_piece<S, ALIGNED>(wd + int64_t(line) * d, mine + chunk * CHUNK, d, line < b);
      for (int s = 0; s < 4; s += 2) {
        const uint32_t a[4] = {u.word[s], v.word[s], u.word[s + 1], v.word[s + 1]};
        S::mma(z[j], a, w.word[s], w.word[s + 1]);
      }
    }
  });
  for (int j = 0; j < BB / 8; ++j)
    for (int e = 0; e < 4; ++e) partial[(part * ROWS + row[e / 2]) * BB + j * 8 + t * 2 + e % 2] = z[j][e];
  __syncthreads();

  for (int i = thread; i < ROWS * BB; i += Traits::THREADS) {
    const int line = i / BB, j = i % BB;
    float h = 0.0f;
    if (j < b) {
      const float sum = partial[i] + partial[ROWS * BB + i] + partial[2 * ROWS * BB + i] + partial[3 * ROWS * BB + i];
      // the backward sees the rounded z: both must have one h
      const T rounded = S::narrow(sum + down_bias[j]);
      h = activate(S::wide(rounded), p.activation);
      if (p.z != nullptr && line < rows) static_cast<T*>(p.z)[(flat + line) * b + j] = rounded;
    }
    H[line * Traits::H_ROW + j] = h;
  }
  __syncthreads();

  if (p.post_norm) {
    const int line = thread / 8;
    float squares = 0.0f;
    for (int i = thread % 8; i < b; i += 8) {
      float q = root[i * (b + 1) + b];
      for (int j = i; j < b; ++j) q += root[i * (b + 1) + j] * H[line * Traits::H_ROW + j];
      squares += q * q;
    }
    squares = lane_sum<8>(squares);
    const float last = root[b * (b + 1) + b], r = rsqrtf(squares + last * last + kEps);
    if (thread % 8 == 0) {
      R[line] = r;
      if (p.z != nullptr && line < rows) p.r[flat + line] = r;
    }
    __syncthreads();
  }
  for (int i = thread; i < ROWS * BB; i += Traits::THREADS) {
    const int line = i / BB, j = i % BB;
    float w = H[line * Traits::H_ROW + j];
    // scaled in float32 before it is rounded: r h may pass float16's range, the scaled row does not
    if (p.post_norm && j < b) w *= scale[j] * R[line];
    reinterpret_cast<T*>(W + line * Traits::W_ROW)[j] = S::narrow(w);
  }

  // Word u of a chunk's 16 goes to place u % 4 * 4 + u / 4 in 16-bit types: a product's columns 2t and 2t+1 of tile j
  // are then word j of lane t's piece. In float32 the reader picks them, and pieces stay whole.
  const auto fetch = [&](int chunk) {
    unsigned char* const stage = shared + chunk % Traits::BUFFERS * (BB * Traits::STAGE_ROW);
    constexpr bool WHOLE = sizeof(T) == 4 && ALIGNED;
    constexpr int UNITS = WHOLE ? 4 : 16, NUMBERS = CHUNK / UNITS;
    for (int i = thread; i < BB * PARTS * UNITS; i += Traits::THREADS) {
      const int unit = i % UNITS, of = i / UNITS % PARTS, line = i / UNITS / PARTS;
      const int column = of * stretch + chunk * CHUNK + unit * NUMBERS;
      const int place = WHOLE ? unit * 16 : sizeof(T) == 4 ? unit * 4 : (unit % 4 * 4 + unit / 4) * 4;
      unsigned char* const to = stage + line * Traits::STAGE_ROW + of * 64 + place;
      const T* const from = wg + int64_t(line) * d + column;
      if constexpr (ALIGNED) {
        const bool there = line < b && column < d;
        copy_async<WHOLE ? 16 : 4>(to, there ? from : wg, there);
      } else {
        for (int c = 0; c < NUMBERS; ++c) reinterpret_cast<T*>(to)[c] = line < b && column + c < d ? from[c] : T(0);
      }
    }
    copy_commit();
  };
  fetch(0);
  __syncthreads();
  // The row operand's fragment of depth k, as a product takes it.
  const auto operand = [&](int k, uint32_t (&w)[4]) {
    if constexpr (sizeof(T) == 2) {
      load_matrices<false>(w, W + (group * 16 + lane % 16) * Traits::W_ROW + (k * 16 + lane / 16 * 8) * 2);
    } else {
      for (int e = 0; e < 4; ++e)
        w[e] = bits<uint32_t>(reinterpret_cast<const float*>(W + row[e % 2] * Traits::W_ROW)[k * 8 + t + e / 2 * 4]);
    }
  };
  constexpr bool HELD = BB * sizeof(T) <= 256;  // in registers for all chunks; more would spill
  uint32_t held[HELD ? BB / Traits::K : 1][4];
  if constexpr (HELD)
    for (int k = 0; k < BB / Traits::K; ++k) operand(k, held[k]);
  each_chunk([&](int chunk, const Piece& above, const Piece& below) {
    if (Traits::BUFFERS == 2 && chunk + 1 < chunks) {
      fetch(chunk + 1);
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    __syncthreads();
    const unsigned char* const stage = shared + chunk % Traits::BUFFERS * (BB * Traits::STAGE_ROW) + part * 64;
    float y[Traits::TILES][4] = {};
#pragma unroll
    for (int k = 0; k < BB / Traits::K; ++k) {
      uint32_t fresh[4];
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
      if (!HELD) __syncwarp();  // as above
#endif
      if constexpr (!HELD) operand(k, fresh);
      const uint32_t (&w)[4] = HELD ? held[HELD ? k : 0] : fresh;
      if constexpr (sizeof(T) == 2) {
        for (int j = 0; j < Traits::TILES; j += 2) {
          uint32_t v[4];
          load_matrices<true>(v, stage + (k * 16 + lane % 16) * Traits::STAGE_ROW + (j + lane / 16) * 16);
          S::mma(y[j], w, v[0], v[1]);
          S::mma(y[j + 1], w, v[2], v[3]);
        }
      } else {
        for (int j = 0; j < Traits::TILES; ++j) {
          const unsigned char* const at =
              stage + (k * 8 + t) * Traits::STAGE_ROW + (quad / 2 * 4 + 2 * j + quad % 2) * 4;
          S::mma(y[j], w, *reinterpret_cast<const uint32_t*>(at),
                 *reinterpret_cast<const uint32_t*>(at + 4 * Traits::STAGE_ROW));
        }
      }
    }
    const int column = mine + chunk * CHUNK;
    for (int i = 0; i < 2; ++i) {
      const Piece& from = i ? below : above;
      const float r = p.post_norm ? R[row[i]] : 1.0f;
      float value[PIECE];
      for (int c = 0; c < PIECE; ++c) {
        float branch = y[c / 2][2 * i + c % 2];
        if (column + c < d) {
          branch += r * up_bias[column + c];
          if (p.post_norm) branch += up_bias[d + column + c];
        }
        value[c] = number<S>(from, c) + branch;
      }
      store_piece<S, ALIGNED>(static_cast<T*>(p.out) + (flat + row[i]) * d, column, d, row[i] < rows, pack<S>(value));
    }
    __syncthreads();
    if (Traits::BUFFERS == 1 && chunk + 1 < chunks) fetch(chunk + 1);
  });
}

template <class S, int BB, int KEPT, bool ALIGNED>
void run(const ForwardParams& p, void* stream) {
  const int64_t blocks = p.B * ((p.M + 31) / 32);
  if (blocks > INT32_MAX) throw std::runtime_error("adapter_forward: too many rows for one launch");
  launch(forward_kernel<S, BB, KEPT, ALIGNED>, "adapter_forward", dim3{unsigned(blocks), 1, 1},
         ForwardTraits<S, BB>::THREADS, ForwardTraits<S, BB>::BYTES, stream, p);
}

// Registers hold x for the widths of T5-small, base and large, where the bottleneck leaves room.
template <class S, int BB>
void run(const ForwardParams& p, void* stream) {
  if (!p.aligned) return run<S, BB, 0, false>(p, stream);
  constexpr int WIDTH = 256 / int(sizeof(typename S::T));  // columns of a chunk, all parts
  if constexpr (BB <= (WIDTH == 128 ? 64 : 32)) {
    if (p.d == 512) return run<S, BB, 512 / WIDTH, true>(p, stream);
    if constexpr (WIDTH == 128 || BB < 32)
      if (p.d == 768) return run<S, BB, 768 / WIDTH, true>(p, stream);
    if constexpr (WIDTH == 128)
      if (p.d == 1024) return run<S, BB, 1024 / WIDTH, true>(p, stream);
  }
  run<S, BB, 0, true>(p, stream);
}

template <class S>
void forward_of(const ForwardParams& p, void* stream) {
  if (p.b <= 16) return run<S, 16>(p, stream);
  if (p.b <= 32) return run<S, 32>(p, stream);
  if (p.b <= 64) return run<S, 64>(p, stream);
  run<S, kLargestBottleneck>(p, stream);
}

template <class S>
int shared_bytes(int b) {
  return b <= 16   ? ForwardTraits<S, 16>::BYTES
         : b <= 32 ? ForwardTraits<S, 32>::BYTES
         : b <= 64 ? ForwardTraits<S, 64>::BYTES
                   : ForwardTraits<S, kLargestBottleneck>::BYTES;
}

// One number type a translation unit, so that they compile side by side.
extern template void forward_of<F32>(const ForwardParams&, void*);
extern template void forward_of<BF16>(const ForwardParams&, void*);
extern template void forward_of<F16>(const ForwardParams&, void*);

}  // namespace hyperformer_fast
