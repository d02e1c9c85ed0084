// The backward as raw ops: adapter_backward for one site, or adapter_backward_sums for each site of a stack and then
// one finish for all of them. The sites of a stack share a schedule as long as their rows have the same tasks.
#pragma once

#include "call.h"

namespace hyperformer_fast {
namespace {

// What the partial sums of a backward take. It depends on sizes alone, so no op reads anything back from the device.
struct Sums {
  int64_t B, T, units, share, segments, size;
  bool by_sample;

  Sums(const Adapter& adapter, int64_t B, int64_t M, int64_t T, bool by_sample, Dtype dtype)
      : B(B),
        T(T),
        units(B * ((M + kUnit - 1) / kUnit)),
        share(segment_share(adapter, units, dtype)),
        segments(units / share + (by_sample ? std::min(T, B) : units % share != 0)),
        size(partial_sums(adapter.d, adapter.b)),
        by_sample(by_sample) {
    STD_TORCH_CHECK(units + T <= INT32_MAX, "too many rows for one backward");
  }

  // The integers that a schedule takes.
  int64_t schedule_size() const { return by_sample ? 2 * T + 3 * segments + B : 0; }

  Schedule schedule(void* memory) const {
    Schedule made{nullptr, nullptr, nullptr, int(segments), share};
    if (!by_sample) return made;
    static_assert(sizeof(Run) == 2 * sizeof(int) && sizeof(Segment) == 3 * sizeof(int));
    made.of_task = static_cast<Run*>(memory);
    made.segment = reinterpret_cast<Segment*>(made.of_task + T);
    made.samples = reinterpret_cast<int*>(made.segment + segments);
    return made;
  }
};

// Memory for one backward in one allocation, in parts that start at multiples of 16 bytes.
class Workspace {
 public:
  // Reserves room; returns where it starts.
  int64_t reserve(int64_t bytes) {
    const int64_t start = size;
    size += (bytes + 15) / 16 * 16;
    return start;
  }
  void allocate(const Tensor& like) { memory = empty({}, {size / 4}, ScalarType::Float, &like); }
  void* at(int64_t start) { return static_cast<char*>(memory.mutable_data_ptr()) + start; }

 private:
  int64_t size = 0;
  Tensor memory;
};

// A backward of one site, its arguments checked.
struct Backward {
  CudaCall call;
  RowView gs, xs;
  const Tensor &z, &r, &pre_mean, &pre_rstd, &packed;
  int64_t d, b;
  bool aligned = false;

  Backward(const Tensor& g, const Tensor& x, const SavedArguments& saved, const Tensor& packed,
           const FoldedArguments& folded, const std::optional<Tensor>& task_index, int64_t d, int64_t b, bool pre_norm,
           bool post_norm, int64_t activation)
      : call(x, tasks_of(folded.wd), task_index, d, b, pre_norm, post_norm, activation),
        gs(checked(g, x, saved, packed, folded), call.by_sample()),
        xs(x, call.by_sample()),
        z(saved.z),
        r(saved.r),
        pre_mean(saved.pre_mean),
        pre_rstd(saved.pre_rstd),
        packed(packed),
        d(d),
        b(b) {
    call.tasks.B = xs.B, call.tasks.M = xs.M;
    aligned = gs.aligned(d) && xs.aligned(d) && call.weights_aligned;
  }

  Sums sums() const { return {call.adapter, call.tasks.B, call.tasks.M, call.T, call.by_sample(), call.dtype}; }
  int64_t records_bytes() const { return call.tasks.B * call.tasks.M * record_bytes(int(b), call.dtype, aligned); }

  // Writes dx where it has numbers, and records and the schedule where there are any.
  void rows(Tensor& dx, void* records, const Schedule& schedule, const Stream& stream) const {
    const bool need_dx = dx.numel() > 0;
    backward({call.adapter, gs.rows(), xs.rows(), call.tasks, call.folded, z.const_data_ptr(), floats(r),
              floats(pre_mean), floats(pre_rstd), floats(packed), call.layout.numel(), call.layout.post_gamma(),
              need_dx ? dx.mutable_data_ptr() : nullptr, records, schedule, aligned},
             call.dtype, stream);
  }

  void partial_sums(const void* records, const Schedule& schedule, float* part, const Stream& stream) const {
    weight_gradients({call.adapter, gs.rows(), xs.rows(), call.tasks, records, floats(pre_mean), floats(pre_rstd),
                      schedule, part, aligned},
                     call.dtype, stream);
  }

 private:
  const Tensor& checked(const Tensor& g, const Tensor& x, const SavedArguments& saved, const Tensor& packed,
                        const FoldedArguments& folded) {
    call.use(x, folded);
    call.check(g, x, saved, packed);
    expect_device(x, {&g, &saved.z, &saved.r, &saved.pre_mean, &saved.pre_rstd, &packed});
    return g;
  }
};

Tensor empty_dx(const Tensor& x, bool needed) {
  return needed ? empty(lead_of(x), {x.size(x.dim() - 1)}, x.scalar_type(), &x) : empty({}, {0}, x.scalar_type(), &x);
}

std::tuple<Tensor, Tensor> adapter_backward_op(const Tensor& g, const Tensor& x, const Tensor& z, const Tensor& r,
                                               const Tensor& pre_mean, const Tensor& pre_rstd, const Tensor& packed,
                                               const Tensor& wd, const Tensor& wg, const Tensor& vectors,
                                               const Tensor& scale, const Tensor& root, const Tensor& mean,
                                               std::optional<Tensor> task_index, int64_t d, int64_t b, bool pre_norm,
                                               bool post_norm, int64_t activation, bool need_dx, bool need_dpacked) {
  Backward site(g, x, {z, r, pre_mean, pre_rstd}, packed, {wd, wg, vectors, scale, root, mean}, task_index, d, b,
                pre_norm, post_norm, activation);
  const int64_t T = site.call.T;
  Tensor dx = empty_dx(x, need_dx);
  Tensor dpacked = need_dpacked ? empty({T}, {site.call.layout.numel()}, ScalarType::Float, &x)
                                : empty({}, {0}, ScalarType::Float, &x);
  const OnDeviceOf device(x);
  if (x.numel() == 0) {
    torch::stable::zero_(dpacked);
    return {dx, dpacked};
  }
  if (!need_dpacked || T == 0) {
    if (need_dx) site.rows(dx, nullptr, {}, device.stream);
    return {dx, dpacked};
  }
  const Sums sums = site.sums();
  Workspace workspace;
  const int64_t records_at = workspace.reserve(site.records_bytes());
  const int64_t part_at = workspace.reserve(sums.segments * sums.size * 4);
  const int64_t schedule_at = workspace.reserve(sums.schedule_size() * 4);
  workspace.allocate(x);
  void* const records = workspace.at(records_at);
  float* const part = static_cast<float*>(workspace.at(part_at));
  const Schedule schedule = sums.schedule(workspace.at(schedule_at));
  site.rows(dx, records, schedule, device.stream);
  site.partial_sums(records, schedule, part, device.stream);
  finish({site.call.adapter, part, floats(packed), floats(mean), floats(dpacked), 1, T, parts_of(site.call.layout),
          schedule},
         device.stream);
  return {dx, dpacked};
}

// How many segments a backward has, how many floats the sums of one take, and how many integers the schedule takes.
std::tuple<int64_t, int64_t, int64_t> sums_sizes_op(int64_t B, int64_t M, int64_t T, bool by_sample, int64_t d,
                                                    int64_t b, bool post_norm, ScalarType dtype) {
  expect_adapter(d, b);
  STD_TORCH_CHECK(B >= 1 && M >= 1 && T >= 1, "B, M and T must be positive, got ", B, ", ", M, " and ", T);
  const Adapter adapter{int(d), int(b), kGeluNew, false, post_norm};
  const Sums sums(adapter, B, M, T, by_sample, compute_dtype("dtype", dtype));
  return {sums.segments, sums.size, sums.schedule_size()};
}

void expect_schedule(const Tensor& schedule, int64_t least) {
  STD_TORCH_CHECK(schedule.scalar_type() == ScalarType::Int && schedule.is_contiguous() && schedule.dim() == 1,
                  "schedule must be a contiguous vector of int32");
  STD_TORCH_CHECK(schedule.numel() >= least, "schedule must have ", least, " numbers, got ", schedule.numel());
}

// The backward of one site without its finish: writes the site's partial sums to part [segments, size], and the
// schedule of its rows, both of which `finish` takes.
Tensor adapter_backward_sums_op(const Tensor& g, const Tensor& x, const Tensor& z, const Tensor& r,
                                const Tensor& pre_mean, const Tensor& pre_rstd, const Tensor& packed, const Tensor& wd,
                                const Tensor& wg, const Tensor& vectors, const Tensor& scale, const Tensor& root,
                                const Tensor& mean, std::optional<Tensor> task_index, int64_t d, int64_t b,
                                bool pre_norm, bool post_norm, int64_t activation, bool need_dx, Tensor part,
                                Tensor schedule) {
  Backward site(g, x, {z, r, pre_mean, pre_rstd}, packed, {wd, wg, vectors, scale, root, mean}, task_index, d, b,
                pre_norm, post_norm, activation);
  STD_TORCH_CHECK(x.numel() > 0 && site.call.T > 0, "there are no rows, or no tasks, to sum over");
  const Sums sums = site.sums();
  expect("part", part, ScalarType::Float, {sums.segments, sums.size});
  expect_schedule(schedule, sums.schedule_size());
  expect_device(x, {&part, &schedule});
  Tensor dx = empty_dx(x, need_dx);
  const OnDeviceOf device(x);
  Workspace workspace;
  workspace.reserve(site.records_bytes());
  workspace.allocate(x);
  const Schedule made = sums.schedule(schedule.mutable_data_ptr());
  site.rows(dx, workspace.at(0), made, device.stream);
  site.partial_sums(workspace.at(0), made, floats(part), device.stream);
  return dx;
}

// dpacked [S, T, P] of S sites, from their partial sums [S, segments, size].
Tensor finish_op(const Tensor& part, const Tensor& schedule, const Tensor& packed, const Tensor& mean, bool by_sample,
                 int64_t d, int64_t b, bool pre_norm, bool post_norm) {
  expect_adapter(d, b);
  const AdapterLayout layout{d, b, pre_norm, post_norm};
  STD_TORCH_CHECK(part.dim() == 3 && packed.dim() == 3, "part must be [S, segments, size] and packed [S, T, P]");
  const int64_t S = packed.size(0), T = packed.size(1), P = layout.numel(), segments = part.size(1);
  STD_TORCH_CHECK(segments <= INT32_MAX && (by_sample || T == 1), "rows without a task_index have one task, not ", T);
  expect("part", part, ScalarType::Float, {S, segments, partial_sums(d, b)});
  expect("packed", packed, ScalarType::Float, {S, T, P});
  expect("mean", mean, ScalarType::Float, {S, T, post_norm ? b + 1 : 0});
  expect_schedule(schedule, by_sample ? 2 * T + 3 * segments : 0);
  expect_device(part, {&schedule, &packed, &mean});
  Tensor dpacked = empty({S, T}, {P}, ScalarType::Float, &part);
  if (S * T == 0) return dpacked;
  const OnDeviceOf device(part);
  Schedule made{};
  made.segments = int(segments);
  if (by_sample) made.of_task = static_cast<Run*>(const_cast<void*>(schedule.const_data_ptr()));
  const Adapter adapter{int(d), int(b), kGeluNew, pre_norm, post_norm};
  finish({adapter, floats(part), floats(packed), floats(mean), floats(dpacked), S, T, parts_of(layout), made},
         device.stream);
  return dpacked;
}

}  // namespace
}  // namespace hyperformer_fast
