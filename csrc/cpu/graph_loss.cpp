// graph on the CPU, along its N k edges: the gradient of their values, and the loss on them with its gradient.
// Formulas: kdfast/reference/relations.py.
//
// An edge (i, j) of weight w adds w (y_j - ...) to row i and w (x_i - ...) to row j. Edges are listed a second time by
// where they end, so that every row of the gradient is one sum in a fixed order: its edges, then those that end in it.
#include <cmath>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "cpu/graph.h"

namespace kdfast {
namespace {

using torch::stable::Tensor;

// (rows, k) edges; -1 where there is none.
struct Edges {
  const int64_t* ends;
  int64_t rows, k;

  int64_t count() const { return rows * k; }
};

// The edges that end in each of `columns` rows, in ascending order.
struct Transposed {
  std::vector<int64_t> begin, edges;

  Transposed(const Edges& e, int64_t columns) : begin(columns + 1, 0), edges(e.count()) {
    for (int64_t i = 0; i < e.count(); ++i)
      if (e.ends[i] >= 0) ++begin[e.ends[i] + 1];
    for (int64_t c = 0; c < columns; ++c) begin[c + 1] += begin[c];
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t i = 0; i < e.count(); ++i)
      if (e.ends[i] >= 0) edges[next[e.ends[i]]++] = i;
  }
};

// One side of the product: rows with their norms.
struct Side {
  const Rows& rows;
  std::vector<double> norms;

  Side(const Rows& rows, Storage storage, Metric metric) : rows(rows), norms(norms_of(rows, storage, metric)) {}
};

// The gradient of the rows of `own`, which are where edges begin (`outgoing`), end (`incoming`), or both. `slopes`:
// gradient by the similarity of each edge; by the squared distance over 2 for distances.
void edge_gradient(const Side& own, const Side& other, const Edges& edges, const Transposed* incoming, bool outgoing,
                   const double* slopes, Metric metric, Storage storage, const Rows& grad) {
  const GraphEdges& kernels = KDFAST_SELECT_LEVEL(graph_edges);
  const int type = static_cast<int>(storage);
  const int64_t width = own.rows.classes;
  const auto sum = metric == Metric::euclidean ? kernels.sum_differences[type] : kernels.sum[type];
  torch::stable::parallel_for(0, own.rows.count, grain(2 * edges.k * width), [&](int64_t begin, int64_t end) {
    std::vector<const void*> others;
    std::vector<double> weights;
    std::vector<char> total(width * compute_size(storage));
    const auto add = [&](int64_t edge, int64_t r) {
      others.push_back(other.rows.row(r));
      weights.push_back(slopes[edge] * inverse_norm(other.norms[r]));
    };
    for (int64_t r = begin; r < end; ++r) {
      others.clear(), weights.clear();
      if (outgoing)
        for (int64_t e = r * edges.k; e < (r + 1) * edges.k; ++e)
          if (edges.ends[e] >= 0) add(e, edges.ends[e]);
      if (incoming)
        for (int64_t i = incoming->begin[r]; i < incoming->begin[r + 1]; ++i)
          add(incoming->edges[i], incoming->edges[i] / edges.k);
      sum(own.rows.row(r), others.data(), weights.data(), others.size(), width, total.data());
      const double norm = own.norms[r];
      if (norm == 0) std::fill(total.begin(), total.end(), 0);  // whatever its neighbours are
      const bool unit = metric == Metric::cosine && norm >= kNormEps;
      kernels.finish[type](own.rows.row(r), total.data(), width, inverse_norm(norm), unit ? 1 / (norm * norm) : 0,
                           grad.row(r));
    }
  });
}

double widened(const void* data, int64_t i, Storage storage) {
  return load_scalar(data, i, storage == Storage::float64 ? Storage::float64 : Storage::float32);
}

// What a slope by the value becomes for edge_gradient: d = |x - y| has gradient (x - y) / d.
double slope_of(double slope, double value, Metric metric) {
  if (metric != Metric::euclidean) return slope;
  return value == 0 ? 0 : slope / value;
}

std::tuple<Tensor, Tensor> graph_backward(const Tensor& features, std::optional<Tensor> keys, const Tensor& values,
                                          const Tensor& indices, const Tensor& grad_values, int64_t metric_number,
                                          bool needs_features, bool needs_keys) {
  const Metric metric = static_cast<Metric>(metric_number);
  const Storage storage = storage_of(features);
  const Rows rows = rows_of(features), columns = keys ? rows_of(*keys) : rows;
  const Edges edges{static_cast<const int64_t*>(indices.data_ptr()), rows.count, indices.size(1)};
  std::vector<double> slopes(edges.count());
  const void *slope_data = grad_values.data_ptr(), *value_data = values.data_ptr();
  for (int64_t e = 0; e < edges.count(); ++e)
    slopes[e] = slope_of(widened(slope_data, e, storage), widened(value_data, e, storage), metric);
  const Side side(rows, storage, metric);
  Tensor grad = make_grad(features, needs_features), grad_keys = make_grad(keys ? *keys : features, needs_keys);
  if (!keys) {
    const Transposed incoming(edges, rows.count);
    edge_gradient(side, side, edges, &incoming, true, slopes.data(), metric, storage, rows_of(grad));
    return {grad, grad_keys};
  }
  const Side other(columns, storage, metric);
  if (needs_features) edge_gradient(side, other, edges, nullptr, true, slopes.data(), metric, storage, rows_of(grad));
  if (needs_keys) {
    const Transposed incoming(edges, columns.count);
    edge_gradient(other, side, edges, &incoming, false, slopes.data(), metric, storage, rows_of(grad_keys));
  }
  return {grad, grad_keys};
}

// log softmax in place.
void log_softmax(std::vector<double>& x) {
  double top = -INFINITY, sum = 0;
  for (double v : x) top = std::max(top, v);
  for (double v : x) sum += std::exp(v - top);
  const double log_sum = top + std::log(sum);
  for (double& v : x) v -= log_sum;
}

// KL(softmax(teacher / T) || softmax(student / T)) over the k edges of each row, and its gradient for grad_output 1.
std::tuple<Tensor, Tensor> graph_kl(const Tensor& student, const Tensor& teacher_values, const Tensor& indices,
                                    std::optional<Tensor> row_weight, double temperature, int64_t metric_number,
                                    int64_t reduction, bool needs_grad) {
  const Metric metric = static_cast<Metric>(metric_number);
  const Rows rows = rows_of(student);
  const Edges edges{static_cast<const int64_t*>(indices.data_ptr()), rows.count, indices.size(1)};
  Tensor grad = make_grad(student, needs_grad);
  Output out = make_output(rows, grad, std::nullopt, row_weight, reduction);
  const Side side(rows, out.storage, metric);
  const GraphEdges& kernels = KDFAST_SELECT_LEVEL(graph_edges);
  const int type = static_cast<int>(out.storage);
  const auto similarities = metric == Metric::euclidean ? kernels.squared_distances[type] : kernels.dots[type];
  const double sign = metric == Metric::euclidean ? -1 : 1, per_row = 1 / out.divisor();
  const void* teacher_data = teacher_values.data_ptr();
  std::vector<double> slopes(needs_grad ? edges.count() : 0);
  torch::stable::parallel_for(0, rows.count, grain(edges.k * rows.classes), [&](int64_t begin, int64_t end) {
    std::vector<const void*> others(edges.k);
    std::vector<double> values(edges.k), log_student(edges.k), log_teacher(edges.k);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t first = r * edges.k;
      for (int64_t i = 0; i < edges.k; ++i) others[i] = rows.row(edges.ends[first + i]);
      similarities(rows.row(r), others.data(), edges.k, rows.classes, values.data());
      for (int64_t i = 0; i < edges.k; ++i) {
        if (metric == Metric::euclidean) values[i] = std::sqrt(values[i]);
        else values[i] *= inverse_norm(side.norms[r]) * inverse_norm(side.norms[edges.ends[first + i]]);
        log_student[i] = sign * values[i] / temperature;
        log_teacher[i] = sign * widened(teacher_data, first + i, out.storage) / temperature;
      }
      log_softmax(log_student), log_softmax(log_teacher);
      double loss = 0;
      for (int64_t i = 0; i < edges.k; ++i) {
        const double p = std::exp(log_teacher[i]);
        if (p != 0) loss += p * (log_teacher[i] - log_student[i]);
        if (!needs_grad) continue;
        const double slope = out.row_weight(r) * per_row * (std::exp(log_student[i]) - p) / temperature;
        slopes[first + i] = slope_of(sign * slope, values[i], metric);
      }
      out.loss[r] = out.row_weight(r) * loss;
    }
  });
  if (needs_grad) {
    const Transposed incoming(edges, rows.count);
    edge_gradient(side, side, edges, &incoming, true, slopes.data(), metric, out.storage, rows_of(grad));
  }
  return {reduced(out, student), grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("graph_backward", TORCH_BOX(&graph_backward));
  m.impl("graph_kl", TORCH_BOX(&graph_kl));
}

}  // namespace kdfast
