// graph on the CPU: the k best columns of every row of a matrix of similarities that is never stored.
// Formulas: kdfast/reference/relations.py.
//
// Work: N M D multiply-adds, half of that where the keys are the rows themselves (a tile then serves its rows and its
// columns). Memory: the packed rows (N D), and up to 2 k + 24 candidates a row.
// Distances select more than k of -(|x|^2 + |y|^2 - 2 <x, y>), which cancels for near rows, and compute those again from
// the differences; a row whose k best are not told apart from the rest by more than rounding is scanned by differences.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "cpu/array.h"
#include "cpu/graph.h"
#include "cpu/graph_select.h"
#include "cpu/graph_tiles.h"
#include "cpu/pool.h"

namespace kdfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Panels of one block stay in a level-2 cache of 1 MiB beside the other side's panel and the candidates.
constexpr int64_t kBlockBytes = 384 * 1024;
// Distances beyond k that are computed again: what rounding may have exchanged is among them but for crowded rows.
constexpr int64_t kSpare = 16;

template <class C> constexpr int kType = sizeof(C) == 8;

// Which columns may be neighbours of which rows.
struct Admitted {
  int64_t rows, columns;  // beyond them is the last panel's padding
  bool self;
  const int64_t* labels;  // or null: rows of one label are no neighbours

  bool operator()(int64_t row, int64_t column) const {
    if (row >= rows || column >= columns || (!self && row == column)) return false;
    return labels == nullptr || labels[row] != labels[column];
  }
};

// Rows as panels.
template <class C> struct Packed {
  int64_t panel, panels, width;
  Array<C> data;
  std::vector<C> squares;  // |x|^2 of the packed rows, for distances alone

  const C* at(int64_t p) const { return data.get() + p * panel * width; }
};

// The mean row, over finite elements: subtracting it leaves distances as they are and cancels less. Parts of kPart rows
// are summed on their own and then in order, whatever the number of threads.
std::vector<double> mean_row(const Rows& rows, Storage storage) {
  constexpr int64_t kPart = 1024;
  const int64_t width = rows.classes, parts = (rows.count + kPart - 1) / kPart;
  std::vector<double> sums(parts * width, 0.0), mean(width, 0.0);
  torch::stable::parallel_for(0, parts, grain(kPart * width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin * kPart; r < std::min(end * kPart, rows.count); ++r) {
      double* sum = sums.data() + r / kPart * width;
      for (int64_t d = 0; d < width; ++d) {
        const double x = load_scalar(rows.row(r), d, storage);
        sum[d] += std::isfinite(x) ? x : 0;
      }
    }
  });
  for (int64_t i = 0; i < parts * width; ++i) mean[i % width] += sums[i] / static_cast<double>(rows.count);
  return mean;
}

template <class C>
Packed<C> pack(const GraphTiles& tiles, const Rows& rows, Storage storage, Metric metric, const double* centre) {
  const int64_t panel = tiles.panel[kType<C>], panels = (rows.count + panel - 1) / panel, width = rows.classes;
  Packed<C> packed{panel, panels, width, uninitialized<C>(panels * panel * width), {}};
  if (metric == Metric::euclidean) packed.squares.resize(panels * panel);
  const std::vector<double> norms = norms_of(rows, storage, metric);
  torch::stable::parallel_for(0, panels, grain(panel * width), [&](int64_t begin, int64_t end) {
    std::vector<const void*> pointers(panel);
    std::vector<double> divisors(panel), squares(panel);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * panel, count = std::min(panel, rows.count - first);
      for (int64_t i = 0; i < count; ++i) {
        pointers[i] = rows.row(first + i);
        divisors[i] = metric == Metric::cosine ? divisor(norms[first + i]) : 1.0;
      }
      C* out = packed.data.get() + first * width;
      tiles.pack[static_cast<int>(storage)](pointers.data(), count, width, centre, divisors.data(), out);
      if (metric != Metric::euclidean) continue;
      std::fill(squares.begin(), squares.end(), 0.0);
      for (int64_t d = 0; d < width; ++d)
        for (int64_t i = 0; i < panel; ++i) squares[i] += static_cast<double>(out[d * panel + i]) * out[d * panel + i];
      std::copy(squares.begin(), squares.end(), packed.squares.begin() + first);
    }
  });
  return packed;
}

// All hits of the tiles go to `best`. A task has its rows to itself, so that nothing is locked.
template <class C> class Sweep {
 public:
  Sweep(const GraphTiles& tiles, const Packed<C>& rows, const Packed<C>& columns, const Admitted& admitted, Best<C>& best)
      : rows_(rows), columns_(columns), admitted_(admitted), best_(best), tiles_(tiles) {
    const int64_t threads = torch::stable::get_num_threads();
    block_ = std::max<int64_t>(1, kBlockBytes / std::max<int64_t>(1, rows.panel * rows.width * sizeof(C)));
    block_ = std::min(block_, std::max<int64_t>(1, rows.panels / (4 * threads)));  // some blocks for each thread
    blocks_ = (rows.panels + block_ - 1) / block_;
    grain_ = grain(block_ * block_ * rows.panel * rows.panel * rows.width);
  }

  // Every row against every column.
  void all() const {
    torch::stable::parallel_for(0, blocks_, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch = make_scratch();
      for (int64_t block = begin; block < end; ++block)
        for (int64_t q = 0; q < columns_.panels; ++q)
          for (int64_t p = block * block_; p < end_of(block); ++p) tile(p, q, false, scratch);
    });
  }

  // Every pair of rows once. Blocks meet as teams in a tournament: in a round each plays one other, so that the pairs
  // of a round touch different rows and run side by side.
  void halves() const {
    torch::stable::parallel_for(0, blocks_, grain_, [&](int64_t begin, int64_t end) {
      const Scratch scratch = make_scratch();
      for (int64_t block = begin; block < end; ++block)
        for (int64_t q = block * block_; q < end_of(block); ++q)
          for (int64_t p = block * block_; p <= q; ++p) tile(p, q, p != q, scratch);
    });
    const int64_t teams = blocks_ + blocks_ % 2, rounds = teams - 1;  // an odd one out meets nobody
    for (int64_t round = 0; round < rounds; ++round)
      torch::stable::parallel_for(0, teams / 2, grain_, [&](int64_t begin, int64_t end) {
        const Scratch scratch = make_scratch();
        for (int64_t pair = begin; pair < end; ++pair) {
          const int64_t a = pair == 0 ? rounds : (round + pair) % rounds, b = (round + rounds - pair) % rounds;
          if (std::max(a, b) >= blocks_) continue;
          for (int64_t q = b * block_; q < end_of(b); ++q)
            for (int64_t p = a * block_; p < end_of(a); ++p) tile(p, q, true, scratch);
        }
      });
  }

 private:
  struct Scratch {
    Array<C> tile;
    Array<Hit<C>> hits;
  };
  Scratch make_scratch() const {
    const int64_t area = rows_.panel * rows_.panel;
    return {uninitialized<C>(area), uninitialized<Hit<C>>(2 * area)};
  }
  int64_t end_of(int64_t block) const { return std::min((block + 1) * block_, rows_.panels); }

  void tile(int64_t p, int64_t q, bool columns_too, const Scratch& scratch) const {
    const int64_t row = p * rows_.panel, column = q * rows_.panel;
    const bool squares = !rows_.squares.empty();
    const Filter filter{best_.limits() + row, columns_too ? best_.limits() + column : nullptr,
                        squares ? rows_.squares.data() + row : nullptr,
                        squares ? columns_.squares.data() + column : nullptr, row, column};
    Hit<C>* hits = scratch.hits.get();
    const int64_t count =
        tiles_.product[kType<C>](rows_.at(p), columns_.at(q), rows_.width, filter, scratch.tile.get(), hits);
    for (int64_t i = 0; i < count; ++i)
      if (admitted_(hits[i].row, hits[i].column)) best_.push(hits[i].row, hits[i].value, hits[i].column);
  }

  const Packed<C>& rows_;
  const Packed<C>& columns_;
  const Admitted& admitted_;
  Best<C>& best_;
  const GraphTiles& tiles_;
  int64_t block_, blocks_, grain_;
};

// Distances from the differences, for the candidates of a row or, where those may not be the right ones, for all.
template <class C> class Distances {
 public:
  Distances(const Rows& rows, const Rows& keys, Storage storage, const Packed<C>& packed, const Admitted& admitted, int64_t k)
      : rows_(rows), keys_(keys), packed_(packed), admitted_(admitted), k_(k),
        squared_(KDFAST_SELECT_LEVEL(graph_edges).squared_distances[static_cast<int>(storage)]) {}

  // The best k of row `r`, as negated distances, sorted.
  std::pair<const Key<C>*, int64_t> operator()(int64_t r, Best<C>& candidates, Best<C>& best) {
    best.restart(0);
    const auto [keys, count] = candidates.sorted(r);
    columns_.clear();
    for (int64_t i = 0; i < count; ++i) columns_.push_back(index_of<C>(keys[i]));
    push(r, best);
    const auto [found, number] = best.sorted(0);
    if (!candidates.dropped(r) || apart(r, candidates.best_dropped(r), value_of<C>(found[k_ - 1]))) return {found, number};
    best.restart(0);
    for (int64_t begin = 0; begin < keys_.count; begin += kScan) {
      columns_.clear();
      for (int64_t c = begin; c < std::min(begin + kScan, keys_.count); ++c)
        if (admitted_(r, c)) columns_.push_back(c);
      push(r, best);
    }
    return best.sorted(0);
  }

 private:
  static constexpr int64_t kScan = 256;

  void push(int64_t r, Best<C>& best) {
    others_.clear();
    for (int64_t c : columns_) others_.push_back(keys_.row(c));
    values_.resize(columns_.size());
    squared_(rows_.row(r), others_.data(), columns_.size(), rows_.classes, values_.data());
    for (size_t i = 0; i < columns_.size(); ++i) best.push(0, -static_cast<C>(std::sqrt(values_[i])), columns_[i]);
  }

  // Whether a row whose tile said `dropped` is certainly farther away than the negated distance `kept`.
  // Tile, squares and packing err by c (|x|^2 + |y|^2) together, c = (D + 8) eps, and |y|^2 <= 2 |x|^2 + 2 distance^2.
  bool apart(int64_t r, C dropped, C kept) const {
    const double c = (static_cast<double>(rows_.classes) + 8) * std::numeric_limits<C>::epsilon();
    const double least = (-static_cast<double>(dropped) - 3 * c * packed_.squares[r]) / (1 + 2 * c);
    return least > 0 && static_cast<C>(std::sqrt(least)) > -kept;
  }

  const Rows& rows_;
  const Rows& keys_;
  const Packed<C>& packed_;
  const Admitted& admitted_;
  int64_t k_;
  GraphEdges::Values squared_;
  std::vector<int64_t> columns_;
  std::vector<const void*> others_;
  std::vector<double> values_;
};

template <class C>
void select(const Rows& rows, const Rows& keys, bool same, Storage storage, Metric metric, const Admitted& admitted,
            int64_t k, C* values, int64_t* indices) {
  const bool euclidean = metric == Metric::euclidean;
  const std::vector<double> centre = euclidean ? mean_row(keys, storage) : std::vector<double>();
  const double* subtracted = euclidean ? centre.data() : nullptr;
  const GraphTiles& tiles = KDFAST_SELECT_LEVEL(graph_tiles);  // once: panels of one level are no panels of another
  const Packed<C> packed = pack<C>(tiles, rows, storage, metric, subtracted);
  Best<C> best(rows.count, packed.panels * packed.panel, euclidean ? k + kSpare : k);
  if (same) {
    Sweep<C>(tiles, packed, packed, admitted, best).halves();
  } else {
    const Packed<C> columns = pack<C>(tiles, keys, storage, metric, subtracted);
    Sweep<C>(tiles, packed, columns, admitted, best).all();
  }
  torch::stable::parallel_for(0, rows.count, grain(k * rows.classes), [&](int64_t begin, int64_t end) {
    Distances<C> distances(rows, keys, storage, packed, admitted, k);
    Best<C> by_difference(1, 1, k);
    for (int64_t r = begin; r < end; ++r) {
      const auto [found, count] =
          euclidean ? distances(r, best, by_difference) : std::pair<const Key<C>*, int64_t>(best.sorted(r));
      for (int64_t i = 0; i < k; ++i) {
        const C value = i < count ? value_of<C>(found[i]) : -std::numeric_limits<C>::infinity();
        values[r * k + i] = euclidean ? -value : value;
        indices[r * k + i] = i < count ? index_of<C>(found[i]) : -1;
      }
    }
  });
}

// Values, not differentiable here, and int64 indices, both (N, k); -inf (euclidean: inf) and -1 where `labels` leave a
// row fewer than k.
std::tuple<Tensor, Tensor> graph(const Tensor& features, std::optional<Tensor> keys, std::optional<Tensor> labels,
                                 int64_t k, int64_t metric, bool include_self, bool ieee) {
  const Rows rows = rows_of(features), columns = keys ? rows_of(*keys) : rows;
  STD_TORCH_CHECK(std::max(rows.count, columns.count) < 0x7fffffff, "kdfast::graph takes up to 2^31 - 2 rows");
  STD_TORCH_CHECK(k <= kMaxKeep - kSpare, "kdfast::graph keeps up to 128 neighbours a row");
  const Storage storage = storage_of(features);
  const bool wide = storage == Storage::float64;
  Tensor values = empty({rows.count, k}, wide ? ScalarType::Double : ScalarType::Float);
  Tensor indices = empty({rows.count, k}, ScalarType::Long);
  const Admitted admitted{rows.count, columns.count, include_self || keys.has_value(),
                          labels ? static_cast<const int64_t*>(labels->data_ptr()) : nullptr};
  int64_t* index = static_cast<int64_t*>(indices.data_ptr());
  const auto run = [&](auto* value) {
    select(rows, columns, !keys, storage, static_cast<Metric>(metric), admitted, k, value, index);
  };
  if (wide) run(static_cast<double*>(values.data_ptr()));
  else run(static_cast<float*>(values.data_ptr()));
  return {values, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { m.impl("graph", TORCH_BOX(&graph)); }

}  // namespace kdfast
