// Searching the box tree: tokens in batches on the grid where the instruction set has one, else, and where the grid cannot tell,
// one by one in float32; what either leaves is scored in double precision, so both give the same answer.
#include <memory>

#include "search.h"

namespace tmm {
namespace {

// One thread's search of blocks of rows in the box tree.
class TreeSearch {
 public:
  TreeSearch(const Query& query, const Summary& known, const Tree& tree)
      : query_(query), known_(known), tree_(tree), isa_(*query.isa), two_(query.margin) {
    const int64_t supers = (tree.view.supers + kLeaf - 1) / kLeaf * kLeaf;
    bounds_.reset(2 * (supers + kLeaf) + (tree.view.supers + 1) * kLeaf + kCapacity + kLeaf);
    slots_.reset(kCapacity + kLeaf);
    if (tree.grid.unit > 0) grid_scratch_.reset(grid_scratch(tree.view.supers));
  }

  Stats run(int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += kTreeBatch) {
      const int64_t rows = std::min<int64_t>(kTreeBatch, last - row);
      int32_t found[kTreeBatch], slots[kTreeBatch * kTreeCandidates];
      std::fill_n(found, rows, -1);
      if (tree_.grid.unit > 0)
        isa_.tree->grid_candidates(tree_.grid, tree_.view.dim, query_.z.f32(row), rows, two_, grid_scratch_.get(), slots, found);
      for (int64_t r = 0; r < rows; ++r) {
        if (found[r] > 0) {
          choose(row + r, slots + r * kTreeCandidates, found[r]);
        } else {
          search_row(row + r);
        }
      }
    }
    Stats stats = stats_;
    stats_ = {};
    stats.rows = last - first;
    return stats;
  }

 private:
  void choose(int64_t row, const int32_t* slots, int64_t count) {
    if (count == 1 && !query_.distance && !two_) {
      query_.ids[row] = tree_.index[slots[0]];
      return;
    }
    Leader leader(query_, row);
    for (int64_t i = 0; i < count; ++i) leader.score(tree_.index[slots[i]], tree_.index[slots[i]] + 1);
    // The reach was that of two slots. Where both may hold one value (a repetition, or the last code, which fills the last
    // slots), it says nothing of the runner-up.
    two_ && leader.repeated() ? search_in_full(query_, known_.only, row, &stats_) : leader.store(&stats_);
  }

  void search_row(int64_t row) {
    const int64_t found = isa_.tree->candidates(tree_.view, query_.z.f32(row), two_, bounds_.get(), slots_.get(), kCapacity);
    if (found <= 0 || found > kCapacity) {
      search_in_full(query_, known_.only, row, &stats_);
    } else {
      choose(row, slots_.get(), found);
    }
  }

  const Query& query_;
  const Summary& known_;
  const Tree& tree_;
  const Isa& isa_;
  const bool two_;  // the runner-up is wanted too
  Buffer<float> bounds_;
  Buffer<int32_t> slots_, grid_scratch_;
  Stats stats_;
};

}  // namespace

Stats search_tree(const Query& query, const Summary& known, const Tree& tree) {
  return over_blocks(
      query, std::min<int64_t>(256, (query.n + query.threads - 1) / query.threads),
      [&] { return std::make_unique<TreeSearch>(query, known, tree); },
      [](TreeSearch& search, int64_t first, int64_t last) { return search.run(first, last); });
}

}  // namespace tmm
