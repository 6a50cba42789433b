// The N x M half of the graph ops, one level's worth: what graph.cpp drives and graph_tiles.cpp implements.
//
// Rows are packed in panels of 3 vectors' worth of rows, transposed, so that a panel serves both sides of a product. A
// tile is the product of two panels; it stays in L1, and what could still be among the best of its row (or, where the
// keys are the rows themselves, of its column's row) leaves it as a list of hits. Nothing else of the product is kept.
//
// Every element of a tile is one chain of multiply-adds over the depth in ascending order, wherever in the tile it
// stands: its bits depend on the two rows alone. So rows that are equal have equal similarities, S is symmetric bit for
// bit, and threads, blocks and the order of tiles change nothing.
#pragma once

#include <cstdint>

#include "cpu/kl_rows.h"

namespace kdfast {

// A candidate neighbour `column` of `row`.
template <class C> struct Hit {
  C value;
  int32_t row, column;
};

// What a tile is compared with. A value that is less than the limit of its row is dropped; NaN is not less.
struct Filter {
  const void* row_limits;      // C, one a row of the tile
  const void* column_limits;   // C, one a column: hits of the columns' rows too; null where those are other tiles' work
  const void* row_squares;     // C: values become 2 <x, y> - squares - squares, the negated squared distance; or null
  const void* column_squares;
  int64_t first_row, first_column;
};

struct GraphTiles {
  // Rows [0, count) widened, `centre` (double, or null) subtracted, over divisors[i]; lanes beyond count are 0.
  using Pack = void (*)(const void* const* rows, int64_t count, int64_t width, const double* centre,
                        const double* divisors, void* panel);
  // Leaves the product of two panels in `tile` (panel * panel values) and its hits in `hits` (room for 2 * panel * panel).
  using Product = int64_t (*)(const void* rows, const void* columns, int64_t width, const Filter&, void* tile, void* hits);

  int64_t panel[2];    // rows of a panel: float, double
  Pack pack[kStorages];
  Product product[2];  // float, double
};

KDFAST_DECLARE_LEVELS(GraphTiles, graph_tiles)

}  // namespace kdfast
