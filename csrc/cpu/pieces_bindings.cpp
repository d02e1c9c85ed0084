// The raw ops of dropout, residual and norm, and of activation and dropout. As in bindings.cpp, autograd and fakes are
// in hyperformer_fast/ops/.
#include "pieces_bindings.h"

#include <tuple>

#include "call.h"

namespace hyperformer_fast {
namespace {

// The weight of a norm, which may be absent.
struct Norm {
  std::optional<Tensor> weight;
  ScalarType normed = ScalarType::Float;  // the dtype of the weight, and of what is normed
  Dtype dtype = Dtype::kFloat32;

  Norm(const std::optional<Tensor>& given, int64_t n) {
    if (!given.has_value()) return;
    STD_TORCH_CHECK(given->dim() == 1 && given->size(0) == n, "weight must be [", n, "]");
    weight = given->is_contiguous() ? *given : torch::stable::contiguous(*given);
    normed = weight->scalar_type();
    dtype = compute_dtype("weight", normed);
  }
  const void* data() const { return weight.has_value() ? weight->const_data_ptr() : nullptr; }
};

// What a forward with a norm returns beside the sum.
struct SumTensors {
  Norm norm;
  Tensor normed, rstd;

  SumTensors(const Sizes& lead, int64_t n, ScalarType dtype, const std::optional<Tensor>& weight, bool save)
      : norm(weight, n),
        normed(weight.has_value() ? empty_rows(lead, n, norm.normed) : nothing(dtype)),
        rstd(weight.has_value() && save ? empty(lead, {}, ScalarType::Float) : nothing(ScalarType::Float)),
        save_(save) {}

  ResidualForward request(Dtype dtype, int64_t N, int64_t n, double eps) {
    ResidualForward call{};
    call.dtype = dtype;
    call.weight_dtype = norm.dtype;
    call.N = N;
    call.n = n;
    call.eps = float(eps);
    if (!norm.weight.has_value()) return call;
    call.weight = norm.data();
    call.normed = normed.mutable_data_ptr();
    call.rstd = save_ ? floats(rstd) : nullptr;
    return call;
  }

 private:
  bool save_;
};

std::tuple<Tensor, Tensor, Tensor> residual_forward_op(std::optional<Tensor> hidden, const Tensor& y, double p,
                                                       std::optional<Tensor> seed, int64_t stream,
                                                       std::optional<Tensor> weight, double eps, bool save) {
  const ScalarType dtype = y.scalar_type();
  const int64_t n = width_of("y", y);
  const Sizes lead = lead_of(y);
  expect_like("hidden", hidden, dtype, y);
  STD_TORCH_CHECK(hidden.has_value() || (p == 0 && weight.has_value()),
                  "without hidden there must be a weight, and no dropout");
  const Dropout dropout = dropout_of(p, seed, stream, rows_in(lead));
  const Dtype kernel_dtype = compute_dtype("y", dtype);
  Tensor out = hidden.has_value() ? empty_rows(lead, n, dtype) : nothing(dtype);
  SumTensors sum(lead, n, dtype, weight, save);
  ResidualForward call = sum.request(kernel_dtype, rows_in(lead), n, eps);
  call.dropout = dropout;
  if (call.N * n > 0) {
    const OptionalRows hidden_rows(hidden);
    const RowView y_rows(y);
    call.hidden = hidden_rows.rows();
    call.y = y_rows.rows();
    call.out = hidden.has_value() ? out.mutable_data_ptr() : nullptr;
    pieces().residual_forward(call, run_parallel);
  }
  return {out, sum.normed, sum.rstd};
}

std::tuple<Tensor, Tensor, Tensor> residual_backward_op(std::optional<Tensor> g_out, std::optional<Tensor> g_normed,
                                                        std::optional<Tensor> out, std::optional<Tensor> weight,
                                                        std::optional<Tensor> rstd, double p,
                                                        std::optional<Tensor> seed, int64_t stream, bool need_dy,
                                                        bool need_dweight) {
  const bool normed = g_normed.has_value();
  STD_TORCH_CHECK(!normed || (out.has_value() && weight.has_value() && rstd.has_value()),
                  "the gradient of a norm needs out, weight and rstd");
  STD_TORCH_CHECK(normed || g_out.has_value(), "there must be a gradient");
  const Tensor& like = normed ? *out : *g_out;
  const ScalarType dtype = like.scalar_type();
  const int64_t n = width_of("out", like);
  const Sizes lead = lead_of(like);
  const Norm norm(weight, n);
  ResidualBackward call{};
  call.dtype = compute_dtype("out", dtype);
  call.weight_dtype = norm.dtype;
  call.N = rows_in(lead);
  call.n = n;
  call.dropout = dropout_of(p, seed, stream, call.N);
  expect_like("g_out", g_out, dtype, like);
  if (normed) {
    expect_like("g_normed", g_normed, norm.normed, like);
    expect("rstd", *rstd, ScalarType::Float, lead);
  }
  need_dy = need_dy && p > 0;
  need_dweight = need_dweight && normed;
  Tensor dhidden = normed ? empty_rows(lead, n, dtype) : nothing(dtype);
  Tensor dy = need_dy ? empty_rows(lead, n, dtype) : nothing(dtype);
  Tensor dweight = need_dweight ? empty({}, {n}, norm.normed) : nothing(norm.normed);
  if (n == 0) return {dhidden, dy, dweight};
  const OptionalRows g_out_rows(g_out), g_normed_rows(g_normed), out_rows(normed ? out : std::nullopt);
  call.g_out = g_out_rows.rows();
  call.g_normed = g_normed_rows.rows();
  call.out = out_rows.rows();
  call.weight = norm.data();
  call.rstd = normed ? static_cast<const float*>(rstd->const_data_ptr()) : nullptr;
  call.dhidden = normed ? dhidden.mutable_data_ptr() : nullptr;
  call.dy = need_dy ? dy.mutable_data_ptr() : nullptr;
  call.dweight = need_dweight ? dweight.mutable_data_ptr() : nullptr;
  pieces().residual_backward(call, run_parallel);
  return {dhidden, dy, dweight};
}

// residual_forward of hidden and the adapter's output.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adapter_residual_forward_op(
    const Tensor& hidden, const Tensor& x, const Tensor& wd, const Tensor& wg, const Tensor& vectors,
    const Tensor& scale, const Tensor& root, const Tensor& mean, std::optional<Tensor> task_index, int64_t d, int64_t b,
    bool pre_norm, bool post_norm, int64_t activation, double p, std::optional<Tensor> seed, int64_t stream,
    std::optional<Tensor> weight, double eps, bool save) {
  const CpuCall call(x, tasks_of(wd), task_index, d, b, pre_norm, post_norm, activation);
  const FoldedArguments folded{wd, wg, vectors, scale, root, mean};
  call.check(folded);
  const ScalarType dtype = x.scalar_type();
  expect_like("hidden", hidden, dtype, x);
  const Sizes lead = lead_of(x);
  const Dropout dropout = dropout_of(p, seed, stream, rows_in(lead));
  ForwardTensors made(empty_rows(lead, d, dtype), x, call.layout, save);
  SumTensors sum(lead, d, dtype, weight, save);
  ResidualForward request = sum.request(call.dtype, rows_in(lead), d, eps);
  request.dropout = dropout;
  if (request.N > 0) {
    const RowView x_rows(x), hidden_rows(hidden);
    request.hidden = hidden_rows.rows();
    request.out = made.out.mutable_data_ptr();
    kernels().forward_residual(call.problem, x_rows.rows(), weights_of(folded), request, call.saved_rows(made, save),
                               run_parallel);
  }
  return {made.out, made.z, made.r, made.pre_mean, made.pre_rstd, sum.normed, sum.rstd};
}

Activation activation_of(int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code <= 3, "activation must be from 0 to 3, got ", code);
  return Activation(code);
}

Tensor act_dropout_forward_op(const Tensor& a, std::optional<Tensor> c, int64_t activation, double p,
                              std::optional<Tensor> seed, int64_t stream) {
  const ScalarType dtype = a.scalar_type();
  const int64_t n = width_of("a", a);
  const Sizes lead = lead_of(a);
  expect_like("c", c, dtype, a);
  ActDropoutForward call{};
  call.dtype = compute_dtype("a", dtype);
  call.N = rows_in(lead);
  call.n = n;
  call.activation = activation_of(activation);
  call.dropout = dropout_of(p, seed, stream, call.N);
  Tensor out = empty_rows(lead, n, dtype);
  if (call.N * n == 0) return out;
  const RowView a_rows(a);
  const OptionalRows c_rows(c);
  call.a = a_rows.rows();
  call.c = c_rows.rows();
  call.out = out.mutable_data_ptr();
  pieces().act_dropout_forward(call, run_parallel);
  return out;
}

std::tuple<Tensor, Tensor> act_dropout_backward_op(const Tensor& g, const Tensor& a, std::optional<Tensor> c,
                                                   int64_t activation, double p, std::optional<Tensor> seed,
                                                   int64_t stream) {
  const ScalarType dtype = a.scalar_type();
  const int64_t n = width_of("a", a);
  const Sizes lead = lead_of(a);
  expect_like("c", c, dtype, a);
  expect_like("g", g, dtype, a);
  ActDropoutBackward call{};
  call.dtype = compute_dtype("a", dtype);
  call.N = rows_in(lead);
  call.n = n;
  call.activation = activation_of(activation);
  call.dropout = dropout_of(p, seed, stream, call.N);
  Tensor da = empty_rows(lead, n, dtype);
  Tensor dc = c.has_value() ? empty_rows(lead, n, dtype) : nothing(dtype);
  if (call.N * n == 0) return {da, dc};
  const RowView g_rows(g), a_rows(a);
  const OptionalRows c_rows(c);
  call.g = g_rows.rows();
  call.a = a_rows.rows();
  call.c = c_rows.rows();
  call.da = da.mutable_data_ptr();
  call.dc = c.has_value() ? dc.mutable_data_ptr() : nullptr;
  pieces().act_dropout_backward(call, run_parallel);
  return {da, dc};
}

STABLE_TORCH_LIBRARY_FRAGMENT(hyperformer_fast_cpu, m) {
  m.def(
      "residual_forward(Tensor? hidden, Tensor y, float p, Tensor? seed, int stream, Tensor? weight, float eps, "
      "bool save) -> (Tensor out, Tensor normed, Tensor rstd)");
  m.def(
      "residual_backward(Tensor? g_out, Tensor? g_normed, Tensor? out, Tensor? weight, Tensor? rstd, float p, "
      "Tensor? seed, int stream, bool need_dy, bool need_dweight)"
      " -> (Tensor dhidden, Tensor dy, Tensor dweight)");
  m.def(
      "adapter_residual_forward(Tensor hidden, Tensor x, Tensor wd, Tensor wg, Tensor vectors, Tensor scale, "
      "Tensor root, Tensor mean, Tensor? task_index, int d, int b, bool pre_norm, bool post_norm, int activation, "
      "float p, Tensor? seed, int stream, Tensor? weight, float eps, bool save)"
      " -> (Tensor out, Tensor z, Tensor r, Tensor pre_mean, Tensor pre_rstd, Tensor normed, Tensor rstd)");
  m.def("act_dropout_forward(Tensor a, Tensor? c, int activation, float p, Tensor? seed, int stream) -> Tensor out");
  m.def(
      "act_dropout_backward(Tensor g, Tensor a, Tensor? c, int activation, float p, Tensor? seed, int stream)"
      " -> (Tensor da, Tensor dc)");
}

STABLE_TORCH_LIBRARY_IMPL(hyperformer_fast_cpu, CPU, m) {
  m.impl("residual_forward", TORCH_BOX(&residual_forward_op));
  m.impl("residual_backward", TORCH_BOX(&residual_backward_op));
  m.impl("adapter_residual_forward", TORCH_BOX(&adapter_residual_forward_op));
  m.impl("act_dropout_forward", TORCH_BOX(&act_dropout_forward_op));
  m.impl("act_dropout_backward", TORCH_BOX(&act_dropout_backward_op));
}

}  // namespace
}  // namespace hyperformer_fast
