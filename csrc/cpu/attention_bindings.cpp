// The raw ops of attention and of the loss. As in bindings.cpp, autograd and fakes are in hyperformer_fast/ops/.
#include <optional>
#include <tuple>

#include "attention.h"
#include "pieces_bindings.h"

namespace hyperformer_fast {
namespace {

// A tensor [B, H, L, n] as the kernels read it: in place if the last dimension is contiguous, else from a copy.
struct HeadView {
  Tensor keep;

  HeadView(const char* what, const Tensor& t, ScalarType dtype, const Sizes& shape) : keep(t) {
    STD_TORCH_CHECK(t.scalar_type() == dtype, what, " must be ", name(dtype), ", got ", name(t.scalar_type()));
    bool same = t.dim() == 4;
    for (int64_t i = 0; same && i < 4; ++i) same = t.size(i) == shape[i];
    STD_TORCH_CHECK(same, what, " has the wrong shape");
    keep = dense_rows(t);
  }
  View4 view() const {
    return {keep.const_data_ptr(), {keep.stride(0), keep.stride(1), keep.stride(2), keep.stride(3)}};
  }
};

// A new tensor [B, H, L, n] that lies in memory as [B, L, H, n], as the linear layers beside attention read it.
Tensor empty_heads(int64_t B, int64_t H, int64_t L, int64_t n, ScalarType dtype) {
  const auto at_least_1 = [](int64_t size) { return std::max<int64_t>(size, 1); };
  const int64_t row = at_least_1(n) * at_least_1(H);
  return empty_strided({B, H, L, n}, {row * at_least_1(L), at_least_1(n), row, 1}, dtype);
}

// A bias or a mask that can be broadcast to [B, H, Lq, Lk].
ScoreTerm term_of(const char* what, const std::optional<Tensor>& t, const Sizes& shape) {
  ScoreTerm term{};
  if (!t.has_value()) return term;
  switch (t->scalar_type()) {
    case ScalarType::Float:
      term.kind = ScoreTerm::kFloat32;
      break;
    case ScalarType::BFloat16:
      term.kind = ScoreTerm::kBFloat16;
      break;
    case ScalarType::Half:
      term.kind = ScoreTerm::kFloat16;
      break;
    case ScalarType::Bool:
      term.kind = ScoreTerm::kBool;
      break;
    default:
      STD_TORCH_CHECK(false, what, " must be float32, bfloat16, float16 or bool");
  }
  term.data = t->const_data_ptr();
  const int64_t first = 4 - t->dim();
  STD_TORCH_CHECK(first >= 0, what, " must have at most four dimensions, got ", t->dim());
  for (int64_t i = first; i < 4; ++i) {
    const int64_t size = t->size(i - first);
    STD_TORCH_CHECK(size == 1 || size == shape[i], what, " cannot be broadcast to the scores");
    term.stride[i] = size == 1 ? 0 : t->stride(i - first);
  }
  return term;
}

// A bool mask can only forbid: it is no bias.
ScoreTerm bias_of(const std::optional<Tensor>& t, const Sizes& shape) {
  const ScoreTerm bias = term_of("bias", t, shape);
  STD_TORCH_CHECK(bias.kind != ScoreTerm::kBool, "bias must be float32, bfloat16 or float16");
  return bias;
}

void set_shape(SoftmaxProblem& p, const char* what, ScalarType dtype, const Sizes& scores) {
  p.dtype = compute_dtype(what, dtype);
  p.B = scores[0];
  p.H = scores[1];
  p.Lq = scores[2];
  p.Lk = scores[3];
}

Sizes shape_of(const char* what, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, what, " must have four dimensions, got ", t.dim());
  return {t.size(0), t.size(1), t.size(2), t.size(3)};
}

std::tuple<Tensor, Tensor> softmax_dropout_forward_op(const Tensor& scores, std::optional<Tensor> bias,
                                                      std::optional<Tensor> mask, double p, std::optional<Tensor> seed,
                                                      int64_t stream, bool save) {
  const Sizes shape = shape_of("scores", scores);
  const ScalarType dtype = scores.scalar_type();
  SoftmaxProblem call{};
  set_shape(call, "scores", dtype, shape);
  call.dropout = dropout_of(p, seed, stream, call.rows());
  call.bias = bias_of(bias, shape);
  call.mask = term_of("mask", mask, shape);
  const Sizes lead(shape.begin(), shape.end() - 1);
  save = save && call.dropout.drops();
  Tensor out = empty_rows(lead, call.Lk, dtype);
  Tensor probabilities = save ? empty_rows(lead, call.Lk, dtype) : nothing(dtype);
  if (out.numel() == 0) return {out, probabilities};
  const HeadView rows("scores", scores, dtype, shape);
  attention_kernels().softmax_forward(call, rows.view(), out.mutable_data_ptr(),
                                      save ? probabilities.mutable_data_ptr() : nullptr, run_parallel);
  return {out, probabilities};
}

Tensor softmax_dropout_backward_op(const Tensor& g, const Tensor& probabilities, double p, std::optional<Tensor> seed,
                                   int64_t stream) {
  const Sizes shape = shape_of("probabilities", probabilities);
  const ScalarType dtype = probabilities.scalar_type();
  SoftmaxProblem call{};
  set_shape(call, "probabilities", dtype, shape);
  call.dropout = dropout_of(p, seed, stream, call.rows());
  expect("probabilities", probabilities, dtype, shape);
  const HeadView rows("g", g, dtype, shape);
  Tensor dscores = empty_rows({shape.begin(), shape.end() - 1}, call.Lk, dtype);
  if (dscores.numel() == 0) return dscores;
  attention_kernels().softmax_backward(call, rows.view(), probabilities.const_data_ptr(), dscores.mutable_data_ptr(),
                                       run_parallel);
  return dscores;
}

// q, k and v of a call.
struct AttentionCall {
  ScalarType dtype;
  Sizes scores;
  AttentionProblem problem{};
  HeadView q, k, v;

  AttentionCall(const Tensor& q, const Tensor& k, const Tensor& v, double scaling, double p,
                const std::optional<Tensor>& seed, int64_t stream)
      : dtype(q.scalar_type()),
        scores{shape_of("q", q)[0], q.size(1), q.size(2), shape_of("k", k)[2]},
        q("q", q, dtype, shape_of("q", q)),
        k("k", k, dtype, {scores[0], scores[1], scores[3], q.size(3)}),
        v("v", v, dtype, {scores[0], scores[1], scores[3], shape_of("v", v)[3]}) {
    set_shape(problem, "q", dtype, scores);
    problem.dk = q.size(3);
    problem.dv = v.size(3);
    problem.scaling = float(scaling);
    problem.dropout = dropout_of(p, seed, stream, problem.rows());
  }
};

std::tuple<Tensor, Tensor> attention_forward_op(const Tensor& q, const Tensor& k, const Tensor& v,
                                                std::optional<Tensor> bias, std::optional<Tensor> mask, double scaling,
                                                double p, std::optional<Tensor> seed, int64_t stream, bool save) {
  AttentionCall call(q, k, v, scaling, p, seed, stream);
  AttentionProblem& problem = call.problem;
  problem.bias = bias_of(bias, call.scores);
  problem.mask = term_of("mask", mask, call.scores);
  Tensor out = empty_heads(problem.B, problem.H, problem.Lq, problem.dv, call.dtype);
  Tensor probabilities =
      save ? empty_rows({problem.B, problem.H, problem.Lq}, problem.Lk, call.dtype) : nothing(call.dtype);
  if (problem.rows() == 0) return {out, probabilities};
  attention_kernels().attention_forward(problem, call.q.view(), call.k.view(), call.v.view(), out.mutable_data_ptr(),
                                        save ? probabilities.mutable_data_ptr() : nullptr, run_parallel);
  return {out, probabilities};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_op(const Tensor& g, const Tensor& q, const Tensor& k,
                                                                 const Tensor& v, const Tensor& probabilities,
                                                                 double scaling, double p, std::optional<Tensor> seed,
                                                                 int64_t stream, bool need_dscores) {
  const AttentionCall call(q, k, v, scaling, p, seed, stream);
  const AttentionProblem& problem = call.problem;
  const ScalarType dtype = call.dtype;
  const HeadView gradient("g", g, dtype, {problem.B, problem.H, problem.Lq, problem.dv});
  expect("probabilities", probabilities, dtype, call.scores);
  Tensor dq = empty_heads(problem.B, problem.H, problem.Lq, problem.dk, dtype);
  Tensor dk = empty_heads(problem.B, problem.H, problem.Lk, problem.dk, dtype);
  Tensor dv = empty_heads(problem.B, problem.H, problem.Lk, problem.dv, dtype);
  Tensor dscores = need_dscores ? empty_rows({problem.B, problem.H, problem.Lq}, problem.Lk, dtype) : nothing(dtype);
  if (problem.B * problem.H == 0) return {dq, dk, dv, dscores};
  attention_kernels().attention_backward(problem, gradient.view(), call.q.view(), call.k.view(), call.v.view(),
                                         probabilities.const_data_ptr(),
                                         {dq.mutable_data_ptr(), dk.mutable_data_ptr(), dv.mutable_data_ptr(),
                                          need_dscores ? dscores.mutable_data_ptr() : nullptr},
                                         run_parallel);
  return {dq, dk, dv, dscores};
}

std::tuple<Tensor, Tensor> cross_entropy_forward_op(const Tensor& logits, const Tensor& labels, double label_smoothing,
                                                    int64_t ignore_index, bool need_grad) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be [N, V], got ", logits.dim(), " dimensions");
  const int64_t N = logits.size(0), V = logits.size(1);
  const ScalarType dtype = logits.scalar_type();
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.dim() == 1 && labels.size(0) == N,
                  "labels must be int64 [", N, "]");
  CrossEntropyProblem call{};
  call.dtype = compute_dtype("logits", dtype);
  call.N = N;
  call.V = V;
  call.ignored = ignore_index;
  call.smoothing = label_smoothing;
  Tensor loss = empty({N}, {}, ScalarType::Float);
  Tensor dlogits = need_grad ? empty_rows({N}, V, dtype) : nothing(dtype);
  if (N == 0) return {loss, dlogits};
  const Tensor dense = labels.is_contiguous() ? labels : torch::stable::contiguous(labels);
  call.labels = static_cast<const int64_t*>(dense.const_data_ptr());
  const RowView rows(logits);
  attention_kernels().cross_entropy(call, rows.rows(), floats(loss), need_grad ? dlogits.mutable_data_ptr() : nullptr,
                                    run_parallel);
  return {loss, dlogits};
}

STABLE_TORCH_LIBRARY_FRAGMENT(hyperformer_fast_cpu, m) {
  m.def(
      "softmax_dropout_forward(Tensor scores, Tensor? bias, Tensor? mask, float p, Tensor? seed, int stream, bool save)"
      " -> (Tensor out, Tensor probabilities)");
  m.def(
      "softmax_dropout_backward(Tensor g, Tensor probabilities, float p, Tensor? seed, int stream) -> Tensor dscores");
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, float scaling, float p, "
      "Tensor? seed, int stream, bool save) -> (Tensor out, Tensor probabilities)");
  m.def(
      "attention_backward(Tensor g, Tensor q, Tensor k, Tensor v, Tensor probabilities, float scaling, float p, "
      "Tensor? seed, int stream, bool need_dscores) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dscores)");
  m.def(
      "cross_entropy_forward(Tensor logits, Tensor labels, float label_smoothing, int ignore_index, bool need_grad)"
      " -> (Tensor loss, Tensor dlogits)");
}

STABLE_TORCH_LIBRARY_IMPL(hyperformer_fast_cpu, CPU, m) {
  m.impl("softmax_dropout_forward", TORCH_BOX(&softmax_dropout_forward_op));
  m.impl("softmax_dropout_backward", TORCH_BOX(&softmax_dropout_backward_op));
  m.impl("attention_forward", TORCH_BOX(&attention_forward_op));
  m.impl("attention_backward", TORCH_BOX(&attention_backward_op));
  m.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy_forward_op));
}

}  // namespace
}  // namespace hyperformer_fast
