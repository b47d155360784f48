// The box tree on AVX-512 with VNNI, in 16-bit fixed point: 32 differences an instruction, and their squares summed by another.
//
// z and the codes are rounded to the grid q(v) = round((v - origin) * unit), the same for both. Boxes hold the smallest and the
// largest q of their codes, so the integer distance to a box is at most that to any code in it: no rounding is left between
// boxes and codes. A coordinate of q is off by at most 0.51, hence a distance on the grid is off by at most e = 1.02 sqrt(dim).
// If any code has the squared grid distance m, the nearest code c is truly no farther than that one:
//
//   |q(z) - q(c)| <= unit |z - c| + e <= sqrt(m) + 2 e =: sqrt(reach),
//
// so the codes within `reach` of the final m are all that can win; they are scored in double precision elsewhere. Sums saturate
// at the largest int32, which only makes a box or a code look nearer; a reach that large is refused.
#include "isa.h"

#if defined(__AVX512F__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

#include <immintrin.h>

namespace tmm {
namespace {

constexpr int32_t kFar = 0x7fffffff;
constexpr int64_t kShort = 24;  // leaves worth a look at the nearest few of them first

inline __attribute__((always_inline)) void add_squares(__m512i& sum, __m512i gap) {
  asm("vpdpwssds %1, %1, %0" : "+v"(sum) : "v"(gap));  // inline: gcc 12 copies the accumulator around the intrinsic
}

// Squared distances to 16 boxes.
template <int kPairs>
inline __attribute__((always_inline)) __m512i box_bound(const int32_t* bounds, const __m512i* z) {
  __m512i sum = _mm512_setzero_si512();
  for (int p = 0; p < kPairs; ++p) {
    const __m512i below = _mm512_subs_epu16(_mm512_load_si512(bounds + p * kLeaf), z[p]);
    const __m512i above = _mm512_subs_epu16(z[p], _mm512_load_si512(bounds + (kPairs + p) * kLeaf));
    add_squares(sum, _mm512_or_si512(below, above));  // one of the two is zero
  }
  return sum;
}

template <int kPairs>
inline __attribute__((always_inline)) __m512i leaf_distances(const int32_t* codes, const __m512i* z) {
  __m512i sum = _mm512_setzero_si512();
  for (int p = 0; p < kPairs; ++p) add_squares(sum, _mm512_sub_epi16(z[p], _mm512_load_si512(codes + p * kLeaf)));
  return sum;
}

inline int lowest_lane(__m512i v) {
  const __m512i least = _mm512_set1_epi32(_mm512_reduce_min_epi32(v));
  return __builtin_ctz(_mm512_cmpeq_epi32_mask(v, least));
}

// Writes base + lane for the lanes of `mask`, and up to 16 values past them.
inline int64_t append(int32_t* list, int64_t count, __m512i base, __mmask16 mask) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  _mm512_storeu_si512(list + count, _mm512_maskz_compress_epi32(mask, _mm512_add_epi32(base, lanes)));
  return count + __builtin_popcount(mask);
}

inline int32_t reach_of(int32_t m, float slack) {
  const float exact = _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(static_cast<float>(m))));
  const float root = exact * (1.0f + 0x1p-20f) + slack;
  const float reach = root * root * (1.0f + 0x1p-20f) + 1.0f;
  return reach < kFarthestReach ? static_cast<int32_t>(reach) : kFar;
}

template <int kPairs>
inline void broadcast(const int32_t* words, __m512i* z) {
  for (int p = 0; p < kPairs; ++p) z[p] = _mm512_set1_epi32(words[p]);
}

// Token to grid; false: not inside it.
template <int kPairs>
bool to_grid(const GridTree& tree, const float* point, int dim, int32_t* words) {
  const __mmask16 mask = static_cast<__mmask16>((1u << dim) - 1);
  const __m512 gap = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, point), _mm512_loadu_ps(tree.origin));
  const __m512 value = _mm512_mul_ps(gap, _mm512_set1_ps(tree.unit));
  const __mmask16 inside = _mm512_mask_cmp_ps_mask(mask, _mm512_abs_ps(value), _mm512_set1_ps(kGridReach), _CMP_LE_OQ);
  const __m512i q = _mm512_maskz_add_epi32(mask, _mm512_cvtps_epi32(value), _mm512_set1_epi32(kGridCentre));
  alignas(64) int32_t packed[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(packed), _mm512_cvtepi32_epi16(q));
  for (int p = 0; p < kPairs; ++p) words[p] = packed[p];
  return inside == mask;
}

// A list of leaves in reach and the integer distances to their boxes; room for a vector past the end.
struct Leaves {
  int32_t* index;
  int32_t* bound;
};

// Every stage runs over all tokens before the next, so that the long chains inside a stage overlap between tokens.
template <int kPairs>
struct GridSearch {
  static constexpr int64_t kBox = 2 * kPairs * kLeaf, kCodes = kPairs * kLeaf;
  const GridTree& tree;
  int64_t blocks;
  int32_t* bounds;     // [kTreeBatch][blocks * kLeaf] distances to super boxes, then the list of those in reach
  Leaves leaves;       // of all tokens, one after the other
  int32_t* distances;  // [kTreeLeaves + 2 * kLeaf][kLeaf]
  int32_t words[kTreeBatch][kPairs];
  int32_t reach[kTreeBatch];
  int64_t start[kTreeBatch + 1];

  __m512i leaf(int64_t index, const __m512i* z) const { return leaf_distances<kPairs>(tree.leaf_codes + index * kCodes, z); }

  // The distance to the best code of the two nearest leaves of the nearest super box.
  void first_reach(int64_t row) {
    __m512i z[kPairs];
    broadcast<kPairs>(words[row], z);
    int32_t* out = bounds + row * blocks * kLeaf;
    __m512i nearest = _mm512_set1_epi32(kFar), where = _mm512_setzero_si512();
    for (int64_t b = 0; b < blocks; ++b) {
      const __m512i bound = box_bound<kPairs>(tree.super_bounds + b * kBox, z);
      _mm512_store_si512(out + b * kLeaf, bound);
      const __mmask16 less = _mm512_cmplt_epi32_mask(bound, nearest);
      nearest = _mm512_mask_mov_epi32(nearest, less, bound);
      where = _mm512_mask_mov_epi32(where, less, _mm512_set1_epi32(static_cast<int>(b)));
    }
    alignas(64) int32_t position[kLeaf];
    _mm512_store_si512(position, where);
    const int lane = lowest_lane(nearest);
    int64_t home = int64_t{position[lane]} * kLeaf + lane;
    home = home < tree.supers ? home : tree.supers - 1;
    const __m512i near = box_bound<kPairs>(tree.leaf_bounds + home * kBox, z);
    const int first = lowest_lane(near);
    const int second = lowest_lane(_mm512_mask_mov_epi32(near, static_cast<__mmask16>(1u << first), _mm512_set1_epi32(kFar)));
    const __m512i d2 = _mm512_min_epi32(leaf(home * kLeaf + first, z), leaf(home * kLeaf + second, z));
    reach[row] = reach_of(_mm512_reduce_min_epi32(d2), tree.slack);
  }

  // Replaces the distances to the super boxes by the list of those in reach; returns how many.
  int64_t list_supers(int64_t row) {
    const __m512i limit = _mm512_set1_epi32(reach[row]);
    int32_t* list = bounds + row * blocks * kLeaf;
    int64_t count = 0;
    for (int64_t b = 0; b < blocks; ++b)  // a vector is read before its place is written
      count = append(list, count, _mm512_set1_epi32(static_cast<int>(b * kLeaf)),
                     _mm512_cmple_epi32_mask(_mm512_load_si512(list + b * kLeaf), limit));
    return count;
  }

  // Appends the leaves in reach at `first`; returns the end, or -1: too many.
  int64_t list_leaves(int64_t row, int64_t first, int64_t near_supers) {
    __m512i z[kPairs];
    broadcast<kPairs>(words[row], z);
    const __m512i limit = _mm512_set1_epi32(reach[row]);
    const int32_t* supers = bounds + row * blocks * kLeaf;
    int64_t end = first;
    for (int64_t i = 0; i < near_supers; ++i) {
      const int64_t box = supers[i];
      const __m512i near = box_bound<kPairs>(tree.leaf_bounds + box * kBox, z);
      const __mmask16 mask = _mm512_cmple_epi32_mask(near, limit);
      _mm512_storeu_si512(leaves.bound + end, _mm512_maskz_compress_epi32(mask, near));
      end = append(leaves.index, end, _mm512_set1_epi32(static_cast<int>(box * kLeaf)), mask);
      if (end > kTreeLeaves) return -1;
    }
    return end;
  }

  // Looks into the kProbes leaves with the nearest boxes, then drops the leaves that are out of reach now; returns the new end.
  int64_t shorten(int64_t row, int64_t first, int64_t end) {
    constexpr int kProbes = 4;
    constexpr int32_t kPlace = 1023;  // a bound's low bits make room for its place in the list: good enough to choose by
    __m512i z[kPairs];
    broadcast<kPairs>(words[row], z);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i keys = _mm512_set1_epi32(kFar), d2 = keys;
    for (int64_t i = first; i < end; i += kLeaf) {
      const __m512i place = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(i - first)), lanes);
      const __mmask16 valid = _mm512_cmplt_epi32_mask(place, _mm512_set1_epi32(static_cast<int>(end - first)));
      const __m512i bound = _mm512_loadu_si512(leaves.bound + i);
      keys = _mm512_mask_min_epi32(keys, valid, keys, _mm512_ternarylogic_epi32(_mm512_set1_epi32(kPlace), bound, place, 0xac));
    }
    for (int probe = 0; probe < kProbes; ++probe) {
      const int32_t key = _mm512_reduce_min_epi32(keys);
      if (key == kFar) break;
      keys = _mm512_mask_mov_epi32(keys, _mm512_cmpeq_epi32_mask(keys, _mm512_set1_epi32(key)), _mm512_set1_epi32(kFar));
      d2 = _mm512_min_epi32(d2, leaf(leaves.index[first + (key & kPlace)], z));
    }
    const int32_t nearer = reach_of(_mm512_reduce_min_epi32(d2), tree.slack);
    reach[row] = nearer < reach[row] ? nearer : reach[row];
    const __m512i limit = _mm512_set1_epi32(reach[row]);
    int64_t kept = first;
    for (int64_t i = first; i < end; i += kLeaf) {
      const __mmask16 valid = end - i >= kLeaf ? 0xffff : static_cast<__mmask16>((1u << (end - i)) - 1);
      const __mmask16 near = _mm512_mask_cmple_epi32_mask(valid, _mm512_loadu_si512(leaves.bound + i), limit);
      const __m512i index = _mm512_loadu_si512(leaves.index + i);
      const int more = __builtin_popcount(near);
      _mm512_mask_storeu_epi32(leaves.index + kept, static_cast<__mmask16>((1u << more) - 1),  // the next list starts at `end`
                               _mm512_maskz_compress_epi32(near, index));
      kept += more;
    }
    return kept;
  }

  int32_t search(int64_t row, const int32_t* list, int64_t count, int32_t* slots) {
    __m512i z[kPairs];
    broadcast<kPairs>(words[row], z);
    __m512i nearest = _mm512_set1_epi32(kFar);
    for (int64_t i = 0; i < count; ++i) {
      const __m512i d2 = leaf(list[i], z);
      _mm512_store_si512(distances + i * kLeaf, d2);
      nearest = _mm512_min_epi32(nearest, d2);
    }
    const __m512i limit = _mm512_set1_epi32(reach_of(_mm512_reduce_min_epi32(nearest), tree.slack));
    for (int64_t i = count; i % 4; ++i) _mm512_store_si512(distances + i * kLeaf, _mm512_set1_epi32(kFar));
    int64_t found = 0;
    for (int64_t i = 0; i < count; i += 4) {
      const int32_t* d2 = distances + i * kLeaf;
      uint64_t mask = 0;
      for (int j = 0; j < 4; ++j)
        mask |= static_cast<uint64_t>(_mm512_cmple_epi32_mask(_mm512_load_si512(d2 + j * kLeaf), limit)) << 16 * j;
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
      start[row + 1] = end < 0 ? start[row] : end;
    }
    for (int64_t row = 0; row < rows; ++row)
      if (count[row] > kShort) count[row] = shorten(row, start[row], start[row] + count[row]) - start[row];
    for (int64_t row = 0; row < rows; ++row)
      found[row] = count[row] < 0 ? -1 : search(row, leaves.index + start[row], count[row], slots + row * kTreeCandidates);
  }
};

template <int kPairs>
void grid_search(const GridTree& tree, int dim, const float* z, int64_t rows, int32_t* scratch, int32_t* slots, int32_t* found) {
  const int64_t blocks = (tree.supers + kLeaf - 1) / kLeaf;
  int32_t* index = scratch + (kTreeBatch * blocks + 1) * kLeaf;
  int32_t* bound = index + kTreeLeaves + 2 * kLeaf;
  GridSearch<kPairs> search{tree, blocks, scratch, {index, bound}, bound + kTreeLeaves + 2 * kLeaf, {}, {}, {}};
  bool inside[kTreeBatch];
  for (int64_t row = 0; row < rows; ++row) inside[row] = to_grid<kPairs>(tree, z + row * dim, dim, search.words[row]);
  search.run(rows, inside, slots, found);
}

}  // namespace

void grid_candidates_avx512(const GridTree& tree, int dim, const float* z, int64_t rows, int32_t* scratch, int32_t* slots,
                            int32_t* found) {
  switch ((dim + 1) / 2) {
#define TMM_GRID(pairs) case pairs: return grid_search<pairs>(tree, dim, z, rows, scratch, slots, found);
    TMM_GRID(1) TMM_GRID(2) TMM_GRID(3) TMM_GRID(4) TMM_GRID(5) TMM_GRID(6)
#undef TMM_GRID
  }
}

}  // namespace tmm

#endif
