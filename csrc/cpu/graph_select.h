// The best columns of every row, from hits that come in any order.
//
// A hit is one integer: value, then index, then whether it is NaN, so that `>` is the order of the result: larger values
// first, equal ones by the smaller index, NaN where -inf is. That order is total, so what is kept does not depend on the
// order hits come in. A row holds up to `capacity` hits; a full one drops all but the best `keep`, and what is below
// those need not come any more: that is the row's limit, which the tiles compare with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

namespace kdfast {

template <class C> struct Ordered;
template <> struct Ordered<float> {
  using Bits = uint32_t;
  using Key = uint64_t;
};
template <> struct Ordered<double> {
  using Bits = uint64_t;
  using Key = unsigned __int128;
};
template <class C> using Key = typename Ordered<C>::Key;

template <class C> Key<C> make_key(C value, int64_t index) {
  using Bits = typename Ordered<C>::Bits;
  constexpr Bits sign = Bits(1) << (8 * sizeof(Bits) - 1);
  const bool nan = value != value;
  const C ordered = nan ? -std::numeric_limits<C>::infinity() : value + C(0);  // + 0: one zero
  Bits bits;
  std::memcpy(&bits, &ordered, sizeof(bits));
  bits = bits & sign ? ~bits : bits | sign;
  return Key<C>(bits) << 32 | static_cast<uint32_t>((0x7fffffff - index) << 1 | nan);
}
template <class C> C value_of(Key<C> key) {
  using Bits = typename Ordered<C>::Bits;
  constexpr Bits sign = Bits(1) << (8 * sizeof(Bits) - 1);
  if (key & 1) return std::numeric_limits<C>::quiet_NaN();
  Bits bits = static_cast<Bits>(key >> 32);
  bits = bits & sign ? bits & ~sign : ~bits;
  C value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
template <class C> int64_t index_of(Key<C> key) { return 0x7fffffff - (static_cast<uint32_t>(key) >> 1); }

inline constexpr int64_t kMaxKeep = 144, kMaxCandidates = 512;

// Moves the `keep` largest of `count` different keys to the front, in any order, and returns the smallest of them.
// A quickselect whose partition has no branch to mispredict, which is most of the time of std::nth_element here.
template <class K> K keep_largest(K* keys, int64_t count, int64_t keep) {
  K open[kMaxCandidates], larger[kMaxCandidates];  // undecided ones, and those above the pivot
  std::copy(keys, keys + count, open);
  for (int64_t kept = 0;;) {
    if (count == keep - kept) {
      std::copy(open, open + count, keys + kept);
      return *std::min_element(keys, keys + keep);
    }
    const K a = open[0], b = open[count / 2], c = open[count - 1];
    const K pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
    int64_t above = 0, below = 0;
    for (int64_t i = 0; i < count; ++i) {
      const K key = open[i];
      larger[above] = key, above += key > pivot;
      open[below] = key, below += key < pivot;
    }
    if (kept + above > keep) {
      std::copy(larger, larger + above, open);
      count = above;
      continue;
    }
    std::copy(larger, larger + above, keys + kept);
    kept += above;
    if (kept < keep) keys[kept++] = pivot;
    count = below;
    if (kept == keep) return *std::min_element(keys, keys + keep);
  }
}

template <class C> class Best {
 public:
  // Limits exist for `padded` rows: those past `rows` let nothing through but NaN.
  Best(int64_t rows, int64_t padded, int64_t keep)
      : keep_(keep), capacity_(2 * keep + kSlack), limits_(padded, std::numeric_limits<C>::infinity()), worst_(rows, 0),
        counts_(rows, 0), keys_(new Key<C>[rows * capacity_]) {
    std::fill_n(limits_.begin(), rows, -std::numeric_limits<C>::infinity());
  }

  const C* limits() const { return limits_.data(); }

  void push(int64_t row, C value, int64_t column) {
    const Key<C> key = make_key(value, column);
    if (key <= worst_[row]) return;  // 0, below every key, until something has been dropped
    Key<C>* keys = keys_of(row);
    keys[counts_[row]++] = key;
    if (counts_[row] == capacity_) drop(row);
  }

  // All hits a row holds, the best `keep` if more; sorted, best first.
  std::pair<Key<C>*, int64_t> sorted(int64_t row) {
    if (counts_[row] > keep_) drop(row);
    std::sort(keys_of(row), keys_of(row) + counts_[row], std::greater<Key<C>>());
    return {keys_of(row), counts_[row]};
  }

  // Whether hits of the row were dropped, and then the best value that one of them can have.
  bool dropped(int64_t row) const { return worst_[row] != 0; }
  C best_dropped(int64_t row) const { return value_of<C>(worst_[row]); }

  // Forgets the hits of a row.
  void restart(int64_t row) { counts_[row] = 0, worst_[row] = 0; }

 private:
  static constexpr int64_t kSlack = 24;
  static_assert(2 * kMaxKeep + kSlack <= kMaxCandidates);

  Key<C>* keys_of(int64_t row) { return keys_.get() + row * capacity_; }

  void drop(int64_t row) {
    worst_[row] = keep_largest(keys_of(row), counts_[row], keep_);
    counts_[row] = static_cast<int32_t>(keep_);
    const C limit = value_of<C>(worst_[row]);
    limits_[row] = limit == limit ? limit : -std::numeric_limits<C>::infinity();
  }

  int64_t keep_, capacity_;
  std::vector<C> limits_;
  std::vector<Key<C>> worst_;
  std::vector<int32_t> counts_;
  std::unique_ptr<Key<C>[]> keys_;
};

}  // namespace kdfast
