// Adapters whose weights were prepared for inference. All that a call needs of a site, its folded weights and what
// they are, lies in one tensor of bytes, because in decoding a call costs more in arguments than in arithmetic.
#include <cstring>
#include <optional>
#include <tuple>

#include "pieces_bindings.h"

namespace hyperformer_fast {
namespace {

constexpr int64_t kLine = 64;                   // the alignment of each part, in bytes
constexpr int64_t kMagic = 0x6870726570617265;  // tells prepared weights from other bytes
constexpr int64_t kFewRows = 16;                // from here on the kernel for many rows is faster

int64_t lines(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

// The first bytes of prepared weights.
struct Header {
  int64_t magic, tasks, d, b, pre_norm, post_norm, activation, dtype;
};
static_assert(sizeof(Header) == kLine, "the parts begin behind one line");

// Prepared weights, or room for them: where each part of T tasks lies.
struct Prepared {
  Header header;
  AdapterLayout layout;
  int64_t bytes_of_task[6];  // wd, wg, vectors, scale, root, mean
  int64_t start[7];          // of each part, and of what follows

  explicit Prepared(const Header& h) : header(h), layout{h.d, h.b, h.pre_norm != 0, h.post_norm != 0} {
    const int64_t b = h.b, c = layout.post_norm ? b + 1 : 0, wide = bytes_of(Dtype(h.dtype));
    const int64_t numbers[6] = {b * h.d, b * h.d, layout.vectors(), layout.post_norm ? b : 0, c * c, c};
    start[0] = kLine;
    for (int i = 0; i < 6; ++i) {
      bytes_of_task[i] = numbers[i] * (i < 2 ? wide : 4);
      start[i + 1] = start[i] + lines(h.tasks * bytes_of_task[i]);
    }
  }

  // The weights from `task` on.
  FoldedWeights from(const char* data, int64_t task) const {
    const auto part = [&](int i) { return data + start[i] + task * bytes_of_task[i]; };
    const auto numbers = [&](int i) { return reinterpret_cast<const float*>(part(i)); };
    return {part(0), part(1), numbers(2), numbers(3), numbers(4), numbers(5)};
  }
};

Tensor prepare_op(const Tensor& wd, const Tensor& wg, const Tensor& vectors, const Tensor& scale, const Tensor& root,
                  const Tensor& mean, int64_t d, int64_t b, bool pre_norm, bool post_norm, int64_t activation) {
  expect_sizes(d, b);
  STD_TORCH_CHECK(activation >= 0 && activation <= 3, "activation must be from 0 to 3, got ", activation);
  const Dtype dtype = compute_dtype("wd", wd.scalar_type());
  const int64_t T = tasks_of(wd), c = post_norm ? b + 1 : 0;
  const Prepared made(Header{kMagic, T, d, b, pre_norm, post_norm, activation, int64_t(dtype)});
  expect("wd", wd, wd.scalar_type(), {T, b, d});
  expect("wg", wg, wd.scalar_type(), {T, b, d});
  expect("vectors", vectors, ScalarType::Float, {T, made.layout.vectors()});
  expect("scale", scale, ScalarType::Float, {T, post_norm ? b : 0});
  expect("root", root, ScalarType::Float, {T, c, c});
  expect("mean", mean, ScalarType::Float, {T, c});
  Tensor weights = empty({}, {(made.start[6] + 3) / 4}, ScalarType::Float);
  auto* data = static_cast<char*>(weights.mutable_data_ptr());
  std::memset(data, 0, made.start[6]);
  std::memcpy(data, &made.header, sizeof(Header));
  const Tensor* parts[] = {&wd, &wg, &vectors, &scale, &root, &mean};
  for (int i = 0; i < 6; ++i)
    if (made.bytes_of_task[i] * T > 0)
      std::memcpy(data + made.start[i], parts[i]->const_data_ptr(), made.bytes_of_task[i] * T);
  return weights;
}

// The prepared weights that an op was given. Throws where they are not what prepare_op made.
Prepared prepared_in(const Tensor& weights) {
  STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Float && weights.is_contiguous() && weights.numel() * 4 >= kLine,
                  "weights must be what `prepare` returned");
  Header header;
  std::memcpy(&header, weights.const_data_ptr(), sizeof(Header));
  STD_TORCH_CHECK(header.magic == kMagic, "weights must be what `prepare` returned");
  const Prepared prepared(header);
  STD_TORCH_CHECK(weights.numel() * 4 >= prepared.start[6], "weights must be what `prepare` returned, as a whole");
  return prepared;
}

// Runs the adapter of `task`, or with a negative one those that task_index names, and writes to `out`.
void run(const Tensor& x, const Tensor& weights, const std::optional<Tensor>& task_index, int64_t task, void* out) {
  const Prepared prepared = prepared_in(weights);
  const Header& h = prepared.header;
  STD_TORCH_CHECK(task < h.tasks && (task < 0 || !task_index.has_value()), "task must be below ", h.tasks,
                  ", and without a task_index; got ", task);
  const Call call(x, task < 0 ? h.tasks : 1, task_index, h.d, h.b, prepared.layout.pre_norm, prepared.layout.post_norm,
                  h.activation);
  STD_TORCH_CHECK(call.dtype == Dtype(h.dtype), "x must have the dtype that the weights were prepared for, got ",
                  name(call.scalar_type));
  const int64_t N = rows_in(lead_of(x));
  Problem p{call.layout, call.activation, call.dtype, 1, N, call.T, nullptr};
  std::vector<int64_t> tasks;
  if (call.by_sample()) {
    const int64_t B = p.B = x.size(0);
    p.M = B == 0 ? 0 : N / B;
    tasks.resize(B);
    const void* data = call.index->const_data_ptr();
    for (int64_t i = 0; i < B; ++i) {
      tasks[i] = call.index_is_wide() ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
      STD_TORCH_CHECK(tasks[i] >= -1 && tasks[i] < p.T, "task_index must be from -1 to ", p.T - 1, ", got ", tasks[i]);
    }
    p.task = tasks.data();
  }
  if (N == 0) return;
  const RowView rows(x);
  const FoldedWeights folded = prepared.from(static_cast<const char*>(weights.const_data_ptr()), task < 0 ? 0 : task);
  if (N <= kFewRows && p.dtype == Dtype::kFloat32 && !p.layout.pre_norm && p.T > 0)
    kernels().few_rows(p, rows.rows(), folded, out);
  else
    kernels().forward(p, rows.rows(), folded, out, SavedRows{nullptr, nullptr, nullptr, nullptr}, run_parallel);
}

Tensor adapter_op(const Tensor& x, const Tensor& weights, std::optional<Tensor> task_index, int64_t task) {
  STD_TORCH_CHECK(x.dim() >= 1, "x must be [..., d]");
  Tensor out = empty_rows(lead_of(x), x.size(x.dim() - 1), x.scalar_type());
  run(x, weights, task_index, task, out.mutable_data_ptr());
  return out;
}

// hidden + adapter(y), and with norm_weight T5's norm of it; an empty tensor in its place otherwise.
std::tuple<Tensor, Tensor> adapter_residual_op(const Tensor& hidden, const Tensor& y, const Tensor& weights,
                                               std::optional<Tensor> task_index, int64_t task,
                                               std::optional<Tensor> norm_weight, double eps) {
  const ScalarType dtype = y.scalar_type();
  const int64_t d = width_of("y", y);
  const Sizes lead = lead_of(y);
  expect_like("hidden", hidden, dtype, y);
  const ScalarType kind = norm_weight.has_value() ? norm_weight->scalar_type() : ScalarType::Float;
  ResidualForward call{};
  call.dtype = compute_dtype("y", dtype);
  call.weight_dtype = compute_dtype("norm_weight", kind);
  if (norm_weight.has_value()) {
    STD_TORCH_CHECK(norm_weight->dim() == 1 && norm_weight->size(0) == d, "norm_weight must be [", d, "]");
    if (!norm_weight->is_contiguous()) norm_weight = torch::stable::contiguous(*norm_weight);
  }
  Tensor out = empty_rows(lead, d, dtype), adapted = empty_rows(lead, d, dtype);
  Tensor normed = norm_weight.has_value() ? empty_rows(lead, d, kind) : nothing(kind);
  run(y, weights, task_index, task, adapted.mutable_data_ptr());
  call.N = rows_in(lead);
  call.n = d;
  if (call.N == 0) return {out, normed};
  const RowView hidden_rows(hidden), adapted_rows(adapted);
  call.hidden = hidden_rows.rows();
  call.y = adapted_rows.rows();
  call.weight = norm_weight.has_value() ? norm_weight->const_data_ptr() : nullptr;
  call.eps = float(eps);
  call.out = out.mutable_data_ptr();
  call.normed = norm_weight.has_value() ? normed.mutable_data_ptr() : nullptr;
  pieces().residual_forward(call, run_parallel);
  return {out, normed};
}

STABLE_TORCH_LIBRARY_FRAGMENT(hyperformer_fast_cpu, m) {
  m.def(
      "prepare(Tensor wd, Tensor wg, Tensor vectors, Tensor scale, Tensor root, Tensor mean, int d, int b, "
      "bool pre_norm, bool post_norm, int activation) -> Tensor weights");
  m.def("prepared_adapter(Tensor x, Tensor weights, Tensor? task_index, int task) -> Tensor out");
  m.def(
      "prepared_adapter_residual(Tensor hidden, Tensor y, Tensor weights, Tensor? task_index, int task, "
      "Tensor? norm_weight, float eps) -> (Tensor out, Tensor normed)");
}

STABLE_TORCH_LIBRARY_IMPL(hyperformer_fast_cpu, CPU, m) {
  m.impl("prepare", TORCH_BOX(&prepare_op));
  m.impl("prepared_adapter", TORCH_BOX(&adapter_op));
  m.impl("prepared_adapter_residual", TORCH_BOX(&adapter_residual_op));
}

}  // namespace
}  // namespace hyperformer_fast
