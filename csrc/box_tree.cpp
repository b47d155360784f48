// Building the box tree: median splits on the widest dimension until a leaf holds at most kLeaf codes. Consecutive leaves are
// neighbours in space, so kLeaf of them make a super box.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "codebook.h"

namespace tmm {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kFineLeaf = 128;  // grid steps across most leaves, at least: then few codes are within the grid's error

// One code during the build: its values travel with it, so that every pass over a range is sequential.
template <int kWidth>
struct Item {
  float value[kWidth];
  int32_t code;
};

template <int kWidth>
struct Builder {
  std::vector<Item<kWidth>>& items;
  int dim;

  int widest(int64_t first, int64_t last) const {
    float low[kMaxTreeDim], high[kMaxTreeDim];
    for (int j = 0; j < dim; ++j) low[j] = kInfinity, high[j] = -kInfinity;
    for (int64_t i = first; i < last; ++i)
      for (int j = 0; j < dim; ++j) {
        low[j] = std::min(low[j], items[i].value[j]);
        high[j] = std::max(high[j], items[i].value[j]);
      }
    int best = 0;
    for (int j = 1; j < dim; ++j)
      if (high[j] - low[j] > high[best] - low[best]) best = j;
    return best;
  }

  // Leaves are full except the last one of all: the split falls on a multiple of kLeaf, or of a super box where it can.
  void split(int64_t first, int64_t last) {
    const int64_t count = last - first;
    if (count <= kLeaf) return;
    const int64_t unit = count > kLeaf * kLeaf ? kLeaf * kLeaf : kLeaf;
    const int64_t middle = first + std::max<int64_t>(unit, count / 2 / unit * unit);
    const int axis = widest(first, last);
    const auto before = [axis](const Item<kWidth>& a, const Item<kWidth>& b) {
      return a.value[axis] < b.value[axis] || (a.value[axis] == b.value[axis] && a.code < b.code);
    };
    std::nth_element(items.begin() + first, items.begin() + middle, items.begin() + last, before);
    split(first, middle);
    split(middle, last);
  }
};

void clear_bounds(float* bounds, int dim) {
  std::fill(bounds, bounds + dim * kLeaf, kInfinity);
  std::fill(bounds + dim * kLeaf, bounds + 2 * dim * kLeaf, -kInfinity);
}

// Rounds a code to the grid; false: not inside it.
bool to_grid(const GridTree& grid, const float* value, int dim, int32_t* q) {
  for (int j = 0; j < dim; ++j) {
    const float scaled = (value[j] - grid.origin[j]) * grid.unit;
    if (!(std::fabs(scaled) <= grid.reach)) return false;
    q[j] = static_cast<int32_t>(scaled + (static_cast<float>(grid.centre) + 0.5f));  // to nearest, within 2^-9; much faster than a library call here
  }
  return true;
}

// Origin in the middle of the codes, which take up half of the grid.
template <int kWidth>
void place_grid(const std::vector<Item<kWidth>>& items, int dim, GridTree* grid) {
  float extent = 0;
  for (int j = 0; j < dim; ++j) {
    float low = kInfinity, high = -kInfinity;
    for (const Item<kWidth>& item : items) {
      low = std::min(low, item.value[j]);
      high = std::max(high, item.value[j]);
    }
    const float half = 0.5f * high - 0.5f * low;
    grid->origin[j] = low + half;
    extent = std::max(extent, half);
  }
  grid->centre = kGridWidth[(dim + 1) / 2] / 2;
  grid->reach = static_cast<float>(grid->centre - 2);
  const float unit = (0.5f * grid->reach - 1.0f) / extent;
  grid->unit = unit < 1e30f && unit > 1e-30f ? unit : 0.0f;
  grid->slack = 2.04f * std::sqrt(static_cast<float>(dim)) * 1.0001f;
}

// The smallest and the largest coordinates of a leaf or a super box.
struct GridBox {
  int32_t low[kMaxTreeDim], high[kMaxTreeDim];

  void clear() {
    std::fill_n(low, kMaxTreeDim, 0x7fff);
    std::fill_n(high, kMaxTreeDim, 0);
  }
  void widen(const int32_t* from, const int32_t* to) {
    for (int j = 0; j < kMaxTreeDim; ++j) {
      low[j] = std::min(low[j], from[j]);
      high[j] = std::max(high[j], to[j]);
    }
  }
  double squared_diagonal() const {
    double sum = 0;
    for (int j = 0; j < kMaxTreeDim; ++j) sum += static_cast<double>(high[j] - low[j]) * (high[j] - low[j]);
    return sum;
  }
  void store(int32_t* bounds, int pairs, int64_t lane) const {
    for (int p = 0; p < pairs; ++p) {
      bounds[p * kLeaf + lane] = low[2 * p] | low[2 * p + 1] << 16;
      bounds[(pairs + p) * kLeaf + lane] = high[2 * p] | high[2 * p + 1] << 16;
    }
  }
};

// The tree over the items in their order, on the grid. Slots past the end repeat the last code.
template <int kWidth>
void build_grid(const std::vector<Item<kWidth>>& items, int dim, Tree* tree) {
  GridTree& grid = tree->grid;
  place_grid(items, dim, &grid);
  if (grid.unit == 0) return;
  const int pairs = (dim + 1) / 2;
  const int64_t count = static_cast<int64_t>(items.size()), supers = tree->view.supers;
  const int64_t blocks = (supers + kLeaf - 1) / kLeaf, box = 2 * pairs * kLeaf, slots = supers * kLeaf * kLeaf;
  tree->grid_super_bounds.reset(blocks * box);
  tree->grid_leaf_bounds.reset(supers * box);
  tree->grid_leaf_codes.reset(supers * kLeaf * pairs * kLeaf);
  int64_t coarse = 0;
  GridBox leaf_box, super_box;
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t leaf = slot / kLeaf, super = leaf / kLeaf;
    int32_t q[kMaxTreeDim];
    std::fill_n(q, kMaxTreeDim, grid.centre);  // also past the last dimension, as of tokens
    if (!to_grid(grid, items[std::min(slot, count - 1)].value, dim, q)) {
      grid.unit = 0;
      return;
    }
    for (int p = 0; p < pairs; ++p) tree->grid_leaf_codes[(leaf * pairs + p) * kLeaf + slot % kLeaf] = q[2 * p] | q[2 * p + 1] << 16;
    if (slot % kLeaf == 0) leaf_box.clear();
    leaf_box.widen(q, q);
    if (slot % kLeaf != kLeaf - 1) continue;
    if (leaf_box.squared_diagonal() < kFineLeaf * kFineLeaf) ++coarse;
    leaf_box.store(&tree->grid_leaf_bounds[super * box], pairs, leaf % kLeaf);
    if (leaf % kLeaf == 0) super_box.clear();
    super_box.widen(leaf_box.low, leaf_box.high);
    if (leaf % kLeaf == kLeaf - 1) super_box.store(&tree->grid_super_bounds[super / kLeaf * box], pairs, super % kLeaf);
  }
  for (int64_t b = supers; b < blocks * kLeaf; ++b)
    for (int p = 0; p < 2 * pairs; ++p) {  // the whole grid but for the first dimension
      const int32_t outside = kGridWidth[pairs] + kNoBox, whole = p < pairs ? 0 : -1;
      tree->grid_super_bounds[b / kLeaf * box + p * kLeaf + b % kLeaf] =
          p % pairs ? whole : static_cast<int32_t>((static_cast<uint32_t>(whole) & 0xffff0000u) | static_cast<uint32_t>(outside));
    }
  if (2 * coarse > supers * kLeaf) grid.unit = 0;
  grid.supers = supers;
  grid.super_bounds = tree->grid_super_bounds.get();
  grid.leaf_bounds = tree->grid_leaf_bounds.get();
  grid.leaf_codes = tree->grid_leaf_codes.get();
}

template <int kWidth>
void build(const Codebook& codebook, const Summary& known, const Rows& codes, Tree* tree) {
  const int dim = static_cast<int>(codebook.d);
  std::vector<Item<kWidth>> items;
  items.reserve(known.usable);
  for (int64_t i = 0; i < codebook.k; ++i) {
    if (known.bias[i] == -kInfinity) continue;
    Item<kWidth> item{};
    for (int j = 0; j < dim; ++j) item.value[j] = codes.f32(i)[j];
    item.code = static_cast<int32_t>(i);
    items.push_back(item);
  }
  const int64_t count = static_cast<int64_t>(items.size());
  Builder<kWidth>{items, dim}.split(0, count);

  const int64_t leaves = (count + kLeaf - 1) / kLeaf, supers = (leaves + kLeaf - 1) / kLeaf;
  const int64_t blocks = (supers + kLeaf - 1) / kLeaf, box = 2 * dim * kLeaf;
  tree->super_bounds.reset(blocks * box);
  tree->leaf_bounds.reset(supers * box);
  tree->leaf_codes.reset(supers * kLeaf * dim * kLeaf);
  tree->index.reset(supers * kLeaf * kLeaf);
  for (int64_t b = 0; b < blocks; ++b) clear_bounds(&tree->super_bounds[b * box], dim);
  for (int64_t s = 0; s < supers; ++s) clear_bounds(&tree->leaf_bounds[s * box], dim);
  std::fill(tree->leaf_codes.get(), tree->leaf_codes.get() + supers * kLeaf * dim * kLeaf, kInfinity);
  std::fill(tree->index.get(), tree->index.get() + supers * kLeaf * kLeaf, items.back().code);
  for (int64_t slot = 0; slot < count; ++slot) {
    const int64_t leaf = slot / kLeaf, super = leaf / kLeaf;
    tree->index[slot] = items[slot].code;
    for (int j = 0; j < dim; ++j) {
      const float value = items[slot].value[j];
      tree->leaf_codes[(leaf * dim + j) * kLeaf + slot % kLeaf] = value;
      for (float* bounds : {&tree->leaf_bounds[super * box + leaf % kLeaf], &tree->super_bounds[super / kLeaf * box + super % kLeaf]}) {
        float& low = bounds[j * kLeaf];
        float& high = bounds[(dim + j) * kLeaf];
        low = std::min(low, value);
        high = std::max(high, value);
      }
    }
  }
  // A float32 sum of dim squared differences errs by at most (dim + 2) units of 2^-24, relative.
  tree->view = {dim, supers, tree->super_bounds.get(), tree->leaf_bounds.get(), tree->leaf_codes.get(),
                1.0f + static_cast<float>(dim + 4) * 0x1p-22f};
  if (codebook.isa->tree->grid_candidates) build_grid(items, dim, tree);
}

}  // namespace

void build_tree(const Codebook& codebook, const Summary& known, const Rows& codes, Tree* tree) {
  codebook.d <= 8 ? build<8>(codebook, known, codes, tree) : build<kMaxTreeDim>(codebook, known, codes, tree);
}

}  // namespace tmm
