// The box tree on vectors of 16 lanes: a search in float32, one token at a time, and one of tokens in batches in 16-bit fixed
// point, where an instruction takes twice as many differences. `V` is the vectors of an instruction set; see the tree_*.cpp files.
//
// The grid: z and the codes are rounded to q(v) = round((v - origin) * unit), the same for both. Boxes hold the smallest and the
// largest q of their codes, so the integer distance to a box is at most that to any code in it: no rounding is left between
// boxes and codes. A coordinate of q is off by at most 0.51, hence a distance on the grid is off by at most e = 1.02 sqrt(dim).
// If any code has the squared grid distance m, the nearest code c is truly no farther than that one:
//
//   |q(z) - q(c)| <= unit |z - c| + e <= sqrt(m) + 2 e =: sqrt(reach),
//
// so the codes within `reach` of the final m are all that can win; they are scored in double precision elsewhere. Squared
// distances fit 32 bits by the width of the grid.
#pragma once

#include "isa.h"

namespace tmm {
namespace {

constexpr int32_t kFar = 0x7fffffff;
constexpr int64_t kShort = 24;  // leaves: with more of them in reach, the nearest few are searched first

// Squared distance to 16 boxes, lower bound.
template <class V>
inline __attribute__((always_inline)) typename V::Floats box_bound(const float* bounds, const typename V::Floats* z, int dim) {
  typename V::Floats sum = V::floats(0);
  for (int j = 0; j < dim; ++j) {
    const auto below = V::sub(V::load(bounds + j * kLeaf), z[j]), above = V::sub(z[j], V::load(bounds + (dim + j) * kLeaf));
    const auto gap = V::max(V::max(below, above), V::floats(0));
    sum = V::multiply_add(gap, gap, sum);
  }
  return sum;
}

template <class V>
inline __attribute__((always_inline)) typename V::Floats leaf_distances(const float* codes, const typename V::Floats* z, int dim) {
  typename V::Floats sum = V::floats(0);
  for (int j = 0; j < dim; ++j) {
    const auto gap = V::sub(z[j], V::load(codes + j * kLeaf));
    sum = V::multiply_add(gap, gap, sum);
  }
  return sum;
}

// First lane that holds `least`, 16 when none does.
template <class V, class T, class Values>
inline int lane_of(Values v, T least) {
  return __builtin_ctz(V::bits(V::at_most(v, V::fill(least))) | 0x10000u);
}

// The least lane, or, for the nearest code and the runner-up, the least of the others: at least two lanes hold no more.
template <class V, class T, class Values>
inline T least_of(Values v, T far, bool two) {
  const T least = V::least(v);
  if (!two) return least;
  const auto first = V::equal(V::lanes(), V::fill(static_cast<int32_t>(lane_of<V>(v, least))));
  return V::least(V::choose(first, v, V::fill(far)));
}

// Appends base + lane for the lanes of `mask`; writes up to 16 values past the end.
template <class V>
inline int64_t append(int32_t* list, int64_t count, int64_t base, typename V::Mask mask) {
  return count + V::compress(list + count, V::add(V::fill(static_cast<int32_t>(base)), V::lanes()), mask);
}

// Few branches depend on the data: first the super boxes in reach are listed, then their leaves, then the leaves are scored.
template <class V, int kDim>
int64_t tree_search(const TreeView& tree, const float* point, bool two, float* scratch, int32_t* out, int64_t capacity) {
  typename V::Floats z[kDim];
  for (int j = 0; j < kDim; ++j) z[j] = V::floats(point[j]);
  const int64_t blocks = (tree.supers + kLeaf - 1) / kLeaf, box_size = 2 * kDim * kLeaf, leaf_size = kDim * kLeaf;
  int32_t* supers = reinterpret_cast<int32_t*>(scratch + blocks * kLeaf);
  int32_t* leaves = supers + (blocks + 1) * kLeaf;
  auto nearest = V::floats(__builtin_inff());
  auto where = V::fill(int32_t{0});
  for (int64_t b = 0; b < blocks; ++b) {
    const auto bound = box_bound<V>(tree.super_bounds + b * box_size, z, kDim);
    V::store(scratch + b * kLeaf, bound);
    const auto less = V::less(bound, nearest);
    nearest = V::choose(less, nearest, bound);
    where = V::choose(less, where, V::fill(static_cast<int32_t>(b)));
  }
  const int lane = lane_of<V>(nearest, V::least(nearest));
  if (lane >= kLeaf) return -1;
  alignas(64) int32_t position[kLeaf];
  V::store(position, where);
  const int64_t home = static_cast<int64_t>(position[lane]) * kLeaf + lane;
  const auto near_home = box_bound<V>(tree.leaf_bounds + home * box_size, z, kDim);
  const int start = lane_of<V>(near_home, V::least(near_home));
  if (start >= kLeaf) return -1;
  const auto start_distances = leaf_distances<V>(tree.leaf_codes + (home * kLeaf + start) * leaf_size, z, kDim);
  float best = least_of<V>(start_distances, __builtin_inff(), two), first = __builtin_inff(), second = first;
  if (!(best < 1e30f)) return -1;

  auto reach = V::floats(best * tree.slack);
  int64_t near_supers = 0, near_leaves = 0;
  for (int64_t b = 0; b < blocks; ++b)
    near_supers = append<V>(supers, near_supers, b * kLeaf, V::at_most(V::load(scratch + b * kLeaf), reach));
  for (int64_t i = 0; i < near_supers; ++i) {
    const int64_t box = supers[i];
    const auto bound = box_bound<V>(tree.leaf_bounds + box * box_size, z, kDim);
    near_leaves = append<V>(leaves, near_leaves, box * kLeaf, V::at_most(bound, reach));
  }

  int64_t count = 0;
  float* found = reinterpret_cast<float*>(leaves + (tree.supers + 1) * kLeaf);
  for (int64_t i = 0; i < near_leaves; ++i) {
    const int64_t leaf = leaves[i];
    const auto d2 = leaf_distances<V>(tree.leaf_codes + leaf * leaf_size, z, kDim);
    auto near = V::at_most(d2, reach);
    if (!V::bits(near)) continue;
    float least = V::least(d2);
    if (two) {  // `least` becomes the second of all distances so far
      const float other = least_of<V>(d2, __builtin_inff(), true), larger = first > least ? first : least;
      first = first < least ? first : least;
      second = second < other ? second : other;
      least = second = second < larger ? second : larger;
    }
    if (least < best) {
      best = least;
      reach = V::floats(best * tree.slack);
      near = V::at_most(d2, reach);
    }
    if (count + kLeaf > capacity) return capacity + 1;
    append<V>(out, count, leaf * kLeaf, near);
    count += V::compress(reinterpret_cast<int32_t*>(found) + count, V::as_ints(d2), near);
  }
  if (!(best > 1e-30f)) return -1;
  const float limit = best * tree.slack;
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i)
    if (found[i] <= limit) out[kept++] = out[i];
  return kept;
}

template <class V>
int64_t tree_candidates(const TreeView& tree, const float* point, bool two, float* scratch, int32_t* out, int64_t capacity) {
  switch (tree.dim) {
#define TMM_TREE(dim) case dim: return tree_search<V, dim>(tree, point, two, scratch, out, capacity);
    TMM_TREE(1) TMM_TREE(2) TMM_TREE(3) TMM_TREE(4) TMM_TREE(5) TMM_TREE(6)
    TMM_TREE(7) TMM_TREE(8) TMM_TREE(9) TMM_TREE(10) TMM_TREE(11) TMM_TREE(12)
#undef TMM_TREE
  }
  return -1;
}

// Squared distances to 16 boxes on the grid.
template <class V, int kPairs>
inline __attribute__((always_inline)) typename V::Ints grid_bound(const int32_t* bounds, const typename V::Ints* z) {
  auto sum = V::fill(int32_t{0});
  for (int p = 0; p < kPairs; ++p) {
    const auto below = V::sub_or_zero(V::load(bounds + p * kLeaf), z[p]);
    const auto above = V::sub_or_zero(z[p], V::load(bounds + (kPairs + p) * kLeaf));
    V::add_squares(sum, V::either(below, above));  // one of the two is zero
  }
  return sum;
}

template <class V, int kPairs>
inline __attribute__((always_inline)) typename V::Ints grid_distances(const int32_t* codes, const typename V::Ints* z) {
  auto sum = V::fill(int32_t{0});
  for (int p = 0; p < kPairs; ++p) V::add_squares(sum, V::sub_pairs(z[p], V::load(codes + p * kLeaf)));
  return sum;
}

template <class V>
inline int32_t reach_of(int32_t m, float slack) {
  const float root = V::root(static_cast<float>(m)) * (1.0f + 0x1p-20f) + slack;
  const float reach = root * root * (1.0f + 0x1p-20f) + 1.0f;
  return reach < kFarthestReach ? static_cast<int32_t>(reach) : kFar;
}

// Token to grid; false: not inside it.
template <class V, int kPairs>
bool to_grid(const GridTree& tree, const float* point, int dim, int32_t* words) {
  const auto value = V::multiply(V::sub(V::load_first(point, dim), V::load_any(tree.origin)), V::floats(tree.unit));
  const auto inside = V::at_most(V::absolute(value), V::floats(tree.reach));
  alignas(64) int32_t q[kLeaf];
  V::store(q, V::add(V::rounded(value), V::fill(tree.centre)));
  for (int p = 0; p < kPairs; ++p) words[p] = q[2 * p] | q[2 * p + 1] << 16;
  return (~V::bits(inside) & ((1u << dim) - 1)) == 0;
}

// Lists of leaves in reach and the integer distances to their boxes. A vector past the end of a list is spare: its distances are
// out of reach.
struct Leaves {
  int32_t* index;
  int32_t* bound;
};

// Every stage runs over all tokens before the next, so that the long chains inside a stage overlap between tokens.
template <class V, int kPairs>
struct GridSearch {
  using Ints = typename V::Ints;
  static constexpr int64_t kBox = 2 * kPairs * kLeaf, kCodes = kPairs * kLeaf;
  const GridTree& tree;
  bool two;
  int64_t blocks;
  int32_t* bounds;     // [kTreeBatch][blocks * kLeaf] distances to super boxes, then the list of those in reach
  Leaves leaves;       // of all tokens, one after the other
  int32_t* distances;  // [kTreeLeaves + 2 * kLeaf][kLeaf]
  int32_t words[kTreeBatch][kPairs];
  int32_t reach[kTreeBatch];
  int64_t start[kTreeBatch + 1];

  void token(int64_t row, Ints* z) const {
    for (int p = 0; p < kPairs; ++p) z[p] = V::fill(words[row][p]);
  }
  Ints leaf(int64_t index, const Ints* z) const { return grid_distances<V, kPairs>(tree.leaf_codes + index * kCodes, z); }

  // The distance to the best code of the two nearest leaves of the nearest super box.
  void first_reach(int64_t row) {
    Ints z[kPairs];
    token(row, z);
    int32_t* out = bounds + row * blocks * kLeaf;
    auto nearest = V::fill(kFar), where = V::fill(int32_t{0});
    for (int64_t b = 0; b < blocks; ++b) {
      const auto bound = grid_bound<V, kPairs>(tree.super_bounds + b * kBox, z);
      V::store(out + b * kLeaf, bound);
      where = V::choose(V::less(bound, nearest), where, V::fill(static_cast<int32_t>(b)));
      nearest = V::min(nearest, bound);
    }
    alignas(64) int32_t position[kLeaf];
    V::store(position, where);
    const int lane = lane_of<V>(nearest, V::least(nearest));
    int64_t home = int64_t{position[lane]} * kLeaf + lane;
    home = home < tree.supers ? home : tree.supers - 1;
    const auto near = grid_bound<V, kPairs>(tree.leaf_bounds + home * kBox, z);
    const int first = lane_of<V>(near, V::least(near));
    const auto rest = V::choose(V::equal(V::lanes(), V::fill(first)), near, V::fill(kFar));
    const int second = lane_of<V>(rest, V::least(rest));
    const auto d2 = V::min(leaf(home * kLeaf + first, z), leaf(home * kLeaf + second, z));
    reach[row] = reach_of<V>(least_of<V>(d2, kFar, two), tree.slack);
  }

  // Replaces the distances to the super boxes by the list of those in reach; returns how many.
  int64_t list_supers(int64_t row) {
    const auto limit = V::fill(reach[row]);
    int32_t* list = bounds + row * blocks * kLeaf;
    int64_t count = 0;
    for (int64_t b = 0; b < blocks; ++b)  // a vector is read before its place is written
      count = append<V>(list, count, b * kLeaf, V::at_most(V::load(list + b * kLeaf), limit));
    return count;
  }

  // Appends the leaves in reach at `first`; returns the end, or -1: too many.
  int64_t list_leaves(int64_t row, int64_t first, int64_t near_supers) {
    Ints z[kPairs];
    token(row, z);
    const auto limit = V::fill(reach[row]);
    const int32_t* supers = bounds + row * blocks * kLeaf;
    int64_t end = first;
    for (int64_t i = 0; i < near_supers; ++i) {
      const int64_t box = supers[i];
      const auto near = grid_bound<V, kPairs>(tree.leaf_bounds + box * kBox, z);
      const auto mask = V::at_most(near, limit);
      V::compress(leaves.bound + end, near, mask);
      end = append<V>(leaves.index, end, box * kLeaf, mask);
      if (end > kTreeLeaves) return -1;
    }
    V::store_any(leaves.bound + end, V::fill(kFar));
    return end;
  }

  // Searches the kProbes leaves with the nearest boxes, then drops the leaves that are out of reach now; returns the new end.
  int64_t shorten(int64_t row, int64_t first, int64_t end) {
    constexpr int kProbes = 4;
    constexpr int32_t kPlace = 1023;  // a bound's low bits make room for its place in the list: good enough to choose by
    Ints z[kPairs];
    token(row, z);
    auto keys = V::fill(kFar), d2 = keys;
    for (int64_t i = first; i < end; i += kLeaf) {
      const auto place = V::add(V::fill(static_cast<int32_t>(i - first)), V::lanes());
      keys = V::min(keys, V::merge(V::load_any(leaves.bound + i), place, V::fill(kPlace)));
    }
    for (int probe = 0; probe < kProbes; ++probe) {
      const int32_t key = V::least(keys);  // of a leaf: each lane has seen one
      keys = V::choose(V::equal(keys, V::fill(key)), keys, V::fill(kFar));
      d2 = V::min(d2, leaf(leaves.index[first + (key & kPlace)], z));
    }
    const int32_t nearer = reach_of<V>(least_of<V>(d2, kFar, two), tree.slack);
    reach[row] = nearer < reach[row] ? nearer : reach[row];
    const auto limit = V::fill(reach[row]);
    int64_t kept = first;
    for (int64_t i = first; i < end; i += kLeaf)
      kept += V::compress(leaves.index + kept, V::load_any(leaves.index + i), V::at_most(V::load_any(leaves.bound + i), limit));
    return kept;
  }

  int32_t search(int64_t row, const int32_t* list, int64_t count, int32_t* slots) {
    Ints z[kPairs];
    token(row, z);
    auto nearest = V::fill(kFar);
    for (int64_t i = 0; i < count; ++i) {
      const auto d2 = leaf(list[i], z);
      V::store(distances + i * kLeaf, d2);
      nearest = V::min(nearest, d2);
    }
    const auto limit = V::fill(reach_of<V>(least_of<V>(nearest, kFar, two), tree.slack));
    for (int64_t i = count; i % 4; ++i) V::store(distances + i * kLeaf, V::fill(kFar));
    int64_t found = 0;
    for (int64_t i = 0; i < count; i += 4) {
      const int32_t* d2 = distances + i * kLeaf;
      uint64_t mask = 0;
      for (int j = 0; j < 4; ++j) mask |= static_cast<uint64_t>(V::bits(V::at_most(V::load(d2 + j * kLeaf), limit))) << 16 * j;
      for (; mask; mask &= mask - 1) {
        if (found == kTreeCandidates) return -1;
        const int bit = __builtin_ctzll(mask);
        slots[found++] = list[i + bit / kLeaf] * kLeaf + bit % kLeaf;
      }
    }
    return static_cast<int32_t>(found);
  }

  void run(int64_t rows, const bool* inside, int32_t* slots, int32_t* found) {
    int64_t near_supers[kTreeBatch], count[kTreeBatch];
    for (int64_t row = 0; row < rows; ++row) first_reach(row);
    for (int64_t row = 0; row < rows; ++row) near_supers[row] = inside[row] && reach[row] != kFar ? list_supers(row) : 0;
    start[0] = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t end = near_supers[row] ? list_leaves(row, start[row], near_supers[row]) : -1;
      count[row] = end < 0 ? -1 : end - start[row];
      start[row + 1] = end < 0 ? start[row] : end + kLeaf;
    }
    for (int64_t row = 0; row < rows; ++row)
      if (count[row] > kShort) count[row] = shorten(row, start[row], start[row] + count[row]) - start[row];
    for (int64_t row = 0; row < rows; ++row)
      found[row] = count[row] < 0 ? -1 : search(row, leaves.index + start[row], count[row], slots + row * kTreeCandidates);
  }
};

template <class V, int kPairs>
void grid_search(const GridTree& tree, int dim, const float* z, int64_t rows, bool two, int32_t* scratch, int32_t* slots,
                 int32_t* found) {
  const int64_t blocks = (tree.supers + kLeaf - 1) / kLeaf;
  int32_t* index = scratch + (kTreeBatch * blocks + 1) * kLeaf;
  int32_t* bound = index + kTreeLeaves + 2 * kLeaf;
  GridSearch<V, kPairs> search{tree, two, blocks, scratch, {index, bound}, bound + kTreeLeaves + 2 * kLeaf, {}, {}, {}};
  bool inside[kTreeBatch];
  for (int64_t row = 0; row < rows; ++row) inside[row] = to_grid<V, kPairs>(tree, z + row * dim, dim, search.words[row]);
  search.run(rows, inside, slots, found);
}

template <class V>
void grid_candidates(const GridTree& tree, int dim, const float* z, int64_t rows, bool two, int32_t* scratch, int32_t* slots,
                     int32_t* found) {
  switch ((dim + 1) / 2) {
#define TMM_GRID(pairs) case pairs: return grid_search<V, pairs>(tree, dim, z, rows, two, scratch, slots, found);
    TMM_GRID(1) TMM_GRID(2) TMM_GRID(3) TMM_GRID(4) TMM_GRID(5) TMM_GRID(6)
#undef TMM_GRID
  }
}

}  // namespace
}  // namespace tmm
