// 32 rows of one sample for a block of eight warps, and the two products that the forward and the backward share: down,
// rows [32, d] times weights [b, d] transposed, and up, [32, b] times weights [b, d].
//
// A warp has 16 rows and a quarter of their columns. The operands of the product down go from global memory to tensor
// cores in 16-byte pieces: the sum over d may run in any order, so a lane's piece needs no rearrangement. The same lane
// gets the same piece of the product up, for which the columns of its weights are permuted on their way to shared
// memory; where its registers suffice (KEPT) a lane holds its pieces of the rows from the one to the other.
#pragma once

#include "common.cuh"

namespace hyperformer_fast {

template <class S, int BB>
struct TileTraits {
  using T = typename S::T;
  static constexpr int ROWS = kUnit, PARTS = 4, WARPS = 8, THREADS = 32 * WARPS;
  static constexpr int PIECE = kPiece<S>;
  static constexpr int CHUNK = 4 * PIECE;            // columns that a warp takes at a time: 64 bytes of a row
  static constexpr int TILES = CHUNK / 8;            // products of 8 columns therein
  static constexpr int K = sizeof(T) == 2 ? 16 : 8;  // depth of a product
  static constexpr int BUFFERS = BB > 64 ? 1 : 2;
  static constexpr int STAGE_ROW = PARTS * 64 + 16;  // bytes; 16 more than 256 keep ldmatrix's rows in different banks
  static constexpr int W_ROW = BB * int(sizeof(T)) + 16;
  static constexpr int H_ROW = BB + 1;
  static constexpr int PARTIAL = PARTS * ROWS * BB * 4, STAGE = BUFFERS * BB * STAGE_ROW;
  // [PARTS, ROWS, BB] partial sums of the product down, and after them the staged pieces of the weights up
  static constexpr int AT_H = PARTIAL > STAGE ? PARTIAL : STAGE;
  static constexpr int AT_W = AT_H + ROWS * H_ROW * 4;
  static constexpr int AT_R = AT_W + ROWS * W_ROW;
  static constexpr int AT_SUMS = AT_R + ROWS * 4;  // two of [PARTS, ROWS]
  static constexpr int BYTES = AT_SUMS + 2 * PARTS * ROWS * 4;

  static_assert(BB % 16 == 0 && BB <= kLargestBottleneck, "a product takes 16 bottleneck numbers at a time");
  static_assert(WARPS / PARTS * 16 == ROWS, "a warp has 16 rows and one part of their columns");
  static_assert(THREADS == 8 * ROWS, "eight neighbouring threads share a row's bottleneck numbers");
  static_assert(CHUNK * sizeof(T) == 64 && TILES % 2 == 0, "four lanes take 64 bytes of a row, in pairs of tiles");
  static_assert(STAGE_ROW % 16 == 0 && W_ROW % 16 == 0, "ldmatrix and 16-byte copies need aligned rows");
  static_assert(AT_H % 16 == 0 && AT_W % 16 == 0 && AT_R % 16 == 0 && AT_SUMS % 16 == 0);
  static_assert(ROWS * BB + ROWS * H_ROW <= PARTS * ROWS * BB, "the backward's q fits behind the first partial sum");
  static_assert(BYTES <= kMostSharedBytes);
};

template <class S, int BB, int KEPT, bool ALIGNED>
struct RowTile {
  using Traits = TileTraits<S, BB>;
  using T = typename S::T;
  static constexpr int PIECE = Traits::PIECE, CHUNK = Traits::CHUNK, ROWS = Traits::ROWS, PARTS = Traits::PARTS;
  static_assert(KEPT == 0 || ALIGNED, "registers hold only rows that are read in whole pieces");

  const T* data;
  int64_t stride;
  int d, b, rows;
  int group, part, quad, t, row[2];  // of a thread: half of the rows, quarter of the columns, lane / 4, lane % 4
  int chunks, stretch, mine;         // columns of a warp, and the first of a lane
  Piece kept[KEPT ? KEPT : 1][2];

  __device__ __forceinline__ RowTile(const T* data, int64_t stride, int rows, int d, int b)
      : data(data), stride(stride), d(d), b(b), rows(rows) {
    const int thread = threadIdx.x, lane = thread % 32;
    group = thread / 32 / PARTS, part = thread / 32 % PARTS, quad = lane / 4, t = lane % 4;
    chunks = KEPT ? KEPT : (d + PARTS * CHUNK - 1) / (PARTS * CHUNK);
    stretch = chunks * CHUNK, mine = part * stretch + t * PIECE;
    row[0] = group * 16 + quad, row[1] = row[0] + 8;
    if constexpr (KEPT > 0) {
#pragma unroll
      for (int chunk = 0; chunk < KEPT; ++chunk)
        for (int i = 0; i < 2; ++i) kept[chunk][i] = piece_of(data, stride, chunk, i);
    }
  }

  // The lane's piece of row i in `chunk`, of these rows or of others of the same shape.
  __device__ __forceinline__ Piece piece_of(const T* from, int64_t stride, int chunk, int i) const {
    return load_piece<S, ALIGNED>(from + row[i] * stride, mine + chunk * CHUNK, d, row[i] < rows);
  }

  // Calls body(chunk, the pieces of the two rows): unrolled where they are in registers.
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

  // What a lane summed over its columns of two rows, to sums [PARTS, ROWS]; after a barrier `whole` gives all of a row.
  __device__ __forceinline__ void partial_sum(const float (&sum)[2], float* sums) const {
    for (int i = 0; i < 2; ++i) {
      const float all = lane_sum<4>(sum[i]);
      if (t == 0) sums[part * ROWS + row[i]] = all;
    }
  }
  static __device__ __forceinline__ float whole(const float* sums, int line) {
    return sums[line] + sums[ROWS + line] + sums[2 * ROWS + line] + sums[3 * ROWS + line];
  }

  // Sums of the two rows over all columns, in a fixed order.
  __device__ __forceinline__ void sum_rows(float (&sum)[2], float* sums) const {
    partial_sum(sum, sums);
    __syncthreads();
    for (int i = 0; i < 2; ++i) sum[i] = whole(sums, row[i]);
    __syncthreads();
  }

  // partial = operand(rows) weights^T by quarters of the columns; operand(piece, chunk, i, first) makes a piece of row
  // i, `first` where it is asked for the first time.
  template <class Operand>
  __device__ __forceinline__ void down(const T* weights, float* partial, Operand operand) const {
    constexpr int AT_ONCE = BB * sizeof(T) > 256 ? BB / 2 : BB;  // more sums would spill
    down_lines<0, AT_ONCE>(weights, partial, operand);
    if constexpr (AT_ONCE < BB) down_lines<AT_ONCE, AT_ONCE>(weights, partial, operand);
  }

  // The rows of W [ROWS, W_ROW bytes] times weights: body(chunk, the pieces of the two rows, y), where the lane's
  // column c of row i is y[c / 2][2 * i + c % 2]. W may have been written just before; the stage must be free.
  template <class Body>
  __device__ __forceinline__ void up(const T* weights, unsigned char* stages, const unsigned char* W, Body body) const {
    fetch(weights, stages, 0);
    __syncthreads();
    constexpr bool HELD = BB * sizeof(T) <= 256;  // in registers for all chunks; more would spill
    uint32_t held[HELD ? BB / Traits::K : 1][4];
    if constexpr (HELD)
      for (int k = 0; k < BB / Traits::K; ++k) operand(W, k, held[k]);
    each_chunk([&](int chunk, const Piece& above, const Piece& below) {
      if (Traits::BUFFERS == 2 && chunk + 1 < chunks) {
        fetch(weights, stages, chunk + 1);
        copy_wait<1>();
      } else {
        copy_wait<0>();
      }
      __syncthreads();
      const unsigned char* const stage = stages + chunk % Traits::BUFFERS * (BB * Traits::STAGE_ROW) + part * 64;
      float y[Traits::TILES][4] = {};
#pragma unroll(HELD ? BB : 2)
      for (int k = 0; k < BB / Traits::K; ++k) {
        uint32_t fresh[4];
        if constexpr (!HELD) operand(W, k, fresh);
        multiply(stage, k, HELD ? held[HELD ? k : 0] : fresh, y);
      }
      body(chunk, above, below, y);
      __syncthreads();
      if (Traits::BUFFERS == 1 && chunk + 1 < chunks) fetch(weights, stages, chunk + 1);
    });
  }

 private:
  // Columns FROM .. of the product down.
  template <int FROM, int LINES, class Operand>
  __device__ __forceinline__ void down_lines(const T* weights, float* partial, Operand operand) const {
    float z[LINES / 8][4] = {};
    each_chunk([&](int chunk, const Piece& above, const Piece& below) {
      if (BB * sizeof(T) > 32) keep_order<1000>();  // ptxas would start the loads of all chunks at once, and spill
      const Piece u = operand(above, chunk, 0, FROM == 0), v = operand(below, chunk, 1, FROM == 0);
#pragma unroll
      for (int j = 0; j < LINES / 8; ++j) {
        const int line = FROM + j * 8 + quad;
        const Piece w = load_piece<S, ALIGNED>(weights + int64_t(line) * d, mine + chunk * CHUNK, d, line < b);
        for (int s = 0; s < 4; s += 2) {
          const uint32_t a[4] = {u.word[s], v.word[s], u.word[s + 1], v.word[s + 1]};
          S::mma(z[j], a, w.word[s], w.word[s + 1]);
        }
      }
    });
#pragma unroll
    for (int j = 0; j < LINES / 8; ++j)
      for (int e = 0; e < 4; ++e) partial[(part * ROWS + row[e / 2]) * BB + FROM + j * 8 + t * 2 + e % 2] = z[j][e];
  }

  // Word u of a chunk's 16 goes to place u % 4 * 4 + u / 4 in 16-bit types: a product's columns 2t and 2t+1 of tile j
  // are then word j of lane t's piece. In float32 the reader picks them, and pieces stay whole.
  __device__ __forceinline__ void fetch(const T* weights, unsigned char* stages, int chunk) const {
    unsigned char* const stage = stages + chunk % Traits::BUFFERS * (BB * Traits::STAGE_ROW);
    constexpr bool WHOLE = sizeof(T) == 4 && ALIGNED;
    constexpr int UNITS = WHOLE ? 4 : 16, NUMBERS = CHUNK / UNITS;
    for (int i = threadIdx.x; i < BB * PARTS * UNITS; i += Traits::THREADS) {
      const int unit = i % UNITS, of = i / UNITS % PARTS, line = i / UNITS / PARTS;
      const int column = of * stretch + chunk * CHUNK + unit * NUMBERS;
      const int place = WHOLE ? unit * 16 : sizeof(T) == 4 ? unit * 4 : (unit % 4 * 4 + unit / 4) * 4;
      unsigned char* const to = stage + line * Traits::STAGE_ROW + of * 64 + place;
      const T* const from = weights + int64_t(line) * d + column;
      if constexpr (ALIGNED) {
        const bool there = line < b && column < d;
        copy_async<WHOLE ? 16 : 4>(to, there ? from : weights, there);
      } else {
        for (int c = 0; c < NUMBERS; ++c) reinterpret_cast<T*>(to)[c] = line < b && column + c < d ? from[c] : T(0);
      }
    }
    copy_commit();
  }

  // The row operand's fragment of depth k, as a product takes it.
  __device__ __forceinline__ void operand(const unsigned char* W, int k, uint32_t (&w)[4]) const {
    if constexpr (sizeof(T) == 2) {
      const int lane = quad * 4 + t;
      load_matrices<false>(w, W + (group * 16 + lane % 16) * Traits::W_ROW + (k * 16 + lane / 16 * 8) * 2);
    } else {
      for (int e = 0; e < 4; ++e)
        w[e] = bits<uint32_t>(reinterpret_cast<const float*>(W + row[e % 2] * Traits::W_ROW)[k * 8 + t + e / 2 * 4]);
    }
  }

  __device__ __forceinline__ void multiply(const unsigned char* stage, int k, const uint32_t (&w)[4],
                                           float (&y)[Traits::TILES][4]) const {
    if constexpr (sizeof(T) == 2) {
      const int lane = quad * 4 + t;
      for (int j = 0; j < Traits::TILES; j += 2) {
        uint32_t v[4];
        load_matrices<true>(v, stage + (k * 16 + lane % 16) * Traits::STAGE_ROW + (j + lane / 16) * 16);
        S::mma(y[j], w, v[0], v[1]);
        S::mma(y[j + 1], w, v[2], v[3]);
      }
    } else {
      for (int j = 0; j < Traits::TILES; ++j) {
        const unsigned char* const at = stage + (k * 8 + t) * Traits::STAGE_ROW + (quad / 2 * 4 + 2 * j + quad % 2) * 4;
        S::mma(y[j], w, *reinterpret_cast<const uint32_t*>(at),
               *reinterpret_cast<const uint32_t*>(at + 4 * Traits::STAGE_ROW));
      }
    }
  }
};

// Rows of a sample without a task leave as they came; those of one that is not there become NaN.
template <class S, bool ALIGNED>
__device__ void pass(const typename S::T* from, int64_t stride, typename S::T* to, int rows, int d, bool none) {
  const int pieces = (d + kPiece<S> - 1) / kPiece<S>;
  float nans[kPiece<S>];
  for (float& n : nans) n = bits<float>(0x7FC00000u);
  for (int i = threadIdx.x; i < rows * pieces; i += blockDim.x) {
    const int row = i / pieces, column = i % pieces * kPiece<S>;
    const Piece piece = none ? load_piece<S, ALIGNED>(from + row * stride, column, d, true) : pack<S>(nans);
    store_piece<S, ALIGNED>(to + int64_t(row) * d, column, d, true, piece);
  }
}

// Registers hold rows of the widths of T5-small, base and large, where the bottleneck leaves room and MAY_KEEP: calls
// run.template at<BB, KEPT, ALIGNED>().
template <class S, bool MAY_KEEP, int BB, class Run>
void choose_kept(int d, const Run& run) {
  constexpr int WIDTH = 256 / int(sizeof(typename S::T));  // columns of a chunk, all parts
  if constexpr (MAY_KEEP && BB <= (WIDTH == 128 ? 64 : 32)) {
    if (d == 512) return run.template at<BB, 512 / WIDTH, true>();
    if constexpr (WIDTH == 128 || BB < 32)
      if (d == 768) return run.template at<BB, 768 / WIDTH, true>();
    if constexpr (WIDTH == 128)
      if (d == 1024) return run.template at<BB, 1024 / WIDTH, true>();
  }
  run.template at<BB, 0, true>();
}

// Rows off 16-byte boundaries have two forms only: each takes its share of every build.
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
  return b <= 16   ? TileTraits<S, 16>::BYTES
         : b <= 32 ? TileTraits<S, 32>::BYTES
         : b <= 64 ? TileTraits<S, 64>::BYTES
                   : TileTraits<S, kLargestBottleneck>::BYTES;
}

}  // namespace hyperformer_fast
