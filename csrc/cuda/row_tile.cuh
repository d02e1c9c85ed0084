// The row tile: 32 rows of one sample for a block of eight warps, and the two products that the forward and the
// backward share. `down` multiplies rows [32, d] by weights [b, d] transposed; `up` multiplies [32, b] by weights [b,
// d].
//
// A warp has 16 of the rows and a quarter of their columns. In `down`, operands go from global memory to tensor cores
// in 16-byte pieces; no rearrangement is needed, because the sum over d may run in any order. In `up`, the columns of
// the weights are permuted on their way to shared memory, so that each lane gets the same piece of the result that it
// loaded of the rows. Where registers suffice (KEPT > 0), a lane keeps its pieces of the rows between the two products.
#pragma once

#include "common.cuh"

namespace hyperformer_fast {

template <class S, int BB>
struct TileTraits {
  using T = typename S::T;
  static constexpr int kRows = kUnit, kParts = 4, kWarps = 8, kThreads = 32 * kWarps;
  static constexpr int kPiece = kPieceNumbers<S>;
  static constexpr int kChunk = 4 * kPiece;               // columns that a warp takes at a time: 64 bytes of a row
  static constexpr int kTiles = kChunk / 8;               // 8-column products in a chunk
  static constexpr int kDepth = sizeof(T) == 2 ? 16 : 8;  // depth of a product
  static constexpr int kBuffers = BB > 64 ? 1 : 2;
  static constexpr int kStageRow =
      kParts * 64 + 16;  // bytes; 16 more than 256 put ldmatrix's rows into different banks
  static constexpr int kWRow = BB * int(sizeof(T)) + 16;
  static constexpr int kHRow = BB + 1;
  static constexpr int kPartial = kParts * kRows * BB * 4, kStage = kBuffers * BB * kStageRow;
  // Offsets in shared memory. It starts with the partial sums [kParts, kRows, BB] of `down`, whose place the staged
  // weights of `up` take later.
  static constexpr int kAtH = kPartial > kStage ? kPartial : kStage;
  static constexpr int kAtW = kAtH + kRows * kHRow * 4;
  static constexpr int kAtR = kAtW + kRows * kWRow;
  static constexpr int kAtSums = kAtR + kRows * 4;  // two of [kParts, kRows]
  static constexpr int kBytes = kAtSums + 2 * kParts * kRows * 4;

  static_assert(BB % 16 == 0 && BB <= kLargestBottleneck, "a product takes 16 bottleneck numbers at a time");
  static_assert(kWarps / kParts * 16 == kRows, "a warp has 16 rows and one part of their columns");
  static_assert(kThreads == 8 * kRows, "eight neighbouring threads share a row's bottleneck numbers");
  static_assert(kChunk * sizeof(T) == 64 && kTiles % 2 == 0, "four lanes take 64 bytes of a row, in pairs of tiles");
  static_assert(kStageRow % 16 == 0 && kWRow % 16 == 0, "ldmatrix and 16-byte copies need aligned rows");
  static_assert(kAtH % 16 == 0 && kAtW % 16 == 0 && kAtR % 16 == 0 && kAtSums % 16 == 0);
  static_assert(kRows * BB + kRows * kHRow <= kParts * kRows * BB,
                "the backward's q fits behind the first partial sum");
  static_assert(kBytes <= kMostSharedBytes);
};

template <class S, int BB, int KEPT, bool ALIGNED>
struct RowTile {
  using Traits = TileTraits<S, BB>;
  using T = typename S::T;
  static constexpr int kPiece = Traits::kPiece, kChunk = Traits::kChunk, kRows = Traits::kRows, kParts = Traits::kParts;
  static_assert(KEPT == 0 || ALIGNED, "registers hold only rows that are read in whole pieces");

  const T* data;
  int64_t stride;
  int d, b, rows;
  // This thread's half of the rows, its quarter of the columns, lane / 4, lane % 4, and its two rows.
  int group, part, quad, t, row[2];
  // Chunks and columns of this warp's quarter, and the first column of this lane.
  int chunks, stretch, mine;
  Piece kept[KEPT ? KEPT : 1][2];

  __device__ __forceinline__ RowTile(const T* data, int64_t stride, int rows, int d, int b)
      : data(data), stride(stride), d(d), b(b), rows(rows) {
    const int thread = threadIdx.x, lane = thread % 32;
    group = thread / 32 / kParts, part = thread / 32 % kParts, quad = lane / 4, t = lane % 4;
    chunks = KEPT ? KEPT : (d + kParts * kChunk - 1) / (kParts * kChunk);
    stretch = chunks * kChunk, mine = part * stretch + t * kPiece;
    row[0] = group * 16 + quad, row[1] = row[0] + 8;
    if constexpr (KEPT > 0) {
#pragma unroll
      for (int chunk = 0; chunk < KEPT; ++chunk)
        for (int i = 0; i < 2; ++i) kept[chunk][i] = piece_of(data, stride, chunk, i);
    }
  }

  // This lane's piece of its row i in `chunk`, read from these rows or from others of the same shape.
  __device__ __forceinline__ Piece piece_of(const T* from, int64_t stride, int chunk, int i) const {
    return load_piece<S, ALIGNED>(from + row[i] * stride, mine + chunk * kChunk, d, row[i] < rows);
  }

  // Calls body(chunk, piece of row 0, piece of row 1) for each chunk. Unrolled where the pieces are in registers.
  template <class Body>
  __device__ __forceinline__ void each_chunk(Body body) const {
    if constexpr (KEPT > 0) {
#pragma unroll
      for (int chunk = 0; chunk < KEPT; ++chunk) body(chunk, kept[chunk][0], kept[chunk][1]);
    } else {
      for (int chunk = 0; chunk < chunks; ++chunk)
        body(chunk, piece_of(data, stride, chunk, 0), piece_of(data, stride, chunk, 1));
    }
  }

  // Writes what the lanes of this warp summed over their columns of two rows to sums [kParts, kRows]. After a barrier,
  // `whole` returns the sum over all columns of a row.
  __device__ __forceinline__ void partial_sum(const float (&sum)[2], float* sums) const {
    for (int i = 0; i < 2; ++i) {
      const float all = lane_sum<4>(sum[i]);
      if (t == 0) sums[part * kRows + row[i]] = all;
    }
  }
  static __device__ __forceinline__ float whole(const float* sums, int line) {
    return sums[line] + sums[kRows + line] + sums[2 * kRows + line] + sums[3 * kRows + line];
  }

  // Replaces this lane's sums of two rows by the sums over all columns, added in a fixed order.
  __device__ __forceinline__ void sum_rows(float (&sum)[2], float* sums) const {
    partial_sum(sum, sums);
    __syncthreads();
    for (int i = 0; i < 2; ++i) sum[i] = whole(sums, row[i]);
    __syncthreads();
  }

  // Writes operand(rows) weights^T to `partial`, one sum for each quarter of the columns. operand(piece, chunk, i,
  // first) returns what stands for a piece of row i; `first` is true at the first of several calls for the same piece.
  template <class Operand>
  __device__ __forceinline__ void down(const T* weights, float* partial, Operand operand) const {
    constexpr int kAtOnce = BB * sizeof(T) > 256 ? BB / 2 : BB;  // more sums at once would spill
    down_lines<0, kAtOnce>(weights, partial, operand);
    if constexpr (kAtOnce < BB) down_lines<kAtOnce, kAtOnce>(weights, partial, operand);
  }

  // Multiplies the rows of W [kRows, kWRow bytes] by weights and calls body(chunk, piece of row 0, piece of row 1, y)
  // for each chunk, where y[c / 2][2 * i + c % 2] is the product in this lane's column c of row i. W may have been
  // written just before, without a barrier; nothing else may still use the stages. Ends without a barrier: other warps
  // may still read the stages.
  template <class Body>
  __device__ __forceinline__ void up(const T* weights, unsigned char* stages, const unsigned char* W, Body body) const {
    fetch(weights, stages, 0);
    copy_wait<0>();
    __syncthreads();
    constexpr bool kHeld = BB * sizeof(T) <= 256;  // in registers for all chunks; more would spill
    uint32_t held[kHeld ? BB / Traits::kDepth : 1][4];
    if constexpr (kHeld)
      for (int k = 0; k < BB / Traits::kDepth; ++k) operand(W, k, held[k]);
    each_chunk([&](int chunk, const Piece& above, const Piece& below) {
      if (chunk > 0) {
        copy_wait<0>();
        __syncthreads();
      }
      // Into the stage that all warps have read since the barrier before this one.
      if (Traits::kBuffers == 2 && chunk + 1 < chunks) fetch(weights, stages, chunk + 1);
      const unsigned char* const stage = stages + chunk % Traits::kBuffers * (BB * Traits::kStageRow) + part * 64;
      float y[Traits::kTiles][4] = {};
#pragma unroll(kHeld ? BB : 2)
      for (int k = 0; k < BB / Traits::kDepth; ++k) {
        uint32_t fresh[4];
        if constexpr (!kHeld) operand(W, k, fresh);
        multiply(stage, k, kHeld ? held[kHeld ? k : 0] : fresh, y);
      }
      if (Traits::kBuffers == 1 && chunk + 1 < chunks) {
        __syncthreads();
        fetch(weights, stages, chunk + 1);
      }
      body(chunk, above, below, y);
    });
  }

 private:
  // Bottleneck numbers FROM .. FROM + LINES - 1 of `down`.
  template <int FROM, int LINES, class Operand>
  __device__ __forceinline__ void down_lines(const T* weights, float* partial, Operand operand) const {
    float z[LINES / 8][4] = {};
    each_chunk([&](int chunk, const Piece& above, const Piece& below) {
      if (BB * sizeof(T) > 32) keep_order<1000>();  // else ptxas starts the loads of all chunks at once, and spills
      const Piece u = operand(above, chunk, 0, FROM == 0), v = operand(below, chunk, 1, FROM == 0);
#pragma unroll
      for (int j = 0; j < LINES / 8; ++j) {
        const int line = FROM + j * 8 + quad;
        const Piece w = load_piece<S, ALIGNED>(weights + int64_t(line) * d, mine + chunk * kChunk, d, line < b);
        for (int s = 0; s < 4; s += 2) {
          const uint32_t a[4] = {u.word[s], v.word[s], u.word[s + 1], v.word[s + 1]};
          S::mma(z[j], a, w.word[s], w.word[s + 1]);
        }
      }
    });
#pragma unroll
    for (int j = 0; j < LINES / 8; ++j)
      for (int e = 0; e < 4; ++e) partial[(part * kRows + row[e / 2]) * BB + FROM + j * 8 + t * 2 + e % 2] = z[j][e];
  }

  // Copies one chunk of the weights' columns to a stage. For 16-bit types, word u of the chunk's 16 words goes to place
  // u % 4 * 4 + u / 4: columns 2t and 2t + 1 of tile j are then word j of lane t's piece. For float32 pieces stay
  // whole, and `multiply` picks the right columns.
  __device__ __forceinline__ void fetch(const T* weights, unsigned char* stages, int chunk) const {
    constexpr bool kWhole = sizeof(T) == 4 && ALIGNED;
    constexpr int kUnits = kWhole ? 4 : 16, kNumbers = kChunk / kUnits, kLines = Traits::kThreads / (kUnits * kParts);
    static_assert(BB % kLines == 0);
    constexpr int kUnroll = ALIGNED && BB <= 64 ? BB : 1;  // unrolling more, or loads instead of copies, would spill
    // A thread has the same columns of every kLines-th line: one address each, from which the others are a step away.
    const unsigned thread = threadIdx.x, unit = thread % kUnits, of = thread / kUnits % kParts;
    const int first = thread / (kUnits * kParts), column = of * stretch + chunk * kChunk + unit * kNumbers;
    const int place = kWhole ? unit * 16 : sizeof(T) == 4 ? unit * 4 : (unit % 4 * 4 + unit / 4) * 4;
    unsigned char* to = stages + (chunk % Traits::kBuffers * BB + first) * Traits::kStageRow + of * 64 + place;
    const T* from = weights + int64_t(first) * d + column;
#pragma unroll(kUnroll)
    for (int line = 0; line < BB; line += kLines) {
      if constexpr (ALIGNED) {
        const bool there = first + line < b && column < d;
        copy_async<kWhole ? 16 : 4>(to + line * Traits::kStageRow, there ? from : weights, there);
      } else {
        T* const numbers = reinterpret_cast<T*>(to + line * Traits::kStageRow);
        for (int c = 0; c < kNumbers; ++c) numbers[c] = first + line < b && column + c < d ? from[c] : T(0);
      }
      from += int64_t(kLines) * d;
    }
    copy_commit();
  }

  // The k-th fragment of the row operand, as mma.sync takes it.
  __device__ __forceinline__ void operand(const unsigned char* W, int k, uint32_t (&w)[4]) const {
    if constexpr (sizeof(T) == 2) {
      const int lane = quad * 4 + t;
      load_matrices<false>(w, W + (group * 16 + lane % 16) * Traits::kWRow + (k * 16 + lane / 16 * 8) * 2);
    } else {
      for (int e = 0; e < 4; ++e)
        w[e] = bits<uint32_t>(reinterpret_cast<const float*>(W + row[e % 2] * Traits::kWRow)[k * 8 + t + e / 2 * 4]);
    }
  }

  __device__ __forceinline__ void multiply(const unsigned char* stage, int k, const uint32_t (&w)[4],
                                           float (&y)[Traits::kTiles][4]) const {
    if constexpr (sizeof(T) == 2) {
      const int lane = quad * 4 + t;
      for (int j = 0; j < Traits::kTiles; j += 2) {
        uint32_t v[4];
        load_matrices<true>(v, stage + (k * 16 + lane % 16) * Traits::kStageRow + (j + lane / 16) * 16);
        S::mma(y[j], w, v[0], v[1]);
        S::mma(y[j + 1], w, v[2], v[3]);
      }
    } else {
      for (int j = 0; j < Traits::kTiles; ++j) {
        const unsigned char* const at = stage + (k * 8 + t) * Traits::kStageRow + (quad / 2 * 4 + 2 * j + quad % 2) * 4;
        S::mma(y[j], w, *reinterpret_cast<const uint32_t*>(at),
               *reinterpret_cast<const uint32_t*>(at + 4 * Traits::kStageRow));
      }
    }
  }
};

// Writes the rows of a sample without an adapter: a copy of the input where there is `none`, and NaN where its task is
// out of range.
template <class S, bool ALIGNED>
__device__ void pass(const typename S::T* from, int64_t stride, typename S::T* to, int rows, int d, bool none) {
  const int pieces = (d + kPieceNumbers<S> - 1) / kPieceNumbers<S>;
  float nans[kPieceNumbers<S>];
  for (float& n : nans) n = bits<float>(0x7FC00000u);
  for (int i = threadIdx.x; i < rows * pieces; i += blockDim.x) {
    const int row = i / pieces, column = i % pieces * kPieceNumbers<S>;
    const Piece piece = none ? load_piece<S, ALIGNED>(from + row * stride, column, d, true) : pack<S>(nans);
    store_piece<S, ALIGNED>(to + int64_t(row) * d, column, d, true, piece);
  }
}

// Calls run.template at<BB, KEPT, ALIGNED>() with the KEPT for width d. With MAY_KEEP, registers hold rows of the
// widths of T5-small, T5-base and T5-large where the bottleneck leaves room.
template <class S, bool MAY_KEEP, int BB, class Run>
void choose_kept(int d, const Run& run) {
  constexpr int kWidth = 256 / int(sizeof(typename S::T));  // columns of a chunk over all parts
  if constexpr (MAY_KEEP && BB <= (kWidth == 128 ? 64 : 32)) {
    if (d == 512) return run.template at<BB, 512 / kWidth, true>();
    if constexpr (kWidth == 128 || BB < 32)
      if (d == 768) return run.template at<BB, 768 / kWidth, true>();
    if constexpr (kWidth == 128)
      if (d == 1024) return run.template at<BB, 1024 / kWidth, true>();
  }
  run.template at<BB, 0, true>();
}

// Calls run.template at<BB, KEPT, ALIGNED>() with the tile for d and b. Rows that are not aligned to 16 bytes have only
// two forms, because every instantiation lengthens the build.
template <class S, bool MAY_KEEP, class Run>
void choose_tile(int d, int b, bool aligned, const Run& run) {
  if (!aligned) {
    if (b <= 32) return run.template at<32, 0, false>();
    return run.template at<kLargestBottleneck, 0, false>();
  }
  if (b <= 16) return choose_kept<S, MAY_KEEP, 16>(d, run);
  if (b <= 32) return choose_kept<S, MAY_KEEP, 32>(d, run);
  if (b <= 64) return choose_kept<S, MAY_KEEP, 64>(d, run);
  choose_kept<S, MAY_KEEP, kLargestBottleneck>(d, run);
}

template <class S>
int tile_shared_bytes(int b) {
  return b <= 16   ? TileTraits<S, 16>::kBytes
         : b <= 32 ? TileTraits<S, 32>::kBytes
         : b <= 64 ? TileTraits<S, 64>::kBytes
                   : TileTraits<S, kLargestBottleneck>::kBytes;
}

}  // namespace hyperformer_fast
