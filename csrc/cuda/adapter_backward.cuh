// The first kernel of the adapter's backward. A block takes 32 rows of one sample, writes their dx, and keeps a record
// of each row (row_record.cuh) for the weight gradients. Its products are the forward's with Wg and Wd exchanged. In a
// mixed batch, one further block for each task schedules the weight gradients, which costs no launch and no time.
#pragma once

#include "launch.cuh"
#include "row_record.cuh"
#include "row_tile.cuh"
#include "schedule.cuh"

namespace hyperformer_fast {

template <class S, int BB, int KEPT, bool ALIGNED>
__global__ void __launch_bounds__(256, 1) backward_kernel(const BackwardParams p) {
  using Tile = RowTile<S, BB, KEPT, ALIGNED>;
  using Traits = typename Tile::Traits;
  using T = typename S::T;
  constexpr int kPiece = Traits::kPiece, kChunk = Traits::kChunk, kRows = Traits::kRows;
  HFF_SHARED(shared);
  float* const partial = reinterpret_cast<float*>(shared);
  float* const Q = partial + kRows * BB;  // behind the sums, which end up in the first quarter
  float* const H = reinterpret_cast<float*>(shared + Traits::kAtH);
  unsigned char* const W = shared + Traits::kAtW;
  float* const along_bias = reinterpret_cast<float*>(shared + Traits::kAtSums);
  float* const along_gamma = along_bias + Traits::kParts * kRows;

  const int d = p.d, b = p.b, thread = threadIdx.x;
  const int64_t units = units_of(p.tasks);
  if (blockIdx.x >= units)
    return schedule_task(p.tasks, p.schedule, int(blockIdx.x - units), reinterpret_cast<int*>(shared));
  const Place place = place_of(p.tasks, blockIdx.x);
  const int64_t flat = place.flat, task = task_of(p.tasks, place.sample);
  T* const dx = static_cast<T*>(p.dx) + (p.dx == nullptr ? 0 : flat * d);
  if (task < 0 || task >= p.tasks.T) {
    if (p.dx != nullptr) pass<S, ALIGNED>(start_of<T>(p.g, place), p.g.stride_row, dx, place.rows, d, task == -1);
    return;
  }

  const TaskWeights<T> weights(p, p.folded, task);
  const float* const gamma = p.packed + task * p.P + p.gamma;
  const Tile tile(start_of<T>(p.g, place), p.g.stride_row, place.rows, d, b);
  const int rows = place.rows;

  float by_bias[2] = {0, 0}, by_gamma[2] = {0, 0};
  tile.down(weights.wg, partial, [&](const Piece& piece, int chunk, int i, bool once) {
    if (p.post_norm && once) {
      const int column = tile.mine + chunk * kChunk;
      if (ALIGNED && column >= d) return piece;
      for (int c = 0; c < kPiece; ++c) {
        if (!ALIGNED && column + c >= d) break;
        by_bias[i] += number<S>(piece, c) * weights.up_bias[column + c];
        if (p.records != nullptr) by_gamma[i] += number<S>(piece, c) * gamma[column + c];
      }
    }
    return piece;
  });
  if (p.post_norm) {
    tile.partial_sum(by_bias, along_bias);
    tile.partial_sum(by_gamma, along_gamma);
  }
  __syncthreads();

  // Eight neighbouring threads compute the bottleneck numbers of one row. Until W, no other thread reads what they
  // write.
  const int line = thread / 8, first = thread % 8;
  const bool there = line < rows;
  const T* const z = static_cast<const T*>(p.z) + (flat + line) * b;
  float* const h = H + line * Traits::kHRow;
  float* const t = partial + line * BB;
  float* const q = Q + line * Traits::kHRow;
  using Record = RowRecord<S, BB>;
  unsigned char* const record =
      p.records != nullptr && there ? static_cast<unsigned char*>(p.records) + (flat + line) * Record::kBytes : nullptr;
  for (int j = first; j < b; j += 8) {
    const int i = line * BB + j;
    const float sum = partial[i] + partial[kRows * BB + i] + partial[2 * kRows * BB + i] + partial[3 * kRows * BB + i];
    t[j] = p.post_norm ? sum * weights.scale[j] : sum;
    h[j] = there ? activate(S::wide(z[j]), p.activation) : 0.0f;
  }
  float r = 1.0f, m2 = 0.0f;
  __syncthreads();  // Q overlaps the other quarters of the sums
  if (p.post_norm) {
    r = there ? p.r[flat + line] : 0.0f;
    for (int i = first; i < b; i += 8) {
      q[i] = root_row(weights.root, b, i, h);
      m2 += t[i] * h[i];
    }
    m2 = (lane_sum<8>(m2) + Tile::whole(along_bias, line)) * r / float(d);
    __syncwarp();  // makes q visible: a shuffle does not order memory accesses
  }
  if (record != nullptr && first == 0)
    Record::put_edge(record, r, m2, p.post_norm ? Tile::whole(along_gamma, line) : 0.0f);
  for (int j = first; j < BB; j += 8) {
    T rounded = S::narrow(0.0f);
    if (there && j < b) {
      float dh = t[j];
      if (p.post_norm) {
        float u = 0.0f;
        for (int i = 0; i <= j; ++i) u += q[i] * weights.root[i * (b + 1) + j];
        dh = r * (dh - m2 * float(d) * r * u);
      }
      rounded = S::narrow(dh * activate_grad(S::wide(z[j]), p.activation));
      if (record != nullptr) Record::dz(record, j) = rounded, Record::put_h(record, j, h[j] * r);
    }
    reinterpret_cast<T*>(W + line * Traits::kWRow)[j] = rounded;
  }
  if (p.dx == nullptr) return;
  __syncthreads();

  // A pre-norm takes two passes, because its backward first needs two sums over the row.
  const T* const x = start_of<T>(p.x, place);
  float mean[2] = {0, 0}, rstd[2] = {0, 0}, total[2] = {0, 0}, along[2] = {0, 0};
  if (p.pre_norm)
    for (int i = 0; i < 2; ++i) {
      if (tile.row[i] >= rows) continue;
      mean[i] = p.pre_mean[flat + tile.row[i]];
      rstd[i] = p.pre_rstd[flat + tile.row[i]];
    }
#pragma unroll 1
  for (int last = p.pre_norm ? 0 : 1; last < 2; ++last) {
    tile.up(weights.wd, shared, W, [&](int chunk, const Piece& above, const Piece& below, const auto& y) {
      const int column = tile.mine + chunk * kChunk;
      for (int i = 0; i < 2; ++i) {
        Piece xhat = {{0, 0, 0, 0}};
        if (p.pre_norm) xhat = normalised<S>(tile.piece_of(x, p.x.stride_row, chunk, i), column, d, mean[i], rstd[i]);
        float value[kPiece];
        for (int c = 0; c < kPiece; ++c) {
          float branch = y[c / 2][2 * i + c % 2];
          if (!last) total[i] += branch, along[i] += branch * number<S>(xhat, c);
          if (p.pre_norm) branch = rstd[i] * (branch - total[i] - number<S>(xhat, c) * along[i]);
          value[c] = number<S>(i ? below : above, c) + branch;
        }
        store_piece<S, ALIGNED>(dx + int64_t(tile.row[i]) * d, column, d, last && tile.row[i] < rows, pack<S>(value));
      }
    });
    if (last) break;
    tile.sum_rows(total, along_bias);
    tile.sum_rows(along, along_gamma);
    for (int i = 0; i < 2; ++i) total[i] /= float(d), along[i] /= float(d);
  }
}

template <class S>
struct LaunchBackward {
  const BackwardParams& p;
  const Stream& stream;

  template <int BB, int KEPT, bool ALIGNED>
  void at() const {
    const int64_t rows = blocks_of(p.tasks, "adapter_backward");
    const int64_t blocks = rows + (p.records != nullptr && p.tasks.index != nullptr ? p.tasks.T : 0);
    if (blocks > INT32_MAX) throw std::runtime_error("adapter_backward: too many tasks for one launch");
    launch<backward_kernel<S, BB, KEPT, ALIGNED>>("adapter_backward", dim3{unsigned(blocks), 1, 1},
                                                  TileTraits<S, BB>::kThreads, TileTraits<S, BB>::kBytes, stream, p);
  }
};

template <class S>
void backward_of(const BackwardParams& p, const Stream& stream) {
  // g is read a second time, from the L2 cache. Keeping it in registers as well would make the kernel spill.
  choose_tile<S, false>(p.d, p.b, p.aligned, LaunchBackward<S>{p, stream});
}

extern template void backward_of<F32>(const BackwardParams&, const Stream&);
extern template void backward_of<BF16>(const BackwardParams&, const Stream&);
extern template void backward_of<F16>(const BackwardParams&, const Stream&);

}  // namespace hyperformer_fast
