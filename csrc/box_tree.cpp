// Building the box tree: median splits on the widest dimension until a leaf holds at most kLeaf codes. Consecutive leaves are
// neighbours in space, so kLeaf of them make a super box.
#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "codebook.h"

namespace tmm {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One code during the build: its values travel with it, so that every pass over a range is sequential.
struct Item {
  float value[kMaxTreeDim];
  int32_t code;
};

struct Builder {
  std::vector<Item>& items;
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
    std::nth_element(items.begin() + first, items.begin() + middle, items.begin() + last, [axis](const Item& a, const Item& b) {
      return a.value[axis] < b.value[axis] || (a.value[axis] == b.value[axis] && a.code < b.code);
    });
    split(first, middle);
    split(middle, last);
  }
};

void clear_bounds(float* bounds, int dim) {
  std::fill(bounds, bounds + dim * kLeaf, kInfinity);
  std::fill(bounds + dim * kLeaf, bounds + 2 * dim * kLeaf, -kInfinity);
}

}  // namespace

void build_tree(const Codebook& codebook, const Rows& codes, Tree* tree) {
  const int dim = static_cast<int>(codebook.d);
  std::vector<Item> items;
  items.reserve(codebook.usable);
  for (int64_t i = 0; i < codebook.k; ++i) {
    if (codebook.bias[i] == -kInfinity) continue;
    Item item{};
    for (int j = 0; j < dim; ++j) item.value[j] = codes.f32(i)[j];
    item.code = static_cast<int32_t>(i);
    items.push_back(item);
  }
  const int64_t count = static_cast<int64_t>(items.size());
  Builder{items, dim}.split(0, count);

  const int64_t leaves = (count + kLeaf - 1) / kLeaf, supers = (leaves + kLeaf - 1) / kLeaf;
  const int64_t blocks = (supers + kLeaf - 1) / kLeaf, box = 2 * dim * kLeaf;
  tree->super_bounds.reset(blocks * box);
  tree->leaf_bounds.reset(supers * box);
  tree->leaf_codes.reset(supers * kLeaf * dim * kLeaf);
  tree->index.reset(supers * kLeaf * kLeaf);
  for (int64_t b = 0; b < blocks; ++b) clear_bounds(&tree->super_bounds[b * box], dim);
  for (int64_t s = 0; s < supers; ++s) clear_bounds(&tree->leaf_bounds[s * box], dim);
  std::fill(tree->leaf_codes.get(), tree->leaf_codes.get() + supers * kLeaf * dim * kLeaf, kInfinity);
  std::fill(tree->index.get(), tree->index.get() + supers * kLeaf * kLeaf, -1);
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
}

}  // namespace tmm
